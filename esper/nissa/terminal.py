"""The views of a running job: live in a terminal, plain lines elsewhere, or nothing.

A view is told of each new `LiveView`, and of notices by the driver. It never reads the bus and never raises because
of what it is shown.
"""

from __future__ import annotations

import io
import threading
import time
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live as RichLive
from rich.text import Text

from esper.nissa import words
from esper.nissa.frame import Frame
from esper.nissa.viewmodel import LiveView, Note, Point, Tone

REFRESH_HZ = 4
Mode = Literal["auto", "live", "plain", "quiet"]


class View(Protocol):
    """What the driver shows a run with; a context manager that leaves the terminal as it found it."""

    def show(self, view: LiveView) -> None:
        """Takes the newest picture; showing the same one again is free."""
        ...

    def notice(self, text: str) -> None:
        """Tells people something of the driver's own; the same notice twice in a row is told once."""
        ...

    def close(self) -> None:
        """Draws the last state and restores the terminal; closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Closing:
    """The context manager part that all views share."""

    def close(self) -> None:
        """Nothing to restore."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class QuietView(_Closing):
    """Shows nothing."""

    def show(self, view: LiveView) -> None:
        """Shows nothing."""

    def notice(self, text: str) -> None:
        """Tells nothing."""


class PlainView(_Closing):
    """One line an epoch and one an event, for logs and pipes. Waits are not told."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = False
        self._next_epoch = 0
        self._num_notes = 0
        self._notice = ""

    def show(self, view: LiveView) -> None:
        """Writes what is new since the last call, in the order of epochs."""
        if not self._started and view.num_epochs:
            self._started = True
            sites = f", {len(view.sites)} sites" if view.sites else ""
            self._write(f"run {view.run_id}: {view.num_epochs} epochs, {view.params_start:,} parameters{sites}")
            if view.page:
                self._write(f"live page: {view.page}")
        notes = [note for note in view.notes if note.number > self._num_notes]
        self._num_notes = view.num_notes
        if any(note.subject == "run" for note in notes):  # resumed: epochs come again
            self._next_epoch = min(self._next_epoch, view.resumed_from_epoch or 0)
        for point in view.points:
            if point.epoch >= self._next_epoch:
                self._next_epoch = point.epoch + 1
                notes = self._write_notes(notes, before=point.epoch)
                self._write(_epoch_line(view, point))
        self._write_notes(notes, before=None)

    def notice(self, text: str) -> None:
        """Writes the line, unless it was the last one; an empty notice takes back the last and needs no line."""
        if text and text != self._notice:
            self._write(f"! {text}")
        self._notice = text

    def _write_notes(self, notes: list[Note], *, before: int | None) -> list[Note]:
        """Writes the notes of epochs below `before`; returns the others."""
        for note in notes:
            if before is None or note.epoch < before:
                self._write(_note_line(note))
        return [note for note in notes if before is not None and note.epoch >= before]

    def _write(self, line: str) -> None:
        # names and reasons come from people and models: no line breaks or escape codes of theirs in a log
        self._stream.write("".join(c if c.isprintable() else " " for c in line) + "\n")
        self._stream.flush()


def _epoch_line(view: LiveView, point: Point) -> str:
    name = view.last.metric_name if view.last else None
    parts = [f"epoch {point.epoch + 1}/{view.num_epochs}", f"loss {words.loss(point.train_loss)}"]
    if point.val_loss is not None:
        parts.append(f"val_loss {words.loss(point.val_loss)}")
    if point.val_metric is not None:
        parts.append(f"val_{name or 'metric'} {words.metric(name, point.val_metric)}")
    parts.append(f"params {point.params:,}")
    if view.last is not None and view.last.epoch == point.epoch:
        active = sum(seed.stage.is_active for seed in view.seeds.values())
        parts.append(f"kernels {view.kernels_ready}" + (f"+{view.kernels_pending}" if view.kernels_pending else ""))
        parts += [f"active {active}"] if active else []
        parts += [f"{name} {state.value.replace('_', ' ')}" for name, state in words.circuits(view.last)]
        left = view.seconds_left(view.updated_at)
        parts += [f"left {words.duration(left)}"] if left else []
    return "  ".join(parts)


_MARKS = {Tone.INFO: "", Tone.GOOD: "+ ", Tone.WARNING: "! ", Tone.BAD: "!! "}


def _note_line(note: Note) -> str:
    reason = f": {note.reason}" if note.reason else ""
    return f"{_MARKS[note.tone]}[epoch {note.epoch + 1}] {note.subject}: {note.text}{reason}"


class LiveTerminal(_Closing):
    """One picture that is redrawn in place, at most four times a second."""

    def __init__(self, console: Console, *, refresh_hz: int = REFRESH_HZ) -> None:
        self._console = console
        self._view: LiveView | None = None
        self._notice = ""
        self._lock = threading.Lock()
        self._live = RichLive(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=refresh_hz,
            vertical_overflow="ellipsis",
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=False)
        return self

    def show(self, view: LiveView) -> None:
        """Takes the picture; the next refresh draws it."""
        with self._lock:
            self._view = view

    def notice(self, text: str) -> None:
        """Keeps the line at the foot of the picture; an empty one takes it away."""
        with self._lock:
            self._notice = text

    def close(self) -> None:
        """Draws once more, stops, and shows the cursor again."""
        self._live.stop()

    def _picture(self) -> RenderableType:
        with self._lock:
            view, notice = self._view, self._notice
        if view is None:
            return Text(notice or "waiting for the first signal of the run", "dim")
        return Frame(view, now=time.time(), height=self._console.size.height, notice=notice)


def view_for(mode: Mode, stream: TextIO) -> View:
    """Chooses the view: `auto` is live where `stream` is a terminal that can redraw, and plain elsewhere."""
    if mode == "quiet":
        return QuietView()
    if isinstance(stream, io.TextIOWrapper):
        # names and reasons may hold what the terminal's encoding cannot show; a `?` there must not end a run
        stream.reconfigure(errors="replace")
    console = Console(file=stream, force_terminal=True if mode == "live" else None)
    if mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return LiveTerminal(console)
    return PlainView(stream)
