"""Which kernel, learned from what kernels came to: a bandit whose arms are (kind of site, blueprint).

When and where to grow are the heuristic's; only the choice among the kernels that fit there is this module's. An arm is
first known by what Urza has counted for it over all runs of the storage (`KernelOption.record`); from then on this
run's own adaptations are added here, and the memory travels with Tamiyo's state, so a run that is resumed goes on as it
would have. What is counted is `FieldReport.value`, paired evidence alone: what the host gains by itself is nobody's.

Of each arm's mean a normal-gamma posterior is kept (Murphy, "Conjugate Bayesian analysis of the Gaussian distribution",
2007, section 3), which begins as one adaptation of `PRIOR_MEAN`, give or take `PRIOR_SPREAD`. Four ways to choose:

- `thompson`: a mean is drawn from each posterior, and the largest wins (Thompson 1933).
- `ucb`: the largest of mean + exploration * error * sqrt(2 ln(1 + adaptations of all arms)) (after Auer et al. 2002).
- `epsilon_greedy`: the largest mean, but any arm alike with probability epsilon.
- `weighted`: any arm, in proportion to its mean, and no less than `FLOOR`.

Rent is taken off before arms are compared: `rent` times the share of the budget that the kernel would use up. Where
arms are equal, as before the first report, the heuristic's worth decides.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from esper.config import BanditConfig
from esper.leyline import KernelOption, SiteKind, SystemStatePacket
from esper.leyline.track import TrackRecord
from esper.tamiyo.draws import generator
from esper.tamiyo.heuristic import Pick, share_of, worth
from esper.tamiyo.memory import BanditMemory, TamiyoState
from esper.tamiyo.safety import Room

PRIOR_MEAN, PRIOR_SPREAD = 0.05, 0.1
FLOOR = 0.005


@dataclass(frozen=True, slots=True)
class Belief:
    """What is thought of an arm's mean: normal-gamma with mean, weight (in adaptations), shape and rate."""

    mean: float
    weight: float
    shape: float
    rate: float

    @classmethod
    def of(cls, record: TrackRecord) -> Belief:
        """The posterior after what was counted."""
        weight = 1.0 + record.num
        moved = record.num * (record.mean - PRIOR_MEAN) ** 2 / (2.0 * weight)
        return cls(
            mean=(PRIOR_MEAN + record.num * record.mean) / weight,
            weight=weight,
            shape=1.0 + record.num / 2.0,
            rate=PRIOR_SPREAD**2 + record.squares / 2.0 + moved,
        )

    @property
    def error(self) -> float:
        """Scale of the mean's posterior."""
        return math.sqrt(self.rate / (self.shape * self.weight))

    def draw(self, generator: random.Random) -> float:
        """A mean out of the posterior."""
        precision = generator.gammavariate(self.shape, 1.0 / self.rate)
        return generator.gauss(self.mean, 1.0 / math.sqrt(max(precision, 1e-12) * self.weight))


def arm_of(kind: SiteKind, blueprint: str) -> str:
    """The name of an arm in the memory."""
    return f"{kind.value}:{blueprint}"


class Bandit:
    """Chooses a kernel by what its design came to; see `heuristic.Chooser`."""

    def __init__(self, config: BanditConfig) -> None:
        self._config = config

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Returns the memory with the arms that are seen for the first time, and the reports not yet counted.

        A report from before its arm was first seen stands in the arm's record already, and is not counted again.
        """
        memory = state.bandit or BanditMemory()
        from esper.tamiyo.table import table_of

        table = table_of(packet)
        arms = dict(memory.arms)
        for report in packet.ended:
            arm, value = arm_of(report.signature.kind, report.blueprint), report.value
            if value is not None and arm in arms and (report.trace_id or report.report_id) not in memory.counted:
                arms[arm] = arms[arm].count(value)
        for option in packet.options:
            known = table.places_of(option.sites)
            if not len(known):
                continue
            arm = arm_of(table.signatures[table.signature_of[known[0]]].kind, option.blueprint)  # all sites are alike
            if arm not in arms:
                arms[arm] = option.record or TrackRecord()
        counted = tuple(report.trace_id or report.report_id for report in packet.ended)
        return state.model_copy(update={"bandit": BanditMemory(arms=arms, counted=counted)})

    def pick(
        self,
        options: Sequence[KernelOption],
        kind: SiteKind,
        channels: int,
        room: Room,
        state: TamiyoState,
        number: int,
    ) -> Pick:
        """Returns the kernel that the configured way chooses, and what is known of it and of the next."""
        records = (state.bandit or BanditMemory()).arms
        beliefs = [Belief.of(records.get(arm_of(kind, o.blueprint), TrackRecord())) for o in options]
        rents = [self._config.rent * share_of(option, room) for option in options]
        ties = [worth(option, channels, room) for option in options]
        draws = generator(state, number)
        scores, chosen = self._score(beliefs, rents, ties, draws, sum(belief.weight - 1.0 for belief in beliefs))
        ranked = sorted(range(len(options)), key=lambda i: (scores[i], ties[i]), reverse=True)
        best = ranked[0] if chosen is None else chosen
        others = [i for i in ranked if i != best]

        def told(i: int) -> str:
            record = records.get(arm_of(kind, options[i].blueprint), TrackRecord())
            return f"{options[i].blueprint} scored {scores[i]:.3f} (value {record.in_words})"

        beside = f", next {told(others[0])}" if others else ""
        chance = "" if chosen is None else " by chance"
        words = f"{self._config.choice} bandit of {kind.value} sites{chance}: {told(best)}{beside}"
        return Pick(options[best], words, num_draws=1)

    def _score(
        self,
        beliefs: Sequence[Belief],
        rents: Sequence[float],
        ties: Sequence[tuple[float, int, str]],
        draws: random.Random,
        num_counted: float,
    ) -> tuple[list[float], int | None]:
        """Returns each arm's score, and the arm that chance chose whatever the scores; None for the largest."""
        means = [belief.mean - rent for belief, rent in zip(beliefs, rents, strict=True)]
        order = sorted(range(len(ties)), key=lambda i: ties[i])  # chance must not hang on the order of the packet
        match self._config.choice:
            case "thompson":
                drawn = {i: beliefs[i].draw(draws) for i in order}
                return [drawn[i] - rents[i] for i in range(len(rents))], None
            case "ucb":
                reach = self._config.exploration * math.sqrt(2.0 * math.log(1.0 + num_counted))
                return [m + reach * b.error for m, b in zip(means, beliefs, strict=True)], None
            case "epsilon_greedy":
                return means, draws.choice(order) if draws.random() < self._config.epsilon else None
            case "weighted":
                weights = [max(means[i], FLOOR) for i in order]
                return means, draws.choices(order, weights)[0]
