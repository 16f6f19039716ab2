"""A circuit breaker around another system, for all that a trainer asks of it: the asset hub, or Tamiyo.

Closed, calls go through. After several failures in a row it is open: calls fail at once, so that a run does not wait a
deadline for each. After a rest it is half open: one call goes through, and its end closes it or opens it again.
Only silence counts as failure; a refusal is an answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from esper.leyline.errors import UnavailableError
from esper.leyline.signals import CircuitState
from esper.leyline.summary import Circuit

T = TypeVar("T")


class Breaker:
    """Safe to use from several threads.

    Args:
        system: whom it stands before, in words.
        failures: in a row, that open it.
        rest_s: how long it stays open.
        clock: seconds, monotonic.
    """

    def __init__(
        self, system: str, *, failures: int = 3, rest_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._system = system
        self._limit = failures
        self._rest_s = rest_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_since: float | None = None
        self._is_trying = False
        self._opened = 0
        self._refused = 0

    @property
    def state(self) -> CircuitState:
        """As it stands now; half open from the end of the rest on."""
        with self._lock:
            return self._state()

    def circuit(self) -> Circuit:
        """The state, and what it came to so far."""
        with self._lock:
            return Circuit(state=self._state(), opened=self._opened, refused=self._refused)

    def call(self, question: Callable[[], T]) -> T:
        """Returns the answer.

        Raises:
            UnavailableError: at once while the circuit is open, or while another call tries it; else from `question`,
                as all else that it raises.
        """
        self._enter()
        try:
            answer = question()
        except UnavailableError:
            self._leave(answered=False)
            raise
        except BaseException:
            self._leave(answered=True)
            raise
        self._leave(answered=True)
        return answer

    def _state(self) -> CircuitState:
        if self._open_since is None:
            return CircuitState.CLOSED
        return CircuitState.HALF_OPEN if self._clock() - self._open_since >= self._rest_s else CircuitState.OPEN

    def _enter(self) -> None:
        with self._lock:
            state = self._state()
            if state is CircuitState.CLOSED:
                return
            if state is CircuitState.HALF_OPEN and not self._is_trying:
                self._is_trying = True
                return
            self._refused += 1
            raise UnavailableError(f"{self._system} was silent {self._failures} times and is not asked for a while")

    def _leave(self, *, answered: bool) -> None:
        with self._lock:
            self._is_trying = False
            if answered:
                self._failures, self._open_since = 0, None
                return
            self._failures += 1
            if self._open_since is not None or self._failures >= self._limit:
                self._opened += 1
                self._open_since = self._clock()


def guarded(port: T, breaker: Breaker) -> T:
    """The port, with every call through the breaker."""
    return cast("T", _Guarded(port, breaker))


class _Guarded:
    def __init__(self, port: Any, breaker: Breaker) -> None:
        self._port = port
        self._breaker = breaker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        return lambda *args, **kwargs: self._breaker.call(lambda: method(*args, **kwargs))
