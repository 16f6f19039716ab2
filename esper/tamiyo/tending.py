"""The rule for seeds under way, the same for every policy: an open gate advances them, a gate that asks for removal
culls or retires them, and a gate that says neither leaves them alone. Health that did not come is never taken for
good health.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.leyline import NEXT, Action, HealthSignal, SystemStatePacket
from esper.tamiyo.memory import TamiyoState
from esper.tamiyo.orders import Order


@dataclass(frozen=True, slots=True)
class Care:
    """Orders for seeds under way, removals first, and what is said of those that are left alone."""

    orders: tuple[Order, ...]
    notes: tuple[str, ...]


def tend(state: TamiyoState, packet: SystemStatePacket) -> Care:
    """Returns what to do with every seed that has begun and not ended."""
    removals: list[Order] = []
    advances: list[Order] = []
    notes: list[str] = []
    for layer in packet.layers:
        for seed in layer.seeds:
            if not seed.stage.is_active:
                continue
            name = f"{seed.layer_id}/{seed.seed_id}"
            if min(layer.epoch, seed.epoch) != packet.epoch.epoch:
                notes.append(f"{name} is left in {seed.stage}: its health is of epoch {min(layer.epoch, seed.epoch)}")
            elif seed.should_cull:
                removals.append(_removal(seed, name))
            elif seed.is_ready_for_transition:
                advances.append(_order(Action.ADVANCE, seed, f"advancing {name} from {seed.stage}"))
            else:
                notes.append(f"{name} stays in {seed.stage}: {seed.gate or 'its gate gave no reason'}")
    reported = {layer.layer_id for layer in packet.layers}
    notes.extend(
        f"no health came from {attempt.site}, where {attempt.seed_id} is under way: it is left as it is"
        for attempt in state.under_way
        if attempt.site not in reported
    )
    return Care((*removals, *advances), tuple(notes))


def _removal(seed: HealthSignal, name: str) -> Order:
    """A cull behind the host leaves no trace; once the host leans on a kernel, alpha goes down while it trains on."""
    if seed.stage.is_blended:
        return _order(Action.RETIRE, seed, f"retiring {name} from {seed.stage}")
    return _order(Action.CULL, seed, f"culling {name} from {seed.stage}")


def _order(action: Action, seed: HealthSignal, what: str) -> Order:
    if action is Action.ADVANCE and seed.stage in NEXT:
        what = f"{what} towards {NEXT[seed.stage]}"
    return Order(action, seed.layer_id, seed.seed_id, seed.gate or "its gate gave no reason", deed=what)
