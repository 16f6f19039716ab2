"""Asking other systems: what happens when one does not answer. Knows no question and no answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from esper.leyline.errors import UnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class Reach:
    """Asks, and either goes on without an answer (and says so) or waits until there is one.

    Args:
        patient: deterministic mode: ask again until there is an answer.
        stop: a reason ends the waiting, with the error of the last try.
    """

    def __init__(self, *, patient: bool, stop: Callable[[], str | None]) -> None:
        self._patient = patient
        self._stop = stop
        self._went_without: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._pause = threading.Event()  # never set: a wait that a signal handler can interrupt

    @property
    def went_without(self) -> tuple[str, ...]:
        """Every system that at some time did not answer, in words, the first time of each."""
        return tuple(self._went_without.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """The systems that did not answer when last asked, in words."""
        return tuple(self._missing.values())

    def lacks(self, system: str) -> bool:
        """Whether the system did not answer when last asked."""
        return system in self._missing

    def ask(self, system: str, question: Callable[[], T]) -> T | None:
        """Returns the answer; None if the system is not there and this run may go on without.

        Raises:
            UnavailableError: in deterministic mode, when the run is told to stop while it waits.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                answer = question()
            except UnavailableError as error:
                self._note(system, error)
                if not self._patient:
                    return None
                if self._stop() is not None:
                    raise
                self._pause.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._missing.pop(system, None)
                return answer

    def give_up(self) -> None:
        """From now on goes on without: a run that ends must not wait for what it can no longer use."""
        self._patient = False

    def restore(self, words: tuple[str, ...]) -> None:
        """Takes over what a run said before it was resumed."""
        self._went_without = {text.split(":", 1)[0]: text for text in words} | self._went_without

    def miss(self, what: str, reason: str) -> None:
        """Notes something else that the run goes on without."""
        self._went_without.setdefault(what, f"{what}: {reason}")

    def _note(self, system: str, error: UnavailableError) -> None:
        words = f"{system}: {error}"
        self._missing[system] = words
        if self._patient or system in self._went_without:
            return
        self._went_without[system] = words
        log.warning("system.missing", extra={"system": system, "reason": str(error)})
