"""The compile pool on Ray: real workers with real compiler processes, an Urza and an Oona of their own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ir_mutations import any_signature, near_valid
from ray.exceptions import RayActorError
from urza_samples import VECTOR, design

from actors import oona, pool, urza
from actors.cluster import NAMESPACE, disconnect
from actors.platform import down
from esper.config import OonaConfig, TezzeretConfig
from esper.leyline import BlueprintStatus, CompiledKernelArtifact, EsperError, SiteKind, SiteSignature, Topic
from esper.leyline.blueprints import parse_ir
from esper.leyline.container import unpack
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits
from esper.storage import Storage
from esper.urza.catalog import TargetState

pytestmark = pytest.mark.ray

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WAIT_S = 240.0
GAUNTLET = """
import os, time
from pathlib import Path
from esper.urabrask.gauntlet import examine as really

HERE = Path({folder!r})

def examine(module, ir, signature):
    if signature.channels > 100:
        print("the end is near", flush=True)  # before it can be seen that it stands here: it may be killed at once
        (HERE / f"{{os.getpid()}}.begun").touch()
        while not (HERE / "gate").exists():
            time.sleep(0.02)
    return really(module, ir, signature)
"""
"""Looks at a site of more than 100 channels only once a gate is open."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        "local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    disconnect()


@pytest.fixture
def gate(tmp_path):
    """A folder with a gauntlet that waits at a gate, and says who waits there."""
    folder = tmp_path / "gauntlet"
    folder.mkdir()
    (folder / "gated.py").write_text(GAUNTLET.format(folder=str(folder)))
    return folder


@pytest.fixture
def platform(tmp_path, gate):
    """Starts a pool over an Urza and an Oona; gives handles of all three.

    The pool has one worker unless a test asks for more: how many it would take depends on how long the machine takes.
    """
    address = str(tmp_path / "store")
    prefix = f"oona-{Storage.at(address).key}"
    bus = oona.spawn(OonaConfig(), tmp_path / "oona", prefix=prefix)
    connect = lambda: oona.connect(prefix).bus()  # noqa: E731 -- by value: workers cannot import this file
    hub = urza.spawn(address, make_bus=connect, num_cpus=0.01, deadline_s=240.0)
    made = []

    def start(ir_limits=DEFAULT_LIMITS, **settings):
        config = TezzeretConfig(**{"cpus_per_worker": 0.01, "lease_s": 20.0, "max_workers": 1, **settings})
        folder = str(gate)

        def builder(config, device):
            sys.path.append(folder)
            from esper.tezzeret.process import CompilerProcess, Limits

            limits = Limits(timeout_s=config.job_timeout_s, memory_mb=config.job_memory_mb)
            return CompilerProcess("gated:examine", device=device, limits=limits, ir_limits=ir_limits)

        plan = pool.Plan(
            prefix=f"tezzeret-{Storage.at(address).key}",
            address=address,
            options={},
            config=config,
            make_bus=connect,
            private_key=lambda: Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
            builder=builder,
        )
        made.append(pool.spawn(f"compilers-{Storage.at(address).key}", plan, detached=False, every_s=0.2))
        return made[-1]

    yield start, hub, connect
    with contextlib.suppress(RayActorError, EsperError):  # a test may have taken it all down
        for actor in made:
            ray.get(actor.stop.remote(), timeout=400)
            ray.kill(actor)
        ray.kill(hub._actor)
        bus.stop()


def site(channels: int) -> SiteSignature:
    return SiteSignature(kind=SiteKind.VECTOR, channels=channels)


def until(holds, what: str):
    """What `holds` returns, once it is something."""
    deadline = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"no {what} within {WAIT_S:g} s"
        time.sleep(0.1)
    return found


def status(hub, blueprint):
    return hub.blueprint(blueprint.blueprint_id).status


def settled(hub, blueprint):
    """The state in which a blueprint ends."""
    ends = {BlueprintStatus.VALIDATED, BlueprintStatus.INVALID}
    return until(lambda: status(hub, blueprint) in ends and status(hub, blueprint), f"end of {blueprint.name}")


