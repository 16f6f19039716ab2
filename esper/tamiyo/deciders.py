"""Who decides: the policy that a configuration names, or a stored one. A decider takes many questions at once.

A stored policy of a kind that needs no weights is a set of settings: its shape holds fields of `TamiyoConfig`. Kinds
with weights register a loader in `LOADERS`; `gnn` answers each question by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from esper.config import TamiyoConfig
from esper.leyline import AdaptationSignal, EsperError, PermanentError, PolicyCard, SystemStatePacket
from esper.tamiyo.controller import WITHOUT_WEIGHTS
from esper.tamiyo.gnn import KIND, Case, Loaded, propose_all, ready
from esper.tamiyo.step import case_of, conclude, step


class Question(NamedTuple):
    """The arguments of one `step`."""

    state: Mapping[str, Any]
    packet: SystemStatePacket
    config: TamiyoConfig


class Decided(NamedTuple):
    """The next state, and the signal."""

    state: dict[str, Any]
    signal: AdaptationSignal


class Decider(Protocol):
    """A policy that is ready to decide."""

    def decide(self, questions: Sequence[Question]) -> list[Decided | EsperError]:
        """Answers each question, or says how it fails; one that fails leaves the others alone."""
        ...


def wanted_version(config: TamiyoConfig) -> str | None:
    """The stored policy that a configuration asks for; None where its policy needs no weights."""
    return config.gnn.version if config.policy == KIND else None


Loader = Callable[[PolicyCard, bytes], Decider]


class Steps:
    """The policies that need no weights, one question after the other.

    Args:
        settings: fields of `TamiyoConfig` that take the place of the question's own.

    Raises:
        PermanentError: if they are no such fields, or no such values.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings: dict[str, Any] = {}
        try:
            checked = TamiyoConfig.model_validate(dict(settings or {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PermanentError(f"the policy's settings: {where}: {first['msg']}") from error
        self._settings = {name: getattr(checked, name) for name in settings or {}}

    def decide(self, questions: Sequence[Question]) -> list[Decided | EsperError]:
        """See `Decider.decide`."""
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> Decided | EsperError:
        config = question.config.model_copy(update=self._settings) if self._settings else question.config
        try:
            return Decided(*step(question.state, question.packet, config))
        except EsperError as error:
            return error


class Graphs:
    """A learned policy of the kind `gnn`.

    Args:
        loaded: its network.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def decide(self, questions: Sequence[Question]) -> list[Decided | EsperError]:
        """See `Decider.decide`."""
        opened = [self._open(question) for question in questions]
        proposals = iter(propose_all(self._loaded, [case for case in opened if isinstance(case, Case)]))
        return [Decided(*conclude(case, next(proposals))) if isinstance(case, Case) else case for case in opened]

    @staticmethod
    def _open(question: Question) -> Case | EsperError:
        state, packet, config = question
        try:
            return case_of(state, packet, config)
        except EsperError as error:
            return error


def _graphs(card: PolicyCard, weights: bytes) -> Decider:
    return Graphs(ready(card, weights))


LOADERS: dict[str, Loader] = {
    **{
        kind: lambda card, _weights, kind=kind: Steps({**card.shape, "policy": kind})
        for kind in sorted(WITHOUT_WEIGHTS)
    },
    KIND: _graphs,
}
"""By the card's kind."""


def load_policy(card: PolicyCard, weights: bytes) -> Decider:
    """Makes a stored policy ready.

    Raises:
        PermanentError: if nobody here can load its kind, or it cannot be loaded.
    """
    loader = LOADERS.get(card.kind)
    if loader is None:
        raise PermanentError(f"nobody here loads policies of the kind {card.kind!r}; known: {', '.join(LOADERS)}")
    return loader(card, weights)
