"""The way into a shard for programs on its own node: a socket beside its log, for what comes a thousand times a second.

A call of an actor costs both sides half a millisecond, whatever it carries; a request here a tenth of that. Only
appending, polling and acknowledging come this way, and mean the same as by a call: whoever cannot come in, or is cut
off, makes calls. Requests and answers are a head (`HEAD`) and a body; answers come in any order.

Only the shard's own user may come in (SO_PEERCRED), and nothing that arrives is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Protocol, cast

from esper.leyline import errors
from esper.leyline.errors import EsperError

HEAD = struct.Struct("<IQB")
"""Bytes of the body, the request's number, and what is asked (`Ask`); of an answer, whether it is an error."""
WAIT = struct.Struct("<d")
"""What the body of an APPEND begins with: how long to wait for room, in seconds."""
MAX_BYTES = 1 << 30
NAME = "door"
_CREDENTIALS = struct.Struct("3i")  # process, user, group

logger = logging.getLogger(__name__)


class Ask(IntEnum):
    """Requests."""

    APPEND = 1  # WAIT and a batch -> one byte, whether it is safe
    POLL = 2  # JSON: group, member, number, most records, seconds -> what `encode_leased` makes
    ACK = 3  # JSON: group, pairs of offsets -> nothing


class Service(Protocol):
    """What stands behind the door."""

    async def append(self, body: bytes, wait_s: float) -> bool: ...

    async def poll(self, group: str, member: str, number: int, max_records: int, wait_s: float) -> bytes: ...

    async def ack(self, group: str, spans: Sequence[range]) -> None: ...


class Door:
    """Opens with `open`, on the running event loop.

    Args:
        directory: of the socket; one that a dead process left there is replaced.
        service: answers.
    """

    def __init__(self, directory: Path, service: Service) -> None:
        self._directory = directory
        self._service = service
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Lets visitors in.

        Raises:
            OSError: if there can be no socket there.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Visitor(self._service), sock=_bound(self._directory))

    def close(self) -> None:
        """Lets nobody in any more; who is in stays until the process ends."""
        if self._server is not None:
            self._server.close()
            self._server = None
            (self._directory / NAME).unlink(missing_ok=True)


def _bound(directory: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with reachable(directory) as path:
            Path(path).unlink(missing_ok=True)
            listening.bind(path)
            Path(path).chmod(0o600)
    except OSError:
        listening.close()
        raise
    return listening


@contextlib.contextmanager
def reachable(directory: Path) -> Iterator[str]:
    """A path of the socket that is short enough for one, however long the directory's is (Linux)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


class _Visitor(asyncio.Protocol):
    """One connection."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        visitor = cast("asyncio.Transport", transport)  # that of Ray's loop is of no class of asyncio
        with socket.socket(fileno=os.dup(visitor.get_extra_info("socket").fileno())) as peer:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.geteuid():
            logger.warning("oona.door.refused", extra={"user": user})
            visitor.abort()
            return
        self._transport = visitor

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while self._transport is not None and len(buffer) >= HEAD.size:
            size, number, ask = HEAD.unpack_from(buffer)
            if size > MAX_BYTES:
                logger.warning("oona.door.refused", extra={"num_bytes": size})
                self._transport.abort()
                return
            end = HEAD.size + size
            if len(buffer) < end:
                return
            with memoryview(buffer) as view:
                body = bytes(view[HEAD.size : end])
            del buffer[:end]
            task = asyncio.get_running_loop().create_task(self._answer(number, ask, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's words
        self._transport = None
        for task in self._tasks:  # nobody waits for them any more; what they would have got goes to the next poll
            task.cancel()

    async def _answer(self, number: int, ask: int, body: bytes) -> None:
        try:
            answer, is_error = await self._serve(ask, body), False
        except EsperError as error:
            answer, is_error = packed_error(error), True
        except Exception as error:  # the loop edge: logged, and told
            logger.exception("oona.door.failed")
            answer, is_error = packed_error(EsperError(f"the shard failed: {error!r}")), True
        if self._transport is not None:
            self._transport.write(HEAD.pack(len(answer), number, is_error) + answer)

    async def _serve(self, ask: int, body: bytes) -> bytes:
        if ask == Ask.APPEND:
            (wait_s,) = WAIT.unpack_from(body)
            return b"\1" if await self._service.append(body[WAIT.size :], wait_s) else b"\0"
        if ask == Ask.POLL:
            return await self._service.poll(*json.loads(body))
        if ask == Ask.ACK:
            group, pairs = json.loads(body)
            await self._service.ack(group, [range(start, stop) for start, stop in pairs])
            return b""
        raise EsperError(f"a request of kind {ask}")


def packed_error(error: EsperError) -> bytes:
    """An error as an answer."""
    return json.dumps((type(error).__name__, error.message, error.field, error.remedy)).encode()


def unpacked_error(body: bytes) -> EsperError:
    """Inverse of `packed_error`; an error of a name that is not known here is one all the same."""
    name, message, field, remedy = json.loads(body)
    known = getattr(errors, name, None)
    cls = known if isinstance(known, type) and issubclass(known, EsperError) else EsperError
    return cls(message, field=field, remedy=remedy)
