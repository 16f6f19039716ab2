"""Content-addressed blobs: a blob's name is the SHA-256 of its bytes, so it never changes and never conflicts."""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

from esper.leyline import NotFoundError, TamperedError
from esper.storage import Storage

_DIGEST = re.compile(r"[0-9a-f]{64}")


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


class MemoryBlobs:
    """Blobs in a dict."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, data: bytes | memoryview) -> str:
        digest = sha256(data)
        self._blobs[digest] = bytes(data)
        return digest

    def get(self, digest: str) -> bytes:
        if digest not in self._blobs:
            raise NotFoundError(f"no blob {digest}")
        return self._blobs[digest]


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


def _name(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise NotFoundError(f"{digest!r} is no SHA-256")
    return f"blobs/{digest[:2]}/{digest}"


def sha256(data: bytes | memoryview) -> str:
    """Returns 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
