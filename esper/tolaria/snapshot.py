"""The whole state of training, taken and given back bit by bit: weights, buffers, optimizer, scheduler, growth, RNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.leyline.growth import Growable
from esper.tolaria.contents import contents, refill
from esper.tolaria.numerics import rng_state, set_rng_state
from esper.tolaria.optim import Optimization
from esper.tolaria.tree import clone


def take(growable: Growable, optimization: Optimization) -> dict[str, Any]:
    """Returns copies that later training does not touch, on the devices where the originals lie."""
    return clone(
        {
            **contents(growable.module),
            "growth": growable.growth_state(),
            "optimization": optimization.state_dict(),
            "rng": rng_state(),
        }
    )


def give_back(state: Mapping[str, Any], growable: Growable, optimization: Optimization) -> None:
    """Restores in place. Afterwards the parameters of seeds are new objects and no gradients are left.

    `state` stays as it was, so that it can be given back again.
    """
    copied = clone(state)  # what loads by reference must not come to share memory with the snapshot
    growable.load_growth_state(copied["growth"])
    refill(growable.module, copied)
    optimization.load_state_dict(copied["optimization"], live=growable.live_parameters())
    growable.module.zero_grad(set_to_none=True)
    set_rng_state(copied["rng"])
