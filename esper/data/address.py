"""Where data lie: a path as it was given, or below the data folder; local or at any fsspec address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from esper.leyline.errors import DataError
from esper.storage import driver_errors

FIELD = "data.path"


@dataclass(frozen=True)
class Place:
    """A file or folder that exists.

    Attributes:
        address: as people write it.
        options: of the storage driver.
    """

    address: str
    options: Mapping[str, Any]

    def open(self, name: str = "") -> IO[bytes]:
        """Opens the file itself, or `name` in the folder, for reading.

        Raises:
            DataError: if it cannot be opened.
        """
        address = _join(self.address, name)
        try:
            filesystem, path = fsspec.core.url_to_fs(address, **self.options)
            return cast("IO[bytes]", filesystem.open(path, "rb"))
        except driver_errors() as error:
            raise DataError(f"cannot read {address}: {_words(error)}", field=FIELD) from error


def find(
    path: str,
    *,
    needs: tuple[str, ...] = ("",),
    data_root: str | None,
    options: Mapping[str, Any] | None = None,
) -> Place:
    """Finds `path` as it is given, else below `data_root`.

    Args:
        path: file, folder or address.
        needs: files that must be in the folder; the default is the path itself.
        data_root: folder or address.
        options: of the storage driver; used for addresses with a scheme.

    Raises:
        DataError: naming every address that was tried, and why it will not do.
    """
    tried = []
    for address in _candidates(path, data_root):
        given = dict(options or {}) if "://" in address else {}
        reason = _missing(address, needs, given)
        if reason is None:
            return Place(address, given)
        tried.append(f"{address}: {reason}")
    raise DataError(
        f"no data; tried {'; '.join(tried)}",
        field=FIELD,
        remedy="give a path or address that exists"
        + ("" if data_root or "://" in path else ", or set ESPER_DATA to the folder that holds it"),
    )


def _candidates(path: str, data_root: str | None) -> list[str]:
    if "://" in path:
        return [path]
    given = str(Path(path).expanduser())
    if data_root is None or Path(given).is_absolute():
        return [given]
    root = data_root if "://" in data_root else str(Path(data_root).expanduser())
    return [given, _join(root, path)]


def _missing(address: str, needs: tuple[str, ...], options: Mapping[str, Any]) -> str | None:
    """Why there are no data at this address; None if there are."""
    try:
        filesystem, root = fsspec.core.url_to_fs(address, **options)
        missing = [name for name in needs if not _is_file(filesystem, _join(root, name))]
    except driver_errors() as error:
        return _words(error)
    if missing:
        return f"no {' and no '.join(missing)}" if any(missing) else "no such file"
    return None


def _is_file(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    try:
        return filesystem.info(path)["type"] == "file"  # `isfile` would take a refused connection for a missing file
    except FileNotFoundError:
        return False


def _join(address: str, name: str) -> str:
    return f"{address.rstrip('/')}/{name}" if name else address


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
