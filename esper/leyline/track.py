"""What designs came to where they were used: counted by Urza from field reports, read by policies that choose by it."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract, Finite


class TrackRecord(Contract):
    """The adaptations with one design at sites of one kind, over all runs of a storage; see `FieldReport.value`.

    Attributes:
        num: those that had a value.
        mean: of their values.
        squares: sum of squared deviations from the mean.
    """

    num: Annotated[int, Field(ge=0)] = 0
    mean: Finite = 0.0
    squares: Annotated[Finite, Field(ge=0.0)] = 0.0

    def count(self, value: float) -> TrackRecord:
        """Returns the record with one more value (Welford 1962)."""
        num = self.num + 1
        mean = self.mean + (value - self.mean) / num
        return TrackRecord(num=num, mean=mean, squares=self.squares + (value - self.mean) * (value - mean))

    @property
    def in_words(self) -> str:
        """The mean, its standard error from two values on, and of how many."""
        error = f" ± {math.sqrt(self.squares / (self.num - 1) / self.num):.3f}" if self.num > 1 else ""
        return f"{self.mean:+.3f}{error} of {self.num}" if self.num else "untried"
