"""What the trainer tells the world: messages to the bus, steps many at a time. Rank 0 alone has one."""

from __future__ import annotations

from esper.leyline.contract import Contract
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Bus
from esper.leyline.signals import StepBatch
from esper.leyline.summary import BusCounts
from esper.tolaria.reach import Reach

ENOUGH_STEPS, MOST_STEPS = 20, 256
"""Steps that travel together: at least where they are fast, and at most."""
SHORT_MS, LONG_MS = 200.0, 2000.0
"""Milliseconds of steps in a message: at least, as nobody looks more often and each message costs; and at most."""


class Outbox:
    """Publishes for one run.

    Args:
        bus: None publishes nothing.
        run_id: the key of all messages.
        reach: what to do when the bus does not answer.
    """

    def __init__(self, bus: Bus | None, *, run_id: str, reach: Reach) -> None:
        self._bus = bus
        self._run_id = run_id
        self._reach = reach
        self._waited_ms = 0.0
        self._first_step = 0
        self._losses: list[float] = []
        self._milliseconds: list[float] = []
        self._marks: list[int] = []

    def publish(self, topic: Topic, *bodies: Contract, trace_id: str = "") -> None:
        """Publishes bodies on one topic; `trace_id` is that of the adaptation they tell of, empty for none."""
        if self._bus is None or not bodies:
            return
        bus = self._bus
        messages = [
            OonaMessage.of(topic, body, sender_id="tolaria", key=self._run_id, trace_id=trace_id or None)
            for body in bodies
        ]
        self._reach.ask("Oona", lambda: bus.publish(messages))

    def step(self, step: int, loss: float, milliseconds: float, *, steps_per_epoch: int) -> None:
        """Adds one step; those that wait are sent when they are enough."""
        if not self._losses:
            self._first_step = step
        self._losses.append(loss)
        self._milliseconds.append(milliseconds)
        self._waited_ms += milliseconds
        num = len(self._losses)
        is_due = self._waited_ms >= LONG_MS or (num >= ENOUGH_STEPS and self._waited_ms >= SHORT_MS)
        if is_due or num >= MOST_STEPS:
            self.send_steps(steps_per_epoch=steps_per_epoch)

    def mark(self, step: int) -> None:
        """Marks a change of the live path."""
        self._marks.append(step)

    def send_steps(self, *, steps_per_epoch: int) -> None:
        """Sends the steps that wait."""
        if not self._losses:
            return
        batch = StepBatch(
            run_id=self._run_id,
            first_step=self._first_step,
            losses=tuple(self._losses),
            milliseconds=tuple(self._milliseconds),
            steps_per_epoch=steps_per_epoch,
            marks=tuple(self._marks),
        )
        self._losses, self._milliseconds, self._marks, self._waited_ms = [], [], [], 0.0
        self.publish(Topic.STEPS, batch)

    def flush(self) -> None:
        """Returns once the broker has all that was published."""
        if self._bus is not None:
            bus = self._bus
            self._reach.ask("Oona", lambda: bus.flush(timeout_s=10.0))

    def counts(self) -> BusCounts:
        """Counts of this run's messages; zeros when the bus does not answer."""
        if self._bus is None:
            return BusCounts()
        bus = self._bus
        return self._reach.ask("Oona", lambda: bus.counts(self._run_id)) or BusCounts()
