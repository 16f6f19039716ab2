"""Health vectors that do not go together: an isolation forest (Liu, Ting and Zhou 2008) over all sites of a run.

A vector says how far a site's figures lie from what is usual at that site. The forest is fitted when a vector comes
whose deviation would matter, and anew once twice as many are known, always with the same seed; scikit-learn is imported
with the first fit.

Beside it stands a plain rule, for a run with too few vectors for a forest, and for what a forest hides: a vector that
is far out in two of five figures is cut off no sooner than one that is a little out in all. Two figures that matter,
each many robust deviations from what all vectors show, are odd.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from esper.nissa.anomalies.robust import TO_SIGMA, median_of

FIRST_FIT = 48
KEEP = 512
NUM_TREES = 48
QUANTILE = 0.95
"""Odder than so many of the vectors it was fitted to. Far out the scores saturate, so that the oddest is no measure."""
FACTOR, SHARE = math.log(4.0), 0.25
"""A deviation that matters: a figure is four times what is usual, or a share is another by so much."""
FIRST_LOOK = 16
"""Vectors from which on the plain rule knows what they show."""
FAR_OUT = 6.0
APART = 3.0
"""What a forest finds odd has a figure that matters and lies so many robust deviations out. In a real run that has
learned all it can, the gradient and what follows from it swing by factors of ten, for epochs on end."""
_FLOORS = (0.1, 0.1, 0.1, 0.02, 0.02)


class Odd(NamedTuple):
    """How odd a vector is.

    Attributes:
        score: the forest's, in (0, 1); None where there is no forest yet.
        num_far: figures that matter and lie far out.
    """

    score: float | None
    num_far: int


class HealthForest:
    """Follows one run."""

    def __init__(self) -> None:
        self._vectors: deque[Sequence[float]] = deque(maxlen=KEEP)
        self._num_seen = 0
        self._next_fit = FIRST_FIT
        self._forest: Any = None
        self._limit = 1.0
        self.num_fits = 0

    def see(self, vectors: Sequence[Sequence[float]]) -> list[Odd | None]:
        """Looks at vectors in one go and learns from those that are not odd.

        Returns:
            for each vector how odd it is; None where it is not, or nothing is known yet.
        """
        if not vectors:
            return []
        matter = [[abs(v) > (FACTOR if i < 3 else SHARE) for i, v in enumerate(vector)] for vector in vectors]
        found: list[Odd | None] = [None] * len(vectors)
        if any(map(any, matter)):
            scores = self._scores(vectors)
            scales = self._scales()
            for i, (vector, out, score) in enumerate(zip(vectors, matter, scores, strict=True)):
                far = sum(m and abs(v) > FAR_OUT * s for m, v, s in zip(out, vector, scales, strict=True))
                is_apart = any(m and abs(v) > APART * s for m, v, s in zip(out, vector, scales, strict=True))
                if far > 1 or (is_apart and score is not None and score > self._limit):
                    found[i] = Odd(score, far)
        usual = [vector for vector, odd in zip(vectors, found, strict=True) if odd is None]
        self._vectors.extend(usual)
        self._num_seen += len(usual)
        return found

    def _scores(self, vectors: Sequence[Sequence[float]]) -> Sequence[float | None]:
        if len(self._vectors) < FIRST_FIT:
            return [None] * len(vectors)
        if self._num_seen >= self._next_fit:
            self._fit()
        return [-float(score) for score in self._forest.score_samples(list(vectors))]

    def _scales(self) -> Sequence[float]:
        """How far each figure usually lies from what is usual at its site."""
        if len(self._vectors) < FIRST_LOOK:
            return [math.inf] * len(_FLOORS)
        sizes = zip(*([abs(v) for v in vector] for vector in self._vectors), strict=True)
        return [max(TO_SIGMA * median_of(sorted(size)), floor) for size, floor in zip(sizes, _FLOORS, strict=True)]

    def _fit(self) -> None:
        from sklearn.ensemble import IsolationForest

        self._next_fit = self._num_seen + max(self._num_seen, KEEP // 4)
        vectors = list(self._vectors)
        self._forest = IsolationForest(n_estimators=NUM_TREES, random_state=0).fit(vectors)
        usual = sorted(-self._forest.score_samples(vectors))
        self._limit = float(usual[int(QUANTILE * (len(usual) - 1))])
        self.num_fits += 1
