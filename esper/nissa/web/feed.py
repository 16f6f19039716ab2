"""What is streamed to a page: the parts that changed, and the events it has not had yet.

Every message carries an id, `boot:number`: the server's life and the number of the last event that was sent. Whoever
comes back with it gets what is missing; after a restart, or where more is missing than a page shows, the list begins
anew. Nothing is kept for a page that is away, and a slow one skips pictures, never events.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from esper.leyline.contract import new_id
from esper.leyline.errors import EsperError
from esper.nissa.viewmodel import LiveView, Note, Tone
from esper.nissa.web.documents import closed, over, runs_table
from esper.nissa.web.parts import CHILDREN, Parts, note_item, parts_of, skeleton
from esper.nissa.web.source import Picture, PlatformState, Runs

NUM_NOTES = 200
"""Events that a page begins with."""
_BEAT_S = 10.0
"""A stream without news says so this often, so that both ends notice when the other is gone."""
_RETRY_MS = 1000
_LOOK_AGAIN_S = 10.0
"""So often a picture that stays the same is drawn again: a run may have fallen silent."""

Gone = Callable[[], Awaitable[bool]]


class Feeds:
    """The streams of one server.

    Args:
        runs: what they tell of.
        where: the storage address in words.
        tick_s: seconds between two looks.
        ending: set when the server ends.
    """

    def __init__(self, runs: Runs, where: str, *, tick_s: float, ending: threading.Event | None = None) -> None:
        self._runs, self._where, self._tick_s = runs, where, tick_s
        self._ending = ending or threading.Event()
        self.boot = new_id()[:8]
        self.num_open = 0

    @staticmethod
    def now() -> float:
        """Seconds since the epoch."""
        return time.time()

    async def of_run(self, run_id: str, after: str, gone: Gone) -> AsyncIterator[str]:
        """The stream of one run; `after` is the id of the last message that came through."""
        feed = RunFeed(self._runs, run_id, boot=self.boot, after=after)

        def farewell() -> Mapping[str, str]:
            try:
                return over(run_id, self._runs.picture(run_id).status, self._where)
            except EsperError:  # how it ended is not known any more, and this is what is said
                return over(run_id, None, self._where)

        async for text in self._ticking(feed.step, farewell, gone):
            yield text

    async def of_runs(self, gone: Gone) -> AsyncIterator[str]:
        """The stream of the list of runs."""
        sent = ""

        def step(_now: float) -> list[str]:
            nonlocal sent
            table = runs_table(self._runs.rows(), self._where)
            is_new, sent = table != sent, table
            return [message("parts", {"runs": table}, self.boot)] if is_new else []

        async for text in self._ticking(step, lambda: closed(self._where), gone):
            yield text

    async def _ticking(
        self, step: Callable[[float], list[str]], farewell: Callable[[], Mapping[str, str]], gone: Gone
    ) -> AsyncIterator[str]:
        """What `step` says, again and again; when the server ends, what is new and a farewell."""
        self.num_open += 1
        try:
            yield f"retry: {_RETRY_MS}\n\n"
            beat = time.monotonic()
            while not await gone():
                is_last = self._ending.is_set()
                try:
                    messages = await run_in_threadpool(step, self.now())
                except EsperError as error:
                    messages = [message("trouble", {"told": str(error)}, "")]
                if is_last:
                    messages.append(message("end", await run_in_threadpool(farewell), ""))
                if messages:
                    beat = time.monotonic()
                    yield "".join(messages)
                elif time.monotonic() - beat >= _BEAT_S:
                    beat = time.monotonic()
                    yield ": still here\n\n"
                if is_last:
                    return
                await asyncio.sleep(self._tick_s)
        finally:
            self.num_open -= 1


class RunFeed:
    """What one page of one run has been sent so far.

    Args:
        runs: what it tells of.
        run_id: of the run.
        boot: names this server's life.
        after: the id of the last message that the page has had; empty or unknown begins anew.
    """

    def __init__(self, runs: Runs, run_id: str, *, boot: str, after: str) -> None:
        self._runs, self._run_id, self._boot = runs, run_id, boot
        self._sent: dict[str, str] = {}
        self._looked: tuple[Any, ...] = ()
        self._platforms: list[PlatformState] = []
        life, _, number = after.partition(":")
        self._number = int(number) if life == boot and number.isdigit() else None

    def step(self, now: float) -> list[str]:
        """The messages that are due; none if nothing has changed."""
        picture, platform = self._runs.picture(self._run_id), self._runs.platform()
        looked = (id(picture), id(platform), int(now // _LOOK_AGAIN_S))
        if looked == self._looked[:3]:
            return []
        self._looked = (*looked, picture, platform)  # kept, so that no other object gets their ids
        messages = self._notes(picture)
        if platform is not None and (not self._platforms or self._platforms[-1] is not platform):
            self._platforms = [*self._platforms, platform][-2:]
        before = self._platforms[0] if len(self._platforms) > 1 else None
        changed = self._changed(parts_of(picture, platform, now, before), picture.view)
        if changed:
            messages.append(message("parts", changed, self._mark()))
        return messages

    def _mark(self) -> str:
        return f"{self._boot}:{self._number or 0}"

    def _changed(self, parts: Parts, view: LiveView) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for name, text in parts.items():
            bones = skeleton(name, view, text)
            if self._sent.get(name) != bones:
                self._sent[name] = bones
                found[name] = text
                for child, inside in CHILDREN[name](view).items() if name in CHILDREN else ():
                    self._sent[child] = inside
            elif name in CHILDREN:
                for child, inside in CHILDREN[name](view).items():
                    if self._sent.get(child) != inside:
                        self._sent[child] = found[child] = inside
        return found

    def _notes(self, picture: Picture) -> list[str]:
        story = picture.story
        newest = story[-1].number if story else 0
        begins = self._number is None or newest < self._number
        fresh = story if begins else after_number(story, self._number or 0)
        if not fresh and not begins:
            return []
        shown, num_skipped = tail(fresh, NUM_NOTES)
        restart = begins or num_skipped > 0
        self._number = newest
        body = {
            "html": "".join(note_item(note) for note in reversed(shown)),
            "restart": restart,
            "first": shown[0].number if shown else 0,
            "earlier": num_skipped if begins else len(story) - len(shown) if restart else 0,
            "news": [] if begins else [_said(note) for note in shown if note.tone is not Tone.INFO][-3:],
        }
        return [message("notes", body, self._mark())]


def _said(note: Note) -> str:
    return f"{note.subject}: {note.text}"


def tail(story: Sequence[Note], most: int) -> tuple[Sequence[Note], int]:
    """The last notes, and how many come before them."""
    num_earlier = max(len(story) - most, 0)
    return story[num_earlier:], num_earlier


def after_number(story: Sequence[Note], number: int) -> Sequence[Note]:
    """The notes above a number."""
    return story[bisect.bisect_right(story, number, key=lambda note: note.number) :]


def cut(story: Sequence[Note], before: int) -> Sequence[Note]:
    """The notes below a number."""
    return story[: bisect.bisect_left(story, before, key=lambda note: note.number)]


def last_id(boot: str, story: Sequence[Note]) -> str:
    """The id of a page that has had all of a story."""
    return f"{boot}:{story[-1].number if story else 0}"


def message(event: str, body: Mapping[str, object], mark: str) -> str:
    """One server-sent event; without a mark the page's own stays."""
    data = json.dumps(body, separators=(",", ":"), ensure_ascii=False)  # escapes line breaks: the data is one line
    return (f"id: {mark}\n" if mark else "") + f"event: {event}\ndata: {data}\n\n"
