"""What a person says of an adaptation while its run goes on: a word to Tamiyo, kept beside the run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract, Finite, new_id, now

STEERING_FOLDER = "steering"
"""Below the run's folder: one file a word."""


class Verdict(StrEnum):
    """APPROVE lets a kernel onto the live path where the run asks for that; VETO removes it, wherever it stands."""

    APPROVE = "approve"
    VETO = "veto"


class PersonsWord(Contract):
    """One word. It means this kernel of this seed; of several about the same, the newest counts.

    Attributes:
        by: who said it.
        reason: why, in words; may be empty.
    """

    word_id: str = Field(default_factory=new_id)
    run_id: str
    site: str
    seed_id: str
    kernel_id: str
    verdict: Verdict
    by: Annotated[str, Field(min_length=1, max_length=256)]
    reason: Annotated[str, Field(max_length=2_000)] = ""
    timestamp: Finite = Field(default_factory=now)

    @property
    def in_words(self) -> str:
        """As people read it."""
        done = "approved" if self.verdict is Verdict.APPROVE else "vetoed"
        return f"{done} by {self.by}" + (f": {self.reason}" if self.reason else "")
