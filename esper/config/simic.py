"""The settings of what a run keeps for the training of policies, and of what growth is worth."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esper.config.section import PositiveInt, Section


class RewardConfig(Section):
    """What an episode of growth is worth, as a share of the loss; see `esper.simic.reward`."""

    params_rent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """For as many parameters as the host began with, once, when they become permanent."""
    flops_rent: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """For as many FLOPs more as the run would have cost without growth, as they are spent."""
    start_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    """Of each adaptation that begins."""
    z: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Standard errors that are taken off a gain before it counts."""
    window: PositiveInt = 3
    """A gain is the mean of the last so many paired measurements: one that was waited for is no gain."""


class SimicConfig(Section):
    """What a run keeps for the training of policies."""

    experience: bool = True
    """Whether its decisions are logged, to `<storage>/experience`."""
    rows_per_write: PositiveInt = 8
    """Decisions that are written together: a run that is killed loses the newest."""
    reward: RewardConfig = RewardConfig()
