"""Chaos on the bus: producers, consumers and brokers are killed under load; nothing acknowledged is lost, order holds,
and the counts add up exactly.

`make test` runs three fixed plans, `make soak` a hundred; it keeps its results below `ESPER_SOAK_DIR` (default:
`.soak`), where it goes on if it was stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

import bus_chaos  # noqa: E402
from ray import cloudpickle  # noqa: E402

from actors import oona  # noqa: E402

cloudpickle.register_pickle_by_value(bus_chaos)  # workers know no folder of tests

NUM_PLANS = 100
FIXED = (
    bus_chaos.Plan(  # a broker that comes again three times, the last time from a log without its beginning
        1000,
        False,
        ((0.1, "shard-0"), (0.3, "c0"), (0.5, "shard-0"), (0.6, "p0"), (0.7, "shard-1"), (0.8, "shard-0"), (0.9, "c1")),
    ),
    bus_chaos.Plan(1001, False, ((0.2, "c0"), (0.2, "c1"), (0.4, "p1"), (0.4, "shard-0"), (0.4, "shard-1"))),
    bus_chaos.Plan(1002, True, ((0.2, "shard-1"), (0.4, "p0"), (0.6, "shard-0"), (0.8, "c0"))),
)


@pytest.fixture(scope="module")
def chaos(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("bus")
    handle = oona.spawn(bus_chaos.CONFIG, root / "log", prefix="chaos")
    chaos = bus_chaos.Chaos(handle, root)
    yield chaos
    chaos.close()
    handle.stop()


@pytest.mark.parametrize("plan", FIXED, ids=lambda plan: str(plan.number))
def test_nothing_acknowledged_is_lost_and_the_counts_add_up(chaos, plan):
    chaos.run(plan)


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_hundred_random_plans(chaos, capsys):
    folder = Path(os.environ.get("ESPER_SOAK_DIR", ".soak")).resolve() / "bus"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PLANS):
        done = folder / f"plan-{number:02d}.json"
        if done.exists():
            continue
        found = chaos.run(bus_chaos.Plan.drawn(number))
        with capsys.disabled():
            sys.stdout.write(f"{json.dumps(found)}\n")
            sys.stdout.flush()
        done.write_text(json.dumps(found))
    assert len(list(folder.glob("plan-*.json"))) == NUM_PLANS
