"""Workers and compilers of the pool are killed at random, by fixed plans: every blueprint that was submitted ends
VALIDATED or INVALID, once, by the log of events that anybody can read.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from urza_samples import design

from actors import oona, pool, urza
from actors.cluster import NAMESPACE, disconnect
from esper.config import OonaConfig, TezzeretConfig
from esper.leyline import BlueprintIR, BlueprintStatus, Node, Pipeline, SiteKind, SiteSignature
from esper.leyline.container import unpack
from esper.storage import Storage
from esper.urza.events import read_events
from esper.urza.records import EventKind

pytestmark = pytest.mark.ray

KEY_BYTES = bytes(range(32))
NUM_GOOD, NUM_LIARS, NUM_KILLS = 10, 2, 4
LEASE_S = 15.0
WAIT_S = 240.0
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=8)
LIAR = BlueprintIR(
    fit=(SiteKind.VECTOR,), nodes=(Node(id="lin", op="linear"),), output="lin", zero_at_birth=True
)  # says that it is zero at birth, and is not
SLOW_GAUNTLET = """
import time
from esper.urabrask.gauntlet import examine as really

def examine(module, ir, signature):
    time.sleep(0.5)  # so that a kill finds work under way
    return really(module, ir, signature)
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # of its own: without an address it would join one that somebody else has started on this machine
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    disconnect()


@pytest.fixture
def platform(tmp_path):
    """A pool of two workers, an Urza and an Oona; gives the handles of the first two."""
    address, gauntlet = str(tmp_path / "store"), tmp_path / "gauntlet"
    gauntlet.mkdir()
    (gauntlet / "slow.py").write_text(SLOW_GAUNTLET)
    key = Storage.at(address).key
    bus = oona.spawn(OonaConfig(), tmp_path / "oona", prefix=f"oona-{key}")
    connect = lambda: oona.connect(f"oona-{key}").bus()  # noqa: E731 -- by value: workers cannot import this file
    hub = urza.spawn(address, make_bus=connect, num_cpus=0.01, deadline_s=60.0)
    folder = str(gauntlet)

    def builder(config, device):
        import sys

        sys.path.append(folder)
        from esper.tezzeret.process import CompilerProcess

        return CompilerProcess("slow:examine", examine_native="esper.urabrask.native:examine_native", device=device)

    plan = pool.Plan(
        prefix=f"tezzeret-{key}",
        address=address,
        options={},
        config=TezzeretConfig(min_workers=2, max_workers=2, cpus_per_worker=0.01, lease_s=LEASE_S),
        make_bus=connect,
        private_key=lambda: Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
        builder=builder,
    )
    compilers = pool.spawn(f"compilers-{key}", plan, detached=False, every_s=0.5)
    yield hub, compilers
    ray.get(compilers.stop.remote(), timeout=120)
    ray.kill(compilers)
    ray.kill(hub._actor)
    bus.stop()


