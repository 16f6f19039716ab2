"""The files of one run below any fsspec address: whole or absent, never half. Knows nothing of runs."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from esper.leyline.errors import NotFoundError, StorageError


class Folder:
    """A folder at an fsspec address (`~/x`, `file://`, `s3://`, `memory://`).

    A local write goes to a temporary file, is fsynced and renamed; an object store replaces an object whole by itself.

    Raises:
        StorageError: if the address cannot be opened, and from each method if it cannot be read or written.
    """

    def __init__(self, address: str, options: Mapping[str, Any] | None = None) -> None:
        self.address = address
        try:
            self._fs, self._root = fsspec.core.url_to_fs(os.path.expanduser(address), **dict(options or {}))  # noqa: PTH111 - an address, not a path
        except (ValueError, ImportError, OSError) as error:
            raise StorageError(f"cannot open {address}: {error}", field="storage") from error
        self.is_local = "file" in _protocols(self._fs.protocol)

    @property
    def local(self) -> Path | None:
        """The folder on this machine; None at another address."""
        return Path(self._root) if self.is_local else None

    def path(self, name: str) -> str:
        """The name's full path within its file system."""
        return f"{self._root.rstrip('/')}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole."""
        try:
            if self.is_local:
                _write_local(Path(self.path(name)), data)
            else:
                self._fs.pipe_file(self.path(name), data)
        except OSError as error:
            raise StorageError(f"cannot write {self.address}/{name}: {error}", field="storage") from error

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises `NotFoundError` if there is none."""
        try:
            return self._fs.cat_file(self.path(name))
        except FileNotFoundError as error:
            raise NotFoundError(f"no {name} in {self.address}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.address}/{name}: {error}", field="storage") from error

    def append(self, name: str, data: bytes) -> None:
        """Appends to a local file and fsyncs it; object stores cannot append.

        Raises:
            StorageError: on an object store, or if the file cannot be written.
        """
        if not self.is_local:
            raise StorageError(f"{self.address} cannot append", field="storage")
        target = Path(self.path(name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.address}/{name}: {error}", field="storage") from error

    def names(self, below: str) -> list[str]:
        """Returns the names directly below a sub-folder, sorted; none if it does not exist."""
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self.path(below), detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.address}/{below}: {error}", field="storage") from error
        return sorted(name for entry in entries if (name := entry.rstrip("/").rsplit("/", 1)[-1]))

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all it holds; nothing happens if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self.path(name), recursive=True)


def _protocols(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
