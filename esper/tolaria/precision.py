"""The number formats of a forward: `tolaria.precision`. Weights, gradients, optimizers and losses stay in float32.

Under bf16 a forward runs in torch's autocast, one region for each: autocast keeps the casts of weights until the
outermost region ends, and a cast that was made without gradients would serve a later forward with them, whose weights
then silently never train. Regions that people open around all of it: `leyline.autocast`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """How forwards are computed.

    Attributes:
        kind: `fp32` leaves everything as it is; `bf16` is autocast.
        device_type: where they run, such as `cpu` or `cuda`.
    """

    kind: Literal["fp32", "bf16"] = "fp32"
    device_type: str = "cpu"

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward, not its backward."""
        if self.kind == "fp32":
            yield
            return
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            yield

    def full(self, outputs: Any) -> Any:
        """The model's outputs in float32, for the loss; other dtypes and all of `fp32` as they are."""
        return outputs if self.kind == "fp32" else _widened(outputs)


FULL = Precision()
"""All in float32."""


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype is torch.bfloat16 else value
    if isinstance(value, dict):
        return value | {key: _widened(item) for key, item in value.items()}  # its class has attributes that losses read
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _widened(getattr(value, one.name)) for one in fields(value) if one.init})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_widened(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(item) for item in value)
    return value
