"""Plans that kill producers, consumers and brokers of the bus under load, and what must hold after each.

A plan is drawn from its number. All plans share one bus and four workers; each has keys and a group of its own. What a
worker knows it writes to files before it goes on, so that nothing is lost with it: a producer what was acknowledged to
it, a consumer what was delivered to it. A producer kills itself, with messages on their way; consumers and brokers are
killed once so much is published. So every planned kill comes, and nothing is decided by how long it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayActorError

from actors import oona
from esper.config import OonaConfig
from esper.leyline import Bus, BusCounts, OonaMessage, StepBatch, Topic, UnavailableError
from esper.leyline.bus import GroupStats
from esper.leyline.ports import Subscription
from esper.leyline.signals import EpochRecord
from esper.oona import BusClient

T = TypeVar("T")

WAIT_S = 240.0
PRODUCERS, CONSUMERS, BROKERS = ("p0", "p1"), ("c0", "c1"), ("shard-0", "shard-1")
NUM_MESSAGES = 600
"""Of each producer, over all its lives."""
CHUNK = 20
DROPPING_FROM = 0.5
"""Where a topic drops, consumers begin when so much is published: by then one shard has dropped for certain."""
CONFIG = OonaConfig(
    num_shards=2,
    batch=16,
    backlog=200,
    drop_oldest=(Topic.STEPS,),
    lease_s=5.0,
    max_deliveries=None,
    retain_mb=0.02,
    archive=(),
)
"""A backlog that is soon full: one topic then waits, the other drops. And so little is kept that a broker which comes
again often reads a log whose beginning is gone.
"""


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        number: its seed.
        drops: whether the topic is one whose oldest messages give way.
        kills: (when, whom). For a producer: the share of its own messages that it published, for others: of all.
    """

    number: int
    drops: bool
    kills: tuple[tuple[float, str], ...]

    @classmethod
    def drawn(cls, number: int) -> Plan:
        """The same for the same number; every fourth drops."""
        draw = random.Random(number)
        victims = (*PRODUCERS, *CONSUMERS, *BROKERS)
        kills = sorted((round(draw.uniform(0.05, 0.9), 3), draw.choice(victims)) for _ in range(draw.randint(2, 5)))
        return cls(number, number % 4 == 3, tuple(kills))

    @property
    def victims(self) -> Counter[str]:
        return Counter(victim for _, victim in self.kills)


class Worker:
    """A producer or a consumer, one after the other of many plans."""

    def __init__(self, handle: oona.OonaHandle) -> None:
        self._handle = handle

    def produce(self, folder: str, key: str, count: int, topic: Topic, dies_at: int | None) -> None:
        """Publishes `count` messages of one key, in order, and notes how many were acknowledged; kills itself after
        `dies_at`, if that is given.
        """
        bus = self._bus()
        with (Path(folder) / f"acked-{key}").open("a") as acked:
            for first in range(0, count, CHUNK):
                last = min(first + CHUNK, count)
                bus.publish([message(topic, key, number) for number in range(first, last)])
                if dies_at is not None and last >= dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if first // CHUNK % 3 == 2 or last == count:
                    bus.flush(timeout_s=WAIT_S)
                    print(last, file=acked, flush=True)
        bus.close()

    def consume(self, folder: str, slot: str, life: int, group: str, topic: Topic) -> None:
        """Takes what comes from the file `go` to the file `stop`; notes each delivery before it acknowledges it."""
        (Path(folder) / f"pid-{slot}-{life}").write_text(str(os.getpid()))
        while not (Path(folder) / "go").exists():
            time.sleep(0.02)
        bus = self._bus()
        inbox = _patiently(lambda: bus.subscribe([topic], group=group))
        with (Path(folder) / f"delivered-{slot}-{life}").open("a") as log:
            while not (Path(folder) / "stop").exists():
                self._take(inbox, log)
        bus.close()

    def _take(self, inbox: Subscription, log: Any) -> None:
        try:
            got = inbox.poll(max_messages=40, timeout_s=0.2)
        except UnavailableError:  # a broker that takes its time to come again
            return
        at = time.monotonic()
        for one in got:
            row = Row(at, one.shard, one.offset, one.attempt, one.message.key, number_of(one.message))
            log.write(json.dumps(row) + "\n")
        log.flush()
        inbox.ack(got)

    def _bus(self) -> Bus:
        """One that waits for its brokers, however long they take."""
        return BusClient(oona.RayTransport(self._handle.shards, self._handle.prefix), CONFIG, deadline_s=None)


class Row(NamedTuple):
    """A delivery, as its consumer wrote it down."""

    at: float
    shard: int
    offset: int
    attempt: int
    key: str
    number: int


