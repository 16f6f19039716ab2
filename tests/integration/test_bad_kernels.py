"""Kernels that pass Urabrask and turn bad in the trainer do a run no lasting harm; useful ones are let through.

`make test` runs a few; `make soak` runs all of them on several seeds, and keeps its rows below `ESPER_SOAK_DIR`
(default: `.soak`), where it goes on if it was stopped; delete the folder to begin again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bad_kernels
import pytest
from bad_kernels import BAD, USEFUL, Battery, Row, controls, table

CONTROL_SEEDS = range(8)
SEEDS = range(3)
FIXED = ("nan_when_live", "shape_shifts_in_late_eval", "gradient_upstream_reversed")
"""A rollback in a step, one at a validation, and a refusal before the kernel is near the host."""


def quiet(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def battery():
    return Battery(None, quiet)


@pytest.fixture(scope="module")
def spread(battery):
    """The largest validation loss of the runs that do not grow."""
    return max(row.val_loss for row in controls(battery, "mlp", range(5)))


@pytest.mark.parametrize("kernel", FIXED)
def test_a_bad_kernel_is_contained(battery, spread, kernel):
    row = battery.run(kernel, "mlp", 0)
    assert_contained(row, spread)
    assert row.stages[-1:] != ["FOSSILIZED"]
    assert (row.rollbacks > 0) == (kernel != "gradient_upstream_reversed")


def test_a_useful_kernel_is_let_through(battery, spread):
    row = battery.run("mlp_2x", "mlp", 0)
    assert (row.status, row.stages[-1], row.rollbacks) == ("finished", "FOSSILIZED", 0)
    assert not row.same_host


def test_a_rollback_that_is_not_exact_would_be_seen(monkeypatch):
    give_back = bad_kernels.snapshot.give_back

    def careless(state, growable, optimization):
        give_back(state, growable, optimization)
        next(growable.module.parameters()).data.mul_(1.0 + 1e-6)

    monkeypatch.setattr(bad_kernels.snapshot, "give_back", careless)
    assert Battery(None, quiet).run("nan_when_live", "mlp", 0).inexact > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_of_them_on_several_seeds(capsys):
    folder = Path(os.environ.get("ESPER_SOAK_DIR", ".soak")).resolve() / "bad-kernels"

    def say(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    battery = Battery(folder, say)
    spreads = {host: max(row.val_loss for row in controls(battery, host, CONTROL_SEEDS)) for host in USEFUL}
    bad = [battery.run(kernel, "mlp", seed) for kernel in BAD for seed in SEEDS]
    useful = [
        battery.run(kernel, host, seed) for host, kernels in USEFUL.items() for kernel in kernels for seed in SEEDS
    ]
    refused = [row for row in useful if row.stages[-1:] != ["FOSSILIZED"]]
    say(f"control, largest validation loss: {spreads}\n{table(bad)}\n\n{table(useful)}\n")
    say(f"{len(refused)} of {len(useful)} runs of useful kernels refused")
    for row in refused:
        say(f"  {row.kernel} on {row.host}, seed {row.seed}: {row.reasons[-2:]}")
    for row in bad:
        assert_contained(row, spreads["mlp"])
    for row in useful:
        assert (row.status, row.inexact) == ("finished", 0), row
    assert len(refused) < len(useful) / 2


def assert_contained(row: Row, spread: float) -> None:
    assert row.status == "finished", row
    assert row.val_loss <= spread, row
    assert row.inexact == 0, row
    if "GRAFTING" not in row.stages:
        assert row.same_host, row  # it never met the host: not a bit is different
