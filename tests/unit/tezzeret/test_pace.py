"""When a compiler gives way to a trainer, and how it sees one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from esper.leyline import Pipeline
from esper.leyline.presence import Presence, TrainerOnMachine, trainers
from esper.tezzeret import neighbours
from esper.tezzeret.neighbours import LOOK_EVERY_S, Neighbours, Watch
from esper.tezzeret.pace import PERIOD_S, Pace

ALONE = Neighbours(num_trainers=0, free_cores=0.0)
CROWDED = Neighbours(num_trainers=1, free_cores=0.2)
ROOMY = Neighbours(num_trainers=1, free_cores=1.0)


@pytest.mark.parametrize(
    ("yields", "pipeline", "seen", "share_of_time"),
    [
        ("never", Pipeline.OPTIMIZED, CROWDED, 1.0),
        ("auto", Pipeline.OPTIMIZED, ALONE, 1.0),
        ("auto", Pipeline.OPTIMIZED, ROOMY, 1.0),
        ("auto", Pipeline.OPTIMIZED, CROWDED, 0.25),
        ("auto", Pipeline.FAST, CROWDED, 1.0),
        ("between_epochs", Pipeline.OPTIMIZED, ALONE, 1.0),
        ("between_epochs", Pipeline.OPTIMIZED, ROOMY, 0.0),
        ("between_epochs", Pipeline.FAST, CROWDED, 0.0),
    ],
)
def test_it_runs_for_this_share_of_the_time(yields, pipeline, seen, share_of_time):
    times = [PERIOD_S * n / 100 for n in range(1000)]
    clock = iter(times)
    pace = Pace(yields, 0.25, lambda: seen, lambda: next(clock))
    assert sum(pace(pipeline) for _ in times) / len(times) == pytest.approx(share_of_time, abs=0.02)


def test_a_trainer_shows_when_it_takes_steps_and_leaves_no_sign(tmp_path):
    presence = Presence(tmp_path)
    assert trainers(tmp_path / "nowhere") == trainers(tmp_path) == []
    with presence.shown():
        assert trainers(tmp_path) == [TrainerOnMachine(os.getpid(), is_busy=False)]
        with presence.busy():
            assert trainers(tmp_path) == [TrainerOnMachine(os.getpid(), is_busy=True)]
        assert trainers(tmp_path) == [TrainerOnMachine(os.getpid(), is_busy=False)]
    assert list(tmp_path.iterdir()) == []


def test_the_sign_of_a_trainer_that_was_killed_says_nothing(tmp_path):
    code = (
        "import sys, pathlib, time; from esper.leyline.presence import Presence\n"
        "presence = Presence(pathlib.Path(sys.argv[1]))\n"
        "with presence.shown(), presence.busy():\n"
        "    print('shown', flush=True); time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout.readline() == b"shown\n"
        assert trainers(tmp_path) == [TrainerOnMachine(trainer.pid, is_busy=True)]
        trainer.kill()
        trainer.wait()
    assert trainers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / str(os.getpid())).write_text("+1")  # one of the same id, that began at another time
    assert trainers(tmp_path) == []


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path):
    (tmp_path / "file").write_text("")
    with Presence(tmp_path / "file" / "folder").shown():
        assert trainers(tmp_path) == []


def test_the_watch_counts_trainers_that_share_a_core_and_what_nobody_uses(tmp_path):
    watch = Watch(list, tmp_path)
    watch.look()
    presence = Presence(tmp_path)
    with presence.shown():
        time.sleep(LOOK_EVERY_S)
        assert watch.look().num_trainers == 0
        with presence.busy():
            time.sleep(LOOK_EVERY_S)
            seen = watch.look()
    assert seen.num_trainers == 1
    assert 0.0 <= seen.free_cores <= len(os.sched_getaffinity(0))


def test_idle_seconds_that_linux_takes_back_are_no_debt(tmp_path, monkeypatch):
    """Its count of those in which a core waited for a disk may fall."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(neighbours, "time", clock)
    watch = Watch(list, tmp_path)
    counts = iter([(10.0, 0.0), (9.75, 0.0), (10.25, 0.0)])
    monkeypatch.setattr(watch, "_counts", lambda: next(counts))
    free = []
    for _ in range(3):
        free.append(watch.look().free_cores)
        clock.now += 1.0
    assert free == [0.0, 0.0, 0.5]


def test_what_the_compiler_uses_itself_is_free_for_it(tmp_path):
    burner = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        alone, with_it = Watch(list, tmp_path), Watch(lambda: [burner.pid], tmp_path)
        deadline = time.monotonic() + 60.0
        while with_it._counts()[1] < 0.2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert alone._counts()[1] == 0.0
    finally:
        burner.kill()
        burner.wait()