def message(topic: Topic, key: str, number: int) -> OonaMessage:
    body = (
        StepBatch(run_id=key, first_step=number, losses=(0.5,), milliseconds=(1.0,))
        if topic is Topic.STEPS
        else EpochRecord(run_id=key, epoch=0, num_epochs=1, step=number, train_loss=0.5)
    )
    return OonaMessage.of(topic, body, sender_id="chaos", key=key)


def number_of(message: OonaMessage) -> int:
    return message.payload["first_step" if message.topic is Topic.STEPS else "step"]


class Chaos:
    """The bus, its workers, and the plans that run over them.

    Args:
        handle: the bus, with `CONFIG`.
        root: a folder for what the workers write.
    """

    def __init__(self, handle: oona.OonaHandle, root: Path) -> None:
        self._handle = handle
        self._root = root
        self._bus: Bus = handle.bus()
        cls = ray.remote(Worker).options(num_cpus=0.05, max_restarts=-1, max_task_retries=0)
        self._workers: dict[str, Any] = {slot: cls.remote(handle) for slot in (*PRODUCERS, *CONSUMERS)}

    def close(self) -> None:
        for worker in self._workers.values():
            ray.kill(worker)
        self._bus.close()

    def run(self, plan: Plan) -> dict[str, Any]:
        """Runs a plan and checks what must hold; returns its figures."""
        folder = self._root / f"plan-{plan.number}-{time.time_ns()}"
        folder.mkdir()
        for worker in self._workers.values():
            _until(lambda worker=worker: _is_there(worker))
        began = time.monotonic()
        running = _Running(plan, folder, self._workers, self._handle, self._bus)
        running.go()
        figures = running.check()
        # or its backlog, which nobody reads, would hold up the next plan
        ray.get([_any(shard).forget.remote(folder.name) for shard in self._handle.shards], timeout=WAIT_S)
        return {**asdict(plan), **figures, "seconds": round(time.monotonic() - began, 1)}


@dataclass
class _Life:
    """One life of a producer: what it was given to publish, and whether it did."""

    key: str
    count: int
    is_done: bool = False


