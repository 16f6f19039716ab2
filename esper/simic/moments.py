"""An episode: the decisions of one run in their order, as they were logged. Pure data; no storage, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from esper.leyline import AdaptationSignal, EpochRecord, FieldReport, SystemStatePacket


@dataclass(frozen=True, slots=True)
class Moment:
    """One decision.

    Attributes:
        state: Tamiyo's memory before it, plain JSON.
        packet: what was known.
        signal: the answer.
    """

    state: dict[str, Any]
    packet: SystemStatePacket
    signal: AdaptationSignal

    @property
    def epoch(self) -> int:
        """After which it was taken."""
        return self.packet.epoch.epoch


@dataclass(frozen=True, slots=True)
class About:
    """What an episode is of, the same for all its decisions.

    Attributes:
        run_id: of the run.
        policy: who decided.
        policy_version: of a learned one; empty for others.
        task, host, data: by their types' names.
        seed: of the run.
        tamiyo: the configuration of Tamiyo, plain JSON: the masks depend on it.
        code: digest of the sources that decided.
    """

    run_id: str
    policy: str
    policy_version: str = ""
    task: str = ""
    host: str = ""
    data: str = ""
    seed: int = 0
    tamiyo: dict[str, Any] = field(default_factory=dict)
    code: str = ""


@dataclass(frozen=True, slots=True)
class Episode:
    """One run.

    Attributes:
        moments: its decisions, oldest first.
        last: the row of its last epoch.
        ended: what became of all its adaptations.
        is_over: whether the run came to its end; else what is here was cut off.
        gains: the reward of each moment by evidence, as it was logged (see `reward`); empty where it was not computed.
    """

    about: About
    moments: tuple[Moment, ...]
    last: EpochRecord | None = None
    ended: tuple[FieldReport, ...] = ()
    is_over: bool = False
    gains: tuple[float, ...] = ()

    def closed(self, last: EpochRecord | None, ended: Sequence[FieldReport]) -> Episode:
        """The episode with its end."""
        return replace(self, last=last, ended=tuple(ended), is_over=True)
