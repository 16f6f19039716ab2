"""Who asks together and who alone, and that one failure is one caller's."""

from __future__ import annotations

import asyncio
import threading

import pytest

from actors.batching import Batching


class Work:
    """Answers with twice the number; `None` fails, and what is held waits."""

    def __init__(self):
        self.batches, self.may_go = [], threading.Event()
        self.may_go.set()

    def __call__(self, questions):
        self.batches.append(list(questions))
        assert self.may_go.wait(30)
        if "all" in questions:
            raise ZeroDivisionError("the whole batch")
        return [ValueError("nothing") if one is None else 2 * one for one in questions]


async def ask_while_busy(batching, work, questions):
    """Asks one, holds it, asks the rest, lets go; returns all answers."""
    work.may_go.clear()
    tasks = [asyncio.create_task(batching.ask(0))]
    await asyncio.sleep(0.01)
    tasks += [asyncio.create_task(batching.ask(one)) for one in questions]
    await asyncio.sleep(0.01)
    work.may_go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_few_callers_are_answered_one_by_one():
    work = Work()
    answers = asyncio.run(ask_while_busy(Batching(work, above=8, longest=64), work, range(1, 8)))
    assert answers == [2 * one for one in range(8)]
    assert [len(batch) for batch in work.batches] == [1] * 8


def test_more_callers_are_answered_together_at_most_so_many_at_once():
    work = Work()
    batching = Batching(work, above=8, longest=20)
    answers = asyncio.run(ask_while_busy(batching, work, range(1, 31)))
    assert answers == [2 * one for one in range(31)]
    assert [len(batch) for batch in work.batches][:2] == [1, 20]
    assert (batching.largest, batching.num_batches) == (20, len(work.batches))


def test_a_failure_is_its_callers_alone():
    work = Work()
    answers = asyncio.run(ask_while_busy(Batching(work, above=1, longest=64), work, [1, None, 3]))
    assert [str(answer) for answer in answers] == ["0", "2", "nothing", "6"]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Batching(Work(), above=1, longest=64).ask("all"))


def test_a_caller_that_has_gone_is_not_worked_for():
    work = Work()

    async def go():
        batching = Batching(work, above=8, longest=64)
        work.may_go.clear()
        tasks = [asyncio.create_task(batching.ask(one)) for one in range(3)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        work.may_go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(go())
    assert (first, third) == (0, 4)
    assert isinstance(second, asyncio.CancelledError)
    assert work.batches == [[0], [2]]
