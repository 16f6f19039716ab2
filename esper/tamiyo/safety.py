"""The gates behind every policy: what may be done at all. Every refusal is said in words.

Nothing here wants anything: `judge` takes orders from whichever policy and lets through those that are legal for
their seed, inside the budget and within the limits of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.config import TamiyoConfig
from esper.leyline import (
    NEXT,
    PAIRED,
    TRANSITIONS,
    Action,
    BlendStrategy,
    Gate,
    HealthSignal,
    KernelOption,
    SeedStage,
    Severity,
    SystemStatePacket,
    Veto,
)
from esper.tamiyo.memory import TamiyoState, failure_key
from esper.tamiyo.orders import Order

GOVERNOR_OK = "ok"
GOVERNOR_CRITICAL = "critical"
"""`SystemStatePacket.governor` begins with this word when the trainer must roll back."""

_NOT_YET_LIVE = frozenset({SeedStage.GERMINATED, SeedStage.TRAINING})


@dataclass(frozen=True, slots=True)
class Room:
    """What growth may still spend; None is no limit."""

    params: int | None
    flops: int | None

    def refuses(self, option: KernelOption) -> str | None:
        """Why this kernel does not fit; None if it does."""
        if self.params is not None and option.num_parameters > self.params:
            return f"{option.num_parameters:,} parameters exceed the {self.params:,} left in the budget"
        if self.flops is not None and option.flops_per_sample > self.flops:
            return f"{option.flops_per_sample:,} FLOPs a sample exceed the {self.flops:,} left in the budget"
        return None

    def after(self, option: KernelOption) -> Room:
        """The room left once this kernel is paid for."""
        return Room(
            None if self.params is None else self.params - option.num_parameters,
            None if self.flops is None else self.flops - option.flops_per_sample,
        )


def room_of(state: TamiyoState, packet: SystemStatePacket) -> Room:
    """Returns what is left, less what kernels under way will take once they join the live path."""
    waiting = [attempt for attempt in state.under_way if attempt.stage in _NOT_YET_LIVE]
    budget = packet.budget
    params, flops = budget.params_limit, budget.flops_limit
    # all that race at a site are counted, though one of them will join: which, nobody knows yet
    if params is not None:
        params = max(0, params - budget.params_used - sum(attempt.num_parameters for attempt in waiting))
    if flops is not None:
        flops = max(0, flops - budget.flops_used - sum(attempt.flops_per_sample for attempt in waiting))
    return Room(params, flops)


def last_growth_epoch(num_epochs: int, fraction: float) -> int:
    """Returns the last epoch whose closing decision may begin an adaptation; -1 for none."""
    # the small term keeps 0.7 * 30 at 21
    return math.floor(fraction * num_epochs + 1e-9) - 1


def growth_is_over(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig) -> str | None:
    """Why no adaptation can begin any more in this run; None if one can."""
    last = last_growth_epoch(packet.epoch.num_epochs, config.last_epoch_fraction)
    if packet.epoch.epoch > last:
        return (
            f"epoch {packet.epoch.epoch} of {packet.epoch.num_epochs} is too late to begin:"
            f" a seed could not be proven any more (last chance was epoch {last})"
        )
    if state.num_adaptations >= config.max_adaptations:
        return f"all {config.max_adaptations} adaptations of this run are spent"
    return None


ALERT_EPOCHS = 10
"""So long an alert that was not told again holds growth back: a Nissa that died tells the end of none."""


def divergence_of(packet: SystemStatePacket) -> str | None:
    """What Nissa says of a loss that runs away, in words; None where no such alert stands."""
    grave = [flag for flag in packet.alerts if flag.is_divergence and packet.epoch.epoch - flag.epoch < ALERT_EPOCHS]
    if not grave:
        return None
    worst = max(grave, key=lambda flag: (flag.severity is Severity.CRITICAL, flag.epoch))
    until = worst.epoch + ALERT_EPOCHS
    return (
        f"Nissa's alert stands: {worst.summary} ({worst.evidence}): nothing grows until it is over, "
        f"or until epoch {until} if it is not told again"
    )


def growth_is_blocked(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, *, num_begun: int = 0
) -> str | None:
    """Why no adaptation can begin at this decision, after `num_begun` others of it; None if one can. Kernels that race
    at a site are one adaptation.
    """
    if packet.governor != GOVERNOR_OK:
        return f"the governor reports {packet.governor}: nothing grows until it is ok"
    if (divergence := divergence_of(packet)) is not None:
        return divergence
    if len({attempt.site for attempt in state.under_way}) + num_begun >= config.max_concurrent:
        names = [f"{a.blueprint or 'a kernel'} at {a.site} ({a.stage})" for a in state.under_way]
        names.extend([f"{num_begun} begun just now"] if num_begun else [])
        allowed = "one adaptation" if config.max_concurrent == 1 else f"{config.max_concurrent} adaptations"
        return f"{', '.join(names)} under way, and {allowed} at a time"
    return None


Held = tuple[Gate, str]
"""The gate that is shut, and why, in words."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What passed the gates, and what did not and why."""

    accepted: tuple[Order, ...]
    vetoes: tuple[Veto, ...]


