"""What a policy returns: orders that have not yet passed the safety gates, with the reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from esper.leyline import Action, BlendStrategy, Explanation, KernelOption, SystemStatePacket, Veto
from esper.tamiyo.memory import TamiyoState


@dataclass(frozen=True, slots=True)
class Order:
    """A command before it got its id.

    Attributes:
        reason: why; what is done stands in the other fields.
        option: the kernel, for GERMINATE.
        entry: the schedule's, by position.
        deed: what is done, in words, where the reason does not say it.
        trial_id: of the trial that it has won.
    """

    action: Action
    site: str
    seed_id: str
    reason: str
    option: KernelOption | None = None
    strategy: BlendStrategy = BlendStrategy.RAMP
    lr_factor: float = 1.0
    entry: int | None = None
    deed: str = ""
    trial_id: str = ""

    @property
    def in_words(self) -> str:
        """Deed and reason."""
        return f"{self.deed}: {self.reason}" if self.deed else self.reason


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a policy wants.

    Attributes:
        reason: why, in words; for a wait as well.
        orders: none means wait.
        vetoes: what it was asked for and cannot do (`schedule`).
        given_up: entries of the schedule that can never be done, by position.
        num_draws: random numbers it used.
        tends: whether it also says which seeds advance, and which more go than the rule asks for; `orders` hold it.
        explanation: of a learned policy.
    """

    reason: str
    orders: tuple[Order, ...] = ()
    vetoes: tuple[Veto, ...] = ()
    given_up: tuple[int, ...] = ()
    num_draws: int = 0
    tends: bool = False
    explanation: Explanation | None = None


class Policy(Protocol):
    """Decides where and when to grow. Pure: the same arguments give the same answers."""

    def learn(self, state: TamiyoState, packet: SystemStatePacket) -> TamiyoState:
        """Returns the memory after what the policy itself remembers of `packet`, which `state` has already seen."""
        ...

    def propose(self, state: TamiyoState, packet: SystemStatePacket) -> Proposal:
        """Returns what to do after `packet`, which `state` has already learned from."""
        ...
