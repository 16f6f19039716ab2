"""Trials by fork before growth: what is asked for, and what is made of the answer (docs/adr/0013). Pure.

It stands between the policy and the safety gates. Where trials can be had, the orders of a policy that would begin an
adaptation become candidates, with the next best beside them; the one whose paired gain is proven begins. Where they
cannot, the policy's orders go on to the gates as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from esper.config import TamiyoConfig
from esper.leyline import Action, BlendStrategy, ForkPrice, SystemStatePacket, TrialCandidate, TrialRequest, TrialResult
from esper.tamiyo.candidates import find_candidates
from esper.tamiyo.heuristic import worth
from esper.tamiyo.memory import TamiyoState, TrialMemory, failure_key
from esper.tamiyo.orders import Order, Proposal
from esper.tamiyo.safety import judge, last_growth_epoch

Consulted = tuple[TamiyoState, Proposal, TrialRequest | None]


def consult(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, proposal: Proposal) -> Consulted:
    """Returns the memory, what is proposed now, and the trial that is asked for instead, if one is.

    Args:
        state: after it has learned from `packet`.
        packet: the current one.
        config: policy and limits.
        proposal: of the policy.
    """
    if not config.trials.enabled:
        return state, proposal, None
    if state.trial is not None:
        return *_wait_or_settle(state, state.trial, packet, config, proposal), None
    grows = [order for order in proposal.orders if order.action is Action.GERMINATE]
    if not grows or not judge(state, packet, config, grows).accepted:
        return state, proposal, None
    return _ask(state, packet, config, proposal, grows)


# ---------------------------------------------------------------- asking


def _ask(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, proposal: Proposal, grows: Sequence[Order]
) -> Consulted:
    settings, trials = config.trials, packet.trials
    if trials is None or trials.price is None:
        why = "the trainer knows of no trials" if trials is None else trials.reason
        return *_untried(state, proposal, why), None
    if packet.epoch.epoch >= last_growth_epoch(packet.epoch.num_epochs, config.last_epoch_fraction):
        return *_untried(state, proposal, "its answer would come when nothing may begin any more"), None
    candidates = _affordable(_candidates(state, packet, config, grows), trials.price, trials.flops_left, config)
    if not candidates:
        why = f"{trials.flops_left:,} FLOPs left for trials pay for none"
        return *_untried(state, proposal, why), None
    request = TrialRequest(
        trial_id=_id(packet, state),
        epoch=packet.epoch.epoch,
        candidates=candidates,
        steps=settings.steps,
        seeds=settings.seeds,
    )
    names = ", ".join(candidate.in_words for candidate in candidates)
    words = f"a trial of {names} against not growing, {settings.steps} steps each"
    memory = TrialMemory(trial_id=request.trial_id, epoch=request.epoch, words=words)
    held = _hold(proposal, f"{proposal.reason}; first {words}")
    return state.model_copy(update={"trial": memory}), held, request


def _affordable(
    candidates: Iterator[TrialCandidate], price: ForkPrice, left: int, config: TamiyoConfig
) -> tuple[TrialCandidate, ...]:
    """The first candidates that the budget holds beside the forks that do not grow."""
    settings, taken = config.trials, []
    left -= settings.seeds * price.limit(settings.steps, None)
    for candidate in candidates:
        cost = settings.seeds * price.limit(settings.steps, candidate)
        if len(taken) < settings.candidates and cost <= left:
            left -= cost
            taken.append(candidate)
    return tuple(taken)


def _untried(state: TamiyoState, proposal: Proposal, why: str) -> tuple[TamiyoState, Proposal]:
    """Decides on shadow evidence alone, and says so once."""
    if state.untried:
        return state, proposal
    said = replace(proposal, reason=f"{proposal.reason}; on shadow evidence alone, without a trial: {why}")
    return state.model_copy(update={"untried": True}), said


def _candidates(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, grows: Sequence[Order]
) -> Iterator[TrialCandidate]:
    """The policy's own first, then the next best kernels of the best sites; each by every strategy that is tried."""
    strategies = [BlendStrategy(name) for name in config.trials.strategies or (config.strategy,)]
    seen: set[tuple[str, str]] = set()
    for order in (*grows, *_next_best(state, packet, config)):
        option = order.option
        if option is None or (order.site, option.kernel_id) in seen:
            continue
        seen.add((order.site, option.kernel_id))
        for strategy in strategies:
            if strategy is BlendStrategy.DIRECT and not option.zero_at_birth:
                continue
            yield TrialCandidate(
                site=order.site,
                seed_id=order.seed_id,
                kernel_id=option.kernel_id,
                blueprint_id=option.blueprint_id,
                blueprint=option.blueprint,
                strategy=strategy,
                lr_factor=order.lr_factor,
                num_parameters=option.num_parameters,
                flops_per_sample=option.flops_per_sample,
            )