class _Running:
    """One plan under way."""

    def __init__(self, plan: Plan, folder: Path, workers: dict[str, Any], handle: oona.OonaHandle, bus: Bus) -> None:
        self._plan, self._folder, self._workers, self._handle, self._bus = plan, folder, workers, handle, bus
        self._topic = Topic.STEPS if plan.drops else Topic.EPOCH
        self._group = folder.name
        self._lives = Counter[str]()
        self._produced: dict[str, list[_Life]] = {slot: [] for slot in PRODUCERS}
        self._deaths = {slot: [share for share, victim in plan.kills if victim == slot] for slot in PRODUCERS}
        self._jobs: dict[str, Any] = {}
        self._killed = Counter[str]()

    def go(self) -> None:
        _patiently(lambda: self._bus.subscribe([self._topic], group=self._group)).close()  # before the first message
        if not self._plan.drops:
            (self._folder / "go").touch()
        for slot in (*PRODUCERS, *CONSUMERS):
            self._start(slot)
        late = [(DROPPING_FROM, "go")] if self._plan.drops else []
        for share, what in sorted([*self._plan.kills, *late]):
            if what not in PRODUCERS:
                _until(lambda share=share: self._published() >= share * NUM_MESSAGES * len(PRODUCERS), self._tend)
                self._do(what)
        _until(lambda: all(slot not in self._jobs for slot in PRODUCERS), self._tend)
        _until(self._is_drained, self._tend)
        (self._folder / "stop").touch()
        _until(lambda: not self._jobs, self._tend)

    def check(self) -> dict[str, Any]:
        """What must hold. Each message has one place; it ends acknowledged or dropped, and never both."""
        assert self._killed == self._plan.victims
        rows = sorted(row for path in self._folder.glob("delivered-*") for row in _rows(path))
        total = Counter[str]()
        for life in (life for lives in self._produced.values() for life in lives):
            counts = _patiently(lambda key=life.key: self._bus.counts(key))
            self._check_key(life, counts, [row for row in rows if row.key == life.key])
            total.update(counts.model_dump())
        assert len({(row.shard, row.offset, row.attempt) for row in rows}) == len(rows)
        group = self._stats()
        told = {name: getattr(group, name) for name in ("delivered", "redelivered", "dropped", "dead")}
        assert told == {name: total[name] for name in told}, (told, total)
        assert (group.pending, group.leased, group.dead) == (0, 0, 0)
        assert total["published"] == group.acknowledged + group.dropped, (total, group)
        places = {(row.shard, row.offset) for row in rows}
        firsts = total["delivered"] - total["redelivered"]
        assert group.acknowledged <= len(places) <= firsts
        assert len(rows) <= total["delivered"]  # what a consumer was killed with was delivered too
        if self._plan.drops:
            assert total["dropped"] > 0
        else:
            assert group.acknowledged == len(places) == firsts == total["published"]
        return {"seen": len(rows), "acknowledged": group.acknowledged, **total}

    # ---- within

    def _check_key(self, life: _Life, counts: BusCounts, rows: list[Row]) -> None:
        """Of one life of a producer, its key."""
        if life.is_done:  # however often it had to send them
            assert counts.published == life.count
        assert self._acked(life) <= counts.published <= life.count
        numbers = list(dict.fromkeys(row.number for row in rows))
        assert len({(row.shard, row.offset) for row in rows}) == len(numbers), f"{life.key}: one message at two places"
        assert numbers == sorted(numbers), f"{life.key}: out of order"
        if self._plan.drops:
            assert len(numbers) >= counts.published - counts.dropped
        else:
            assert counts.dropped == 0
            assert numbers == list(range(counts.published)), f"{life.key}: lost"

    def _start(self, slot: str) -> None:
        worker, folder = self._workers[slot], str(self._folder)
        number = self._lives[slot]
        self._lives[slot] += 1
        if slot in CONSUMERS:
            self._jobs[slot] = worker.consume.remote(folder, slot, number, self._group, self._topic)
            return
        given, deaths = sum(map(self._acked, self._produced[slot])), self._deaths[slot]
        life = _Life(f"{self._folder.name}-{slot}-{number}", NUM_MESSAGES - given)
        dies_at = max(1, int(deaths[0] * NUM_MESSAGES) - given) if deaths else None
        self._produced[slot].append(life)
        self._jobs[slot] = worker.produce.remote(folder, life.key, life.count, self._topic, dies_at)

    def _tend(self) -> None:
        """Starts anew what was killed; a producer's next life publishes what is left, under another key."""
        if not self._jobs:
            return
        done, _ = ray.wait(list(self._jobs.values()), num_returns=len(self._jobs), timeout=0)
        for slot in [slot for slot, job in self._jobs.items() if job in done]:
            try:
                ray.get(self._jobs.pop(slot))
            except RayActorError:
                self._bury(slot)
                if slot in PRODUCERS or not (self._folder / "stop").exists():
                    self._start(slot)
            else:
                assert slot in PRODUCERS or (self._folder / "stop").exists(), f"{slot} ended by itself"
                if slot in PRODUCERS:
                    self._produced[slot][-1].is_done = True

    def _bury(self, slot: str) -> None:
        if slot in CONSUMERS:
            assert self._killed[slot], f"{slot} died by itself"
            return
        began = (self._folder / f"acked-{self._produced[slot][-1].key}").exists()
        if began:  # else Ray gave this life to the process that was killed before
            assert self._deaths[slot], f"{slot} died by itself"
            del self._deaths[slot][0]
            self._killed[slot] += 1

    def _do(self, what: str) -> None:
        if what == "go":
            (self._folder / "go").touch()
            return
        if what in BROKERS:
            shard = _any(self._handle.shards[int(what[-1])])
            pid = ray.get(shard.describe.remote(), timeout=WAIT_S).pid
        else:
            _until(lambda: self._pid_of(what) is not None, self._tend)
            path = self._pid_of(what)
            assert path is not None
            pid = int(path.read_text())
            path.rename(path.with_name(f"killed-{path.name}"))
        self._killed[what] += 1
        os.kill(pid, signal.SIGKILL)

    def _pid_of(self, slot: str) -> Path | None:
        """The file with the process of its present life, once that has begun."""
        return next((path for path in self._folder.glob(f"pid-{slot}-*") if path.read_text()), None)

    def _acked(self, life: _Life) -> int:
        path = self._folder / f"acked-{life.key}"
        return max((int(line) for line in path.read_text().split()), default=0) if path.exists() else 0

    def _published(self) -> int:
        return sum(self._acked(life) for lives in self._produced.values() for life in lives)

    def _is_drained(self) -> bool:
        return self._stats().pending == 0

    def _stats(self) -> GroupStats:
        [group] = [group for group in _patiently(self._bus.stats).groups if group.group == self._group]
        return group


def _rows(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the line that its writer was killed in
            yield Row(*json.loads(line))


def _any(value: Any) -> Any:
    """An actor's handle, whose methods no checker knows."""
    return value


def _is_there(worker: Any) -> bool:
    try:
        return ray.get(worker.__ray_ready__.remote(), timeout=WAIT_S)
    except RayActorError:  # killed by the plan before, which Ray has just found out
        return False


def _patiently(ask: Callable[[], T]) -> T:
    """Asks until brokers that were killed are there again."""
    ends = time.monotonic() + WAIT_S
    while True:
        try:
            return ask()
        except UnavailableError:
            if time.monotonic() > ends:
                raise


def _until(happened: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    ends = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < ends, "it did not happen"
        meanwhile()
        time.sleep(0.02)