def waiting(gate, number: int = 1) -> list[int]:
    """The compiler processes that stand at the gate, the dead ones not among them."""

    def alive() -> list[int]:
        pids = [int(path.stem) for path in gate.glob("*.begun")]
        found = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        return found if len(found) >= number else []

    return until(alive, f"{number} compilers at work")


def pids(compilers) -> dict[str, int]:
    """The pool's workers that live: one may be let go between the listing and the asking."""
    found = {}
    for name in ray.get(compilers.workers.remote(), timeout=60):
        with contextlib.suppress(ValueError, RayActorError):
            found[name] = ray.get(ray.get_actor(name, namespace=NAMESPACE).ready.remote(), timeout=60)
    return found


def test_what_is_submitted_is_compiled_signed_and_told_of(platform):
    start, hub, connect = platform
    bus = connect()
    heard = bus.subscribe((Topic.KERNEL_READY,), group="test")
    compilers = start()
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    assert settled(hub, blueprint) is BlueprintStatus.VALIDATED
    [kernel] = hub.kernels(signature=VECTOR)
    assert unpack(hub.fetch(kernel.kernel_id), KEY.public_key()).manifest.blueprint_name == "adapter"
    [delivery] = until(lambda: heard.poll(timeout_s=5.0), "news of the kernel")
    body = delivery.message.body()
    assert isinstance(body, CompiledKernelArtifact)
    assert body.kernel_id == kernel.kernel_id
    [(name, pid)] = pids(compilers).items()
    assert name.endswith("-cpu-0")
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()  # it is in the compiler's process
    heard.close()
    bus.close()


def test_the_work_of_a_worker_that_is_killed_is_done_by_its_successor(platform, gate):
    start, hub, _ = platform
    compilers = start()
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[site(200)])
    [compiler] = waiting(gate)
    [worker] = pids(compilers).values()
    os.kill(worker, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{compiler}").exists(), "end of the compiler whose worker was killed")
    waiting(gate)
    (gate / "gate").touch()
    assert settled(hub, blueprint) is BlueprintStatus.VALIDATED
    [target] = hub.targets(blueprint.blueprint_id)
    assert (target.attempts, target.deaths) == (2, 1)
    [successor] = pids(compilers).values()
    assert successor != worker


@pytest.mark.parametrize("silent_s", [0.0, 12.0])  # a busy machine may let a worker wait so long for a core
def test_a_platform_that_is_taken_down_counts_no_death_for_the_work_under_way(platform, gate, tmp_path, silent_s):
    start, hub, _ = platform
    compilers = start()
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[site(200)])
    waiting(gate)
    [worker] = pids(compilers).values()
    os.kill(worker, signal.SIGSTOP)
    wakes = threading.Timer(silent_s, os.kill, (worker, signal.SIGCONT))
    wakes.start()
    down(str(tmp_path / "store"))
    wakes.join()
    again = urza.spawn(str(tmp_path / "store"), num_cpus=0.01, deadline_s=240.0)
    [target] = again.targets(blueprint.blueprint_id)
    ray.kill(again._actor)
    assert (target.state, target.attempts, target.deaths) == (TargetState.QUEUED, 1, 0)


def test_work_that_kills_its_compiler_twice_is_given_up_with_its_last_lines_and_the_worker_lives(platform, gate):
    start, hub, _ = platform
    compilers = start()
    poison = hub.submit_blueprint(design(), name="poison", targets=[site(300)])
    [first] = waiting(gate)
    [worker] = pids(compilers).values()
    os.kill(first, signal.SIGSEGV)
    until(lambda: not Path(f"/proc/{first}").exists(), "end of the first compiler")
    [second] = waiting(gate)
    os.kill(second, signal.SIGSEGV)
    assert settled(hub, poison) is BlueprintStatus.INVALID
    [target] = hub.targets(poison.blueprint_id)
    assert "given up after 2 attempts: the compiler was killed by SIGSEGV" in target.reason
    assert target.reason in hub.blueprint(poison.blueprint_id).reason
    assert "the end is near" in target.log
    good = hub.submit_blueprint(design(5), name="good", targets=[VECTOR])
    assert settled(hub, good) is BlueprintStatus.VALIDATED
    assert list(pids(compilers).values()) == [worker]


