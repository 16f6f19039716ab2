"""Serves the page on a port that is taken at once; the server itself starts when somebody first looks.

A run that nobody looks at pays for an open port and a sleeping thread, nothing else.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

from esper.leyline.errors import UnavailableError

_LOG = logging.getLogger("esper.nissa")
NUM_PORTS = 16
"""Ports that are tried, from the first on: several runs of one machine each have their page."""
_CLOSE_S = 5.0


class PageServer:
    """The page of one process, until `close`.

    Args:
        make_app: makes the ASGI app, when somebody first looks.
        host: to listen on.
        port: the first port that is tried; 0 takes any that is free.
        ending: set when it ends, so that the app can tell those who look.

    Raises:
        UnavailableError: if none of the ports can be had.
    """

    def __init__(
        self, make_app: Callable[[], Any], *, host: str, port: int, ending: threading.Event | None = None
    ) -> None:
        self._make_app = make_app
        self._ending = ending or threading.Event()
        self._socket = _listening(host, port)
        name = socket.gethostname() if host in {"0.0.0.0", "::"} else host  # noqa: S104 - where it is told, not bound
        shown = f"[{name}]" if ":" in name else name
        self.address = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._wake, self._waker = socket.socketpair()
        self._server: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="nissa-page", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the server has ended."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # a join without a limit would not hear Ctrl-C

    def close(self) -> None:
        """Stops listening; open streams say so and end. Once it is closed this does nothing."""
        self._ending.set()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._server is not None:
                self._server.should_exit = True
        self._waker.send(b"\0")
        self._thread.join(_CLOSE_S)
        for one in (self._socket, self._wake, self._waker):
            one.close()

    def _run(self) -> None:
        try:
            if self._is_wanted():
                self._serve()
        except Exception:  # noqa: BLE001 - the edge of a thread: a page that breaks must be heard of, and must not end a run
            _LOG.exception("page.failed")

    def _is_wanted(self) -> bool:
        """Waits until somebody looks; False if it is closed first."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            return all(key.fileobj is self._socket for key, _ in selector.select())

    def _serve(self) -> None:
        import uvicorn

        config = uvicorn.Config(
            self._make_app(),
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=2,
            ws="none",
        )
        server = uvicorn.Server(config)
        with self._lock:
            if self._closed:
                return
            self._server = server
        server.run(sockets=[self._socket])


def _listening(host: str, port: int) -> socket.socket:
    ports = range(port, port + NUM_PORTS) if port else (0,)
    reason = ""
    for candidate in ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        taken = socket.socket(family)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, candidate))
            taken.listen(64)
        except (OSError, OverflowError) as error:
            taken.close()
            reason = str(error)
        else:
            return taken
    raise UnavailableError(
        f"cannot listen on {host}, ports {ports[0]} to {ports[-1]}: {reason}", remedy="choose another nissa.page.port"
    )
