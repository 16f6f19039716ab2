"""The envelope of the bus and the list of topics, each with the contract of its payload."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from esper.leyline.alerts import Alert
from esper.leyline.blueprints import Blueprint
from esper.leyline.bus import DeadLetter
from esper.leyline.contract import Contract, Finite, new_id, now
from esper.leyline.kernels import CompiledKernelArtifact
from esper.leyline.native import RungChange
from esper.leyline.policies import PolicyEvent
from esper.leyline.signals import (
    AdaptationSignal,
    EpochRecord,
    FieldReport,
    KernelCharacterized,
    LayerHealthReport,
    LifecycleEvent,
    RunStarted,
    RunState,
    StepBatch,
)


class Topic(StrEnum):
    """Every topic. `PAYLOADS` says what travels on it."""

    SEED_HEALTH = "telemetry.seed.health"
    STEPS = "telemetry.training.steps"
    KASMINA_COMMANDS = "control.kasmina.commands"
    BLUEPRINT_SUBMITTED = "compilation.blueprint.submitted"
    KERNEL_READY = "compilation.kernel.ready"
    KERNEL_CHARACTERIZED = "validation.kernel.characterized"
    RUN_STARTED = "system.events.run"
    EPOCH = "system.events.epoch"
    LIFECYCLE = "system.events.lifecycle"
    RUNGS = "system.events.rung"
    ALERTS = "system.events.alert"
    POLICIES = "system.events.policy"
    RUN_STATE = "system.events.state"
    FIELD_REPORTS = "innovation.field_reports"
    DEAD_LETTERS = "system.dead_letters"


PAYLOADS: dict[Topic, type[Contract]] = {
    Topic.SEED_HEALTH: LayerHealthReport,
    Topic.STEPS: StepBatch,
    Topic.KASMINA_COMMANDS: AdaptationSignal,
    Topic.BLUEPRINT_SUBMITTED: Blueprint,
    Topic.KERNEL_READY: CompiledKernelArtifact,
    Topic.KERNEL_CHARACTERIZED: KernelCharacterized,
    Topic.RUN_STARTED: RunStarted,
    Topic.EPOCH: EpochRecord,
    Topic.LIFECYCLE: LifecycleEvent,
    Topic.RUNGS: RungChange,
    Topic.ALERTS: Alert,
    Topic.POLICIES: PolicyEvent,
    Topic.RUN_STATE: RunState,
    Topic.FIELD_REPORTS: FieldReport,
    Topic.DEAD_LETTERS: DeadLetter,
}


class OonaMessage(Contract):
    """One message as it travels.

    Attributes:
        event_id: unique; the same message delivered twice carries the same id.
        sender_id: the actor or worker that sent it.
        timestamp: seconds since the epoch, at the sender.
        trace_id: follows one adaptation through all systems.
        topic: where it is published.
        key: ordering key, usually the run id; order holds within (topic, key).
        payload: the JSON form of the topic's contract.
    """

    event_id: str = Field(default_factory=new_id)
    sender_id: Annotated[str, Field(min_length=1, max_length=256)]
    timestamp: Finite = Field(default_factory=now)
    trace_id: Annotated[str, Field(min_length=1, max_length=64)]
    topic: Topic
    key: Annotated[str, Field(min_length=1, max_length=256)]
    payload: dict[str, Any]

    @classmethod
    def of(cls, topic: Topic, body: Contract, *, sender_id: str, key: str, trace_id: str | None = None) -> OonaMessage:
        """Wraps `body`.

        Raises:
            TypeError: if the topic carries another contract.
        """
        if not isinstance(body, PAYLOADS[topic]):
            raise TypeError(f"{topic} carries {PAYLOADS[topic].__name__}, not {type(body).__name__}")
        return cls(
            sender_id=sender_id,
            trace_id=trace_id or new_id(),
            topic=topic,
            key=key,
            payload=body.model_dump(mode="json"),
        )

    def body(self) -> Contract:
        """The payload as its contract."""
        return PAYLOADS[self.topic].model_validate(self.payload)


_BATCH = TypeAdapter(list[OonaMessage])


def encode(messages: Sequence[OonaMessage]) -> bytes:
    """Encodes a whole batch as one JSON list."""
    return _BATCH.dump_json(list(messages))


def decode(data: bytes | memoryview) -> list[OonaMessage]:
    """Inverse of `encode`."""
    with _uncollected():
        return _BATCH.validate_json(bytes(data))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps the garbage collector from looking at the objects of a batch again and again while they come: it would find
    nothing, and costs as much as the decoding.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def topics(values: Iterable[str]) -> tuple[Topic, ...]:
    """Parses topic names; raises `ValueError` for an unknown one."""
    return tuple(Topic(value) for value in values)
