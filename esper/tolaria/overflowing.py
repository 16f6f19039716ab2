"""Steps that a scaler leaves out since their gradients overflowed: how it finds its scale, and no sickness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from esper.leyline.growth import Growable
from esper.tolaria.optim import Optimization


class Overflowing:
    """Tells the steps of one run that its scaler left out, and what health lost on them. Without a scaler, none.

    Args:
        growable: the host, whose health is sampled.
        optimization: whose scaler lowers its scale when it leaves out a step.
    """

    def __init__(self, growable: Growable, optimization: Optimization) -> None:
        self._growable = growable
        self._optimization = optimization
        self._scale = self._scale_now()
        self._seen: Counter[str] = Counter()  # site to sampled steps of this interval that were not finite
        self._forgiven: Counter[str] = Counter()

    def look(self, *, sampled: bool) -> bool:
        """Whether the scaler left out the step that was just taken.

        Args:
            sampled: whether health was taken on it.
        """
        if self._optimization.scaler is None:
            return False
        before, self._scale = self._scale, self._scale_now()
        left_out = self._scale < before
        if sampled:
            now = Counter({site: num_skipped for site, (_, num_skipped) in self._growable.soundness().items()})
            if left_out:
                self._forgiven += now - self._seen
            self._seen = now
        return left_out

    def forgiven(self, sites: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The soundness of an interval without what was not finite on steps that were left out."""
        return {site: (num, num_skipped - self._forgiven[site]) for site, (num, num_skipped) in sites.items()}

    def begin(self) -> None:
        """Another interval of health begins."""
        self._seen, self._forgiven = Counter(), Counter()

    def rescaled(self) -> None:
        """The scaler's state was restored: what it holds now is no step's doing."""
        self._scale = self._scale_now()

    def _scale_now(self) -> float:
        scaler = self._optimization.scaler
        return 1.0 if scaler is None else scaler.get_scale()
