"""Forks as Ray tasks: they take what is idle, never wait in the queue, and give way."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import ray
import tolaria_support
from tolaria_support import SITE, config, kernel_hub, workload

from actors.cluster import connected
from actors.trials import NEEDED, Free, Origin, RayTrials, free_cpus
from esper.api import fork_local
from esper.config import parse_config
from esper.leyline import Fork, TrialCandidate
from esper.tolaria.packing import pack

pytestmark = pytest.mark.ray

STEPS = 9


def settings(**changes):
    tree = config().model_dump(mode="json")
    tree["deterministic"] = False
    tree["tamiyo"] |= {"policy": "heuristic", "schedule": []}
    tree["tamiyo"]["trials"] = {"enabled": True, "steps": STEPS, "cpus": 1.0, "at_once": 2} | changes
    return parse_config(tree)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray whose workers find this file and what it imports."""
    found = [str(Path(__file__).parent), str(Path(tolaria_support.__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, found)))
        patch.setattr(os, "cpu_count", lambda: 2)  # what the tests below take all of, whatever machine this is
        with connected(dashboard=False):
            yield


def problem():
    return workload(settings())


def packed():
    """The state of a run before its first step."""
    import torch

    from esper.kasmina import wrap
    from esper.leyline import NoFaults
    from esper.tolaria.course import Course, Ports
    from esper.tolaria.optim import Optimization

    chosen, given = settings(), problem()
    host = wrap(given.model, example=given.example, sites=chosen.kasmina.sites, config=chosen.kasmina)
    optimizer = given.optimizer(list(given.model.parameters()))
    scheduler = given.scheduler(optimizer, 24)
    course = Course(
        host, Optimization(optimizer, scheduler), given.task, chosen, "run", Ports(faults=NoFaults()),
        torch.device("cpu"), given.model,
    )  # fmt: skip
    return pack(course)


def kernel():
    hub, _ = kernel_hub()
    found = next(k for k in hub.kernels() if k.pipeline == "fast")
    return TrialCandidate(
        site=SITE, seed_id="s0", kernel_id=found.kernel_id, blueprint_id=found.blueprint_id, blueprint="mlp_2x"
    )


class Here:
    """A hub in the fork's own process."""

    def __getattr__(self, name):
        return getattr(kernel_hub()[0], name)

    def __reduce__(self):
        return Here, ()


class Slow:
    """Holds every fork up at its second step."""

    def __init__(self, seconds):
        self.seconds = seconds

    def at(self, place, step):
        if (place, step) == ("fork", 1):
            time.sleep(self.seconds)


def trials(faults=None, **changes):
    _, key = kernel_hub()
    return RayTrials(Origin(problem, settings(**changes), Here(), key, faults))


def wait_for(what, seconds=240.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.1)


def all_free():
    wait_for(lambda: free_cpus() == Free((float(ray.cluster_resources()["CPU"]),)))


FORKS = [
    Fork("none", None, 0, STEPS, 10**12),
    Fork("grows", None, 1, STEPS, 10**12),
    Fork("third", None, 2, STEPS, 10**12),
]


def test_forks_on_ray_come_to_what_they_come_to_here():
    all_free()
    state, hub_key = packed(), kernel_hub()
    forks = [Fork("none", None, 0, STEPS, 10**12), Fork("grows", kernel(), 0, STEPS, 10**12), FORKS[2]]
    port = trials()
    assert port.idle() == 2
    port.start(state, forks)
    wait_for(lambda: len(port.results()) == 3)
    assert {result.failure for result in port.results().values()} == {""}
    for fork in forks:
        here = fork_local(problem, settings(), state, fork, hub=hub_key[0], public_key=hub_key[1])
        there = port.results()[fork.fork_id]
        assert (there.losses, there.weights, there.flops, there.failure) == (here.losses, here.weights, here.flops, "")
    assert port.cancel("the run ended first") == port.results()


def test_no_fork_begins_while_nothing_is_idle_and_none_waits_in_the_queue():
    all_free()

    @ray.remote(num_cpus=2)
    def busy(seconds):
        time.sleep(seconds)

    held = busy.remote(600)
    wait_for(lambda: free_cpus().nodes == (0.0,))
    port = trials()
    assert port.idle() == 0
    port.start(packed(), FORKS)
    time.sleep(3.0)
    assert free_cpus() == Free((0.0,)), "nothing waits for CPUs"
    assert port.results() == {}
    results = port.cancel("late")
    assert {r.failure for r in results.values()} == {"late"}
    assert sum(r.flops for r in results.values()) == 0, "none had begun"
    ray.cancel(held, force=True)


def test_forks_give_way_to_whoever_waits_for_cpus():
    all_free()
    port = trials(Slow(600.0))
    port.start(packed(), FORKS)
    wait_for(lambda: free_cpus().nodes == (0.0,))

    @ray.remote(num_cpus=2)
    def training():
        return "trains"

    assert ray.get(training.remote(), timeout=240.0) == "trains"
    wait_for(lambda: len(port.results()) == 3)
    results = port.results()
    assert {r.failure for r in results.values()} == {NEEDED}
    assert [results[f.fork_id].flops for f in FORKS] == [10**12, 10**12, 0], "what had begun is counted at its limit"
    port.cancel("over")


class Killed:
    """Kills the fork's own process."""

    def at(self, place, step):
        if (place, step) == ("fork", 3):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_fork_whose_process_is_killed_is_told_and_not_tried_again():
    all_free()
    port = trials(Killed(), at_once=1)
    port.start(packed(), FORKS[:2])
    wait_for(lambda: len(port.results()) == 2)
    assert all("Crashed" in r.failure or "Died" in r.failure for r in port.results().values())
    assert all(r.flops == 10**12 for r in port.results().values())
    port.cancel("over")


def test_what_a_trainer_takes_without_asking_is_left_to_it():
    _, key = kernel_hub()
    origin = Origin(problem, settings(), Here(), key)
    for nodes, reserved, expected in (
        ((2.0,), 0.0, 2), ((2.0,), 1.0, 1), ((1.2,), 1.0, 0), ((8.0,), 1.0, 2), ((0.6, 0.6), 0.0, 0),
        ((1.0, 1.0), 1.0, 1),
    ):  # fmt: skip
        assert RayTrials(origin, reserved=reserved, look=partial(Free, nodes)).idle() == expected
    assert RayTrials(origin, look=lambda: Free((8.0,), is_waited_for=True)).idle() == 0
