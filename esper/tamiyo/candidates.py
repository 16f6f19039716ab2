"""Where growth is possible: sites with a dormant seed, a fresh report, and kernels that may be used there.

Every site that falls out has its reason in words, so that a wait can be explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    import numpy as np

    from esper.tamiyo.table import Layers, Table


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


class Candidates:
    """What was found, in the order of the packet's layers, and why the other sites fell out.

    Args:
        layers: the packet's.
        room: for growth.
        places: (C,) the sites where an adaptation could begin.
        first: (C,) the seed of each.
        options: the kernels of each.
        excluded: tells why the other sites fell out.
    """

    def __init__(
        self,
        layers: Layers,
        room: Room,
        places: np.ndarray,
        first: np.ndarray,
        options: Sequence[tuple[KernelOption, ...]],
        excluded: Callable[[], dict[str, str]],
    ) -> None:
        self.room, self.places, self.first, self.options = room, places, first, options
        self._layers, self._excluded = layers, excluded

    def __len__(self) -> int:
        return len(self.places)

    def at(self, number: int) -> Candidate:
        """Makes one of them."""
        layer = self._layers[int(self.places[number])]
        seed, *others = _resting(layer)
        return Candidate(layer.layer_id, layer.signature, seed, self.options[number], tuple(others))

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them."""
        return tuple(self.at(number) for number in range(len(self)))

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Growth potential and number of those where it was measured, largest first, ties in forward order."""
        import numpy as np

        potential = self._layers.table.seed.numbers("grow_potential")[self.first]
        order = np.argsort(-potential, kind="stable")
        order = order[~np.isnan(potential[order])]
        return potential[order], order

    @cached_property
    def excluded(self) -> dict[str, str]:
        """Why the other sites fell out, by site."""
        return self._excluded()

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
    from esper.tamiyo.table import layers_of

    layers, room = layers_of(packet), room_of(state, packet)
    names = layers.table.sites
    places, first = _where(layers, packet)
    ready = _ready(layers.table, packet)
    # what was tried or is forbidden at a site makes its kernels its own; sites that have the same are judged once
    own = {key.rpartition(":")[0] for key in (*state.failed, *packet.embargoed)}
    judged: dict[int, tuple[KernelOption, ...] | str] = {}

    def usable(place: int) -> tuple[KernelOption, ...] | str:
        site, bundle = names[place], ready.bundle_of[place]
        if site in own:
            return _usable(site, ready.bundles[bundle], state, packet, config, room, blueprint)
        if bundle not in judged:
            judged[bundle] = _usable(site, ready.bundles[bundle], state, packet, config, room, blueprint)
        return judged[bundle]

    found = [usable(place) for place in places.tolist()]
    kept = [number for number, options in enumerate(found) if not isinstance(options, str)]

    def excluded() -> dict[str, str]:
        refused = {place: why for place, why in zip(places.tolist(), found, strict=True) if isinstance(why, str)}
        fine = set(places.tolist()) - refused.keys()
        return {
            names[place]: refused.get(place) or _why_not_resting(layers[place], packet)
            for place in range(len(layers))
            if place not in fine
        }

    options = [one for one in found if not isinstance(one, str)]
    return Candidates(layers, room, places[kept], first[kept], options, excluded)


def _where(layers: Layers, packet: SystemStatePacket) -> tuple[np.ndarray, np.ndarray]:
    """The sites with a dormant seed, a fresh report and nothing under way, and the first of their dormant seeds."""
    import numpy as np

    table = layers.table
    fine = (table.site.numbers("epoch") == packet.epoch.epoch) & (table.count(table.is_active) == 0)
    fine[table.places_of(packet.embargoed)] = False
    resting = np.flatnonzero(table.stage == SeedStage.DORMANT.code)
    resting = resting[fine[table.seed_site[resting]]]
    potential = table.seed.numbers("grow_potential")[resting]
    order = np.lexsort((np.where(np.isnan(potential), 1.0, -potential), table.seed_site[resting]))
    places, begins = np.unique(table.seed_site[resting[order]], return_index=True)
    return places, resting[order][begins]


@dataclass(frozen=True, slots=True)
class _Ready:
    """Bundles of kernels, and which of them each site has: there may be a hundred thousand pairs, and few bundles."""

    bundles: list[list[KernelOption]]
    bundle_of: list[int]


def _ready(table: Table, packet: SystemStatePacket) -> _Ready:
    import numpy as np

    alike: dict[tuple[str, ...], list[KernelOption]] = {}
    for option in packet.options:
        alike.setdefault(option.sites, []).append(option)
    bundles: list[list[KernelOption]] = [[]]
    bundle_of = np.zeros(len(table), dtype=np.int64)
    for sites, more in alike.items():
        places = np.unique(table.places_of(sites))
        had, which = np.unique(bundle_of[places], return_inverse=True)
        bundle_of[places] = len(bundles) + which
        bundles += [[*bundles[before], *more] for before in had.tolist()]
    return _Ready(bundles, bundle_of.tolist())


def _why_not_resting(layer: LayerHealthReport, packet: SystemStatePacket) -> str:
    """Why there is no seed to use at a site."""
    if layer.layer_id in packet.embargoed:
        return "under embargo"
    if layer.epoch != packet.epoch.epoch:
        return f"its health is of epoch {layer.epoch}, not of {packet.epoch.epoch}"
    busy = next((seed for seed in layer.seeds if seed.stage.is_active), None)
    return "no dormant seed there" if busy is None else f"{busy.seed_id} is {busy.stage} there"


def _resting(layer: LayerHealthReport) -> list[HealthSignal]:
    """The dormant seeds, that with the largest growth potential first; an unmeasured one ranks below every measured."""
    resting = [seed for seed in layer.seeds if seed.stage is SeedStage.DORMANT]
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
