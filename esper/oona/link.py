"""A program's connection to the door of a shard on its own node (`esper.oona.door`)."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import struct
import threading
from concurrent.futures import Future
from pathlib import Path

from esper.leyline.errors import UnavailableError
from esper.oona.door import HEAD, Ask, reachable, unpacked_error

SEND_S = 10
"""How long a shard may not read, until it counts as gone."""
_READ_AHEAD = 1 << 18

logger = logging.getLogger(__name__)


class LinkLostError(UnavailableError):
    """The connection ended before an answer came. The request may have been carried out."""


class Link:
    """A connection, with a thread that takes the answers. Any thread may ask.

    Args:
        directory: where the socket is.

    Raises:
        OSError: if nobody is behind it.
    """

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
            with reachable(directory) as path:
                self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._guard = threading.Lock()  # of what waits
        self._waiting: dict[int, Future[bytes]] = {}
        self._is_up = True
        threading.Thread(target=self._receive, name="oona-link", daemon=True).start()

    @property
    def is_up(self) -> bool:
        """Whether it has not ended yet."""
        return self._is_up

    def ask(self, ask: Ask, *body: bytes) -> Future[bytes]:
        """Sends a request; the answer, or an error of Esper's tree, comes in the link's thread."""
        answer: Future[bytes] = Future()
        number = next(self._numbers)
        with self._guard:
            is_up = self._is_up
            if is_up:
                self._waiting[number] = answer
        if not is_up:
            answer.set_exception(LinkLostError("the connection has ended"))
            return answer
        try:
            with self._sending:
                self._socket.sendall(b"".join((HEAD.pack(sum(map(len, body)), number, ask), *body)))
        except OSError as error:
            self._end(str(error))
        return answer

    def close(self) -> None:
        """Ends the connection; who waits for an answer is told so."""
        self._end("it was closed")

    def _receive(self) -> None:
        reason = "the shard is gone"
        try:
            with self._socket, self._socket.makefile("rb", buffering=_READ_AHEAD) as stream:
                while len(head := stream.read(HEAD.size)) == HEAD.size:
                    size, number, is_error = HEAD.unpack(head)
                    body = stream.read(size)
                    if len(body) < size:
                        break
                    self._settle(number, body, is_error=bool(is_error))
        except OSError as error:
            reason = str(error)
        self._end(reason)

    def _settle(self, number: int, body: bytes, *, is_error: bool) -> None:
        with self._guard:
            answer = self._waiting.pop(number, None)
        if answer is None:
            return
        if is_error:
            answer.set_exception(unpacked_error(body))
        else:
            answer.set_result(body)

    def _end(self, reason: str) -> None:
        with self._guard:
            waiting, self._waiting = self._waiting, {}
            self._is_up = False
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it
        except OSError as error:
            logger.debug("oona.link.ended", extra={"errno": os.strerror(error.errno or 0)})
        for answer in waiting.values():
            answer.set_exception(LinkLostError(f"the connection has ended: {reason}"))