def judge(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, orders: Sequence[Order]) -> Verdict:
    """Passes orders through the gates, in their order; a place freed by a removal counts from the next packet on."""
    seeds = _seeds_at({order.site for order in orders}, packet)
    ordered: set[tuple[str, str]] = set()
    accepted: list[Order] = []
    vetoes: list[Veto] = []
    room = room_of(state, packet)
    begun: set[str] = set()
    for order in orders:
        key = (order.site, order.seed_id)
        held: Held | None
        if packet.governor.startswith(GOVERNOR_CRITICAL):
            # after a rollback the seed may not even have its kernel any more
            held = Gate.GOVERNOR, "the governor asks for a rollback, which comes first"
        elif key in ordered:
            held = Gate.STAGE, "the seed already got an order"
        else:
            held = _why_illegal(order, seeds.get(key), packet)
        if held is None and order.action is Action.GERMINATE:
            held = _why_no_growth(order, state, packet, config, room, len(begun - {order.site}))
        if held is not None:
            vetoes.append(_veto(order, *held))
            continue
        ordered.add(key)
        accepted.append(order)
        if order.option is not None:
            room = room.after(order.option)
            begun.add(order.site)
    return Verdict(tuple(accepted), tuple(vetoes))


def _seeds_at(sites: set[str], packet: SystemStatePacket) -> dict[tuple[str, str], HealthSignal]:
    """The seeds of sites, by site and id."""
    if not sites:
        return {}
    from esper.tamiyo.table import layers_of

    layers = layers_of(packet)
    found = (layers.named(site) for site in sites)
    return {(seed.layer_id, seed.seed_id): seed for layer in found if layer is not None for seed in layer.seeds}


def _veto(order: Order, gate: Gate, reason: str) -> Veto:
    what = f"{order.option.blueprint} at {order.site}" if order.option else f"{order.site}/{order.seed_id}"
    return Veto(
        gate=gate,
        action=order.action,
        site=order.site,
        seed_id=order.seed_id,
        blueprint=order.option.blueprint if order.option else None,
        what=f"{order.action} {what}",
        reason=reason,
    )


def _why_illegal(order: Order, seed: HealthSignal | None, packet: SystemStatePacket) -> Held | None:
    """Why the seed cannot take this order as it stands; None if it can."""
    if seed is None:
        return Gate.STAGE, "no health came from this seed"
    if order.action is Action.ADVANCE:
        return _why_not_advance(seed, packet)
    if order.action is Action.GERMINATE:
        return None if seed.stage is SeedStage.DORMANT else (Gate.STAGE, f"the seed is {seed.stage}, not DORMANT")
    if order.action is Action.CULL:
        may_go = SeedStage.CULLED in TRANSITIONS[seed.stage]
        return None if may_go else (Gate.STAGE, f"a seed in {seed.stage} cannot be culled")
    may_retire = seed.stage.is_blended and seed.stage is not SeedStage.FOSSILIZED
    return None if may_retire else (Gate.STAGE, f"a seed in {seed.stage} has nothing on the live path to retire")


def _why_not_advance(seed: HealthSignal, packet: SystemStatePacket) -> Held | None:
    if seed.stage is SeedStage.DORMANT or seed.stage not in NEXT:
        return Gate.STAGE, f"a seed in {seed.stage} cannot advance"
    if not seed.is_ready_for_transition:
        return Gate.EVIDENCE, f"its gate is shut: {seed.gate or 'the gate gave no reason'}"
    to = NEXT[seed.stage]
    if seed.stage is SeedStage.GRAFTING and seed.alpha < 1.0:
        return Gate.STAGE, f"it is blended in to {seed.alpha:.2f} only"
    if seed.stage is SeedStage.TRAINING and not (
        seed.evidence is not None and seed.evidence.kind in PAIRED and seed.evidence.num_pairs > 0
    ):
        return Gate.EVIDENCE, "no paired evidence came with its health, and unmeasured is not better"
    joins_or_stays = to in {SeedStage.GRAFTING, SeedStage.FOSSILIZED} or seed.stage is SeedStage.GERMINATED
    if packet.governor != GOVERNOR_OK and joins_or_stays:
        return Gate.GOVERNOR, f"the governor reports {packet.governor}: nothing new joins the host or becomes permanent"
    return None


def _why_no_growth(
    order: Order,
    state: TamiyoState,
    packet: SystemStatePacket,
    config: TamiyoConfig,
    room: Room,
    num_begun: int,
) -> Held | None:
    """Why this adaptation may not begin, after `num_begun` others of the same decision; None if it may."""
    counted = state.model_copy(update={"num_adaptations": state.num_adaptations + num_begun})
    if (over := growth_is_over(counted, packet, config)) is not None:
        return Gate.TIME, over
    if (blocked := growth_is_blocked(state, packet, config, num_begun=num_begun)) is not None:
        return _gate_of_growth(packet), blocked
    if order.entry is None and packet.epoch.epoch < state.cooldown_until:  # a person's schedule does not rest
        return Gate.COOLDOWN, f"{state.cooldown_reason}: growth rests until epoch {state.cooldown_until}"
    return _why_not_this_kernel(order, state, packet, room)


def _gate_of_growth(packet: SystemStatePacket) -> Gate:
    """Which gate holds all growth back, where one does."""
    if packet.governor != GOVERNOR_OK:
        return Gate.GOVERNOR
    return Gate.CONCURRENCY if divergence_of(packet) is None else Gate.ALERT


def _why_not_this_kernel(order: Order, state: TamiyoState, packet: SystemStatePacket, room: Room) -> Held | None:
    """Why this kernel may not be used at this site; None if it may."""
    option = order.option
    if option is None or option not in packet.options or order.site not in option.sites:
        return Gate.KERNEL, "its kernel is not among those that are ready for this site"
    if any(attempt.site == order.site for attempt in state.under_way):
        return Gate.CONCURRENCY, "another adaptation is under way at this site"
    for key in (order.site, failure_key(order.site, option.blueprint)):
        if key in packet.embargoed:
            return Gate.EMBARGO, f"{key} is under embargo"
    if order.strategy is BlendStrategy.DIRECT and not option.zero_at_birth:
        return Gate.KERNEL, "the direct strategy needs a kernel that is exactly zero at birth"
    too_dear = room.refuses(option)
    return None if too_dear is None else (Gate.BUDGET, too_dear)
