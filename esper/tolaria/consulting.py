"""Asking Tamiyo, and what a run does with no answer, with a failure, or with an answer that cannot be meant for it.

A run never ends for Tamiyo's sake: without a usable answer the trainer decides itself, by `Ports.fallback`, and says
so. In deterministic mode it waits for the answer instead, and a failure that would only repeat ends the run: going on
without would make it another run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from esper.leyline.errors import ConflictError, EsperError, UnavailableError
from esper.leyline.signals import AdaptationSignal, Gate, KasminaControlCommand, SystemStatePacket, Veto
from esper.tolaria.course import Course
from esper.tolaria.reach import Reach

_LOG = logging.getLogger(__name__)
_TAMIYO = "Tamiyo"


class Answer(NamedTuple):
    """Tamiyo's next memory, and what shall be done."""

    memory: dict[str, Any]
    signal: AdaptationSignal


class Consulting:
    """Asks on behalf of one run.

    Args:
        course: the run; its ports hold the controller and the fallback.
        reach: to Tamiyo.
    """

    def __init__(self, course: Course, reach: Reach) -> None:
        self._course = course
        self._reach = reach

    def ask(self, memory: dict[str, Any], packet: SystemStatePacket) -> Answer | None:
        """Returns an answer that fits this run and this epoch; None if nobody can give one.

        Raises:
            EsperError: in deterministic mode, what Tamiyo failed with; `UnavailableError` if the run is told to stop
                while it waits.
        """
        controller = self._course.ports.controller
        if controller is None:
            return None

        def question() -> Answer:
            try:
                answer = Answer(*controller.decide(memory, packet))
                _require_fitting(answer.signal, packet)
            except UnavailableError as error:
                raise UnavailableError(f"{error.message}{self._instead()}", field=error.field) from error
            except Exception as error:
                # the edge of the run towards another system: whatever breaks there must not end the training
                if self._course.config.deterministic:
                    raise
                words = _in_words(error)
                _LOG.warning("tamiyo.failed", extra={"error": words, "epoch": packet.epoch.epoch})
                raise UnavailableError(f"it failed: {words}{self._instead()}") from error
            return answer

        answer = self._reach.ask(_TAMIYO, question) or self._own(memory, packet)
        return None if answer is None else answer._replace(signal=self._screened(answer.signal))

    def _instead(self) -> str:
        return "" if self._course.ports.fallback is None else "; the trainer decides itself meanwhile"

    def _own(self, memory: dict[str, Any], packet: SystemStatePacket) -> Answer | None:
        """The trainer's own decision; None without a fallback, or with one that fails as well."""
        fallback = self._course.ports.fallback
        if fallback is None:
            return None
        try:
            answer = Answer(*fallback.decide(memory, packet))
            _require_fitting(answer.signal, packet)
        except Exception as error:  # noqa: BLE001 - as above
            words = _in_words(error)
            self._reach.miss("Tamiyo's fallback", words)
            _LOG.warning("tamiyo.fallback.failed", extra={"error": words, "epoch": packet.epoch.epoch})
            return None
        reason = f"without Tamiyo, decided by the trainer's own {answer.signal.policy}: {answer.signal.reason}"
        return answer._replace(signal=answer.signal.model_copy(update={"reason": reason}))

    def _screened(self, signal: AdaptationSignal) -> AdaptationSignal:
        """Turns commands to seeds that do not exist into vetoes, so that they are on record."""
        known = {(seed.site, seed.seed_id) for seed in self._course.growable.seeds()}
        strange = [command for command in signal.commands if (command.site, command.seed_id) not in known]
        if not strange:
            return signal
        return signal.model_copy(
            update={
                "commands": tuple(command for command in signal.commands if command not in strange),
                "vetoes": (*signal.vetoes, *_vetoes(strange)),
            }
        )


def _in_words(error: Exception) -> str:
    """What we know of it: our own errors speak for themselves, others are named."""
    return str(error) if isinstance(error, EsperError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def _vetoes(strange: Sequence[KasminaControlCommand]) -> list[Veto]:
    return [
        Veto(
            gate=Gate.STAGE,
            action=command.action,
            site=command.site,
            seed_id=command.seed_id,
            blueprint=command.blueprint,
            what=f"{command.action.value} at {command.site}",
            reason=f"this run has no seed {command.seed_id!r} at a site {command.site!r}",
        )
        for command in strange
    ]


def _require_fitting(signal: AdaptationSignal, packet: SystemStatePacket) -> None:
    if (signal.run_id, signal.epoch) != (packet.run_id, packet.epoch.epoch):
        raise ConflictError(
            f"the answer is about epoch {signal.epoch + 1} of run {signal.run_id}, "
            f"asked was epoch {packet.epoch.epoch + 1} of run {packet.run_id}"
        )
