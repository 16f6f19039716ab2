"""How far seeds are blended in: alpha, moved by one step at a time on the way in, and on the way out."""

from __future__ import annotations

import torch

from esper.config import KasminaConfig
from esper.kasmina.blending import alpha_at
from esper.kasmina.layer import Layer
from esper.kasmina.seed import Seed
from esper.kasmina.shadow import AllReduce
from esper.kasmina.strategies import Course, Limits, move
from esper.leyline.signals import BlendStrategy


class Ramps:
    """Moves the alphas of seeds in GRAFTING and of those that retire.

    Args:
        config: lengths and forms.

    Attributes:
        mean: averages figures over ranks in place, under DDP.
    """

    def __init__(self, config: KasminaConfig) -> None:
        self.mean: AllReduce | None = None
        self.configure(config)

    def configure(self, config: KasminaConfig) -> None:
        """Goes by these lengths and forms from now on."""
        self._config = config
        self._limits = Limits(config.ramp, config.gate_factor, config.drift_limit)

    def step(self, layer: Layer, seed: Seed, steps_per_epoch: int) -> bool:
        """Moves a seed by one step; returns whether its retirement is done."""
        if seed.strategy is BlendStrategy.DIRECT and seed.retirement is None:
            return False
        if seed.figure("ramp_total") == 0:
            seed.put("ramp_total", max(1, round(self._config.ramp_epochs * steps_per_epoch)))
        if seed.retirement is None:
            self._move(layer, seed)
            return False
        done, total = seed.figure("ramp_done") + 1, seed.figure("ramp_total")
        seed.put("ramp_done", min(done, total))
        if done >= total:
            return True
        seed.alpha = seed.retirement.from_alpha * (1.0 - alpha_at(self._config.ramp, done, total))
        return False

    def measure(self, layer: Layer, seed: Seed) -> None:
        """Takes what the strategy goes by from the last step, unless the end of an interval did already: a resumed run
        has neither gradients nor activations of that step. Collective where figures are shared.
        """
        figure = None
        if seed.strategy is BlendStrategy.GRAD_NORM_GATED:
            gradients = [p.grad for p in layer.kernel(seed).parameters() if p.grad is not None]
            figure = torch.nn.utils.get_total_norm(gradients) if gradients else None  # DDP made it equal on all ranks
        elif seed.strategy is BlendStrategy.DRIFT_CONTROLLED:
            figure, layer.reach = layer.reach, None
            if figure is not None and self.mean is not None:
                self.mean([figure])
        if figure is not None and not seed.figure("has_measured"):
            layer.table.set("measured", seed.row, float(figure))
            seed.put("has_measured", 1)

    def _move(self, layer: Layer, seed: Seed) -> None:
        """Moves alpha by one step of the seed's strategy."""
        self.measure(layer, seed)
        table, row = layer.table, seed.row
        course = Course(
            alpha=seed.alpha,
            done=seed.figure("ramp_done"),
            total=seed.figure("ramp_total"),
            typical=table.get("typical", row),
            released=seed.figure("released"),
        )
        measured = table.get("measured", row) if seed.figure("has_measured") else None
        course = move(seed.strategy, course, measured, self._limits)
        seed.put("has_measured", 0)
        seed.alpha = course.alpha
        seed.put("ramp_done", course.done)
        table.set("typical", row, course.typical)
