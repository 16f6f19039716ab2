"""Where growth is possible: sites with a dormant seed, a fresh report, and kernels that may be used there.

Every site that falls out has its reason in words, so that a wait can be explained.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import (
    Action,
    BlendStrategy,
    HealthSignal,
    KernelOption,
    LayerHealthReport,
    SeedStage,
    SiteSignature,
    SystemStatePacket,
)
from esper.tamiyo.memory import TamiyoState, failure_key
from esper.tamiyo.orders import Order
from esper.tamiyo.safety import Room, growth_is_blocked, growth_is_over, room_of


@dataclass(frozen=True, slots=True)
class Candidate:
    """A site's dormant seeds and the kernels they may be given, by blueprint name.

    Attributes:
        seed: the first of them.
        others: those that may race with it.
    """

    site: str
    signature: SiteSignature
    seed: HealthSignal
    options: tuple[KernelOption, ...]
    others: tuple[HealthSignal, ...] = ()

    def germinate(
        self,
        option: KernelOption,
        settings: TamiyoConfig | ScheduledGraft,
        reason: str,
        *,
        entry: int | None = None,
        seed: HealthSignal | None = None,
    ) -> Order:
        """Returns the order to begin with this kernel here, in the way of `settings`, in `seed` or the first."""
        return Order(
            action=Action.GERMINATE,
            site=self.site,
            seed_id=(seed or self.seed).seed_id,
            reason=reason,
            option=option,
            strategy=BlendStrategy(settings.strategy),
            lr_factor=settings.lr_factor,
            entry=entry,
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """What was found, in the order of the packet's layers, and why the other sites fell out."""

    candidates: tuple[Candidate, ...]
    excluded: dict[str, str]
    room: Room

    def why_none(self) -> str:
        """Says why no site is eligible."""
        if not self.excluded:
            return "no site sent a health report"
        return "no site is eligible (" + "; ".join(f"{site}: {why}" for site, why in self.excluded.items()) + ")"


def reason_to_wait(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig) -> str | None:
    """Why a policy that chooses its own time should not think of growth now; None if it may."""
    epoch = packet.epoch.epoch
    held = growth_is_over(state, packet, config) or growth_is_blocked(state, packet, config)
    if held is not None:
        return held
    if epoch + 1 < config.warmup_epochs:
        return f"epoch {epoch} belongs to the warm-up of {config.warmup_epochs} epochs"
    if epoch < state.cooldown_until:
        return f"{state.cooldown_reason}: growth rests until epoch {state.cooldown_until}"
    return None


def find_candidates(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, *, blueprint: str | None = None
) -> Candidates:
    """Finds where an adaptation could begin.

    Args:
        state: after it has seen `packet`.
        packet: the current one.
        config: limits, and the strategy that kernels must suit.
        blueprint: only kernels that go by this name, even where they failed before: somebody asked for it by name.
    """
    room = room_of(state, packet)
    found: list[Candidate] = []
    excluded: dict[str, str] = {}
    # sites that have the same kernels share one list, judged once: there may be a hundred thousand pairs
    bundles: dict[tuple[str, ...], list[KernelOption]] = {}
    for option in packet.options:
        bundles.setdefault(option.sites, []).append(option)
    ready: dict[str, list[KernelOption]] = {}
    for sites, bundle in bundles.items():
        for site in sites:
            ready[site] = [*ready[site], *bundle] if site in ready else bundle
    none: list[KernelOption] = []
    own = {key.rpartition(":")[0] for key in (*state.failed, *packet.embargoed)}
    judged: dict[int, tuple[KernelOption, ...] | str] = {}
    for layer in packet.layers:
        seeds = _resting_seeds(layer, packet)
        if isinstance(seeds, str):
            excluded[layer.layer_id] = seeds
            continue
        here = ready.get(layer.layer_id, none)
        options = None if layer.layer_id in own else judged.get(id(here))
        if options is None:
            options = _usable(layer.layer_id, here, state, packet, config, room, blueprint)
            if layer.layer_id not in own:
                judged[id(here)] = options
        if isinstance(options, str):
            excluded[layer.layer_id] = options
        else:
            found.append(Candidate(layer.layer_id, layer.signature, seeds[0], options, tuple(seeds[1:])))
    return Candidates(tuple(found), excluded, room)


def _resting_seeds(layer: LayerHealthReport, packet: SystemStatePacket) -> list[HealthSignal] | str:
    """The dormant seeds, that with the largest growth potential first, or why there is none to use."""
    if layer.layer_id in packet.embargoed:
        return "under embargo"
    if layer.epoch != packet.epoch.epoch:
        return f"its health is of epoch {layer.epoch}, not of {packet.epoch.epoch}"
    busy = next((seed for seed in layer.seeds if seed.stage.is_active), None)
    if busy is not None:
        return f"{busy.seed_id} is {busy.stage} there"
    resting = [seed for seed in layer.seeds if seed.stage is SeedStage.DORMANT]
    if not resting:
        return "no dormant seed there"
    # an unmeasured seed ranks below every measured one
    return sorted(resting, key=lambda seed: 1.0 if seed.grow_potential is None else -seed.grow_potential)


def _usable(
    site: str,
    ready: list[KernelOption],
    state: TamiyoState,
    packet: SystemStatePacket,
    config: TamiyoConfig,
    room: Room,
    blueprint: str | None,
) -> tuple[KernelOption, ...] | str:
    """The kernels for this site that nothing forbids of those that are `ready`, or why there are none."""
    if blueprint is not None:
        ready = [option for option in ready if blueprint in {option.blueprint, *option.aliases}]
    if not ready:
        return "no kernel is ready" if blueprint is None else f"no kernel of {blueprint} is ready"
    usable: list[KernelOption] = []
    refusals: dict[str, None] = {}
    for option in sorted(ready, key=lambda one: (one.blueprint, one.kernel_id)):
        key = failure_key(site, option.blueprint)
        if blueprint is None and key in state.failed:
            refusals[f"{option.blueprint} failed there before"] = None
        elif key in packet.embargoed:
            refusals[f"{option.blueprint} is under embargo there"] = None
        elif config.strategy == BlendStrategy.DIRECT and not option.zero_at_birth:
            refusals[f"{option.blueprint} is not zero at birth, which the direct strategy needs"] = None
        elif (too_risky := _risk_above(config.max_risk, option)) is not None:
            refusals[f"{option.blueprint}: {too_risky}"] = None
        elif (too_dear := room.refuses(option)) is not None:
            refusals[f"{option.blueprint}: {too_dear}"] = None
        else:
            usable.append(option)
    if not usable:
        return ", ".join(refusals)
    return tuple(usable)


def _risk_above(limit: float | None, option: KernelOption) -> str | None:
    """Why the kernel's risk forbids it; None if it does not."""
    if limit is None or (option.risk is not None and option.risk <= limit):
        return None
    found = "has no risk score" if option.risk is None else f"its risk score is {option.risk:.2f}"
    return f"{found}, and the limit is {limit:.2f}"
