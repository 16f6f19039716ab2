"""What observing a run costs, and how many datapoints Nissa takes in a minute.

Cost: two sessions of one host take turns in one process, an epoch of 50 steps each with its validation; one has no
bus, the other publishes all that a trainer tells. Ratios of CPU time, of the whole process:

    publishing      what the trainer's process pays: contracts, encoding, the bus's client (its broker too, here)
    all of Nissa    publishing, and beside it in the same process a consumer that decodes every message, folds it into
                    the live view, watches for anomalies and makes the metrics' samples once an epoch

On a cluster Nissa is a process of its own, so the second is what both pay together.

Datapoints: batches of step telemetry (a loss and a time for each of 20 steps) and health reports (five figures a site)
go over the bus in memory, are decoded, folded and watched, as fast as they come. Counted is CPU time, of publisher,
broker and Nissa together; by the wall clock other work on the machine counts too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from esper import kasmina
from esper.config import parse_config
from esper.hosts import build_host
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Bus, Subscription
from esper.leyline.signals import LayerHealthReport, StepBatch
from esper.nissa.anomalies import Watch
from esper.nissa.live import TOPICS, Live
from esper.nissa.metrics import of_run
from esper.oona.memory import MemoryBus
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.workload import evaluation_batches
from jobs.bench.harness import BenchResult, Goal, goal_at_most, interleaved, machine
from jobs.bench.overhead import HOSTS
from jobs.bench.streams import RUN, episode

BATCH, STEPS_PER_EPOCH = 16, 50
WARM_UP = 4
"""Chunks of messages before the count begins: imports fall into them."""
GOAL, DATAPOINTS_GOAL = 1.02, 1_000_000


class Observer:
    """Nissa without an actor: decodes, folds, watches."""

    def __init__(self, bus: Bus) -> None:
        self._subscription: Subscription = bus.subscribe(TOPICS, group="nissa", from_start=True)
        self._live, self._watch = Live(), Watch()

    def take(self) -> int:
        """Takes what there is; returns how many messages that was."""
        total = 0
        while deliveries := self._subscription.poll(max_messages=512, timeout_s=0.0):
            for delivery in deliveries:
                body = self._live.take(delivery.message)
                if body is not None:
                    self._watch.apply(body, delivery.message.timestamp)
            self._subscription.ack(deliveries)
            total += len(deliveries)
        return total

    def samples(self) -> int:
        """Makes the metrics' samples; returns how many."""
        views = [view for run_id in self._live.run_ids() if (view := self._live.view(run_id)) is not None]
        return sum(1 for view in views for _ in of_run(view))


