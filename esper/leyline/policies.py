"""Learned policies as they are kept: a card that people read, weights that a net loads, and the port of their store.

A policy is known by its version, a hash of what decides: the weights and the shape of the net that they belong to.
The rest of the card tells of it and may be written anew, as when an exam's results come.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, Protocol, Self

from pydantic import Field

from esper.leyline.contract import API_VERSION, Contract, Finite, Name, Sha256, now
from esper.leyline.errors import ConflictError, NotFoundError

PROMOTED = "promoted"
"""The name by which a configuration asks for the version that is promoted at that moment."""


class PolicyOrigin(Contract):
    """What a policy was trained on.

    Attributes:
        runs: ids of runs whose logged experience was used.
        hosts, tasks: networks and tasks of its episodes, by name.
        episodes: how many.
        seeds: of its episodes.
        code_digest: of the code that trained it; empty if unknown.
    """

    runs: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    episodes: Annotated[int, Field(ge=0)] = 0
    seeds: tuple[int, ...] = ()
    code_digest: str = ""


class PolicyCard(Contract):
    """What is known of one policy.

    Attributes:
        version: see `policy_version`.
        kind: of net, as `tamiyo.policy` names it.
        shape: the net's hyper-parameters, plain JSON.
        observation_version: of the observations it reads.
        parents: versions that its training began with, or how it began, in words (`imitation of heuristic`).
        calibration: figures of its uncertainty.
        results: rows of the exams it took.
        notes: in words.
    """

    api_version: int = API_VERSION
    name: Name
    version: Sha256
    kind: Name = "gnn"
    shape: dict[str, Any] = Field(default_factory=dict)
    observation_version: Annotated[int, Field(ge=0)]
    trained_on: PolicyOrigin = PolicyOrigin()
    parents: tuple[str, ...] = ()
    calibration: dict[str, Any] = Field(default_factory=dict)
    results: tuple[dict[str, Any], ...] = ()
    notes: str = ""
    created_at: Finite = Field(default_factory=now)

    @classmethod
    def of(cls, weights: bytes, **fields: Any) -> Self:
        """Returns the card of these weights: all fields but `version`, which is computed.

        Raises:
            ValueError: if the shape is no JSON (NaN and infinity are none).
        """
        kind = fields.get("kind", cls.model_fields["kind"].default)
        fields["version"] = policy_version(
            weights, kind=kind, shape=fields.get("shape", {}), observation_version=fields["observation_version"]
        )
        return cls(**fields)

    def describes(self, weights: bytes) -> bool:
        """Whether these are the weights that the version stands for, in this shape."""
        shape = {"kind": self.kind, "shape": self.shape, "observation_version": self.observation_version}
        return self.version == policy_version(weights, **shape)


def policy_version(weights: bytes, *, kind: str, shape: dict[str, Any], observation_version: int) -> str:
    """Returns the hash of all that decides: weights, kind and shape of the net, and what it reads.

    Raises:
        ValueError: if the shape is no JSON (NaN and infinity are none).
    """
    digest = hashlib.sha256(weights).hexdigest()
    form = {"kind": kind, "shape": shape, "observation_version": observation_version, "weights": digest}
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class CanaryVerdict(StrEnum):
    """How a new policy stands beside the one before."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"


class CanaryRecord(Contract):
    """A new policy in shadow: it is asked what the one before is asked, and its answers are compared, not obeyed.

    Attributes:
        version: of the new one.
        beside: version of the one before; `built-in` where none was promoted yet.
        num_decisions: compared so far.
        num_agreed: of them, those in which both wanted the same actions at the same sites with the same designs.
        num_actions: decisions in which at least one of the two did not wait.
        num_actions_agreed: of those, the ones in which they agreed.
        num_values: decisions in which the new one predicted a value.
        value: mean of those.
        num_values_before, value_before: of the one before.
        reason: of the verdict, in words.
    """

    version: Sha256
    beside: str
    verdict: CanaryVerdict = CanaryVerdict.RUNNING
    num_decisions: Annotated[int, Field(ge=0)] = 0
    num_agreed: Annotated[int, Field(ge=0)] = 0
    num_actions: Annotated[int, Field(ge=0)] = 0
    num_actions_agreed: Annotated[int, Field(ge=0)] = 0
    num_values: Annotated[int, Field(ge=0)] = 0
    value: Finite = 0.0
    num_values_before: Annotated[int, Field(ge=0)] = 0
    value_before: Finite = 0.0
    reason: str = ""
    started_at: Finite = Field(default_factory=now)


