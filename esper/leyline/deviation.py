"""The largest of several deviations, where NaN is the worst of all. No torch here.

`max(0.0, nan)` is 0.0: a check built on it passes what computes nothing at all.
"""

from __future__ import annotations

import math


def largest(*deviations: float) -> float:
    """The largest; infinite if one is NaN, 0 if there is none."""
    return max((math.inf if math.isnan(one) else one for one in deviations), default=0.0)
