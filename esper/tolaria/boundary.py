"""The end of an epoch, measured and not decided about yet: what a checkpoint holds between the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from esper.leyline.signals import EpochRecord, LayerHealthReport


@dataclass
class Boundary:
    """What `measure` found and `control` needs; part of a checkpoint.

    Attributes:
        skip: why no decision is taken at this boundary; None where one is.
    """

    record: EpochRecord
    reports: tuple[LayerHealthReport, ...]
    skip: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "record": self.record.model_dump(mode="json"),
            "reports": [report.model_dump(mode="json") for report in self.reports],
            "skip": self.skip,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` gave."""
        return cls(
            EpochRecord.model_validate(state["record"]),
            tuple(LayerHealthReport.model_validate(report) for report in state["reports"]),
            state["skip"],
        )
