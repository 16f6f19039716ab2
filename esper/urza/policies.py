"""Policies below a storage address: `policies/<version>/weights.safetensors` and `card.json`, and `policies/promoted`
and `policies/nominated`, which name one.

The card is written last, so a policy that has one is whole. The version vouches for weights and shape, the card's own
digest for the rest of it. That finds what is torn and what was changed by accident or by hand; whoever can write below
the address can also put a policy of his own there, but not under a version that a run's configuration names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from typing import Any

from pydantic import ValidationError

from esper.leyline import DataError, NotFoundError, TamperedError
from esper.leyline.policies import PolicyCard
from esper.storage import Storage

_LOG = logging.getLogger(__name__)
_VERSION = re.compile(r"[0-9a-f]{64}")
_PROMOTED, _NOMINATED = "policies/promoted", "policies/nominated"


class MemoryPolicies:
    """Policies in a dict."""

    def __init__(self) -> None:
        self._policies: dict[str, tuple[PolicyCard, bytes]] = {}
        self._promoted: str | None = None
        self._nominated: str | None = None

    def put(self, card: PolicyCard, weights: bytes) -> str:
        """See `PolicyStore.put`."""
        check_policy(card, weights)
        self._policies[card.version] = card, bytes(weights)
        return card.version

    def get(self, version: str) -> tuple[PolicyCard, bytes]:
        """See `PolicyStore.get`."""
        if version not in self._policies:
            raise NotFoundError(f"there is no policy {version!r}")
        return self._policies[version]

    def ls(self) -> list[PolicyCard]:
        """See `PolicyStore.ls`."""
        return _by_age([card for card, _ in self._policies.values()])

    def promote(self, version: str) -> None:
        """See `PolicyStore.promote`."""
        self.get(version)
        self._promoted = version

    def promoted(self) -> str | None:
        """See `PolicyStore.promoted`."""
        return self._promoted

    def nominate(self, version: str | None) -> None:
        """See `PolicyStore.nominate`."""
        if version is not None:
            self.get(version)
        self._nominated = version

    def nominated(self) -> str | None:
        """See `PolicyStore.nominated`."""
        return self._nominated


class StoredPolicies:
    """Policies below a storage address, a directory or S3; see `PolicyStore`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, card: PolicyCard, weights: bytes) -> str:
        """See `PolicyStore.put`. What is there is written again, not trusted: a damaged policy is mended."""
        check_policy(card, weights)
        self._storage.write(_weights_name(card.version), weights)
        self._storage.write(_card_name(card.version), _sealed(card.model_dump(mode="json")))
        return card.version

    def get(self, version: str) -> tuple[PolicyCard, bytes]:
        """See `PolicyStore.get`."""
        if not _VERSION.fullmatch(version):
            raise NotFoundError(f"{version!r} is no version of a policy")
        try:
            card = self._card(version)
        except NotFoundError as error:
            raise NotFoundError(f"there is no policy {version} below {self._storage.shown}") from error
        try:
            weights = self._storage.read(_weights_name(version))
        except NotFoundError as error:
            raise TamperedError(f"the policy {version} below {self._storage.shown} has no weights") from error
        if not card.describes(weights):
            raise TamperedError(f"the weights of the policy {version} below {self._storage.shown} are not its own")
        return card, weights

    def ls(self) -> list[PolicyCard]:
        """See `PolicyStore.ls`."""
        cards = []
        for version in self._versions():
            try:
                cards.append(self._card(version))
            except NotFoundError:
                continue  # it is being written, or its writer was killed
            except TamperedError as error:
                _LOG.warning("policy.card.refused", extra={"version": version, "error": str(error)})
        return _by_age(cards)

    def damaged(self) -> dict[str, str]:
        """Versions whose card or weights are not as they were written, and what is wrong with them. Reads all weights.

        Raises:
            StorageError: if the store cannot be read.
        """
        found = {}
        for version in self._versions():
            try:
                self.get(version)
            except NotFoundError:
                continue  # as in `ls`
            except TamperedError as error:
                found[version] = str(error)
        return found

    def _versions(self) -> list[str]:
        return [name for name in self._storage.names("policies") if _VERSION.fullmatch(name)]

    def promote(self, version: str) -> None:
        """See `PolicyStore.promote`."""
        self.get(version)
        self._storage.write(_PROMOTED, _sealed({"version": version}))

    def promoted(self) -> str | None:
        """See `PolicyStore.promoted`."""
        return self._named_in(_PROMOTED)

    def nominate(self, version: str | None) -> None:
        """See `PolicyStore.nominate`."""
        if version is not None:
            self.get(version)
        self._storage.write(_NOMINATED, _sealed({"version": version}))

    def nominated(self) -> str | None:
        """See `PolicyStore.nominated`."""
        return self._named_in(_NOMINATED)

    def _named_in(self, note: str) -> str | None:
        try:
            return _unsealed(self._storage.read(note), f"{note} below {self._storage.shown}")["version"]
        except NotFoundError:
            return None

    def _card(self, version: str) -> PolicyCard:
        what = f"{_card_name(version)} below {self._storage.shown}"
        body = _unsealed(self._storage.read(_card_name(version)), what)
        try:
            card = PolicyCard.model_validate(body)
        except ValidationError as error:
            raise TamperedError(f"{what} is no card of this version: {error.errors()[0]['msg']}") from error
        if card.version != version:
            raise TamperedError(f"{what} is that of another policy")
        return card


def check_policy(card: PolicyCard, weights: bytes) -> None:
    """Raises `DataError` unless the weights are safetensors, and `TamperedError` unless they are this card's."""
    import safetensors

    try:
        safetensors.deserialize(bytes(weights))
    except safetensors.SafetensorError as error:
        raise DataError(f"the weights of {card.name} are no safetensors: {error}") from error
    if not card.describes(weights):
        raise TamperedError(f"the card of {card.name} names the version {card.version}, which is not of these weights")


def _by_age(cards: list[PolicyCard]) -> list[PolicyCard]:
    return sorted(cards, key=lambda card: (card.created_at, card.version))


def _weights_name(version: str) -> str:
    return f"policies/{version}/weights.safetensors"


def _card_name(version: str) -> str:
    return f"policies/{version}/card.json"


def _sealed(body: dict[str, Any]) -> bytes:
    """JSON with its own digest, so that a part of it is not taken for all of it."""
    return json.dumps({"sha256": _digest(body), "body": body}, indent=1, allow_nan=False).encode()


def _unsealed(data: bytes, what: str) -> dict[str, Any]:
    """Inverse of `_sealed`; raises `TamperedError` for `what` that is torn or changed."""
    try:
        sealed = json.loads(data)
        if set(sealed) == {"sha256", "body"} and sealed["sha256"] == _digest(sealed["body"]):
            return sealed["body"]
    except (ValueError, TypeError) as error:
        raise TamperedError(f"{what} is torn: {error}") from error
    raise TamperedError(f"{what} holds other bytes than were written")


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
