"""Keeps a view up to date from a thread of its own. Nissa may be slow, gone or restarting: training never waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from esper.leyline.errors import TransientError
from esper.nissa.terminal import View
from esper.nissa.viewmodel import LiveView

log = logging.getLogger("esper.nissa")

POLL_HZ = 3.0
STARTUP_S = 30.0
MISSING = "the view has no answer from Nissa; training goes on without it"

Fetch = Callable[[], LiveView | None]
"""Returns the run's newest picture, None before there is one; may raise `UnavailableError`."""


def follow(
    fetch: Fetch, view: View, stop: threading.Event, *, hz: float = POLL_HZ, startup_s: float = STARTUP_S
) -> None:
    """Shows what `fetch` returns until `stop` is set, and once more then. Does not open or close the view.

    Args:
        fetch: see `Fetch`.
        view: takes the pictures.
        stop: ends it.
        hz: pictures a second.
        startup_s: seconds in which a Nissa that has not answered yet is coming up, and not missing.
    """
    missing, is_up, began = False, False, time.monotonic()
    while True:
        is_last = stop.wait(1.0 / hz)
        try:
            picture = fetch()
        except TransientError as error:
            if not missing and (is_up or time.monotonic() - began >= startup_s):
                missing = True
                log.warning("view.missed", extra={"error": str(error)})
                view.notice(MISSING)
        else:
            is_up = True
            if missing:
                missing = False
                view.notice("")
            if picture is not None:
                view.show(picture)
        if is_last:
            return


class Follower:
    """Runs `follow` in a daemon thread between entering and leaving; the terminal is restored whatever happens.

    Leaving waits `patience_s` for the last picture and then lets go: a view must not hold a finished run up.
    """

    def __init__(self, fetch: Fetch, view: View, *, hz: float = POLL_HZ, patience_s: float = 5.0) -> None:
        self.view = view
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(fetch, hz), name="nissa-view", daemon=True)

    def __enter__(self) -> Self:
        self.view.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._thread.join(self._patience_s)
        finally:
            self.view.close()

    def _run(self, fetch: Fetch, hz: float) -> None:
        try:
            follow(fetch, self.view, self._stop, hz=hz)
        except Exception:  # the edge of a thread: a broken picture must be heard of, and must not end a run
            log.exception("view.failed")
