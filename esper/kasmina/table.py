"""The figures of all seeds of one layer, as a struct of arrays: one tensor a field, one row a seed.

Telemetry and checkpoints read a field of all seeds at once; a `Seed` reads and writes its own row. The tensors stay on
the CPU, since they steer Python and not kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

FIELDS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "stage": torch.uint8,  # SeedStage.code
        "alpha": torch.float64,  # how far the seed is blended in
        "epochs": torch.int64,  # control intervals since it entered its stage
        "entered": torch.int64,  # the host's step clock when it entered its stage
        "ramp_done": torch.int64,  # steps of the present ramp that are done
        "ramp_total": torch.int64,  # steps of the present ramp; 0 until its first step
        "measured": torch.float64,  # what the strategy goes by at the next step, if `has_measured`
        "has_measured": torch.uint8,
        "typical": torch.float64,  # running mean of the kernel's gradient norms in GRAFTING; 0 before the first
        "released": torch.int64,  # quarters of the ramp that validation has released
        "graft_order": torch.int64,  # counts grafts over the whole host; 0 is not grafted
        "errors": torch.int64,  # shadow updates that were left out for a gradient that was not finite
    }
)


class SeedTable:
    """Rows are appended and never removed: a row belongs to one seed for good."""

    def __init__(self, fields: Mapping[str, torch.Tensor] | None = None) -> None:
        fields = fields or {}
        num_rows = len(fields["stage"]) if fields else 0
        self.fields = {
            # a field that is younger than the state starts at 0
            name: fields[name].to(dtype).clone() if name in fields else torch.zeros(num_rows, dtype=dtype)
            for name, dtype in FIELDS.items()
        }

    def __len__(self) -> int:
        return len(self.fields["stage"])

    def append(self) -> int:
        """Adds a row of zeros (stage DORMANT) and returns its number."""
        for name, dtype in FIELDS.items():
            self.fields[name] = torch.cat([self.fields[name], torch.zeros(1, dtype=dtype)])
        return len(self) - 1

    def get(self, field: str, row: int) -> float:
        return self.fields[field][row].item()

    def set(self, field: str, row: int, value: float) -> None:
        self.fields[field][row] = value

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all fields."""
        return {name: tensor.clone() for name, tensor in self.fields.items()}