def _next_best(state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig) -> Iterator[Order]:
    """The best kernel of each site, sites with the largest growth potential first, then the second best, and so on."""
    found = find_candidates(state, packet, config)
    ranked = [found.at(number) for number in found.ranked()[1].tolist()]
    lists = [
        sorted(site.options, key=lambda o, c=site.signature.channels: worth(o, c, found.room), reverse=True)
        for site in ranked
    ]
    for place in range(max(map(len, lists), default=0)):
        for site, options in zip(ranked, lists, strict=True):
            if place < len(options):
                yield site.germinate(options[place], config, "the next best")


def _id(packet: SystemStatePacket, state: TamiyoState) -> str:
    text = f"{packet.run_id}/{packet.epoch.epoch}/{state.num_decisions}/trial"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---------------------------------------------------------------- the answer


def _wait_or_settle(
    state: TamiyoState, trial: TrialMemory, packet: SystemStatePacket, config: TamiyoConfig, proposal: Proposal
) -> tuple[TamiyoState, Proposal]:
    told = packet.trials
    if told is not None and told.result is not None and told.result.trial_id == trial.trial_id:
        return _settle(state.model_copy(update={"trial": None}), told.result, packet, config, proposal)
    if told is not None and told.under_way == trial.trial_id:
        return state, _hold(proposal, f"{trial.words}, asked for after epoch {trial.epoch}, is under way")
    lost = state.model_copy(update={"trial": None})
    return lost, replace(proposal, reason=f"{trial.words} was lost with its trainer; {proposal.reason}")


def _settle(
    state: TamiyoState, result: TrialResult, packet: SystemStatePacket, config: TamiyoConfig, proposal: Proposal
) -> tuple[TamiyoState, Proposal]:
    if result.failure:
        return state, replace(proposal, reason=f"the trial says nothing: {result.failure}; {proposal.reason}")
    z = config.trials.z
    told = "; ".join(outcome.in_words(z) for outcome in result.outcomes)
    proven = sorted(
        (o for o in result.outcomes if (low := o.low(z)) is not None and low > 0.0),
        key=lambda o: o.evidence.gain if o.evidence else 0.0,
        reverse=True,
    )
    if not proven:
        return _nothing_pays(state, result, config, proposal, told)
    refused = []
    for outcome in proven:
        order = _order(outcome.candidate, state, packet, config, result, told)
        verdict = None if order is None else judge(state, packet, config, [order])
        if order is not None and verdict is not None and verdict.accepted:
            return state, replace(_hold(proposal, order.reason), orders=(order,))
        why = verdict.vetoes[0].reason if verdict is not None else "it cannot begin there any more"
        refused.append(f"{outcome.candidate.in_words}: {why}")
    return state, _hold(proposal, f"the trial has winners ({told}), and none may begin: {'; '.join(refused)}")


def _order(
    candidate: TrialCandidate,
    state: TamiyoState,
    packet: SystemStatePacket,
    config: TamiyoConfig,
    result: TrialResult,
    told: str,
) -> Order | None:
    """The order to begin with the winner; None where its site or kernel is not to be had any more."""
    for site in find_candidates(state, packet, config).candidates:
        for option in site.options:
            if (site.site, option.kernel_id) == (candidate.site, candidate.kernel_id):
                seed = next((s for s in (site.seed, *site.others) if s.seed_id == candidate.seed_id), site.seed)
                reason = f"{candidate.in_words} has won a trial of {result.steps} steps: {told}"
                order = site.germinate(option, config, reason, seed=seed)
                return replace(
                    order, strategy=candidate.strategy, lr_factor=candidate.lr_factor, trial_id=result.trial_id
                )
    return None


def _nothing_pays(
    state: TamiyoState, result: TrialResult, config: TamiyoConfig, proposal: Proposal, told: str
) -> tuple[TamiyoState, Proposal]:
    """Rests as after a failure, and does not try the same again."""
    tried = (failure_key(o.candidate.site, o.candidate.blueprint) for o in result.outcomes if o.evidence is not None)
    rested = state.model_copy(
        update={
            "failed": tuple(dict.fromkeys((*state.failed, *tried))),
            "cooldown_until": max(state.cooldown_until, state.epoch + config.plateau_window),
            "cooldown_reason": "no candidate of a trial was better than not growing",
        }
    )
    return rested, _hold(proposal, f"no candidate is proven to be better than not growing: {told}")


def _hold(proposal: Proposal, reason: str) -> Proposal:
    """The proposal without what would begin."""
    kept = tuple(order for order in proposal.orders if order.action is not Action.GERMINATE)
    return replace(proposal, orders=kept, reason=reason)
