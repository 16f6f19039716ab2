"""Where the page has its runs from: the folder of a storage, or what Nissa has in memory and beside it the folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from esper.leyline.bus import BusStats
from esper.leyline.catalogue import Backlog
from esper.leyline.errors import EsperError, NotFoundError, StorageError
from esper.leyline.summary import HISTORY_FILE, SUMMARY_FILE, VIEW_FILE, RunStatus, RunSummary
from esper.nissa.runs import RunStore
from esper.nissa.viewmodel import LiveView, Note

_READ_EVERY_S = 0.5
_LIST_EVERY_S = 2.0
_ASK_EVERY_S = 2.0


@dataclass(frozen=True)
class Picture:
    """A run at one moment.

    Attributes:
        summary: as it lies in the run's folder; None before there is one.
        story: its notes, the oldest that is known first; their numbers rise.
        is_followed: whether it comes from the bus, at once, and not from files that are written at each epoch's end.
    """

    view: LiveView
    summary: RunSummary | None
    story: Sequence[Note]
    is_followed: bool = False

    @property
    def status(self) -> RunStatus:
        """As the summary has it; a run without one has just begun."""
        return self.summary.status if self.summary else RunStatus.RUNNING


@dataclass(frozen=True)
class PlatformState:
    """What the bus and the compile queue say of themselves.

    Attributes:
        at: when they were asked, seconds since the epoch.
        missing: who did not answer, and why.
    """

    at: float
    bus: BusStats | None = None
    backlog: Backlog | None = None
    missing: tuple[str, ...] = ()


class Runs(Protocol):
    """What the page shows. Calls may block and come from several threads."""

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a run, newest first, as `RunStore.rows`."""
        ...

    def picture(self, run_id: str) -> Picture:
        """The run; the same object until something has changed.

        Raises:
            NotFoundError: if there is no such run.
            StorageError: if its files cannot be read.
        """
        ...

    def platform(self) -> PlatformState | None:
        """The systems that runs share; None where the page is not served by them."""
        ...


class FolderRuns:
    """Runs as they lie below a storage address, finished or not. A file is read again only when it has changed."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._pictures: dict[str, tuple[float, Any, Picture]] = {}
        self._rows: tuple[float, Sequence[Mapping[str, Any]]] = (-_LIST_EVERY_S, ())

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Runs`."""
        with self._lock:
            at, rows = self._rows
            if time.monotonic() - at >= _LIST_EVERY_S:
                rows = self._store.rows()
                self._rows = (time.monotonic(), rows)
            return rows

    def picture(self, run_id: str) -> Picture:
        """See `Runs`."""
        with self._lock:
            known = self._pictures.get(run_id)
            if known is not None and time.monotonic() - known[0] < _READ_EVERY_S:
                return known[2]
            listing = self._store.storage.listing(f"runs/{run_id}")
            files = [entry for entry in listing if entry[0] in {SUMMARY_FILE, HISTORY_FILE, VIEW_FILE}]
            picture = known[2] if known is not None and known[1] == files else self._read(run_id)
            self._pictures[run_id] = (time.monotonic(), files, picture)
            return picture

    def platform(self) -> PlatformState | None:
        """None: a folder knows of no platform."""
        return None

    def _read(self, run_id: str) -> Picture:
        if run_id not in self._store.ids():
            raise NotFoundError(f"no run {run_id} under {self._store.storage.shown}")
        try:
            told = self._store.told(run_id)
            return Picture(told.view, self._store.summary(run_id), told.story)
        except ValidationError as error:
            raise StorageError(f"the files of run {run_id} cannot be read: {error.error_count()} errors") from error


class LiveRuns:
    """Runs as they are heard of on the bus; those that are over, and what only files say, from the folder.

    Args:
        follow: gives a run's view and story, None for one that was not heard of.
        folder: the runs of the storage.
        bus, backlog: ask the bus and Urza; None where there is no such system.
    """

    def __init__(
        self,
        follow: Callable[[str], tuple[LiveView, Sequence[Note]] | None],
        folder: FolderRuns,
        *,
        bus: Callable[[], BusStats] | None = None,
        backlog: Callable[[], Backlog] | None = None,
    ) -> None:
        self._follow, self._folder = follow, folder
        self._ask_bus, self._ask_backlog = bus, backlog
        self._lock = threading.Lock()
        self._state: PlatformState | None = None
        self._pictures: dict[str, Picture] = {}

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Runs`."""
        return self._folder.rows()

    def picture(self, run_id: str) -> Picture:
        """See `Runs`."""
        followed = self._follow(run_id)
        if followed is None or not followed[0].num_epochs:
            return self._folder.picture(run_id)
        view, story = followed
        try:
            summary = self._folder.picture(run_id).summary
        except (NotFoundError, StorageError):
            summary = None  # it has just begun, or lies where this machine cannot read
        known = self._pictures.get(run_id)
        if known is not None and known.view is view and known.summary is summary:
            return known
        picture = Picture(view, summary, story, is_followed=True)
        self._pictures = {run_id: picture, **{k: v for k, v in self._pictures.items() if k != run_id}}
        return picture

    def platform(self) -> PlatformState | None:
        """See `Runs`; asked every few seconds, however many look."""
        with self._lock:
            if self._state is None or time.time() - self._state.at >= _ASK_EVERY_S:
                self._state = self._ask(PlatformState(time.time()))
            return self._state

    def _ask(self, state: PlatformState) -> PlatformState:
        if self._ask_bus is not None:
            try:
                state = replace(state, bus=self._ask_bus())
            except EsperError as error:
                state = replace(state, missing=(f"Oona did not answer: {error}",))
        if self._ask_backlog is not None:
            try:
                state = replace(state, backlog=self._ask_backlog())
            except EsperError as error:
                state = replace(state, missing=(*state.missing, f"Urza did not answer: {error}"))
        return state
