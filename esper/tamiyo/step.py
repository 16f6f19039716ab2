"""The decision: `step(state, packet, config) -> (state, signal)`, a pure function.

Seeds under way are tended first, then the policy says whether to grow, then the safety gates judge every order. No
clock and no global randomness: the same arguments give the same signal, ids included. Of a learned policy the version
is one of the arguments: it stands in the configuration, and who holds its weights does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from esper.config import TamiyoConfig
from esper.leyline import (
    Action,
    AdaptationSignal,
    KasminaControlCommand,
    SeedStage,
    Severity,
    SystemStatePacket,
    Veto,
)
from esper.tamiyo.bandit import Bandit
from esper.tamiyo.gnn import Case, GraphPolicy, Policies, load
from esper.tamiyo.heuristic import LargestWorth, PlateauGrowth
from esper.tamiyo.memory import Attempt, TamiyoState, observe, read_state
from esper.tamiyo.orders import Order, Policy, Proposal
from esper.tamiyo.policies import NoGrowth, RandomGrowth, ScheduledGrowth
from esper.tamiyo.safety import GOVERNOR_CRITICAL, GOVERNOR_OK, divergence_of, judge
from esper.tamiyo.tending import Care, tend
from esper.tamiyo.trying import consult


def policy_for(config: TamiyoConfig, policies: Policies | None = None) -> Policy:
    """Returns the policy that the configuration names.

    Raises:
        EsperError: if it is a learned one and cannot be had; see `gnn.load`.
    """
    match config.policy:
        case "heuristic":
            return PlateauGrowth(config, LargestWorth())
        case "bandit":
            return PlateauGrowth(config, Bandit(config.bandit))
        case "gnn":
            return GraphPolicy(config, load(config.gnn.version, policies))
        case "none":
            return NoGrowth()
        case "random":
            return RandomGrowth(config)
        case "schedule":
            return ScheduledGrowth(config)


def step(
    state: Mapping[str, Any], packet: SystemStatePacket, config: TamiyoConfig, policies: Policies | None = None
) -> tuple[dict[str, Any], AdaptationSignal]:
    """Decides about one epoch.

    Args:
        state: what the last call returned, or `initial_state`.
        packet: all that is known at the end of the epoch.
        config: policy and limits.
        policies: where the weights of learned policies come from.

    Returns:
        The next state, plain JSON, and the signal.

    Raises:
        ConflictError: if `state` is not a state of this version.
        EsperError: if the policy is a learned one and cannot be had; see `gnn.load`.
    """
    policy = policy_for(config, policies)
    case = case_of(state, packet, config, policy)
    packet = case.packet
    tended = isinstance(policy, GraphPolicy)  # it needs what tending says, which is known here
    return conclude(case, policy.propose_for(case) if tended else policy.propose(case.state, packet))


def case_of(
    state: Mapping[str, Any], packet: SystemStatePacket, config: TamiyoConfig, policy: Policy | None = None
) -> Case:
    """Returns what a decision is about: the memory after it has seen the packet, and what tending asks for.

    Raises:
        ConflictError: if `state` is not a state of this version.
    """
    from esper.tamiyo.table import tabled

    packet = tabled(packet)
    seen = observe(read_state(state), packet, config)
    seen = seen if policy is None else policy.learn(seen, packet)
    return Case(seen, packet, config, tend(seen, packet, config))


def conclude(case: Case, proposal: Proposal) -> tuple[dict[str, Any], AdaptationSignal]:
    """Passes what a policy proposes, and what tending asks for, through the gates; returns the next state and the
    signal.
    """
    packet, config, care = case.packet, case.config, case.care
    wanted = proposal
    seen, proposal, trial = consult(case.state, packet, config, proposal)
    explanation = proposal.explanation
    if explanation is not None and proposal.orders != wanted.orders:
        # what is done has another probability than what was wanted
        explanation = explanation.model_copy(update={"log_prob": None})
    tending = care.removals if proposal.tends else care.orders
    verdict = judge(seen, packet, config, (*tending, *proposal.orders))
    vetoes = (*proposal.vetoes, *verdict.vetoes)
    signal = AdaptationSignal(
        signal_id=_id(seen, packet, "signal"),
        run_id=packet.run_id,
        epoch=packet.epoch.epoch,
        policy=config.policy,
        severity=_severity(packet, verdict.accepted, care),
        commands=tuple(_command(order, _id(seen, packet, str(i))) for i, order in enumerate(verdict.accepted)),
        vetoes=vetoes,
        trial=trial,
        reason=_reason(packet, verdict.accepted, care.notes, proposal, vetoes),
        value=explanation.value if explanation else None,
        explanation=explanation,
    )
    return _remember(seen, proposal, verdict.accepted, care).to_json(), signal


def _remember(state: TamiyoState, proposal: Proposal, accepted: Sequence[Order], care: Care) -> TamiyoState:
    retired = {(order.site, order.seed_id) for order in accepted if order.action is Action.RETIRE}
    known = tuple(
        attempt.model_copy(
            update={
                "asked": attempt.asked or attempt.seed_id in care.asked,
                "vetoed": attempt.vetoed or attempt.seed_id in care.vetoed,
                "retiring": attempt.retiring or (attempt.site, attempt.seed_id) in retired,
            }
        )
        for attempt in state.under_way
    )
    begun = tuple(
        Attempt(
            site=order.site,
            seed_id=order.seed_id,
            blueprint=order.option.blueprint,
            kernel_id=order.option.kernel_id,
            since_epoch=state.epoch,
            stage=SeedStage.GERMINATED,
            num_parameters=order.option.num_parameters,
            flops_per_sample=order.option.flops_per_sample,
            strategy=order.strategy,
        )
        for order in accepted
        if order.option is not None
    )
    entries = [order.entry for order in accepted if order.entry is not None]
    return state.model_copy(
        update={
            "num_adaptations": state.num_adaptations + len({attempt.site for attempt in begun}),
            "rng_counter": state.rng_counter + proposal.num_draws,
            "under_way": (*known, *begun),
            "schedule_done": tuple(sorted({*state.schedule_done, *proposal.given_up, *entries})),
        }
    )


def _severity(packet: SystemStatePacket, accepted: Sequence[Order], care: Care) -> Severity:
    if packet.governor.startswith(GOVERNOR_CRITICAL):
        return Severity.CRITICAL
    if care.asked:  # people should see it, once
        return Severity.WARNING
    if packet.governor != GOVERNOR_OK or any(order.action in {Action.CULL, Action.RETIRE} for order in accepted):
        return Severity.WARNING
    return Severity.INFO


def _reason(
    packet: SystemStatePacket,
    accepted: Sequence[Order],
    notes: Sequence[str],
    proposal: Proposal,
    vetoes: Sequence[Veto],
) -> str:
    """One line for a person: what is done and why, what is waited for, what was refused."""
    if packet.governor.startswith(GOVERNOR_CRITICAL):
        return f"the governor reports {packet.governor}: asking for a rollback to the last good snapshot"
    parts = [order.in_words for order in accepted if order.action is not Action.GERMINATE]
    parts.extend(notes)
    # a proposal's reason covers its own germinations; beside seeds under way a wait needs no second explanation
    if proposal.orders or proposal.tends or not parts:
        parts.append(proposal.reason)
    if proposal.tends and (divergence := divergence_of(packet)) is not None:
        parts.append(divergence)  # a learned policy sees masks, and knows no reasons
    if vetoes:
        parts.append("vetoed: " + "; ".join(veto.in_words for veto in vetoes))
    return "; ".join(parts)


def _command(order: Order, command_id: str) -> KasminaControlCommand:
    return KasminaControlCommand(
        command_id=command_id,
        action=order.action,
        site=order.site,
        seed_id=order.seed_id,
        kernel_id=order.option.kernel_id if order.option else None,
        blueprint=order.option.blueprint if order.option else None,
        strategy=order.strategy,
        lr_factor=order.lr_factor,
        trial_id=order.trial_id,
        reason=order.reason,
    )


def _id(state: TamiyoState, packet: SystemStatePacket, part: str) -> str:
    """An id that a repeated decision gets again: 32 hexadecimal digits."""
    text = f"{packet.run_id}/{packet.epoch.epoch}/{state.num_decisions}/{part}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
