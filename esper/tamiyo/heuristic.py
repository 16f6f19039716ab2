"""The heuristic policy: when the host has plateaued, the site with the largest growth potential, then a kernel.

1. When: the validation loss, over `plateau_window` epochs, falls by less than `plateau_threshold` of itself or of all
   its progress so far, or by no more than its own noise (`plateau`), after the warm-up.
2. Where: the eligible site with the largest measured growth potential: the norm of the loss gradient at a
   zero-initialised last layer placed there, which predicts the first-order gain. A site that was not measured is no
   candidate.
3. What: the kernel with the largest expected value per cost. A kernel's first-order gain is the site's and so the
   same for all; what differs is how much it can use it. Value is `log2(1 + n / C^2)`, with n the kernel's parameters
   and C^2 a full mixing of the site's C channels: doubling a kernel adds less and less. Cost is `1 + s`, with s the
   larger share of the parameter or FLOP budget that the kernel would use up: the 1 stands for what every adaptation
   costs (training behind the host, its place in the run). Few large events beat many small ones: with 1/4 in its
   place the smallest kernels won, and the digits CNN reached 70 and 78% instead of 84 and 82% (docs/log.md).
   Among kernels within `EQUAL` of the best, which such an estimate cannot tell apart, the least risky by Urabrask's
   score is taken; one without a score counts as the riskiest. Where more seeds rest at the site (`kasmina.race`),
   the next best designs race with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from esper.config import TamiyoConfig
from esper.leyline import BlendStrategy, KernelOption, SiteKind, SystemStatePacket
from esper.tamiyo.candidates import Candidate, find_candidates, reason_to_wait
from esper.tamiyo.memory import TamiyoState
from esper.tamiyo.orders import Order, Proposal
from esper.tamiyo.plateau import fit
from esper.tamiyo.safety import Room

FIXED_COST = 1.0
"""What any adaptation costs, in shares of the budget."""

EQUAL = 0.001
"""Kernels whose value per cost differs by less than this share of the best are of equal promise."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A kernel that was chosen.

    Attributes:
        words: why, beside its price; may be empty.
        num_draws: random numbers that were used.
    """

    option: KernelOption
    words: str = ""
    num_draws: int = 0


class Chooser(Protocol):
    """Says which of the kernels that fit a site is tried there, and may learn from what they came to."""

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """See `Policy.learn`."""
        ...

    def pick(
        self,
        options: Sequence[KernelOption],
        kind: SiteKind,
        channels: int,
        room: Room,
        state: TamiyoState,
        number: int,
    ) -> Pick:
        """Returns one of `options`, of which there is one at least; `number`: draws of this proposal so far."""
        ...


class LargestWorth:
    """The heuristic's choice: the largest expected value per cost. Learns nothing."""

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Returns the memory as it is."""
        del packet
        return state

    def pick(
        self,
        options: Sequence[KernelOption],
        kind: SiteKind,
        channels: int,
        room: Room,
        state: TamiyoState,
        number: int,
    ) -> Pick:
        """Returns the least risky of those that promise most."""
        del kind, state, number
        return Pick(choose(options, channels, room))


class PlateauGrowth:
    """Grows at a plateau, at the site with the largest growth potential, by a kernel of `chooser`; one adaptation a
    decision.
    """

    def __init__(self, config: TamiyoConfig, chooser: Chooser) -> None:
        self._config = config
        self._chooser = chooser

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Lets the chooser learn."""
        return self._chooser.learn(state, packet)

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Waits while the host still learns, then names a site and a kernel."""
        wait = reason_to_wait(state, packet, self._config)
        if wait is not None:
            return Proposal(reason=wait)
        plateau, stands_still = self._judge_plateau(state, packet)
        if not stands_still:
            return Proposal(reason=plateau)
        found = find_candidates(state, packet, self._config)
        if not len(found):
            pending = f"; {packet.epoch.pending} kernels are still being compiled" if packet.epoch.pending else ""
            return Proposal(reason=f"{plateau}, but {found.why_none()}{pending}")
        potentials, numbers = found.ranked()
        if not len(numbers):
            sites = ", ".join(candidate.site for candidate in found.candidates)
            return Proposal(reason=f"{plateau}, but no growth potential was measured at {sites}: unmeasured, no growth")
        potential, best = float(potentials[0]), found.at(int(numbers[0]))
        if potential <= 0.0:
            return Proposal(reason=f"{plateau}, but no site shows growth potential (all measured 0)")
        pick = self._pick(best, best.options, found.room, state, 0)
        option = pick.option
        runner_up = f", next {potentials[1]:.2g}" if len(numbers) > 1 else ""
        lead = "the largest" if len(numbers) > 1 else "the only measured"
        reason = (
            f"{plateau}; site {best.site} has {lead} growth potential ({potential:.2g}{runner_up}):"
            f" germinating {option.blueprint}, {_price(pick, found.room)}"
        )
        rivals = list(self._rivals(best, pick, found.room, state))
        orders = (best.germinate(option, self._config, reason), *(order for order, _ in rivals))
        num_draws = pick.num_draws + sum(drawn for _, drawn in rivals)
        return Proposal("; ".join(order.reason for order in orders), orders, num_draws=num_draws)

    def _pick(
        self, site: Candidate, options: Sequence[KernelOption], room: Room, state: TamiyoState, number: int
    ) -> Pick:
        return self._chooser.pick(options, site.signature.kind, site.signature.channels, room, state, number)

    def _rivals(self, site: Candidate, first: Pick, room: Room, state: TamiyoState) -> Iterator[tuple[Order, int]]:
        """The next best designs that the budget still holds, one for each seed that rests beside the first, with the
        random numbers that each took.
        """
        if self._config.strategy == BlendStrategy.DIRECT:  # takes no evidence, so there is nothing to race for
            return
        left, taken, number = site.options, first, first.num_draws
        for seed in site.others:
            room = room.after(taken.option)
            left = tuple(o for o in left if o.blueprint != taken.option.blueprint and room.refuses(o) is None)
            if not left:
                return
            taken = self._pick(site, left, room, state, number)
            number += taken.num_draws
            name = taken.option.blueprint
            words = f"{name} races with {first.option.blueprint} at {site.site}, {_price(taken, room)}"
            yield site.germinate(taken.option, self._config, words, seed=seed), taken.num_draws

    def _judge_plateau(self, state: TamiyoState, packet: SystemStatePacket) -> tuple[str, bool]:
        """Returns what the validation loss says, and whether the host has stopped learning."""
        epoch, window = packet.epoch.epoch, self._config.plateau_window
        if packet.epoch.val_loss is None:
            return f"no validation loss was measured at epoch {epoch}: a plateau cannot be told from progress", False
        if packet.epoch.val_loss == 0.0:
            return "validation loss is 0: there is nothing left to learn", False
        losses = [entry for entry in state.val_losses if entry[0] >= epoch - window]
        if len(losses) <= window:
            return f"{len(losses)} of the {window + 1} validation losses that a plateau is judged by are there", False
        trend = fit(losses, highest=state.highest_val_loss)
        if trend is None:
            return "validation loss has no trend that could be put as a share of itself", False
        threshold = self._config.plateau_threshold
        return trend.in_words(threshold), trend.has_plateaued(threshold)


def choose(options: Sequence[KernelOption], channels: int, room: Room) -> KernelOption:
    """Returns the least risky of those that promise most."""
    ranked = sorted(options, key=lambda option: worth(option, channels, room), reverse=True)
    least = (1.0 - EQUAL) * worth(ranked[0], channels, room)[0]
    equals = [option for option in ranked if worth(option, channels, room)[0] >= least]
    return min(equals, key=lambda option: 1.0 if option.risk is None else option.risk)  # the first of equal risk


def worth(option: KernelOption, channels: int, room: Room) -> tuple[float, int, str]:
    """Returns the expected value per cost (see the module's text), then what breaks ties: the cheaper, by name."""
    value = math.log2(1.0 + option.num_parameters / channels**2)
    return value / (FIXED_COST + share_of(option, room)), -option.num_parameters, option.blueprint


def share_of(option: KernelOption, room: Room) -> float:
    """The larger share of what is left of the budget, in parameters or FLOPs, that a kernel would use up."""
    return max(_share(option.num_parameters, room.params), _share(option.flops_per_sample, room.flops))


def _share(cost: int, left: int | None) -> float:
    return 0.0 if not left else cost / left


def _price(pick: Pick, room: Room) -> str:
    option = pick.option
    risk = "" if option.risk is None else f", risk {option.risk:.2f}"
    why = f" ({pick.words})" if pick.words else ""
    if room.params is None:
        return f"{option.num_parameters:,} parameters, no limit set{risk}{why}"
    return f"{option.num_parameters:,} parameters of {room.params:,} left in the budget{risk}{why}"
