"""Offsets as spans: what travels together is counted, leased and acknowledged together, not one by one.

A span is a `range` of step 1 that is not empty. Spans of one list are disjoint and ascend, unless it is said otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Records of a lane that follow each other there and were delivered equally often.

    Attributes:
        start, stop: their offsets.
        attempts: deliveries so far.
        deadline: of the lease, where they are out.
    """

    start: int
    stop: int
    attempts: int = 0
    deadline: float = 0.0


def spans_of(offsets: Iterable[int | range]) -> list[range]:
    """Offsets, or ranges of them, in any order and however often, as spans."""
    found: list[range] = []
    pairs = sorted((item, item + 1) if isinstance(item, int) else (item.start, item.stop) for item in offsets)
    start = stop = -1
    for first, end in pairs:
        if first > stop:
            if stop > start:
                found.append(range(start, stop))
            start, stop = first, end
        else:
            stop = max(stop, end)
    if stop > start:
        found.append(range(start, stop))
    return found


def num_in(spans: Iterable[range | Run]) -> int:
    """How many offsets they are."""
    return sum([span.stop - span.start for span in spans])


def flat(spans: Iterable[range]) -> list[int]:
    """Each offset."""
    return [offset for span in spans for offset in span]


def add(spans: list[range], start: int, stop: int) -> None:
    """Appends a span that comes behind the others, or makes the last one longer."""
    if spans and spans[-1].stop == start:
        spans[-1] = range(spans[-1].start, stop)
    else:
        spans.append(range(start, stop))


def overlap(runs: Iterable[Run], spans: Sequence[range]) -> Iterator[Run]:
    """The parts of the runs, which ascend, that lie in the spans."""
    at = 0
    for run in runs:
        while at < len(spans) and spans[at].stop <= run.start:
            at += 1
        if at == len(spans):
            return
        index = at
        while index < len(spans) and spans[index].start < run.stop:
            span = spans[index]
            if span.start <= run.start and run.stop <= span.stop:
                yield run
            else:
                yield run._replace(start=max(run.start, span.start), stop=min(run.stop, span.stop))
            index += 1


def cut(runs: deque[Run], spans: Sequence[range]) -> list[Run]:
    """Takes the spans out of the runs, which ascend; returns what was there of them. Costs what lies before them."""
    passed: list[Run] = []
    taken: list[Run] = []
    for span in spans:
        while runs and runs[0].start < span.stop:
            run = runs.popleft()
            if run.stop <= span.start:
                passed.append(run)
                continue
            if run.start < span.start:
                passed.append(run._replace(stop=span.start))
                run = run._replace(start=span.start)
            if run.stop > span.stop:
                runs.appendleft(run._replace(start=span.stop))
                run = run._replace(stop=span.stop)
            taken.append(run)
    runs.extendleft(reversed(passed))
    return taken


def without(spans: Sequence[range], others: Sequence[range]) -> list[range]:
    """The spans less the others."""
    runs = deque([Run(span.start, span.stop) for span in spans])
    cut(runs, others)
    return [range(run.start, run.stop) for run in runs]