def processes(compilers) -> tuple[list[int], list[int]]:
    """The workers' processes, and those of their compilers."""
    workers = []
    for name in ray.get(compilers.workers.remote(), timeout=60):
        with suppress(ValueError, ray.exceptions.RayError):
            workers.append(ray.get(ray.get_actor(name, namespace=NAMESPACE).ready.remote(), timeout=60))
    found = []
    for worker in workers:
        for path in Path(f"/proc/{worker}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, path.read_text().split())
    return workers, [pid for pid in found if b"esper.tezzeret.child" in _command(pid)]


def descendants(pid: int) -> list[int]:
    """What a process has started, and what those have."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def run_plan(hub, compilers, storage, seed: int, *, num_native: int = 0) -> str:
    """One plan: submit, kill at random places, wait for the end, look at the log. Returns what happened, in words.

    Args:
        num_native: good designs that are compiled to native code: their compilers have started others (g++).
    """
    plan = random.Random(seed)
    names = [f"good-{n}" for n in range(NUM_GOOD)] + [f"liar-{n}" for n in range(NUM_LIARS)]
    plan.shuffle(names)
    sites = {name: SITE.model_copy(update={"channels": 4 + n}) for n, name in enumerate(sorted(names))}
    submitted = {}
    for number, name in enumerate(names):
        ir = LIAR if name.startswith("liar") else design(2 + number)
        is_native = name in [f"good-{n}" for n in range(num_native)]
        submitted[name] = hub.submit_blueprint(
            ir,
            name=name,
            targets=[sites[name]],
            priority=plan.randint(0, 9),
            pipelines=[Pipeline.OPTIMIZED if is_native else Pipeline.FAST],
        )
    killed: Counter[str] = Counter()
    deadline = time.monotonic() + WAIT_S * (1 + 2 * num_native)
    # the last kill of a plan with native code waits for what a compiler has started
    while hub.pending(list(sites.values())):
        is_full = killed.total() >= NUM_KILLS
        if is_full and (killed["C++ compiler"] or not num_native):
            break
        assert time.monotonic() < deadline, f"only {dict(killed)} kills"
        time.sleep(plan.uniform(0.1, 2.0))
        workers, children = processes(compilers)
        started = [pid for child in children for pid in descendants(child)]
        kind, victims = ("compiler", children) if plan.random() < 0.5 else ("worker", workers)
        if is_full or (started and plan.random() < 0.5):
            kind, victims = "C++ compiler", started
        if victims:
            with suppress(ProcessLookupError):
                os.kill(plan.choice(victims), signal.SIGKILL)
                killed[kind] += 1
    while hub.pending(list(sites.values())):
        assert time.monotonic() < deadline, f"{hub.backlog()} is left after {dict(killed)} kills"
        time.sleep(0.2)
    assert killed.total() >= 1
    counts = check_log(hub, storage, submitted)
    return f"seed {seed}: killed {dict(killed)}, {counts}"


def check_log(hub, storage, submitted) -> str:
    """Holds the log against what was submitted."""
    events = read_events(storage)
    ends: dict[str, list[EventKind]] = {}
    for event in events:
        if event.kind in {EventKind.TARGET_COMPILED, EventKind.TARGET_FAILED}:
            ends.setdefault(event.id, []).append(event.kind)
    kernels = [event for event in events if event.kind is EventKind.KERNEL_STORED]
    assert len({event.body.compile_key for event in kernels}) == len(kernels)  # no work was counted twice
    verdicts: Counter[BlueprintStatus] = Counter()
    for name, blueprint in submitted.items():
        [target] = hub.targets(blueprint.blueprint_id)
        assert len(ends[target.job_id]) == 1, f"{name} ended {ends[target.job_id]}"
        found = hub.blueprint(blueprint.blueprint_id)
        expected = {
            EventKind.TARGET_COMPILED: BlueprintStatus.VALIDATED,
            EventKind.TARGET_FAILED: BlueprintStatus.INVALID,
        }
        assert found.status is expected[ends[target.job_id][0]]
        if name.startswith("liar"):
            assert found.status is BlueprintStatus.INVALID
        elif found.status is BlueprintStatus.INVALID:  # killed twice at it: that looks like poison, and says so
            assert "given up" in found.reason
        else:
            [kernel] = hub.kernels(blueprint_id=blueprint.blueprint_id)
            key = Ed25519PrivateKey.from_private_bytes(KEY_BYTES).public_key()
            assert unpack(hub.fetch(kernel.kernel_id), key).manifest.blueprint_name == name
        verdicts[found.status] += 1
    lost = sum(event.kind in {EventKind.TARGET_EXPIRED, EventKind.TARGET_RELEASED} for event in events)
    return f"{dict(verdicts)}, {lost} leases lost"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_blueprint_ends_once_whoever_is_killed(platform, tmp_path, seed):
    hub, compilers = platform
    run_plan(hub, compilers, Storage.at(str(tmp_path / "store")), seed)


RESULTS = Path(os.environ.get("ESPER_SOAK_DIR", ".soak")) / "compile-workers" / "results.jsonl"
"""A line for each plan that is done; a soak that was ended goes on with the others."""


def done() -> dict[int, str]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["seed"]: row["words"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def told(capfd_of_module) -> Iterator[None]:
    """Prints the results of all plans at the end."""
    yield
    with capfd_of_module():
        print("\n" + "\n".join(done().values()))  # noqa: T201 -- the soak's result


@pytest.fixture(scope="module")
def capfd_of_module(request):
    return request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled


@pytest.fixture
def undone(seed: int, told: None) -> int:
    """A plan that is to be run; asked for before a platform is started."""
    if seed in done():
        pytest.skip(f"done before: {done()[seed]}")
    return seed


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 120))
def test_every_blueprint_ends_once_whoever_is_killed_for_long(undone, platform, tmp_path):
    hub, compilers = platform
    words = run_plan(hub, compilers, Storage.at(str(tmp_path / "store")), undone, num_native=1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"seed": undone, "words": words}) + "\n")
