"""Views, frames and the end table as people get them, without a terminal."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import threading
from dataclasses import replace

import nissa_story as story
import pytest
from rich.cells import cell_len
from rich.console import Console

from esper.leyline.errors import UnavailableError
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import CircuitState, Severity
from esper.leyline.summary import Params, RunStatus
from esper.nissa import words
from esper.nissa.follow import MISSING, Follower, follow
from esper.nissa.frame import ASCII, Frame, sparkline, track
from esper.nissa.live import Live
from esper.nissa.outcome import table
from esper.nissa.stages import LOOKS
from esper.nissa.terminal import LiveTerminal, PlainView, QuietView, view_for
from esper.nissa.viewmodel import LiveView


@functools.cache
def view_after(epoch: int) -> LiveView:
    live = Live()
    for message in story.messages(epoch):
        live.apply(message)
    view = live.view(story.RUN)
    assert view is not None
    return view


def drawn(view: LiveView, *, width: int = 80, height: int = 40, notice: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(Frame(view, now=view.updated_at, height=height, notice=notice))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 140, 200])
@pytest.mark.parametrize("height", [18, 24, 50])
@pytest.mark.parametrize("epoch", [0, 13, 16, 29])
def test_the_frame_fits_any_terminal(width, height, epoch):
    lines = drawn(view_after(epoch), width=width, height=height).splitlines()
    assert max(cell_len(line) for line in lines) == width
    # in a small terminal the wrapped head may need more; the terminal crops below
    assert len(lines) <= max(height, 20)


def test_the_frame_tells_progress_stages_and_reasons_in_words():
    text = " ".join(drawn(view_after(16), width=140).split())
    for told in (
        story.RUN,
        "epoch 18/30",
        "57%",
        "left",
        "validation loss",
        "accuracy 76.6%",
        "grafting 50%",
        "●━●━◉─○─○─○─○",
        "residual_conv",
        "gain +0.0412 ± 0.0063",
        "kernels 21 ready",
        "2,666 (x1.86 of 1,434)",
        "training → culled: no gain within 6 epochs",
        "tamiyo (heuristic): wait",
    ):
        assert told in text, told
    assert "residual_conv native code" in " ".join(drawn(view_after(29), width=140).split())
    assert "13 compiling" in drawn(view_after(0))
    assert "nissa is away" in drawn(view_after(3), notice="nissa is away")


def test_the_frame_shows_what_lasts_with_where_since_when_evidence_and_what_to_do():
    bodies = [
        story.alert(alert_id=f"a{i}", severity=Severity.CRITICAL if i == 4 else Severity.WARNING, summary=f"thing {i}")
        for i in range(5)
    ]
    ended = story.alert(alert_id="a0", summary="thing 0", ended_at=story.STARTED + 11, ending="as before")
    live = Live()
    for message in [*story.messages(2), *map(story.told, bodies), story.told(ended, 1)]:
        live.apply(message)
    view = live.view(story.RUN)
    assert view is not None
    text = " ".join(drawn(view, width=160).replace("│", " ").split())
    told = f"✗ thing 4 at {story.RUN} since step 40: {ended.evidence}; {ended.command}"
    assert told in text
    assert "and 1 more alerts: esper alerts" in text
    assert "thing 0: over: as before" in text


def test_the_frame_needs_no_unicode():
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="ascii")
    with view_for("live", stream) as view:
        view.show(view_after(16))
    stream.flush()
    text = data.getvalue().decode("ascii")
    assert "epoch" in text
    assert "o=o=O-.-.-.-." in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert track(SeedStage.FOSSILIZED, ASCII).plain == "o=o=o=o=o=o=#"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (CircuitState.CLOSED, None),
        (CircuitState.OPEN, "open: silent, and not asked for a while"),
        (CircuitState.HALF_OPEN, "half open: the next call tries it"),
    ],
)
@pytest.mark.parametrize("name", ["urza", "tamiyo"])
def test_the_frame_tells_when_a_system_is_not_asked(name, state, told):
    view = view_after(3)
    view = replace(view, last=view.last.model_copy(update={name: state}))
    picture = " ".join(drawn(view, width=140).split())
    said = [f"{name} {words}" in picture for words in ("open: silent", "half open:")]
    assert any(said) == (told is not None)
    assert told is None or f"{name} {told}" in picture


def test_every_stage_has_its_own_word_and_track():
    assert len({look.word for look in LOOKS.values()}) == len(SeedStage)
    tracks = {track(stage).plain for stage in SeedStage if stage.is_active or stage is SeedStage.FOSSILIZED}
    assert len(tracks) == 7
    assert track(SeedStage.CULLED, reached=SeedStage.TRAINING).plain == "●━●━✕"


def test_sparkline_keeps_shape_and_width():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(range(1000), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline([float(i % 7) for i in range(999)], 31)) == 31


def test_plain_view_writes_a_line_an_epoch_and_an_event_and_never_twice():
    stream = io.StringIO()
    view = PlainView(stream)
    for epoch in range(story.EPOCHS):
        picture = view_after(epoch) if epoch in {0, 5, 12, 22, 29} else None
        for _ in range(2):
            if picture is not None:
                view.show(picture)
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"run {story.RUN}: 30 epochs, 1,434 parameters, 3 sites"
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == [f"{i}/30" for i in range(1, 31)]
    events = [line for line in lines if "] stages." in line]
    assert len(events) == len(story.events()) + len(story.rungs())
    assert any(line.startswith("+ [epoch 22] stages.1: residual_conv fine-tuning → fossilized") for line in events)
    assert not any("wait" in line for line in lines)
    # an event stands below the epoch that it ended
    assert lines.index(epochs[5]) < lines.index(events[0]) < lines.index(epochs[6])


def test_plain_lines_carry_no_line_breaks_or_escape_codes_of_others():
    stream = io.StringIO()
    view = PlainView(stream)
    view.notice("a\x1b[2Jb\nc")
    view.notice("a\x1b[2Jb\nc")
    view.notice("")
    assert stream.getvalue() == "! a [2Jb c\n"


def test_the_mode_chooses_the_view():
    stream = io.StringIO()
    assert isinstance(view_for("auto", stream), PlainView)
    assert isinstance(view_for("plain", stream), PlainView)
    assert isinstance(view_for("live", stream), LiveTerminal)
    assert isinstance(view_for("quiet", stream), QuietView)


def test_the_live_view_restores_the_cursor_whatever_happens():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=24)
    with contextlib.suppress(KeyboardInterrupt), LiveTerminal(console) as view:
        view.show(view_after(3))
        view.notice("the loss exploded")
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "the loss exploded" in text
    view.close()


class Recorded(QuietView):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.closed = False

    def show(self, view: LiveView) -> None:
        self.told.append(view.epochs_done)

    def notice(self, text: str) -> None:
        self.told.append(text)

    def close(self) -> None:
        self.closed = True


class Script:
    """Answers in turn; sets `stop` with the last answer."""

    def __init__(self, *answers: LiveView | Exception | None) -> None:
        self.answers = list(answers)
        self.stop = threading.Event()

    def __call__(self) -> LiveView | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if len(self.answers) == 1:
            self.stop.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_following_says_once_that_nissa_is_missing_and_goes_on():
    away = UnavailableError("no answer within 2 s")
    script = Script(None, view_after(1), away, away, view_after(2), view_after(3))
    view = Recorded()
    follow(script, view, script.stop, hz=1000)
    assert view.told[:4] == [2, MISSING, "", 3]
    assert view.told[-1] == 4


@pytest.mark.parametrize(("startup_s", "told"), [(60.0, [2]), (0.0, [MISSING, "", 2])])
def test_a_nissa_that_comes_up_is_not_missing_before_its_time(startup_s, told):
    away = UnavailableError("no answer within 2 s")
    script = Script(away, away, view_after(1), view_after(1))
    view = Recorded()
    follow(script, view, script.stop, hz=1000, startup_s=startup_s)
    assert view.told[: len(told)] == told


def test_a_broken_view_does_not_end_the_run_and_is_closed(caplog):
    class Broken(Recorded):
        def show(self, view: LiveView) -> None:
            raise ZeroDivisionError

    view, asked = Broken(), threading.Event()

    def fetch() -> LiveView:
        asked.set()
        return view_after(0)

    with Follower(fetch, view, hz=1000):
        assert asked.wait(10)
    assert view.closed
    assert "view.failed" in caplog.text


def test_leaving_does_not_wait_for_a_nissa_that_hangs():
    entered, release = threading.Event(), threading.Event()

    def fetch() -> None:
        entered.set()
        release.wait(30)

    view = Recorded()
    follower = Follower(fetch, view, hz=1000, patience_s=0.05)
    with follower:
        assert entered.wait(10)
    assert view.closed
    release.set()
    follower._thread.join()  # no thread of ours may be left where the session ends with this test


@pytest.mark.parametrize("width", [80, 140])
def test_the_end_table_tells_it_all_within_its_width(width):
    text = table(story.summary(), report="/runs/x/report.html", width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    for told in (
        "finished",
        "88.9% validation, 88.1% test",
        "1,434 → 2,666 (x1.86)",
        "shadow 16%",
        "median 6.6 ms",
        "●━●━✕",
        "●━●━●━●━●━●━◆",
        "+0.0412 ± 0.0063",
        "residual_conv, native code",
        "no answer within 5.0 s",
        "/runs/x/report.html",
    ):
        assert told in flat, told
    assert "\x1b" not in text
    assert "\x1b" in table(story.summary(), color=True)


def test_the_end_table_of_a_run_that_failed_or_stopped():
    failed = table(
        story.summary(status=RunStatus.FAILED, error="data are gone", events=(), params=Params(start=5, final=5))
    )
    assert "data are gone" in failed
    assert "no adaptation was begun" in failed
    assert f"esper train --resume {story.RUN}" in table(story.summary(status=RunStatus.INTERRUPTED))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (950, "950"),
        (1_000, "1.00k"),
        (41_300, "41.3k"),
        (999_999, "1.00M"),
        (8.02e9, "8.02G"),
        (0.1234, "0.123"),
    ],
)
def test_short_numbers(value, written):
    assert words.short(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"), [(-1, "0.0 s"), (4.21, "4.2 s"), (42.4, "0:42"), (725, "12:05"), (11_261, "3:07:41")]
)
def test_durations(seconds, written):
    assert words.duration(seconds) == written


def test_a_harm_check_is_never_called_a_gain():
    assert words.gain(story.harm(0.2)) == words.UNKNOWN
    assert words.evidence(story.harm(0.2)).startswith("loss 0.5800 against 0.7800 before (harm check")
    assert not words.is_proven(story.harm(0.2))
    assert words.is_proven(story.shadow(0.02, 0.009))
    assert not words.is_proven(story.shadow(0.02, 0.011))
