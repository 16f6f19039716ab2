"""The simple policies: `none`, `random` and `schedule`. The heuristic and the bandit have modules of their own.

A policy says only where and when to grow. Seeds under way are tended in `tending`, alike for all policies, and every
order of any policy passes `safety`.
"""

from __future__ import annotations

from collections.abc import Sequence

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import Action, Gate, SystemStatePacket, Veto
from esper.tamiyo.candidates import find_candidates, reason_to_wait
from esper.tamiyo.draws import generator
from esper.tamiyo.memory import TamiyoState
from esper.tamiyo.orders import Order, Policy, Proposal
from esper.tamiyo.safety import growth_is_blocked, growth_is_over, last_growth_epoch

__all__ = ["NoGrowth", "Order", "Policy", "Proposal", "RandomGrowth", "ScheduledGrowth"]


class Unlearning:
    """What remembers nothing of its own."""

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Returns the memory as it is."""
        del packet
        return state


class NoGrowth(Unlearning):
    """Never grows: the control group."""

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Waits."""
        del state, packet
        return Proposal(reason="policy none: the host does not grow")


class RandomGrowth(Unlearning):
    """Grows at random epochs, uniform over eligible pairs of site and kernel: what any policy must beat.

    Each epoch begins an adaptation with probability (adaptations left) / (epochs left in which one may begin), so
    that all allowed ones are spent where nothing stands in the way, and no epoch is preferred.
    """

    def __init__(self, config: TamiyoConfig) -> None:
        self._config = config

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Draws whether to grow, then where and what."""
        wait = reason_to_wait(state, packet, self._config)
        if wait is not None:
            return Proposal(reason=wait)
        last = last_growth_epoch(packet.epoch.num_epochs, self._config.last_epoch_fraction)
        num_epochs_left = last - packet.epoch.epoch + 1
        chance = min(1.0, (self._config.max_adaptations - state.num_adaptations) / num_epochs_left)
        draw = generator(state)
        if draw.random() >= chance:
            return Proposal(reason=f"random policy: a coin with {chance:.0%} for growth said wait", num_draws=1)
        found = find_candidates(state, packet, self._config)
        pairs = [(candidate, option) for candidate in found.candidates for option in candidate.options]
        if not pairs:
            return Proposal(reason=f"random policy: would grow, but {found.why_none()}", num_draws=1)
        pairs.sort(key=lambda pair: (pair[0].site, pair[0].seed.seed_id, pair[1].blueprint, pair[1].kernel_id))
        candidate, option = draw.choice(pairs)
        reason = f"random policy: drew {option.blueprint} at site {candidate.site} out of {len(pairs)} pairs"
        order = candidate.germinate(option, self._config, reason)
        return Proposal(reason, orders=(order,), num_draws=1)


class ScheduledGrowth(Unlearning):
    """Grows as `TamiyoConfig.schedule` says.

    An entry is due at the decision that closes its epoch. One that cannot be done then stays due, with a veto that
    says why, until it can; one that can never be done any more is given up with a last veto.
    """

    def __init__(self, config: TamiyoConfig) -> None:
        self._config = config

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Turns due entries into orders."""
        epoch = packet.epoch.epoch
        waiting = [(i, entry) for i, entry in enumerate(self._config.schedule) if i not in state.schedule_done]
        due = [(i, entry) for i, entry in waiting if entry.epoch <= epoch]
        orders: list[Order] = []
        vetoes: list[Veto] = []
        given_up: list[int] = []
        for i, entry in due:
            never = self._why_never(entry, state, packet)
            if never is not None:
                given_up.append(i)
                vetoes.append(_veto(entry, "schedule gives up", never))
                continue
            planned = self._plan(i, entry, state, packet, taken=[order.seed_id for order in orders])
            if isinstance(planned, str):
                vetoes.append(_veto(entry, f"schedule, epoch {entry.epoch},", planned))
            else:
                orders.append(planned)
        if orders:
            reason = "; ".join(order.reason for order in orders)
        elif due:
            reason = "what the schedule asks for cannot be done now"
        elif waiting:
            reason = f"the schedule's next entry is for epoch {min(entry.epoch for _, entry in waiting)}"
        else:
            reason = "the schedule holds no more entries"
        return Proposal(reason, tuple(orders), tuple(vetoes), tuple(given_up))

    def _why_never(self, entry: ScheduledGraft, state: TamiyoState, packet: SystemStatePacket) -> str | None:
        from esper.tamiyo.table import table_of

        sites = table_of(packet).sites
        # a packet that goes without some system proves nothing about which sites exist
        if sites and not packet.missing and entry.site not in sites:
            return f"there is no site {entry.site}; the sites are {', '.join(sites)}"
        return growth_is_over(state, packet, self._config)

    def _plan(
        self, i: int, entry: ScheduledGraft, state: TamiyoState, packet: SystemStatePacket, *, taken: Sequence[str]
    ) -> Order | str:
        blocked = growth_is_blocked(state, packet, self._config)
        if blocked is not None:
            return blocked
        # kernels must suit the entry's own strategy
        config = self._config.model_copy(update={"strategy": entry.strategy})
        found = find_candidates(state, packet, config, blueprint=entry.blueprint)
        candidate = next((candidate for candidate in found.candidates if candidate.site == entry.site), None)
        if candidate is None:
            pending = f"; {packet.epoch.pending} kernels are still being compiled" if packet.epoch.pending else ""
            return found.excluded.get(entry.site, "no health came from this site") + pending
        option = candidate.options[0]
        made_from = "" if option.blueprint == entry.blueprint else f" (a kernel made from {option.blueprint})"
        reason = f"scheduled for epoch {entry.epoch}: germinating {entry.blueprint} at site {entry.site}{made_from}"
        free = [seed for seed in (candidate.seed, *candidate.others) if seed.seed_id not in taken]
        # without a free seed the safety gates say what stands in the way
        return candidate.germinate(option, entry, reason, entry=i, seed=free[0] if free else None)


def _veto(entry: ScheduledGraft, who: str, reason: str) -> Veto:
    return Veto(
        gate=Gate.SCHEDULE,
        action=Action.GERMINATE,
        site=entry.site,
        blueprint=entry.blueprint,
        what=f"{who} {entry.blueprint} at {entry.site}",
        reason=reason,
    )
