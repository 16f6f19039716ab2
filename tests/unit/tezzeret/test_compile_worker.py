"""The compile worker against the real hub and bus in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from actors.tezzeret import GROUP, CompileWorker
from esper.leyline import (
    BlueprintIR,
    BlueprintStatus,
    CompiledKernelArtifact,
    KernelCharacterized,
    Node,
    OonaMessage,
    SiteKind,
    SiteSignature,
    Topic,
    UnavailableError,
    keys,
)
from esper.leyline.container import unpack
from esper.oona.memory import MemoryBus
from esper.tezzeret.builder import InProcess
from esper.tezzeret.fingerprint import target_fingerprint
from esper.tezzeret.worker import Compiled, Idle, Overtaken, Rejected, Returned, work_once
from esper.urabrask.gauntlet import examine
from esper.urza.memory import MemoryHub

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SITES = tuple(SiteSignature(kind=SiteKind.VECTOR, channels=n) for n in (3, 4, 5))
GOOD = BlueprintIR(
    fit=(SiteKind.VECTOR,),
    nodes=(Node(id="lin", op="linear", params={"init": "zeros"}),),
    output="lin",
    zero_at_birth=True,
)
LIAR = GOOD.model_copy(update={"nodes": (Node(id="lin", op="linear"),)})  # declared zero at birth, and is not


def turn(hub, worker: str = "w1"):
    return work_once(hub, InProcess(examine), worker=worker, private_key=KEY)


def test_a_turn_compiles_one_job_and_hands_it_over():
    hub = MemoryHub()
    assert turn(hub) == Idle()
    blueprint = hub.submit_blueprint(GOOD, name="good", targets=SITES[:1])
    outcome = turn(hub)
    assert isinstance(outcome, Compiled)
    [stored] = hub.kernels(signature=SITES[0])
    assert stored == outcome.artifact
    assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.VALIDATED
    kernel = unpack(hub.fetch(stored.kernel_id), keys.public_hex(KEY))
    assert kernel.manifest.blueprint_id == blueprint.blueprint_id
    assert turn(hub) == Idle()


def test_a_kernel_that_fails_a_check_makes_the_blueprint_invalid_with_the_reason():
    hub = MemoryHub()
    blueprint = hub.submit_blueprint(LIAR, name="liar", targets=SITES[:1])
    outcome = turn(hub)
    assert isinstance(outcome, Rejected)
    assert "zero_at_birth" in outcome.reason
    known = hub.blueprint(blueprint.blueprint_id)
    assert known.status is BlueprintStatus.INVALID
    assert "zero_at_birth" in known.reason
    assert hub.kernels() == []


@pytest.mark.parametrize("ir", [GOOD, LIAR])
def test_a_worker_whose_lease_ran_out_gives_way(ir: BlueprintIR):
    time = [0.0]
    hub = MemoryHub(clock=lambda: time[0])
    hub.submit_blueprint(ir, name="slow", targets=SITES[:1])

    def slowly(module, ir, signature):
        time[0] += 1000.0
        assert hub.claim("faster", fingerprint=target_fingerprint()) is not None
        return examine(module, ir, signature)

    outcome = work_once(hub, InProcess(slowly), worker="slow", private_key=KEY)
    assert isinstance(outcome, Overtaken)
    assert hub.kernels() == []


def test_what_torch_refuses_is_tried_again_and_then_a_rejection_not_a_crash():
    hub = MemoryHub()
    hub.submit_blueprint(GOOD, name="good", targets=SITES[:1])

    def no_memory(module, ir, signature):
        raise RuntimeError("not enough\nmemory")

    outcomes = [work_once(hub, InProcess(no_memory), worker="w1", private_key=KEY) for _ in range(3)]
    assert [type(outcome) for outcome in outcomes] == [Returned, Returned, Rejected]
    assert outcomes[-1].reason == "torch: not enough memory"
    assert hub.blueprints()[0].status is BlueprintStatus.INVALID


@dataclass
class Pool:
    """A hub and a bus in memory, a listener on it, and the workers that a test starts."""

    hub: MemoryHub = field(default_factory=MemoryHub)
    bus: MemoryBus = field(default_factory=MemoryBus)
    workers: list[CompileWorker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.heard = self.bus.subscribe((Topic.KERNEL_READY, Topic.KERNEL_CHARACTERIZED), group="listener")

    def start(self, name: str, **changes) -> CompileWorker:
        factories = {
            "hub": lambda: self.hub,
            "bus": lambda: SharedBus(self.bus),
            "private_key": lambda: KEY,
            "builder": lambda: InProcess(examine),
        }
        worker = CompileWorker(name, **{**factories, **changes})
        self.workers.append(worker)
        return worker

    def submit(self, name: str, *targets: SiteSignature, ir: BlueprintIR = GOOD) -> None:
        blueprint = self.hub.submit_blueprint(ir, name=name, targets=targets)
        message = OonaMessage.of(
            Topic.BLUEPRINT_SUBMITTED, blueprint, sender_id="test", key=blueprint.blueprint_id, trace_id=f"t-{name}"
        )
        self.bus.publish([message])

    def hear(self, count: int) -> list[OonaMessage]:
        messages: list[OonaMessage] = []
        while len(messages) < count:
            deliveries = self.heard.poll(timeout_s=20.0)
            assert deliveries, f"only {len(messages)} of {count} messages came"
            self.heard.ack(deliveries)
            messages += [delivery.message for delivery in deliveries]
        return messages


class SharedBus:
    """A client of a bus that outlives it: closing it leaves the groups it joined."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self._subscriptions = []
        self.publish = bus.publish

    def subscribe(self, topics, *, group, key=None, from_start=False):
        subscription = self._bus.subscribe(topics, group=group, key=key, from_start=from_start)
        self._subscriptions.append(subscription)
        return subscription

    def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.bus.close()
    assert all(worker.stop() for worker in pool.workers)


