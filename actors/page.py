"""The live page in Nissa's process, and the last picture of each run in its folder. Needs no Ray of its own.

What the page shows, and how, is in `esper.nissa.web`; who is let in is settled as for Urza's gateway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from esper.config import PageConfig
from esper.leyline import AssetHub, Bus, EsperError
from esper.leyline.bus import BusStats
from esper.leyline.catalogue import Backlog
from esper.leyline.summary import CONFIG_FILE, VIEW_FILE
from esper.nissa.replay import dump
from esper.nissa.runs import RunStore
from esper.nissa.viewmodel import LiveView, Note
from esper.nissa.web import FolderRuns, LiveRuns, PageServer, build_app
from esper.storage import Storage
from esper.urza.guard import limits_of

_LOG = logging.getLogger("esper.nissa")
_Linked = TypeVar("_Linked")
_Answer = TypeVar("_Answer")

KEEP_EVERY_S = 2.0
KEEP_REMOTE_EVERY_S = 15.0
"""On an object store a picture is an upload."""
_PATIENCE_S = 30.0


def open_page(
    follow: Callable[[str], tuple[LiveView, Sequence[Note]] | None],
    storage: Storage,
    config: PageConfig,
    bus: Callable[[], Bus],
    hub: Callable[[], AssetHub] | None,
) -> PageServer:
    """Takes the port; the server starts when somebody looks.

    Args:
        follow: gives a run's view and story.
        storage: whose runs are shown.
        config: the page's settings.
        bus: connects to Oona, when somebody looks.
        hub: connects to Urza, when somebody looks; None leaves it out.

    Raises:
        ConfigError: if the token that the host needs cannot be had.
        UnavailableError: if there is no free port.
    """
    limits = limits_of(config)
    ending = threading.Event()

    def make_app() -> object:
        oona, urza = _Link(bus), _Link(hub) if hub is not None else None
        runs = LiveRuns(
            follow,
            FolderRuns(RunStore(storage.uri, dict(storage.options))),
            bus=partial(oona.ask, _stats),
            backlog=partial(urza.ask, _backlog) if urza is not None else None,
        )
        return build_app(runs, where=storage.shown, token_digest=limits.token_digest, hosts=limits.hosts, ending=ending)

    return PageServer(make_app, host=config.host, port=config.port, ending=ending)


def _stats(bus: Bus) -> BusStats:
    return bus.stats()


def _backlog(hub: AssetHub) -> Backlog:
    return hub.backlog()


class _Link(Generic[_Linked]):
    """A connection that is made anew after it failed."""

    def __init__(self, connect: Callable[[], _Linked]) -> None:
        self._connect = connect
        self._made: _Linked | None = None

    def ask(self, question: Callable[[_Linked], _Answer]) -> _Answer:
        """Asks; raises what the question raises."""
        if self._made is None:
            self._made = self._connect()
        try:
            return question(self._made)
        except EsperError:
            self._made = None
            raise


class Keeper:
    """Writes each run's last picture (`view.json`) into its folder, in a thread, until `stop`.

    A run that was over before this began is left alone: what is heard of it again may be less than was known. A folder
    that is gone is not made again. What cannot be written is logged, once until it can.

    Args:
        views: gives the runs as Nissa has them.
        storage: where they lie.
    """

    def __init__(self, views: Callable[[], Sequence[LiveView]], storage: Storage) -> None:
        self._views, self._storage = views, storage
        self._every_s = KEEP_EVERY_S if storage.is_local else KEEP_REMOTE_EVERY_S
        self._kept: dict[str, LiveView] = {}
        self._since = time.time() - _PATIENCE_S
        self._failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nissa-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Writes what is new and ends."""
        self._stopped.set()
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._keep()
        self._keep()

    def _keep(self) -> None:
        views = self._views()
        for view in views:
            if view.updated_at < self._since or self._kept.get(view.run_id) is view:
                continue
            self._kept[view.run_id] = view
            try:
                if self._storage.listing(f"runs/{view.run_id}/{CONFIG_FILE}"):
                    self._storage.write(f"runs/{view.run_id}/{VIEW_FILE}", dump(view))
            except EsperError as error:
                if not self._failed:
                    _LOG.warning("view.unwritten", extra={"run": view.run_id, "reason": str(error)})
                self._failed = True
            else:
                self._failed = False
        self._kept = {view.run_id: self._kept[view.run_id] for view in views if view.run_id in self._kept}
