"""Content-addressed blobs: a blob's name is the SHA-256 of its bytes, so it never changes and never conflicts.

Nothing is removed at once. A blob that nobody wants is first *set aside*, under a name that no other copy has, where
`get` still finds it; only a copy that was set aside before one knew oneself to be the writer is discarded. So a writer
that stalls anywhere, and is taken over from meanwhile, cannot take away what its successor has stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from esper.leyline import NotFoundError, TamperedError, new_id, now
from esper.storage import Storage

_ASIDE = "blobs/aside"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoredBlob(NamedTuple):
    """A blob as a listing shows it; `written_at` is in seconds since the epoch, by the store's clock."""

    digest: str
    size_bytes: int
    written_at: float


class AsideBlob(NamedTuple):
    """A copy of a blob that was set aside; `name` is that of this copy alone."""

    name: str
    digest: str
    size_bytes: int


class Blobs(Protocol):
    """A store of bytes by their hash."""

    def put(self, data: bytes | memoryview) -> str:
        """Stores bytes and returns their hash; durable on return, repeating it is harmless."""
        ...

    def get(self, digest: str) -> bytes:
        """Returns the bytes with this hash.

        Raises:
            NotFoundError: if there are none.
            TamperedError: if what is stored has another hash.
        """
        ...

    def stored(self) -> Iterator[StoredBlob]:
        """All blobs."""
        ...

    def set_aside(self, blob: StoredBlob, *, before: float) -> bool:
        """Sets a blob aside unless it was written again after `before`; returns whether that was done."""
        ...

    def aside(self) -> list[AsideBlob]:
        """All copies that are set aside."""
        ...

    def restore(self, blob: AsideBlob) -> None:
        """Stores a blob that was set aside again."""
        ...

    def discard(self, blob: AsideBlob) -> None:
        """Removes a copy for good."""
        ...

    def drop_drafts(self, *, before: float) -> None:
        """Removes what writers that were killed left behind, if it is older than `before`."""
        ...


class MemoryBlobs:
    """Blobs in a dict."""

    def __init__(self, clock: Callable[[], float] = now) -> None:
        self._clock = clock
        self._blobs: dict[str, bytes] = {}
        self._written_at: dict[str, float] = {}
        self._aside: dict[str, tuple[str, bytes]] = {}

    def put(self, data: bytes | memoryview) -> str:
        digest = sha256(data)
        self._blobs[digest] = bytes(data)
        self._written_at[digest] = self._clock()
        return digest

    def get(self, digest: str) -> bytes:
        copies = [data for other, data in self._aside.values() if other == digest]
        if digest not in self._blobs and not copies:
            raise NotFoundError(f"no blob {digest}")
        return self._blobs.get(digest, *copies[:1])

    def stored(self) -> Iterator[StoredBlob]:
        for digest, data in list(self._blobs.items()):
            yield StoredBlob(digest, len(data), self._written_at[digest])

    def set_aside(self, blob: StoredBlob, *, before: float) -> bool:
        if self._written_at.get(blob.digest, before) >= before:
            return False
        del self._written_at[blob.digest]
        self._aside[new_id()] = (blob.digest, self._blobs.pop(blob.digest))
        return True

    def aside(self) -> list[AsideBlob]:
        return [AsideBlob(name, digest, len(data)) for name, (digest, data) in self._aside.items()]

    def restore(self, blob: AsideBlob) -> None:
        self.put(self._aside.pop(blob.name)[1])

    def discard(self, blob: AsideBlob) -> None:
        del self._aside[blob.name]

    def drop_drafts(self, *, before: float) -> None:
        """There are none in memory."""


class StoredBlobs:
    """Blobs as files `blobs/ab/<sha256>` below a storage address, and `blobs/aside/<sha256>.<id>` what is set aside."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, data: bytes | memoryview) -> str:
        """See `Blobs.put`.

        An existing blob is written again, not trusted: the bytes are the same, and a damaged one is mended.

        Raises:
            StorageError: if the address cannot be written.
        """
        digest = sha256(data)
        self._storage.write(_name(digest), data)
        return digest

    def get(self, digest: str) -> bytes:
        """See `Blobs.get`.

        Raises:
            StorageError: if the address cannot be read.
        """
        try:
            data = self._storage.read(_name(digest))
        except NotFoundError:
            data = self._read_aside(digest)
        if sha256(data) != digest:
            raise TamperedError(f"the blob {digest} below {self._storage.uri} holds other bytes")
        return data

    def _read_aside(self, digest: str) -> bytes:
        for copy in self.aside():
            if copy.digest == digest:
                try:
                    return self._storage.read(f"{_ASIDE}/{copy.name}")
                except NotFoundError:
                    continue  # restored or discarded at this moment
        return self._storage.read(_name(digest))  # what is restored is stored before its copy goes

    def stored(self) -> Iterator[StoredBlob]:
        """See `Blobs.stored`; raises `StorageError`."""
        for folder in self._storage.names("blobs"):
            for digest, size_bytes, written_at in self._storage.listing(f"blobs/{folder}"):
                # neither a draft that a crash left nor a copy that is set aside
                if _DIGEST.fullmatch(digest):
                    yield StoredBlob(digest, size_bytes, written_at)

    def set_aside(self, blob: StoredBlob, *, before: float) -> bool:
        """See `Blobs.set_aside`; raises `StorageError`."""
        name = _name(blob.digest)
        if any(found == blob.digest and at >= before for found, _, at in self._storage.listing(name)):
            return False
        try:
            self._storage.move(name, f"{_ASIDE}/{blob.digest}.{new_id()}")
        except NotFoundError:
            return False
        return True

    def aside(self) -> list[AsideBlob]:
        """See `Blobs.aside`; raises `StorageError`."""
        found = ((name, name.partition("."), size) for name, size, _ in self._storage.listing(_ASIDE))
        return [AsideBlob(name, parts[0], size) for name, parts, size in found if _DIGEST.fullmatch(parts[0])]

    def restore(self, blob: AsideBlob) -> None:
        """See `Blobs.restore`; raises `NotFoundError` if it is not there any more, and `StorageError`."""
        self.put(self._storage.read(f"{_ASIDE}/{blob.name}"))
        self.discard(blob)

    def discard(self, blob: AsideBlob) -> None:
        """See `Blobs.discard`; raises `StorageError`."""
        self._storage.remove(f"{_ASIDE}/{blob.name}")

    def drop_drafts(self, *, before: float) -> None:
        """See `Blobs.drop_drafts`, and the probes of `Storage.check_writable`; raises `StorageError`."""
        for name, _, written_at in self._storage.listing(""):
            if name.startswith(".probe-") and written_at < before:
                self._storage.remove(name)
        for folder in self._storage.names("blobs"):
            for name, _, written_at in self._storage.listing(f"blobs/{folder}"):
                if name.startswith(".") and written_at < before:
                    self._storage.remove(f"blobs/{folder}/{name}")


def _name(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise NotFoundError(f"{digest!r} is no SHA-256")
    return f"blobs/{digest[:2]}/{digest}"


def sha256(data: bytes | memoryview) -> str:
    """Returns 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
