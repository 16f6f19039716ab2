"""`esper runs approve` and `esper runs veto`: a person's word about an adaptation of a run that is under way."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from esper.leyline import NotFoundError, RunStatus, RunSummary, UserError
from esper.leyline.errors import ConflictError
from esper.leyline.steering import PersonsWord, Verdict
from esper.nissa.adaptations import Adaptation, adaptations
from jobs.options import DEFAULT_STORAGE, Json, RunArg, Storage, print_json

AdaptationArg = Annotated[
    str, typer.Argument(metavar="ADAPTATION", help="Its number in the order of beginning, its site, or its seed.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why; stands in the run's summary.")]


class UnknownAdaptationError(NotFoundError, UserError):
    """No adaptation under way, or more than one, goes by this name."""


class TooLateError(ConflictError, UserError):
    """The word could not be heard any more."""


def approve(
    run: RunArg,
    adaptation: AdaptationArg,
    reason: Reason = "",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Let a kernel onto the live path, in a run that asks for that (tamiyo.ask_before_graft)."""
    _say(Verdict.APPROVE, run, adaptation, reason, storage, as_json=as_json)


def veto(
    run: RunArg,
    adaptation: AdaptationArg,
    reason: Reason = "",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Have a kernel removed: at once while it trains behind the host, by a ramp once the host leans on it."""
    _say(Verdict.VETO, run, adaptation, reason, storage, as_json=as_json)


def _say(verdict: Verdict, run: str, adaptation: str, reason: str, storage: str, *, as_json: bool) -> None:
    from esper.storage import Storage as Place
    from esper.tolaria.steering import Steering
    from jobs.runs import RunStore

    store = RunStore(storage)
    summary = store.summary(run)
    life = find(summary, adaptation)
    if verdict is Verdict.APPROVE and life.stage.is_blended:
        raise TooLateError(
            f"{life.blueprint} at {life.site} is on the live path already", field="adaptation",
            remedy="esper runs veto removes it",
        )  # fmt: skip
    word = PersonsWord(
        run_id=summary.run_id,
        site=life.site,
        seed_id=life.seed,
        kernel_id=life.kernel_id or "",
        verdict=verdict,
        by=getpass.getuser(),
        reason=reason,
    )
    Steering(Place.at(store.directory(run))).say(word)
    if as_json:
        print_json(word.model_dump(mode="json"))
    else:
        typer.echo(f"{life.blueprint} at {life.site}: {word.in_words}; the run hears it at the end of this epoch")


def find(summary: RunSummary, name: str) -> Adaptation:
    """The adaptation under way that goes by a number, a site or a seed.

    Raises:
        TooLateError: if the run is over, or that adaptation is.
        UnknownAdaptationError: if none or more than one fits.
    """
    if summary.status is not RunStatus.RUNNING:
        raise TooLateError(f"run {summary.run_id} is {summary.status.value}: it hears nobody any more", field="run")
    lives = adaptations(summary)
    under_way = [(number, life) for number, life in enumerate(lives, 1) if not life.is_over and life.kernel_id]
    if name.isdecimal() and 1 <= int(name) <= len(lives) and lives[int(name) - 1].is_over:
        life = lives[int(name) - 1]
        raise TooLateError(f"{life.blueprint} at {life.site} is over: {life.outcome}", field="adaptation")
    fitting = [life for number, life in under_way if name in {str(number), life.site, life.seed}]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{number} ({life.blueprint} at {life.site})" for number, life in under_way)
    remedy = f"under way: {known}" if known else "none is under way; see esper runs show"
    words = f"more than one adaptation is {name!r}" if fitting else f"no adaptation {name!r} is under way"
    raise UnknownAdaptationError(words, field="adaptation", remedy=remedy)
