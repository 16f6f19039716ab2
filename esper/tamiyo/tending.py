"""The rule for seeds under way, the same for every policy: an open gate advances them, a gate that asks for removal
culls or retires them, and a gate that says neither leaves them alone. Where kernels race at a site (see `race`), the
winner alone goes on, and the others are culled with it. Health that did not come is never taken for
good health. A person's veto removes a seed whatever its gate says; where the run asks for it, nothing enters the live
path without a person's approval.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.config import TamiyoConfig
from esper.leyline import NEXT, Action, BlendStrategy, HealthSignal, LayerHealthReport, SeedStage, SystemStatePacket
from esper.leyline.steering import Verdict
from esper.tamiyo.memory import Attempt, TamiyoState
from esper.tamiyo.orders import Order
from esper.tamiyo.race import rivals, why_wait


@dataclass(frozen=True, slots=True)
class Care:
    """Orders for seeds under way, removals first, and what is said of those that are left alone.

    Attributes:
        removals: of seeds that must go, by their gate's word or a person's.
        advances: of each seed that may go on, its own order and then those for whom it races with, who must go then.
        asked: ids of seeds for which a person is asked now, for the first time.
        vetoed: ids of those that are removed by a person's word.
    """

    removals: tuple[Order, ...]
    advances: tuple[tuple[Order, ...], ...]
    notes: tuple[str, ...]
    asked: tuple[str, ...] = ()
    vetoed: tuple[str, ...] = ()

    @property
    def orders(self) -> tuple[Order, ...]:
        """All of them, what is removed first."""
        lost = (order for _, *losers in self.advances for order in losers)
        return (*self.removals, *lost, *(advance for advance, *_ in self.advances))


def tend(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig) -> Care:
    """Returns what to do with every seed that has begun and not ended."""
    from esper.tamiyo.table import layers_of

    attempts = {attempt.seed_id: attempt for attempt in state.under_way}
    words = {(word.seed_id, word.kernel_id): word for word in packet.words}
    asked: list[str] = []
    vetoed: list[str] = []
    removals: list[Order] = []
    advances: list[tuple[Order, ...]] = []
    notes: list[str] = []
    for layer, seed in layers_of(packet).active():
        name = f"{seed.layer_id}/{seed.seed_id}"
        attempt = attempts.get(seed.seed_id)
        word = words.get((seed.seed_id, seed.kernel_id or (attempt.kernel_id if attempt else None) or ""))
        if attempt and word is not None and word.verdict is Verdict.VETO:
            vetoed.append(seed.seed_id)
            if attempt.vetoed:
                notes.append(f"{name} is on its way out: {word.in_words}")
            else:
                removals.append(removal(seed, name, word.in_words))
        elif min(layer.epoch, seed.epoch) != packet.epoch.epoch:
            notes.append(f"{name} is left in {seed.stage}: its health is of epoch {min(layer.epoch, seed.epoch)}")
        elif seed.should_cull:
            removals.append(removal(seed, name))
        elif seed.is_ready_for_transition and (held := why_wait(seed, layer, packet.epoch.epoch)) is not None:
            notes.append(f"{name} {held}")
        elif seed.is_ready_for_transition and config.ask_before_graft and _would_graft(seed, attempt) and not word:
            notes.append(f"{name} waits for a person: esper runs approve {packet.run_id} {seed.seed_id}, or veto")
            asked += _to_ask(attempt)
        elif seed.is_ready_for_transition:
            advance = _order(Action.ADVANCE, seed, f"advancing {name} from {seed.stage}")
            advances.append((advance, *_losers(seed, layer)))
        else:
            notes.append(f"{name} stays in {seed.stage}: {seed.gate or 'its gate gave no reason'}")
    notes.extend(_unreported(state, packet))
    return Care(tuple(removals), tuple(advances), tuple(notes), tuple(asked), tuple(vetoed))


def _unreported(state: TamiyoState, packet: SystemStatePacket) -> list[str]:
    from esper.tamiyo.table import table_of

    reported = table_of(packet).places
    return [
        f"no health came from {attempt.site}, where {attempt.seed_id} is under way: it is left as it is"
        for attempt in state.under_way
        if attempt.site not in reported
    ]


def _to_ask(attempt: Attempt | None) -> list[str]:
    return [] if attempt is None or attempt.asked else [attempt.seed_id]


def _losers(winner: HealthSignal, layer: LayerHealthReport) -> list[Order]:
    return [
        removal(seed, f"{seed.layer_id}/{seed.seed_id}", f"lost the race to {winner.seed_id} ({seed.gate})")
        for seed in rivals(winner, layer)
    ]


def _would_graft(seed: HealthSignal, attempt: Attempt | None) -> bool:
    """Whether its next stage puts it on the live path. One that nobody here began is taken for direct: it might be."""
    is_direct = attempt is None or attempt.strategy is BlendStrategy.DIRECT
    return seed.stage is SeedStage.TRAINING or (seed.stage is SeedStage.GERMINATED and is_direct)


def removal(seed: HealthSignal, name: str, why: str = "") -> Order:
    """A cull behind the host leaves no trace; once the host leans on a kernel, alpha goes down while it trains on."""
    if seed.stage.is_blended:
        return _order(Action.RETIRE, seed, f"retiring {name} from {seed.stage}", why)
    return _order(Action.CULL, seed, f"culling {name} from {seed.stage}", why)


def _order(action: Action, seed: HealthSignal, what: str, why: str = "") -> Order:
    if action is Action.ADVANCE and seed.stage in NEXT:
        what = f"{what} towards {NEXT[seed.stage]}"
    return Order(action, seed.layer_id, seed.seed_id, why or seed.gate or "its gate gave no reason", deed=what)
