"""A network's choices with all that explains them: chances, forecast and its doubt, attention and attributions.

An attribution is gradient times input (Shrikumar et al. 2016): how the choice's log-probability would fall, to first
order, if the feature were 0, which for most of them means: unmeasured, or none of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from esper.leyline import Attribution, Explanation
from esper.tamiyo.actions import STRATEGIES, Operation
from esper.tamiyo.features import SEED_FEATURES
from esper.tamiyo.inference import Inference
from esper.tamiyo.net import Decided, Drawn
from esper.tamiyo.observation import KERNEL_FEATURES, RUN_FEATURES, SITE_FEATURES, Observation

_SHOWN_SITES = 3
_SHOWN_FEATURES = 5
_FEATURES = {"site": SITE_FEATURES, "seed": SEED_FEATURES, "run": RUN_FEATURES, "kernel": KERNEL_FEATURES}


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a row's chance comes from.

    Attributes:
        source: None takes the most probable.
        whole: draws all parts of the choice, as it is learned from; else the operation alone, see `PolicyNet.decide`.
    """

    source: random.Random | None
    whole: bool = True


@dataclass(frozen=True)
class Considered:
    """One choice and what explains it.

    Attributes:
        attention: (S,) share of each site in the pooling.
        effects: by kind of node, (nodes, features): gradient times input; empty where there was nothing to choose.
        forecasts: (members,) what each expects to come of the choice.
        scale: standard errors for one standard deviation of theirs, as calibrated.
        uncertainty: of the choice, in [0, 1).
        is_calibrated: whether that was ever measured.
    """

    decided: Decided
    attention: np.ndarray
    effects: dict[str, np.ndarray]
    forecasts: np.ndarray
    scale: float
    uncertainty: float
    is_calibrated: bool

    def explanation(self, view: Observation, version: str) -> Explanation:
        """Returns the explanation for people."""
        choice = self.decided.choice
        chances = self.decided.probabilities["operation"]
        sites = np.argsort(-self.attention, kind="stable")[:_SHOWN_SITES]
        seed = view.seed_names[choice.seed] if choice.seed >= 0 else None
        return Explanation(
            version=version,
            operation=choice.operation.name,
            site=view.site_names[choice.site] if choice.site >= 0 else seed[0] if seed else None,
            seed_id=seed[1] if seed else None,
            blueprint=view.kernel_names[view.option_kernel[choice.option]][1] if choice.option >= 0 else None,
            strategy=STRATEGIES[choice.strategy] if choice.strategy >= 0 else None,
            chances={op.name: _fraction(chances[op]) for op in Operation if view.operations[op]},
            confidence=_fraction(chances[choice.operation]),
            log_prob=self.decided.log_prob,
            entropy=self.decided.entropy,
            value=self.decided.value,
            forecast=float(self.forecasts.mean()) if self.is_calibrated else None,
            forecast_error=self.scale * float(self.forecasts.std(ddof=1)) if self.is_calibrated else None,
            uncertainty=_fraction(self.uncertainty) if self.is_calibrated else None,
            attention={view.site_names[place]: _fraction(float(self.attention[place])) for place in sites},
            attributions=self._attributions(view),
        )

    def _attributions(self, view: Observation) -> tuple[Attribution, ...]:
        """The features with the largest effect, that first."""
        found: list[tuple[float, str, int]] = []
        for kind, effects in self.effects.items():
            found += [(size, kind, place) for size, place in largest(effects, _SHOWN_FEATURES)]
        found.sort(key=lambda entry: -entry[0])
        return tuple(self._attribution(view, kind, place) for _, kind, place in found[:_SHOWN_FEATURES])

    def _attribution(self, view: Observation, kind: str, place: int) -> Attribution:
        node, feature = divmod(place, len(_FEATURES[kind]))
        of = {
            "run": lambda: "run",
            "site": lambda: view.site_names[node],
            "seed": lambda: "/".join(view.seed_names[node]),
            "kernel": lambda: view.kernel_names[node][1],
        }[kind]()
        value = np.atleast_2d(getattr(view, kind))[node, feature]
        effect = float(self.effects[kind][node, feature])
        return Attribution(of=of, feature=_FEATURES[kind][feature], value=float(value), effect=effect)


def largest(table: np.ndarray, num: int) -> list[tuple[float, int]]:
    """The entries of a table that lie furthest from 0, at least the first `num` of them, with their flat place; none
    that is 0. The largest of each column bound what can be among them, so that no whole table is sorted.
    """
    sizes = np.abs(table)
    columns = sizes.max(axis=0, initial=0.0)
    bound = np.sort(columns)[-num] if num <= len(columns) else 0.0
    places = [
        row * table.shape[1] + feature
        for feature in np.flatnonzero((columns >= bound) & (columns > 0.0)).tolist()
        for row in np.flatnonzero((sizes[:, feature] >= bound) & (sizes[:, feature] > 0.0)).tolist()
    ]
    return [(float(sizes[divmod(place, table.shape[1])]), place) for place in sorted(places)]


def consider(inference: Inference, views: Sequence[Observation], draws: Sequence[Draw]) -> list[Considered]:
    """Chooses for each observation, and explains it. Each is considered by itself.

    Args:
        inference: the network.
        views: observations.
        draws: of each, whether it is left to chance.

    Raises:
        FloatingPointError: if a figure of the network is not finite.
    """
    with _one_thread(), torch.inference_mode(), np.errstate(all="ignore"):
        return [_consider(inference, view, draw) for view, draw in zip(views, draws, strict=True)]


def _consider(inference: Inference, view: Observation, draw: Draw) -> Considered:
    judged = inference.judge(view)
    generator = None if draw.source is None else torch.Generator().manual_seed(draw.source.getrandbits(63))
    chance = Drawn.NONE if draw.source is None else Drawn.ALL if draw.whole else Drawn.OPERATION
    chosen = inference.decide(view, judged, generator, chance)
    # where all can only wait there is nothing to explain
    effects = inference.effects(view, judged, chosen) if view.operations.sum() > 1 else {}
    forecasts = inference.forecasts(view, judged, chosen.decided.choice)
    members = forecasts[0].numpy()
    scale = float(inference.outcomes.scale)
    spread = scale * members.std(ddof=1)  # which is told, and runs over before they do
    if not (np.isfinite(spread) and all(np.isfinite(table).all() for table in effects.values())):
        raise FloatingPointError("a forecast of the network is not finite")
    return Considered(
        decided=chosen.decided,
        attention=judged.encoded.attention,
        effects=effects,
        forecasts=members,
        scale=scale,
        uncertainty=float(inference.outcomes.uncertainty(forecasts)[0]),
        is_calibrated=int(inference.outcomes.num_calibrated) > 0,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: its pool waits for all its threads at each of a thousand small steps, and on a machine
    where others work too that took 300 ms instead of 15.
    """
    num = torch.get_num_threads()
    if num > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if num > 1:
            torch.set_num_threads(num)


def _fraction(value: float) -> float:
    return min(1.0, max(0.0, float(value)))
