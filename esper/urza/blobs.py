"""Content-addressed blobs: a blob's name is the SHA-256 of its bytes, so it never changes and never conflicts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from esper.leyline import NotFoundError, TamperedError, now
from esper.storage import Storage

_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoredBlob(NamedTuple):
    """A blob as a listing shows it; `written_at` is in seconds since the epoch, by the store's clock."""

    digest: str
    size_bytes: int
    written_at: float


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

    def remove(self, blob: StoredBlob, *, before: float) -> bool:
        """Removes a blob unless it was written again after `before`; returns whether it is gone."""
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

    def put(self, data: bytes | memoryview) -> str:
        digest = sha256(data)
        self._blobs[digest] = bytes(data)
        self._written_at[digest] = self._clock()
        return digest

    def get(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise NotFoundError(f"no blob {digest}")
        return self._blobs[digest]

    def stored(self) -> Iterator[StoredBlob]:
        for digest, data in list(self._blobs.items()):
            yield StoredBlob(digest, len(data), self._written_at[digest])

    def remove(self, blob: StoredBlob, *, before: float) -> bool:
        if self._written_at.get(blob.digest, before) >= before:
            return False
        del self._blobs[blob.digest], self._written_at[blob.digest]
        return True

    def drop_drafts(self, *, before: float) -> None:
        """There are none in memory."""


class StoredBlobs:
    """Blobs as files `blobs/ab/<sha256>` below a storage address."""

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
        data = self._storage.read(_name(digest))
        if sha256(data) != digest:
            raise TamperedError(f"the blob {digest} below {self._storage.uri} holds other bytes")
        return data

    def stored(self) -> Iterator[StoredBlob]:
        """See `Blobs.stored`; raises `StorageError`."""
        for folder in self._storage.names("blobs"):
            for digest, size_bytes, written_at in self._storage.listing(f"blobs/{folder}"):
                if _DIGEST.fullmatch(digest):  # a draft that a crash left is no blob
                    yield StoredBlob(digest, size_bytes, written_at)

    def remove(self, blob: StoredBlob, *, before: float) -> bool:
        """See `Blobs.remove`; raises `StorageError`."""
        name = _name(blob.digest)
        if any(found == blob.digest and at >= before for found, _, at in self._storage.listing(name)):
            return False
        self._storage.remove(name)
        return True

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
