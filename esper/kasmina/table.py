"""The figures of all seeds of one layer, as a struct of arrays: one tensor a field, one row a seed.

Telemetry and checkpoints read a field of all seeds at once; a `Seed` reads and writes its own row. The tensors lie on
the model's device. What steers Python at every step (stages, alphas) is read from a copy of the rows in plain numbers,
and a write to the device is a fill that nobody waits for: so no step waits for the device on account of a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
    """Rows are appended and never removed: a row belongs to one seed for good.

    Args:
        fields: of a state; None is a table without rows.
        device: of the model.
    """

    def __init__(self, fields: Mapping[str, torch.Tensor] | None = None, device: torch.device | None = None) -> None:
        fields = fields or {}
        num_rows = len(fields["stage"]) if fields else 0
        self.fields = {
            # a field that is younger than the state starts at 0
            name: fields[name].to(device, dtype, copy=True)
            if name in fields
            else torch.zeros(num_rows, dtype=dtype, device=device)
            for name, dtype in FIELDS.items()
        }
        self._rows: dict[str, list[Any]] = {name: tensor.tolist() for name, tensor in self.fields.items()}

    def __len__(self) -> int:
        return len(self._rows["stage"])

    def to(self, device: torch.device) -> None:
        """Goes to where the model lies."""
        self.fields = {name: tensor.to(device) for name, tensor in self.fields.items()}

    def append(self) -> int:
        """Adds a row of zeros (stage DORMANT) and returns its number."""
        for name, tensor in self.fields.items():
            self.fields[name] = torch.cat([tensor, tensor.new_zeros(1)])
            self._rows[name].append(0)
        return len(self) - 1

    def get(self, field: str, row: int) -> float:
        """The value; does not wait for the device."""
        return self._rows[field][row]

    def set(self, field: str, row: int, value: float) -> None:
        """Writes the value; does not wait for the device."""
        self._rows[field][row] = value if FIELDS[field].is_floating_point else int(value)
        self.fields[field][row].fill_(value)

    def age(self) -> None:
        """One more control interval for every seed."""
        self.fields["epochs"] += 1
        self._rows["epochs"] = [epochs + 1 for epochs in self._rows["epochs"]]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all fields."""
        return {name: tensor.clone() for name, tensor in self.fields.items()}
