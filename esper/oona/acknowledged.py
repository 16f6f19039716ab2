"""What a member has acknowledged: it is known again when the broker has lost that, and not handed out twice."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

MAX_SPANS = 65_536
"""Of a shard; the lowest are forgotten first."""


class Acknowledged:
    """Offsets by shard, as spans. Not safe for threads."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {}
        self._stops: dict[int, list[int]] = {}

    def add(self, shard: int, spans: Iterable[range]) -> list[range]:
        """Remembers offsets; returns those that are new."""
        starts, stops = self._starts.setdefault(shard, []), self._stops.setdefault(shard, [])
        fresh: list[range] = []
        for span in spans:
            if not starts or span.start > stops[-1]:
                starts.append(span.start)
                stops.append(span.stop)
                fresh.append(span)
                continue
            known = self.known(shard, span)
            fresh += _gaps(span, known)
            first, end = bisect_left(stops, span.start), bisect_right(starts, span.stop)  # those it touches
            low, high = min([span.start, *starts[first:end]]), max([span.stop, *stops[first:end]])
            starts[first:end], stops[first:end] = [low], [high]
        if len(starts) > MAX_SPANS:
            del starts[: MAX_SPANS // 4], stops[: MAX_SPANS // 4]
        return fresh

    def known(self, shard: int, span: range) -> list[range]:
        """Those of consecutive offsets that were added."""
        starts, stops = self._starts.get(shard, []), self._stops.get(shard, [])
        if not stops or span.start >= stops[-1]:
            return []
        first, end = bisect_right(stops, span.start), bisect_left(starts, span.stop)
        return [range(max(starts[at], span.start), min(stops[at], span.stop)) for at in range(first, end)]

    def fresh(self, shard: int, span: range) -> list[range]:
        """Those that were not."""
        return _gaps(span, self.known(shard, span))


def _gaps(span: range, known: list[range]) -> list[range]:
    if not known:
        return [span]
    starts = [span.start, *(one.stop for one in known)]
    stops = [*(one.start for one in known), span.stop]
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