def test_a_worker_takes_up_what_was_submitted_before_it_came(pool: Pool):
    pool.submit("good", *SITES)
    pool.start("w1", wake_s=3600.0)
    messages = pool.hear(2 * len(SITES))
    ready = [m.body() for m in messages if m.topic is Topic.KERNEL_READY]
    assert sorted(a.kernel_id for a in ready if isinstance(a, CompiledKernelArtifact)) == sorted(
        artifact.kernel_id for artifact in pool.hub.kernels()
    )


class WatchedHub(MemoryHub):
    """Tells when a worker has found nothing to do: from then on only news makes it look again."""

    def __init__(self) -> None:
        super().__init__()
        self.is_empty = threading.Event()

    def claim(self, *args, **settings):
        job = super().claim(*args, **settings)
        if job is None:
            self.is_empty.set()
        return job


def test_news_wakes_a_waiting_worker(pool: Pool):
    pool.hub = hub = WatchedHub()
    worker = pool.start("w1", wake_s=3600.0)
    assert hub.is_empty.wait(20.0)
    pool.submit("good", SITES[0])
    verdict, ready = sorted(pool.hear(2), key=lambda message: message.topic is Topic.KERNEL_READY)
    body = verdict.body()
    assert isinstance(body, KernelCharacterized)
    assert body.report.passed
    # the trace is the message's: it was the news and nothing else that woke the worker
    assert (ready.trace_id, ready.sender_id) == ("t-good", "w1")
    assert worker.counts() == (1, 0)
    assert repr(worker).startswith("Tezzeret(w1, ")
    assert repr(worker).endswith(", 1 compiled, 0 rejected)")


def test_two_workers_share_the_work_and_do_it_once(pool: Pool):
    names = [f"b{i}" for i in range(6)]
    workers = [pool.start(name, wake_s=3600.0) for name in ("w1", "w2")]
    for index, name in enumerate(names):
        pool.submit(name, SiteSignature(kind=SiteKind.VECTOR, channels=10 + index))
    pool.hear(2 * len(names))
    assert sum(worker.counts()[0] for worker in workers) == len(names)
    assert len(pool.hub.kernels()) == len(names)


def test_work_of_a_dead_worker_is_found_without_news(pool: Pool):
    time = [0.0]
    pool.hub = MemoryHub(clock=lambda: time[0])
    pool.submit("orphan", SITES[0])
    assert pool.hub.claim("dead", fingerprint=target_fingerprint(), lease_s=60.0) is not None
    pool.start("w1", wake_s=0.01)
    time[0] = 61.0
    assert {message.topic for message in pool.hear(2)} == {Topic.KERNEL_READY, Topic.KERNEL_CHARACTERIZED}


def test_a_rejected_job_does_not_stop_the_next(pool: Pool):
    worker = pool.start("w1", wake_s=3600.0)
    pool.submit("liar", SITES[0], ir=LIAR)
    pool.submit("good", SITES[1])
    pool.hear(2)
    assert worker.counts() == (1, 1)


def test_a_hub_that_comes_back_is_used_again(pool: Pool):
    attempts: list[str] = []

    def connect() -> MemoryHub:
        attempts.append("connect")
        if len(attempts) == 1:
            raise UnavailableError("Urza is gone")
        return pool.hub

    pool.submit("good", SITES[0])
    pool.start("w1", hub=connect, wake_s=3600.0)
    assert len(pool.hear(2)) == 2
    assert len(attempts) == 2


def test_stop_ends_the_thread_and_leaves_the_group(pool: Pool):
    worker = pool.start("w1", wake_s=3600.0)
    pool.submit("good", SITES[0])
    pool.hear(2)
    assert worker.ready() > 0
    assert worker.stop()
    assert worker.state() == "stopped"
    pool.submit("late", SITES[1], ir=GOOD.model_copy(update={"fit": (SiteKind.VECTOR, SiteKind.SEQUENCE)}))
    other = pool.bus.subscribe((Topic.BLUEPRINT_SUBMITTED,), group=GROUP)
    came: set[str] = set()
    while "t-late" not in came:  # "t-good" may come again, if the worker stopped before it acknowledged
        deliveries = other.poll(timeout_s=20.0)
        assert deliveries
        came |= {delivery.message.trace_id for delivery in deliveries}
