"""The `gnn` policy: a trained network decides when, where and how to grow, and when a seed goes on or goes.

What tending does by rule (a gate that asks for removal, a person's word, who loses a race) is done whatever the network
says, and every order passes the gates of `safety` as those of any policy do. Before them stand two of its own: where it
is not certain enough of what comes of its choice, or not decided enough, it begins nothing, seeds under way are tended
by the rule, and the veto says so. Each decision comes with its explanation.

What is done is drawn from its probabilities, as it was trained: to wait for one epoch costs next to nothing, so that
what is most probable may be to wait, in every epoch. Chance hangs on the run's seed, the epoch and nothing else.

The same state, packet, configuration and version give the same decision. Weights come from whoever holds them
(`Policies`) and are kept by version in this process. torch and numpy are imported with the first of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import ValidationError

from esper.config import TamiyoConfig
from esper.leyline import (
    Action,
    Explanation,
    Gate,
    PermanentError,
    PolicyCard,
    PolicyStore,
    SystemStatePacket,
    TamperedError,
    Veto,
)
from esper.leyline.policies import find_policy
from esper.tamiyo.actions import STRATEGIES, ActionChoice, Operation
from esper.tamiyo.draws import generator
from esper.tamiyo.memory import TamiyoState
from esper.tamiyo.orders import Order, Proposal
from esper.tamiyo.shape import NetShape
from esper.tamiyo.tending import Care, removal, tend

if TYPE_CHECKING:
    from esper.tamiyo.considering import Considered, Draw
    from esper.tamiyo.inference import Inference
    from esper.tamiyo.net import PolicyNet
    from esper.tamiyo.observation import Observation

KIND = "gnn"
Policies = Callable[[str], tuple[PolicyCard, bytes]]
"""From a version to card and weights, as `PolicyStore.get`."""

_NUM_KEPT = 4
_REMEDY = "train one with `esper policy train`, then name it in tamiyo.gnn.version, nominate or promote it"


@dataclass(frozen=True)
class Loaded:
    """A policy whose network is ready."""

    version: str
    net: PolicyNet

    @cached_property
    def inference(self) -> Inference:
        """The network as it decides."""
        from esper.tamiyo.inference import Inference

        return Inference(self.net)


_kept: OrderedDict[str, Loaded] = OrderedDict()
_keeping = threading.Lock()


def load(version: str, policies: Policies | None) -> Loaded:
    """Returns the policy of this version, from this process' memory where it is there.

    Raises:
        PermanentError: if it cannot be had, or reads observations of another form.
        TamperedError: if card and weights do not belong together.
        EsperError: what `policies` raises.
    """
    with _keeping:
        kept = _kept.get(version)
        if kept is not None:
            _kept.move_to_end(version)
            return kept
    if policies is None or len(version) != 64:
        what = "nobody here holds weights" if policies is None else f"{version!r} is not the whole of a version"
        raise PermanentError(f"the gnn policy needs weights, and {what}", field="tamiyo.gnn.version", remedy=_REMEDY)
    loaded = ready(*policies(version))
    if loaded.version != version:
        raise TamperedError(f"asked for policy {version[:12]}, got {loaded.version[:12]}")
    with _keeping:
        _kept[version] = loaded
        while len(_kept) > _NUM_KEPT:
            _kept.popitem(last=False)
    return loaded


def ready(card: PolicyCard, weights: bytes) -> Loaded:
    """Makes a stored policy ready.

    Raises:
        PermanentError: if it is of another kind or form.
        TamperedError: if card and weights do not belong together, or the weights are broken.
    """
    from esper.tamiyo.net import PolicyNet
    from esper.tamiyo.observation import OBSERVATION_VERSION

    if card.kind != KIND:
        raise PermanentError(f"policy {card.version[:12]} is of the kind {card.kind!r}, not {KIND}")
    if card.observation_version != OBSERVATION_VERSION:
        raise PermanentError(
            f"policy {card.version[:12]} reads observations of version {card.observation_version}, and these are of "
            f"version {OBSERVATION_VERSION}",
            field="tamiyo.gnn.version",
            remedy="train it anew",
        )
    if not card.describes(weights):
        raise TamperedError(f"these are not the weights of policy {card.version[:12]}")
    try:
        shape = NetShape.model_validate(card.shape)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PermanentError(f"policy {card.version[:12]} has no shape of a network: {first['msg']}") from error
    net = PolicyNet.from_bytes(weights, shape)
    net.requires_grad_(requires_grad=False)
    return Loaded(card.version, net)


def pin(config: TamiyoConfig, store: PolicyStore) -> TamiyoConfig:
    """Returns the configuration with the whole version that it means, once and for all of a run; of another policy
    than `gnn` as it is.

    Raises:
        NotFoundError, ConflictError: if it means none, or several.
    """
    if config.policy != KIND:
        return config
    version = find_policy(store, config.gnn.version)
    return config.model_copy(update={"gnn": config.gnn.model_copy(update={"version": version})})


@dataclass(frozen=True, slots=True)
class Case:
    """What one decision is about; `state` has seen the packet."""

    state: TamiyoState
    packet: SystemStatePacket
    config: TamiyoConfig
    care: Care


class GraphPolicy:
    """The policy behind `Policy`'s protocol.

    Args:
        config: limits, and the policy's own settings.
        loaded: the network.
    """

    def __init__(self, config: TamiyoConfig, loaded: Loaded) -> None:
        self._config = config
        self._loaded = loaded

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Returns the memory as it is: what the network learns, Simic teaches it."""
        del packet
        return state

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Returns what the network chooses, or a wait with its reason."""
        return self.propose_for(Case(state, packet, self._config, tend(state, packet, self._config)))

    def propose_for(self, case: Case) -> Proposal:
        """As `propose`, where it is known already what tending asks for."""
        (proposal,) = propose_all(self._loaded, [case])
        return proposal


def propose_all(loaded: Loaded, cases: Sequence[Case]) -> list[Proposal]:
    """Returns what the network chooses for each, one after the other: a choice does not hang on who asks beside."""
    from esper.tamiyo.considering import consider
    from esper.tamiyo.observation import observe_graph

    if not cases:
        return []
    views = [observe_graph(case.state, case.packet, case.config, case.care) for case in cases]
    draws = [_draw(case) for case in cases]
    try:
        found = consider(loaded.inference, views, draws)
    except FloatingPointError as error:
        if len(cases) > 1:  # one of them: the others must not wait for it
            return [propose_all(loaded, [case])[0] for case in cases]
        (case,) = cases
        # it has chosen nothing: what the rule of every policy asks for is done in its place
        by_rule = case.care.orders[len(case.care.removals) :]
        words, num_draws = f"policy {loaded.version[:8]} waits: {error}", int(_is_drawn(case.config))
        return [Proposal(words, by_rule, tends=True, num_draws=num_draws)]
    return [_proposal(loaded, *entry) for entry in zip(cases, views, found, strict=True)]


def _is_drawn(config: TamiyoConfig) -> bool:
    return config.gnn.explore or config.gnn.choice == "drawn"


def _draw(case: Case) -> Draw:
    from esper.tamiyo.considering import Draw

    return Draw(generator(case.state) if _is_drawn(case.config) else None, whole=case.config.gnn.explore)


def _proposal(loaded: Loaded, case: Case, view: Observation, found: Considered) -> Proposal:
    choice, num_draws = found.decided.choice, int(_is_drawn(case.config))
    explanation = found.explanation(view, loaded.version)
    words = explanation.in_words
    if choice.operation is Operation.WAIT:
        return Proposal(words, tends=True, explanation=explanation, num_draws=num_draws)
    orders = _orders(case, view, choice, explanation)
    held = None if case.config.gnn.explore else _why_not(case.config, explanation, measured=found.is_calibrated)
    if held is None:
        return Proposal(words, orders, tends=True, explanation=explanation, num_draws=num_draws)
    gate, why = held
    main = orders[-1]
    veto = Veto(
        gate=gate,
        action=main.action,
        site=main.site,
        seed_id=main.seed_id,
        blueprint=main.option.blueprint if main.option else None,
        what=f"{main.action} {main.option.blueprint if main.option else main.seed_id} at {main.site}",
        reason=why,
    )
    # what is done has another probability than what was wanted
    gated = explanation.model_copy(update={"log_prob": None})
    # a seed under way is not left alone for that: it is tended by the rule of every policy
    return Proposal(words, (), (veto,), explanation=gated, num_draws=num_draws)


def _why_not(config: TamiyoConfig, found: Explanation, *, measured: bool) -> tuple[Gate, str] | None:
    """Why the policy's own gates hold its choice back; None if they do not."""
    limit = config.gnn.max_uncertainty
    if limit is not None and not measured:
        return Gate.UNCERTAINTY, "how far its forecasts can be trusted was never measured, so it waits"
    if limit is not None and found.uncertainty is not None and found.uncertainty > limit:
        return Gate.UNCERTAINTY, f"its uncertainty is {found.uncertainty:.2f}, above {limit:.2f}, so it waits"
    if config.gnn.choice == "likeliest" and found.confidence < config.gnn.min_confidence:
        return (
            Gate.CONFIDENCE,
            f"it gives {found.operation} {found.confidence:.0%}, below {config.gnn.min_confidence:.0%}, so it waits",
        )
    return None


def _orders(case: Case, view: Observation, choice: ActionChoice, told: Explanation) -> tuple[Order, ...]:
    """The orders of a choice, its own the last: before an advance go those who lose the race."""
    from esper.tamiyo.table import layers_of

    if choice.operation is Operation.GERMINATE:
        kernel_id, _ = view.kernel_names[view.option_kernel[choice.option]]
        site, seed_id = view.seed_names[view.resting[choice.site]]
        option = next(o for o in case.packet.options if o.kernel_id == kernel_id and site in o.sites)
        strategy = STRATEGIES[choice.strategy]
        return (Order(Action.GERMINATE, site, seed_id, told.in_words, option, strategy, case.config.lr_factor),)
    key = view.seed_names[choice.seed]
    if choice.operation is not Operation.CULL:
        chosen = (orders for orders in case.care.advances if (orders[0].site, orders[0].seed_id) == key)
        advance, *losers = next(chosen)
        return (*losers, advance)
    seed = layers_of(case.packet).signal(choice.seed)
    return (removal(seed, "/".join(key), f"policy {told.version[:8]} gives it up ({told.confidence:.0%})"),)