def test_a_lease_is_renewed_while_the_work_goes_on_and_urza_may_be_killed_meanwhile(platform, gate):
    start, hub, _ = platform
    start(lease_s=3.0)
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[site(200)])
    waiting(gate)
    [target] = hub.targets(blueprint.blueprint_id)
    until(lambda: hub.targets(blueprint.blueprint_id)[0].deadline > target.deadline, "renewal")
    os.kill(hub.ready(), signal.SIGKILL)
    renewed = hub.targets(blueprint.blueprint_id)[0].deadline
    until(lambda: hub.targets(blueprint.blueprint_id)[0].deadline > renewed, "renewal by the next Urza")
    (gate / "gate").touch()
    assert settled(hub, blueprint) is BlueprintStatus.VALIDATED
    assert hub.targets(blueprint.blueprint_id)[0].attempts == 1


def test_the_pool_grows_with_the_work_and_shrinks_when_there_is_none(platform, gate):
    from esper.leyline import Pipeline

    start, hub, _ = platform
    compilers = start(max_workers=3, idle_s=1.0)
    until(lambda: len(pids(compilers)) == 1, "worker")
    # nothing was ever compiled by this pipeline: each counts as half a minute of work
    both = (Pipeline.FAST, Pipeline.OPTIMIZED)
    for number in range(5):
        hub.submit_blueprint(design(3 + number), name=f"d{number}", targets=[site(200)], pipelines=both)
    until(lambda: len(pids(compilers)) == 3, "growth")
    waiting(gate, 3)
    (gate / "gate").touch()
    until(lambda: hub.pending([site(200)], pipeline=Pipeline.FAST) == 0, "end of the fast work")
    until(lambda: hub.pending([site(200)]) == 0, "end of the work")
    until(lambda: len(pids(compilers)) == 1, "shrinking")


def test_no_nearly_right_design_ends_an_actor_and_each_is_settled(platform, gate):
    (gate / "gate").touch()
    start, hub, _ = platform
    compilers = start(IRLimits(parameters=1 << 16, flops=1 << 22, activation_bytes=1 << 18))
    before = hub.ready(), until(lambda: pids(compilers), "worker")
    chance = random.Random(5)
    refused, taken = 0, []
    for number in range(40):
        raw = near_valid(chance)
        try:
            ir = parse_ir(json.dumps(raw))
            targets = [any_signature(chance, raw), VECTOR, site(1 << 20)]
            taken.append(hub.submit_blueprint(ir, name=f"d{number}", targets=targets))
        except EsperError:
            refused += 1
    assert refused >= 5
    assert len(taken) >= 5
    sound = hub.submit_blueprint(design(), name="sound", targets=[VECTOR], priority=0)
    assert settled(hub, sound) is BlueprintStatus.VALIDATED
    for one in taken:
        settled(hub, one)
    reasons = [target.reason for one in taken for target in hub.targets(one.blueprint_id) if target.reason]
    assert any("asks for too much" in reason for reason in reasons)
    assert all(len(reason) < 1_000 for reason in reasons)
    assert (hub.ready(), pids(compilers)) == before


def test_a_killed_pool_finds_its_workers_again(platform):
    start, hub, _ = platform
    compilers = start()
    before = until(lambda: pids(compilers), "worker")
    os.kill(ray.get(compilers.ready.remote(), timeout=60), signal.SIGKILL)
    until(lambda: _answers(compilers), "pool")
    assert pids(compilers) == before
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    assert settled(hub, blueprint) is BlueprintStatus.VALIDATED


def _answers(actor) -> bool:
    try:
        return ray.get(actor.ready.remote(), timeout=30) > 0
    except (RayActorError, ray.exceptions.GetTimeoutError):
        return False
