"""What a learned policy can choose, and how the choices of every other policy are told in the same form."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from esper.leyline import Action, AdaptationSignal, BlendStrategy, KasminaControlCommand

if TYPE_CHECKING:
    from esper.tamiyo.observation import Observation

STRATEGIES = tuple(BlendStrategy)
"""In the order of `ActionChoice.strategy`; new ones are appended."""


class Operation(IntEnum):
    """What is done. FOSSILIZE is the last advance, out of FINE_TUNING; ADVANCE is every other. CULL removes a seed, and
    retires one that is on the live path.
    """

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    CULL = 3
    FOSSILIZE = 4


@dataclass(frozen=True, slots=True)
class ActionChoice:
    """One choice. Each is a place in the observation, -1 where the operation has none.

    Attributes:
        site, option, strategy: of GERMINATE; `option` counts `Observation.option_site`, `strategy` counts `STRATEGIES`.
        seed: of ADVANCE, CULL and FOSSILIZE.
    """

    operation: Operation
    site: int = -1
    seed: int = -1
    option: int = -1
    strategy: int = -1


WAIT = ActionChoice(Operation.WAIT)


def choice_of(observation: Observation, signal: AdaptationSignal) -> ActionChoice | None:
    """Tells a signal of any policy as the choice that the learned one would have had to make.

    A decision may hold several orders. What is done by rule whoever decides is none of them: what a gate or a person
    removes, and who loses a race. Of the others the first germination counts, then the first other.

    Returns:
        The choice; None where the masks did not hold it (a kernel beyond the top k, a strategy that is not allowed).
    """
    forced = observation.by_rule
    commands = [command for command in signal.commands if (command.site, command.seed_id) not in forced]
    begun = [command for command in commands if command.action is Action.GERMINATE]
    if begun:
        return _germination(observation, begun[0])
    advanced = [command for command in commands if command.action is Action.ADVANCE]
    chosen = (advanced or commands)[:1]
    return _tending(observation, chosen[0]) if chosen else WAIT


def _germination(observation: Observation, command: KasminaControlCommand) -> ActionChoice | None:
    strategy = STRATEGIES.index(command.strategy)
    for option, (site, kernel) in enumerate(
        zip(observation.option_site.tolist(), observation.option_kernel.tolist(), strict=True)
    ):
        if (observation.site_names[site], observation.kernel_names[kernel][0]) == (command.site, command.kernel_id):
            choice = ActionChoice(Operation.GERMINATE, site=site, option=option, strategy=strategy)
            return choice if observation.allows(choice) else None
    return None


def _tending(observation: Observation, command: KasminaControlCommand) -> ActionChoice | None:
    try:
        seed = observation.seed_names.index((command.site, command.seed_id))
    except ValueError:
        return None
    if command.action is Action.ADVANCE:
        choices = [ActionChoice(op, seed=seed) for op in (Operation.FOSSILIZE, Operation.ADVANCE)]
    else:
        choices = [ActionChoice(Operation.CULL, seed=seed)]
    return next((choice for choice in choices if observation.allows(choice)), None)