class Arm:
    """One run of a host, an epoch at a time."""

    def __init__(self, name: str, *, bus: Bus | None, observer: Observer | None = None) -> None:
        kind, shape, outputs = HOSTS[name]
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(BATCH, *shape, generator=generator)
        self._y = torch.randint(outputs, (BATCH,), generator=generator)
        settings = {"data": {"type": "given"}, "host": {"type": "given"}, "tolaria": {"epochs": 1_000_000}}
        config = parse_config(settings, [])
        model = build_host(kind, input_shape=shape, num_outputs=outputs, seed=0)
        self.host = kasmina.wrap(model, example=(self._x[:2],), config=config.kasmina)
        self._optimizer = torch.optim.AdamW([p for _, p in self.host.live_parameters()], lr=1e-4)
        self._bus, self._observer = bus, observer
        self.session = Session(
            self.host, Optimization(self._optimizer), TASKS["classification"], example=(self._x[:2],), config=config,
            run_id=f"bench-{name}", ports=Ports(bus=bus), val=evaluation_batches((self._x, self._y), batch_size=BATCH),
            steps_per_epoch=STEPS_PER_EPOCH,
        )  # fmt: skip
        self.session.begin()

    def epoch(self) -> None:
        """Trains one epoch; what it told is with the broker afterwards, and with Nissa if there is one."""
        for _ in range(STEPS_PER_EPOCH):
            self._optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.session.course.model(self._x), self._y)
            loss.backward()
            self._optimizer.step()
            self.session.step((self._x, self._y), loss)
        self.session.end_epoch()
        if self._bus is not None:
            self._bus.flush()
        if self._observer is not None:
            self._observer.take()
            self._observer.samples()

    def close(self) -> None:
        """Ends the run's threads and hooks."""
        self.session.keep_experience(is_over=True)
        self.host.close()


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="esper bench nissa", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds of four epochs a figure, at least 10")
    parser.add_argument("--hosts", nargs="+", choices=("cnn", "mlp"), default=("cnn", "mlp"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of CPU, for the stream of datapoints")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [row for name in options.hosts for row in cost(name, options.rounds, say)]
    finally:
        torch.set_num_threads(threads)
    rate, by_the_clock = datapoints(options.seconds)
    words = f"{60 * rate:,.0f} datapoints in a minute of one core, {60 * by_the_clock:,.0f} by the wall clock"
    say(words)
    goals = [goal for _, goal in costs]
    goals.append(
        Goal(
            name="datapoints in a minute of one core",
            value=60 * rate,
            goal=DATAPOINTS_GOAL,
            met=60 * rate >= DATAPOINTS_GOAL,
            interval=(60 * rate, 60 * rate),
        )
    )
    return BenchResult(
        name="nissa", machine=machine(), rows=tuple(row for row, _ in costs), goals=tuple(goals), verdict=words
    )


def cost(name: str, rounds: int, say: Callable[[str], None]) -> list[tuple[dict[str, object], Goal]]:
    """The rows and goals of one host."""
    found = []
    for what in ("publishing", "all of Nissa"):
        bus = MemoryBus()
        # without a reader a broker in memory keeps all that was published
        observed = Arm(name, bus=bus, observer=Observer(bus) if what == "all of Nissa" else None)
        bare = Arm(name, bus=None)
        try:
            estimate = interleaved(bare.epoch, observed.epoch, rounds=rounds)
        finally:
            bare.close()
            observed.close()
            bus.close()
        say(f"{name}, {what}: {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]")
        row = {"host": name, "what": what, "ratio": estimate.value, "low": estimate.low, "high": estimate.high,
               "rounds": estimate.num_samples}  # fmt: skip
        found.append((row, goal_at_most(f"{name}, {what}", estimate, GOAL)))
    return found


def datapoints(seconds: float) -> tuple[float, float]:
    """Datapoints that Nissa takes in a second of CPU, and of the wall clock; publishing included."""
    bus = MemoryBus()
    observer = Observer(bus)
    stream = endless()
    points, began, cpu = 0, 0.0, 0.0
    try:
        for number in itertools.count():
            if number == WARM_UP:
                points, began, cpu = 0, time.perf_counter(), time.process_time()
            if number > WARM_UP and time.process_time() - cpu >= seconds:
                break
            bodies = list(itertools.islice(stream, 256))
            topics = [Topic.STEPS if isinstance(body, StepBatch) else Topic.SEED_HEALTH for body in bodies]
            told = [OonaMessage.of(t, body, sender_id="bench", key=RUN) for t, body in zip(topics, bodies, strict=True)]
            bus.publish(told)
            bus.flush()
            observer.take()
            points += sum(2 * len(b.losses) if isinstance(b, StepBatch) else 5 * len(b.seeds) for b in bodies)
    finally:
        bus.close()
    return points / (time.process_time() - cpu), points / (time.perf_counter() - began)


def endless() -> Iterator[StepBatch | LayerHealthReport]:
    """The telemetry of a made-up run, again and again, with steps that go on."""
    bodies = [body for _, body in episode(0, hours=0.3).signals if isinstance(body, StepBatch | LayerHealthReport)]
    length = max(body.first_step + len(body.losses) for body in bodies if isinstance(body, StepBatch))
    for lap in itertools.count():
        for body in bodies:
            if isinstance(body, StepBatch):
                marks = tuple(mark + lap * length for mark in body.marks)
                yield body.model_copy(update={"first_step": body.first_step + lap * length, "marks": marks})
            else:
                yield body.model_copy(update={"step": body.step + lap * length})
