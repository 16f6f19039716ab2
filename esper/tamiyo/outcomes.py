"""An ensemble that forecasts what comes of a choice, and whose members disagree where they were not taught.

Each member is a small network plus a fixed random one that training never touches (randomised priors: Osband,
Aslanides, Cassirer 2018, "Randomized Prior Functions for Deep Reinforcement Learning"). Each learns from a resampled
part of the data. Where there was data they agree, and elsewhere the fixed ones show through. How far they disagree
becomes an uncertainty between 0 and 1 by two figures that `calibration` measures on runs which were held out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from esper.tamiyo.actions import Operation
from esper.tamiyo.shape import NetShape


class Outcomes(nn.Module):
    """The ensemble.

    Attributes:
        scale: standard deviations of the error for one of the members' disagreement, on held-out runs.
        spread: standard deviation of what came of choices, on the average: the doubt of one who knows nothing else.
        center: their mean.
        num_calibrated: choices that these were measured on; 0 before.
    """

    scale: Tensor
    spread: Tensor
    center: Tensor
    num_calibrated: Tensor

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        into, width = 3 * shape.hidden + len(Operation), shape.hidden
        self._prior = shape.prior
        self.first = nn.Parameter(torch.randn(shape.members, into, width) / math.sqrt(into))
        self.first_bias = nn.Parameter(torch.zeros(shape.members, 1, width))
        self.second = nn.Parameter(torch.randn(shape.members, width, 1) / math.sqrt(width))
        self.second_bias = nn.Parameter(torch.zeros(shape.members, 1, 1))
        self.register_buffer("prior_first", 2.0 * torch.randn(shape.members, into, width) / math.sqrt(into))
        self.register_buffer("prior_second", torch.randn(shape.members, width, 1) / math.sqrt(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("num_calibrated", torch.zeros((), dtype=torch.int64))

    def forward(self, chosen: Tensor) -> Tensor:
        """Forecasts of each member: chosen (B, features), returns (B, members)."""
        learned = torch.relu(chosen @ self.first + self.first_bias) @ self.second + self.second_bias
        fixed = torch.tanh(chosen @ self.get_buffer("prior_first")) @ self.get_buffer("prior_second")
        units = (learned + self._prior * fixed)[:, :, 0].T
        return self.center + self.spread * units

    def uncertainty(self, forecasts: Tensor) -> Tensor:
        """How little the ensemble knows: (B, members) to (B,) in [0, 1); at 0.5 no more than what comes of all."""
        error = self.scale * forecasts.std(dim=1)
        return error / (error + self.spread)
