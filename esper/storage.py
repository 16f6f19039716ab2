"""Where everything that must last lies: one address, as fsspec and as deltalake want it, and files below it.

Responsible for the address (parsing it, the options of its driver) and for files that are whole or absent. Knows
nothing of tables, blobs and runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from esper.leyline import NotFoundError, StorageError, new_id

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

S3_OPTIONS = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region": "AWS_REGION",
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
    "ca_bundle": "AWS_CA_BUNDLE",
}
"""Keys of `storage_options` for S3, with the names of the AWS environment, from which comes what is absent.

`ca_bundle` is a PEM file with the authorities that may vouch for an `https` endpoint, where the system knows none.
"""


@dataclass(frozen=True)
class Storage:
    """One storage address.

    Attributes:
        uri: the resolved form: `file:///abs/dir` or `s3://bucket/prefix`, without a trailing slash.
        options: of the driver; keys are those of `S3_OPTIONS`. Not shown in the repr: they may hold secrets.
    """

    uri: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, address: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
        """Parses an address: a directory (`~` is expanded), `file://` or `s3://`.

        Raises:
            StorageError: if the scheme, the form or an option is not known; names the setting.
        """
        text = os.fspath(address)
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(Path(text).expanduser().resolve().as_uri(), _no_options(options))
        if scheme == "file":
            if not rest.startswith("/"):
                raise StorageError(f"{text} is no absolute path", field="storage", remedy="write file:///dir")
            return cls(text.rstrip("/"), _no_options(options))
        if scheme == "s3":
            if not urlsplit(text).netloc:
                raise StorageError(f"{text} names no bucket", field="storage", remedy="write s3://bucket/prefix")
            return cls(text.rstrip("/"), _s3_options(options))
        raise StorageError(f"unknown scheme in {text}", field="storage", remedy="a directory, file:// or s3://")

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that stand for the address in actor names."""
        return hashlib.sha256(self.uri.encode()).hexdigest()[:8]

    @property
    def is_local(self) -> bool:
        """Whether the address is a directory of this machine (or mounted on it)."""
        return self.uri.startswith("file://")

    @property
    def root(self) -> str:
        """The address as a path of `fs`."""
        return self.path()

    def path(self, *parts: str) -> str:
        """Joins parts below the root, as a path of `fs`."""
        base = self._directory if self.is_local else self.uri.removeprefix("s3://")
        return "/".join((base, *parts))

    def child(self, *parts: str) -> str:
        """Joins parts below the address, as an address for deltalake."""
        return self.path(*parts) if self.is_local else "/".join((self.uri, *parts))

    def below(self, *parts: str) -> Storage:
        """The address of a folder below this one, reached in the same way."""
        return Storage("/".join((self.uri, *parts)), self.options)

    @property
    def local(self) -> Path | None:
        """The directory on this machine; None at another address."""
        return Path(self._directory) if self.is_local else None

    @property
    def shown(self) -> str:
        """The address as people write it: a plain path, where it is a directory."""
        return self._directory if self.is_local else self.uri

    @property
    def _directory(self) -> str:
        from urllib.request import url2pathname

        return url2pathname(self.uri.removeprefix("file://")).rstrip("/")

    @property
    def _nearest(self) -> Path:
        """The directory, or what of its path exists already."""
        path = Path(self._directory)
        return next(place for place in (path, *path.parents) if place.exists())

    @cached_property
    def fs(self) -> AbstractFileSystem:
        """The fsspec filesystem."""
        import fsspec

        if self.is_local:
            return fsspec.filesystem("file")
        names = {"key": "key", "secret": "secret", "token": "token", "endpoint_url": "endpoint_url"}
        known = {names[key]: value for key, value in self.options.items() if key in names}
        client = {"region_name": self.options.get("region"), "verify": self._ca_bundle}
        # older S3 servers refuse the checksums that newer clients send unasked
        config = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": 5,
            "retries": {"max_attempts": 3},
        }
        return fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            config_kwargs=config,
            client_kwargs={k: v for k, v in client.items() if v},
            **known,
        )

    @property
    def delta_options(self) -> dict[str, str]:
        """The `storage_options` of deltalake."""
        if self.is_local:
            return {}
        options = {S3_OPTIONS[key]: value for key, value in self.options.items() if key != "ca_bundle"}
        # a commit is a PUT that fails if the version exists; this, and not a lock table, keeps a second writer out
        options["AWS_CONDITIONAL_PUT"] = "etag"
        endpoint = self.options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL", "")
        if endpoint.startswith("http://"):  # s3fs goes by the address alone, deltalake asks to be told
            options["AWS_ALLOW_HTTP"] = "true"
        if self._ca_bundle:
            # deltalake can be told in no other way, and this holds for the whole process
            os.environ.setdefault("SSL_CERT_FILE", self._ca_bundle)
        return options

    @property
    def _ca_bundle(self) -> str | None:
        return self.options.get("ca_bundle") or os.environ.get(S3_OPTIONS["ca_bundle"])

    @contextlib.contextmanager
    def named_errors(self, doing: str, name: str = "") -> Iterator[None]:
        """Turns the driver's errors into a `StorageError` that names the setting, the address and the remedy.

        `FileNotFoundError` passes: what is not there is for the caller to judge.

        Args:
            doing: a verb: what was tried.
            name: of the file below the address that it was tried with.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except self._errors as error:
            raise self.failure(doing, error, name) from error

    def failure(self, doing: str, error: Exception, name: str = "") -> StorageError:
        """The error that a person sees."""
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        remedy = "choose a directory you may write to: storage=DIR"
        if not self.is_local:
            remedy = "check bucket, storage_options.endpoint_url and credentials, or use a directory: storage=DIR"
        place = f"{self.uri}/{name}" if name else self.uri
        return StorageError(f"cannot {doing} {place}: {' '.join(said.split())}", field="storage", remedy=remedy)

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        if self.is_local:
            return (OSError,)
        from botocore.exceptions import BotoCoreError

        return (OSError, BotoCoreError)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file whole: no reader and no crash meets half of it; durable on return.

        Args:
            name: relative to the address, `/` between folders, which are made.
            data: the whole of it.

        Raises:
            StorageError: if it cannot be written.
        """
        try:
            with self.named_errors("write", name):
                if self.is_local:
                    _write_local(Path(self.path(name)), data)
                else:
                    self.fs.pipe_file(self.path(name), bytes(data))  # one PUT is atomic
        except FileNotFoundError as error:  # S3 says so of a bucket that does not exist
            raise self.failure("write", error, name) from error

    def append(self, name: str, data: bytes) -> None:
        """Appends to a file of a directory; durable on return. Where that fails, the file ends where it did, so that
        what comes next is not glued to a part of this.

        Raises:
            StorageError: if it cannot be written, and always on an object store: those cannot append.
        """
        if not self.is_local:
            raise StorageError(f"{self.uri} cannot append to {name}", field="storage")
        target = Path(self.path(name))
        with self.named_errors("write", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab", buffering=0) as file:
                before, rest = file.tell(), memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(before)
                    raise

    def read(self, name: str) -> bytes:
        """Returns a file's bytes.

        Raises:
            NotFoundError: if there is no such file.
            StorageError: if it cannot be read.
        """
        try:
            with self.named_errors("read", name):
                return cast("bytes", self.fs.cat_file(self.path(name)))
        except FileNotFoundError as error:
            raise NotFoundError(f"no {name} below {self.shown}") from error

    def names(self, below: str = "") -> list[str]:
        """Returns the names directly below a folder, sorted; none if it does not exist."""
        try:
            with self.named_errors("list", below):
                entries = self.fs.ls(self.path(below) if below else self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for entry in entries if (name := entry.rstrip("/").rsplit("/", 1)[-1]))

    def listing(self, below: str) -> list[tuple[str, int, float]]:
        """Returns the files directly below a folder, or the one file of that name; none if it does not exist.

        Returns:
            Of each its name without folders, its size in bytes and when it was written, in seconds since the epoch.
        """
        try:
            with self.named_errors("list", below):
                entries = self.fs.ls(self.path(below), detail=True)
        except FileNotFoundError:
            return []
        files = (entry for entry in entries if entry["type"] == "file")
        return sorted((entry["name"].rsplit("/", 1)[-1], entry["size"] or 0, _written_at(entry)) for entry in files)

    def move(self, name: str, to: str) -> None:
        """Gives a file another name; at no moment is it under neither.

        Raises:
            NotFoundError: if there is no such file.
            StorageError: if it cannot be moved.
        """
        try:
            with self.named_errors("move", name):
                if self.is_local:
                    target = Path(self.path(to))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Path(self.path(name)).replace(target)
                else:
                    self.fs.cp_file(self.path(name), self.path(to))
                    self.fs.rm_file(self.path(name))
        except FileNotFoundError as error:
            raise NotFoundError(f"no {name} below {self.shown}") from error

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all it holds; nothing happens if it does not exist."""
        with contextlib.suppress(FileNotFoundError), self.named_errors("remove", name):
            self.fs.rm(self.path(name), recursive=True)

    def check_writable(self) -> None:
        """Writes and removes a probe: in the directory, or in the nearest one above it that exists.

        Raises:
            StorageError: if that fails; names the setting, the address and the remedy. Nothing is left behind.
        """
        try:
            with self.named_errors("write"):
                place = self._nearest if self.is_local else self.root
                probe = f"{place}/.probe-{new_id()}"
                self.fs.pipe_file(probe, b"esper")
                self.fs.rm_file(probe)
        except FileNotFoundError as error:
            # S3 says so of a bucket that does not exist
            raise self.failure("write", error) from error


def _write_local(target: Path, data: bytes | memoryview) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{new_id()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _written_at(entry: Mapping[str, Any]) -> float:
    """The age of a file, where a directory says seconds and S3 a date."""
    return entry["mtime"] if "mtime" in entry else entry["LastModified"].timestamp()


def _no_options(options: Mapping[str, Any] | None) -> dict[str, str]:
    if options:
        name = next(iter(options))
        raise StorageError(
            "a directory takes no options", field=f"storage_options.{name}", remedy="options belong to s3:// addresses"
        )
    return {}


def _s3_options(options: Mapping[str, Any] | None) -> dict[str, str]:
    given = dict(options or {})
    for name in given:
        if name not in S3_OPTIONS:
            known = ", ".join(S3_OPTIONS)
            raise StorageError("no such option", field=f"storage_options.{name}", remedy=f"known options: {known}")
    if "ca_bundle" in given:
        bundle = Path(given["ca_bundle"]).expanduser().resolve()
        if not bundle.is_file():
            raise StorageError(
                f"there is no file {bundle}",
                field="storage_options.ca_bundle",
                remedy="name a PEM file of certificates",
            )
        given["ca_bundle"] = bundle
    return {name: str(value) for name, value in given.items()}


def driver_errors() -> tuple[type[Exception], ...]:
    """What storage drivers raise for an address that cannot be used."""
    known: list[type[Exception]] = [OSError, ValueError, ImportError]
    if botocore := sys.modules.get("botocore.exceptions"):  # s3fs lets those about credentials through
        known.append(botocore.BotoCoreError)
    return tuple(known)
