"""The figures of the benchmark of stalls, on steps that are made up."""

from __future__ import annotations

from jobs.bench.stall import Times, _goals, _row


def test_a_stall_is_the_worst_step_against_that_of_the_control():
    control = [10.0] * 99 + [20.0]
    changed = Times(window=[20.0] * 9 + [10.0] * 20 + [30.0], grafted=[20.0] * 9 + [30.0])
    row = _row("cnn", "graft", [10.0] * 99 + [50.0], changed, control)
    assert (row["stall"], row["worst"], row["steps"]) == (1.25, 2.5, 100), "over the median while the kernel is live"
    assert (row["window worst"], row["window"]) == (1.5, 30)
    assert _row("cnn", "control", control, Times(), control)["stall"] == 1.0


def test_goals_tell_stalls_and_that_compiling_in_the_trainer_is_one():
    stalls = {"idle": 0.9, "graft": 1.2, "graft and hot swap": 1.4, "inline torch.compile": 80.0}
    graft, swap, inline = _goals("cnn", [{"arm": arm, "stall": value} for arm, value in stalls.items()])
    assert (graft.met, swap.met, inline.met) == (True, False, True)
    assert graft.interval[0] < 1.2 < graft.interval[1]
    stalls |= {"graft": 1.4, "inline torch.compile": 3.0}
    assert not any(goal.met for goal in _goals("cnn", [{"arm": arm, "stall": v} for arm, v in stalls.items()]))
