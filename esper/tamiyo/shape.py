"""The hyper-parameters of the policy's network: plain data, read without torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from esper.leyline import Contract


class NetShape(Contract):
    """How large the network is, and what is fixed in it.

    Attributes:
        hidden: width of every embedding.
        heads: of attention, in each layer and in the pooling of sites; divides `hidden`.
        layers: of attention between neighbours; what is further away is seen through the pooling alone.
        members: of the ensemble that forecasts what comes of a choice.
        prior: how much of each member's forecast is a fixed random function, which data alone can make them agree on.
        floor: share of every distribution that is spread evenly over what the masks allow.
    """

    hidden: Annotated[int, Field(ge=4, le=1024)] = 32
    heads: Annotated[int, Field(ge=1, le=16)] = 4
    layers: Annotated[int, Field(ge=0, le=8)] = 2
    members: Annotated[int, Field(ge=2, le=64)] = 8
    prior: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    floor: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.02

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        return self