class PolicyChange(StrEnum):
    """What happened to a policy that somebody serves, or to whoever serves it."""

    SERVING = (
        "serving"  # a process answers questions about this storage from now on, or Serve's controller is a new one
    )
    LOADED = "loaded"  # it decides from now on
    REFUSED = "refused"  # it cannot be loaded; the one before stays
    CANARY = "canary"  # it runs in shadow
    PASSED = "passed"  # and was promoted
    FAILED = "failed"  # and was not


class PolicyEvent(Contract):
    """One change of the policies that Tamiyo serves from a storage.

    Attributes:
        version: whose; empty where the note of it cannot be read, and for SERVING.
        before: the one that decided before, and still does after REFUSED and FAILED; None for the built-in ones.
    """

    change: PolicyChange
    version: str
    before: str | None = None
    reason: str = ""
    canary: CanaryRecord | None = None
    timestamp: Finite = Field(default_factory=now)


class PolicyShelf(Contract):
    """The policies of a storage, as Tamiyo serves them.

    Attributes:
        live: version that decides for whoever asks for the promoted one; None: the built-in ones do.
        canary: the last one in shadow, or that was.
        refused: versions that cannot be loaded, and why.
        policies: the cards of all that are stored.
    """

    live: str | None = None
    canary: CanaryRecord | None = None
    refused: dict[str, str] = Field(default_factory=dict)
    policies: tuple[PolicyCard, ...] = ()


class PolicyStore(Protocol):
    """Urza's shelf of policies. What it acknowledged is durable, and no reader meets half a policy."""

    def put(self, card: PolicyCard, weights: bytes) -> str:
        """Stores a policy and returns its version. Repeating it is harmless; another card for a version that is known
        takes the place of its card.

        Args:
            card: of these weights.
            weights: safetensors.

        Raises:
            DataError: if the weights are no safetensors.
            TamperedError: if the card's version is not that of these weights.
            StorageError: if the store cannot be written.
        """
        ...

    def get(self, version: str) -> tuple[PolicyCard, bytes]:
        """Returns card and weights.

        Raises:
            NotFoundError: if there is no such policy.
            TamperedError: if what is stored is torn or was changed.
            StorageError: if the store cannot be read.
        """
        ...

    def ls(self) -> list[PolicyCard]:
        """The cards of all policies, oldest first. One that cannot be read is left out, with a warning in the log."""
        ...

    def promote(self, version: str) -> None:
        """Makes this version the one that `promoted` stands for. Raises as `get`; then the one before stays."""
        ...

    def nominate(self, version: str | None) -> None:
        """Asks Tamiyo to try this version in shadow, and to promote it if it passes; None takes that back. Raises as
        `get`.
        """
        ...

    def nominated(self) -> str | None:
        """The version that shall be tried; None if there is none. Raises as `promoted`."""
        ...

    def promoted(self) -> str | None:
        """The version that was promoted last; None if none was.

        Raises:
            TamperedError: if the note of it is torn or was changed.
            StorageError: if the store cannot be read.
        """
        ...


def find_policy(store: PolicyStore, wanted: str) -> str:
    """Returns the whole version that a configuration means.

    Args:
        store: where it must be.
        wanted: `promoted`, a version, or as much of its beginning as no other has.

    Raises:
        NotFoundError: if there is none; says what to do.
        ConflictError: if several begin so.
    """
    remedy = "see `esper policy ls`"
    if wanted == PROMOTED:
        version = store.promoted()
        if version is None:
            raise NotFoundError("no policy was promoted", remedy=f"{remedy}, then `esper policy nominate` or `promote`")
        return version
    versions = [card.version for card in store.ls() if wanted and card.version.startswith(wanted)]
    if not versions:
        raise NotFoundError(f"there is no policy {wanted!r}", remedy=remedy)
    if len(versions) > 1:
        raise ConflictError(f"{len(versions)} policies begin with {wanted!r}", remedy="write more of the version")
    return versions[0]
