"""Whether a validation loss still falls: a straight line through the window, with its own noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trend:
    """How a loss moved over a window.

    Attributes:
        num_epochs: length of the window.
        improvement: fall of the fitted line over the window, as a share of its start; negative where it rose.
        noise: standard error of that fall, as the same share; 0 for two points.
        of_progress: the fall as a share of all that the loss has fallen since its highest point; a loss that nears its
            floor may halve again and again, and yet have little left to gain.
    """

    num_epochs: int
    improvement: float
    noise: float
    of_progress: float = 1.0

    def has_plateaued(self, threshold: float) -> bool:
        """Whether the fall is below `threshold`, of the loss or of its progress, or no larger than its own noise."""
        return min(self.improvement, self.of_progress) < threshold or self.improvement <= self.noise

    def in_words(self, threshold: float) -> str:
        """Says what was seen and what it means."""
        span = f"{self.num_epochs} epoch{'s' if self.num_epochs > 1 else ''}"
        if self.improvement < 0:
            return f"host has plateaued (validation loss rose {-self.improvement:.1%} in {span})"
        if self.improvement < threshold:
            return f"host has plateaued ({self.improvement:.1%} in {span})"
        if self.of_progress < threshold:
            return f"host has plateaued (the last {span} brought {self.of_progress:.1%} of its progress)"
        if self.has_plateaued(threshold):
            return f"host has plateaued ({self.improvement:.1%} in {span} is within its noise of {self.noise:.1%})"
        return f"validation loss improved {self.improvement:.1%} over {span}; the host is still learning"


def fit(losses: Sequence[tuple[int, float]], *, highest: float | None = None) -> Trend | None:
    """Fits a line by least squares.

    Args:
        losses: (epoch, loss), at least two, epochs rising.
        highest: the highest loss of the run; None is that of the window.

    Returns:
        The trend, or None where the fitted line starts at zero and no share can be taken.
    """
    epochs = [float(epoch) for epoch, _ in losses]
    values = [loss for _, loss in losses]
    n = len(losses)
    mean_x, mean_y = math.fsum(epochs) / n, math.fsum(values) / n
    spread = math.fsum((x - mean_x) ** 2 for x in epochs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(epochs, values, strict=True)) / spread
    width = epochs[-1] - epochs[0]
    start = abs(mean_y + slope * (epochs[0] - mean_x))
    if start == 0.0:
        return None
    residual = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(epochs, values, strict=True)) / max(
        1, n - 2
    )
    stderr = math.sqrt(residual / spread) * width if n > 2 else 0.0
    fall = -slope * width
    improvement, noise = fall / start, stderr / start
    progress = max(values if highest is None else (*values, highest)) - (mean_y + slope * (epochs[-1] - mean_x))
    of_progress = fall / progress if progress > 0.0 else 0.0
    if not all(math.isfinite(value) for value in (improvement, noise, of_progress)):
        return None
    return Trend(round(width), improvement, noise, of_progress)
