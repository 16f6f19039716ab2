"""Health vectors that do not go together: an isolation forest (Liu, Ting and Zhou 2008) over all sites of a run.

A vector says how far a site's figures lie from what is usual at that site. The forest is fitted when a vector comes
whose deviation would matter, and anew once twice as many are known, always with the same seed; scikit-learn is imported
with the first fit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

FIRST_FIT = 48
KEEP = 512
NUM_TREES = 48
QUANTILE = 0.95
"""Odder than so many of the vectors it was fitted to. Far out the scores saturate, so that the oddest is no measure."""
FACTOR, SHARE = math.log(4.0), 0.25
"""A deviation that matters: a figure is four times what is usual, or a share is another by so much."""


class HealthForest:
    """Follows one run."""

    def __init__(self) -> None:
        self._vectors: deque[Sequence[float]] = deque(maxlen=KEEP)
        self._num_seen = 0
        self._next_fit = FIRST_FIT
        self._forest: Any = None
        self._limit = 1.0
        self.num_fits = 0

    def see(self, vectors: Sequence[Sequence[float]]) -> list[float | None]:
        """Scores vectors in one go and learns from those that are not odd.

        Returns:
            for each vector its oddness, in (0, 1), where it is odd; None where it is not, or nothing is known yet.
        """
        if not vectors:
            return []
        scores: list[float | None] = [None] * len(vectors)
        matter = [any(abs(v) > (FACTOR if i < 3 else SHARE) for i, v in enumerate(vector)) for vector in vectors]
        if any(matter) and len(self._vectors) >= FIRST_FIT:
            if self._num_seen >= self._next_fit:
                self._fit()
            found = -self._forest.score_samples(list(vectors))
            scores = [
                float(score) if odd and score > self._limit else None for score, odd in zip(found, matter, strict=True)
            ]
        usual = [vector for vector, score in zip(vectors, scores, strict=True) if score is None]
        self._vectors.extend(usual)
        self._num_seen += len(usual)
        return scores

    def _fit(self) -> None:
        from sklearn.ensemble import IsolationForest

        self._next_fit = self._num_seen + max(self._num_seen, KEEP // 4)
        vectors = list(self._vectors)
        self._forest = IsolationForest(n_estimators=NUM_TREES, random_state=0).fit(vectors)
        usual = sorted(-self._forest.score_samples(vectors))
        self._limit = float(usual[int(QUANTILE * (len(usual) - 1))])
        self.num_fits += 1
