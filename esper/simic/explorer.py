"""Who tries what nobody chose yet: growth by a plan that is drawn for each run. A learner compares what plans came to.

A plan is a first epoch (half of the time as early as may be, else any) and a number of adaptations (half of the time
one). Where and how each begins is drawn around what the heuristic holds best, so that few runs find what is better:
half of the time the site of the largest growth potential, else any; the kernel of rank n by its worth with chance
2^-(n+1); in four of ten cases each `direct` or `ramp`, else any way that the masks allow. From its first epoch on it
begins whenever it may: what is cloned from it decides at once, where a coin for each epoch would teach to wait.
Seeds are tended by the rule.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from esper.config import TamiyoConfig
from esper.leyline import AdaptationSignal, BlendStrategy, SystemStatePacket
from esper.tamiyo.actions import STRATEGIES
from esper.tamiyo.candidates import find_candidates
from esper.tamiyo.memory import initial_state
from esper.tamiyo.observation import SITE_FEATURES, Observation, observe_graph
from esper.tamiyo.orders import Order, Proposal
from esper.tamiyo.safety import last_growth_epoch
from esper.tamiyo.step import case_of, conclude

POLICY = "random"
"""What its runs are logged as."""


@dataclass(frozen=True)
class Plan:
    """When to begin, and how often."""

    start: int
    num: int

    @classmethod
    def drawn(cls, source: random.Random, config: TamiyoConfig, num_epochs: int) -> Plan:
        """Draws one for a run."""
        last = max(0, last_growth_epoch(num_epochs, config.last_epoch_fraction))
        start = 0 if source.random() < 0.5 else source.randint(0, last)
        most = max(1, config.max_adaptations)
        return cls(start, 1 if source.random() < 0.5 else source.randint(1, most))


class Explorer:
    """A `Controller`: the same seed, the same plan.

    Args:
        config: limits, with `POLICY` as its policy.
        seed: of the run.
        draw: another number, another plan for the same run.
        num_epochs: of the run.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int, draw: int, num_epochs: int) -> None:
        self._config, self._seed = config, seed
        self._random = random.Random(f"explorer/{seed}/{draw}")
        self._plan = Plan.drawn(self._random, config, num_epochs)

    def initial_state(self) -> dict[str, Any]:
        """Returns the state of a run that has not begun."""
        return initial_state(self._config, self._seed)

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """Decides about one epoch; see `step`."""
        case = case_of(state or self.initial_state(), packet, self._config)
        if packet.epoch.epoch < self._plan.start or case.state.num_adaptations >= self._plan.num:
            return conclude(case, Proposal("the plan of this run says wait"))
        view = observe_graph(case.state, packet, self._config, case.care)
        if not len(view.option_site):
            return conclude(case, Proposal("nothing may begin"))
        candidates = find_candidates(
            case.state, packet, self._config.model_copy(update={"strategy": "ramp"})
        ).candidates
        return conclude(case, self._begin(view, {one.site: one for one in candidates}))

    def _begin(self, view: Observation, candidates: dict[str, Any]) -> Proposal:
        sites = sorted(set(view.option_site.tolist()))
        potential = view.site[sites, SITE_FEATURES.index("potential")]
        site = sites[int(potential.argmax())] if self._random.random() < 0.5 else self._random.choice(sites)
        ranked = view.option_kernel[view.option_site == site].tolist()  # of the largest worth first
        rank = next((n for n in range(len(ranked)) if self._random.random() < 0.5), 0)
        kernel = ranked[rank]
        allowed = [way for way, is_open in zip(STRATEGIES, view.strategies[kernel].tolist(), strict=True) if is_open]
        chance = self._random.random()
        way = BlendStrategy.DIRECT if chance < 0.4 else BlendStrategy.RAMP
        if chance >= 0.8 or way not in allowed:
            way = self._random.choice(allowed)
        here = candidates[view.site_names[site]]
        option = next(one for one in here.options if one.kernel_id == view.kernel_names[kernel][0])
        reason = f"the plan drew {option.blueprint} at {here.site}, {way.value}"
        order: Order = here.germinate(option, self._config.model_copy(update={"strategy": way.value}), reason)
        return Proposal(reason, (order,))
