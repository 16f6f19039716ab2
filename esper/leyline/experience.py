"""What a run lived through, decision by decision, for whoever learns from it: the port by which a trainer tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from esper.leyline.signals import AdaptationSignal, EpochRecord, FieldReport, SystemStatePacket


class ExperienceLog(Protocol):
    """Keeps a run's decisions. No call waits for the storage but `close`, and none raises where that fails: a run is
    unharmed without.
    """

    def decided(self, state: Mapping[str, Any], packet: SystemStatePacket, signal: AdaptationSignal) -> None:
        """Takes in one decision.

        Args:
            state: Tamiyo's, before it.
            packet: what was known.
            signal: the answer.
        """
        ...

    def close(self, last: EpochRecord | None, ended: Sequence[FieldReport], *, is_over: bool) -> str | None:
        """Writes what is left.

        Args:
            last: the newest epoch's row.
            ended: what became of the run's adaptations.
            is_over: whether the run has come to its end; else it may be resumed, and the episode stays open.

        Returns:
            What was not kept, in words; None if all is.
        """
        ...


class NoExperience:
    """The log of a run that keeps none."""

    def decided(self, state: Mapping[str, Any], packet: SystemStatePacket, signal: AdaptationSignal) -> None:
        """Keeps nothing."""

    def close(self, last: EpochRecord | None, ended: Sequence[FieldReport], *, is_over: bool) -> str | None:
        """Writes nothing."""
