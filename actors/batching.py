"""Many callers, one thread that works: alone while few ask, together once more than a few wait.

Nobody waits for company: what is taken together is what came while the thread was at work. Below the threshold every
question is worked on alone, so that one slow neighbour costs a caller one question's time and no more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batching(Generic[Q, A]):
    """For one event loop.

    Args:
        work: answers several questions, in their order; an exception in the place of an answer is raised to its caller.
        above: so many callers at once are still answered one by one.
        longest: questions that are worked on together at most.
    """

    def __init__(self, work: Callable[[Sequence[Q]], Sequence[A | Exception]], *, above: int, longest: int) -> None:
        self._work, self._above, self._longest = work, above, longest
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._num_callers = 0
        self._is_busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decide")
        self.num_batches, self.largest = 0, 0

    async def ask(self, question: Q) -> A:
        """Returns the answer; raises what came in its place."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._num_callers += 1
        try:
            if not self._is_busy:
                self._next()
            return await future
        finally:
            self._num_callers -= 1

    def _next(self) -> None:
        while self._waiting and self._waiting[0][1].done():  # its caller has gone
            self._waiting.popleft()
        self._is_busy = bool(self._waiting)
        if not self._is_busy:
            return
        count = min(self._longest, len(self._waiting)) if self._num_callers > self._above else 1
        taken = [self._waiting.popleft() for _ in range(count)]
        self.num_batches, self.largest = self.num_batches + 1, max(self.largest, count)
        working = asyncio.get_running_loop().run_in_executor(self._thread, self._work, [one for one, _ in taken])
        working.add_done_callback(lambda done: self._answer([future for _, future in taken], done))

    def _answer(self, futures: Sequence[asyncio.Future[A]], done: asyncio.Future[Sequence[A | Exception]]) -> None:
        failure = done.exception()
        answers = [failure] * len(futures) if failure is not None else done.result()
        for future, answer in zip(futures, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        self._next()
