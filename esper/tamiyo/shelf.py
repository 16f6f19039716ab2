"""The policies of one storage as a server holds them: the one that decides, those that runs have pinned, and a new one
in shadow. Follows the store's notes of what is promoted and nominated.

Whatever goes wrong with a policy, the one before goes on deciding, and an event says so. `refresh` reads the store and
may take long; all else is quick once a policy is loaded, and may be called from other threads meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from esper.config import CanaryConfig
from esper.leyline import (
    AdaptationSignal,
    CanaryRecord,
    CanaryVerdict,
    EsperError,
    PolicyChange,
    PolicyEvent,
    PolicyShelf,
    PolicyStore,
    TamperedError,
    UnavailableError,
)
from esper.leyline.policies import PROMOTED, find_policy
from esper.tamiyo import canary
from esper.tamiyo.deciders import Decider, Loader, Question, Steps, load_policy

BUILT_IN = "built-in"
CONTROLS = frozenset({"none", "random", "schedule"})
"""Built-in policies that show nothing of another: they do not look, or do what a person said."""
_NUM_KEPT, _WHOLE = 8, 64
_LOG = logging.getLogger(__name__)


class Held(NamedTuple):
    """A policy that is loaded; `version` is None for the built-in ones, which follow the question's configuration."""

    version: str | None
    decider: Decider


class Shelf:
    """See the module.

    Args:
        store: of the policies.
        config: what one in shadow must show.
        tell: told of every change.
        load: makes a stored policy ready.
    """

    def __init__(
        self,
        store: PolicyStore,
        config: CanaryConfig,
        *,
        tell: Callable[[PolicyEvent], None],
        load: Loader = load_policy,
    ) -> None:
        self._store, self._config, self._tell, self._load = store, config, tell, load
        self._lock = threading.Lock()
        self._turning = threading.Lock()  # one reads the notes, or writes them, at a time
        self._canary_lock = threading.Lock()
        self._built_in = self._live = Held(None, Steps())
        self._shadow: Held | None = None
        self._canary: CanaryRecord | None = None
        self._refused: dict[str, str] = {}
        self._loaded: OrderedDict[str, Held] = OrderedDict()

    def refresh(self) -> None:
        """Looks at the store's notes, and takes in what is new. What cannot be read leaves all as it is."""
        with self._turning:  # else what was read before one in shadow passed would put the one before in its place
            self._look()

    def _look(self) -> None:
        try:
            promoted = self._note(self._store.promoted, "promoted")
            if promoted is not None and promoted != self._live.version:
                self._go_live(promoted)
            nominated = self._note(self._store.nominated, "nominated")
        except (EsperError, OSError) as error:
            _LOG.warning("policies.unread", extra={"reason": str(error)})
            return
        if nominated is None or nominated == self._live.version:
            self._shadow = None
        elif self._shadow is None or self._shadow.version != nominated or self._stands_beside_another():
            self._begin(nominated)

    def _stands_beside_another(self) -> bool:
        """Whether what was compared so far is of a policy that does not decide any more."""
        with self._canary_lock:
            record = self._canary
        return record is not None and record.beside != (self._live.version or BUILT_IN)

    def held(self, version: str | None) -> Held:
        """The policy that decides.

        Args:
            version: None for the built-in ones; `promoted`; or one that a run has pinned, whole or its beginning.

        Raises:
            NotFoundError: if there is none.
            EsperError: if it cannot be loaded.
        """
        if version is None:
            return self._built_in
        live = self._live
        if version == PROMOTED:
            if live.version is None:
                self.refresh()  # the first question may come before the first look
                live = self._live
            return live if live.version else self._loaded_as(find_policy(self._store, PROMOTED))
        if live.version is not None and live.version.startswith(version):
            return live
        whole = len(version) == _WHOLE  # then the store need not be listed
        found = version if whole else find_policy(self._store, version)
        try:
            return self._loaded_as(found)
        except TamperedError as error:  # the run that asks is told; so is everybody else
            self._refuse(found, str(error))
            raise

    def compare(self, question: Question, held: Held, signal: AdaptationSignal) -> None:
        """Asks the one in shadow the same question, if there is one and `held` is the one that it stands beside. A
        control group is not asked about: what it does, nobody decided.
        """
        if held.version is None and question.config.policy in CONTROLS:
            return
        with self._canary_lock:
            shadow, record = self._shadow, self._canary
            if shadow is None or record is None or record.verdict is not CanaryVerdict.RUNNING:
                return
            if held.version != self._live.version or record.beside != (held.version or BUILT_IN):
                return
            try:
                [answer] = shadow.decider.decide([question])
            except Exception as error:  # noqa: BLE001 - weights that nobody trusts yet: whatever it is, they failed
                answer = UnavailableError(f"{type(error).__name__}: {error}")
            if isinstance(answer, EsperError):
                record = canary.fail(record, f"it fails: {answer}")
            else:
                record = canary.judge(canary.compare(record, signal, answer.signal), self._config)
            self._canary = record
        if record.verdict is not CanaryVerdict.RUNNING:
            with self._turning:
                self._end(record)

    def view(self) -> PolicyShelf:
        """As people see it; reads the store. Raises `StorageError`."""
        return PolicyShelf(
            live=self._live.version,
            canary=self._canary,
            refused=dict(self._refused),
            policies=tuple(self._store.ls()),
        )

    @property
    def live(self) -> str | None:
        """The version that decides where the promoted one is asked for."""
        return self._live.version

    def _note(self, read: Callable[[], str | None], name: str) -> str | None:
        """What a note names; None, and an event, for one that is damaged."""
        try:
            version = read()
        except TamperedError as error:
            self._refuse("", f"the note of what is {name}: {error}", key=name)
            return None
        self._refused.pop(name, None)
        return version

    def _go_live(self, version: str) -> None:
        held = self._try(version)
        if held is None:
            return
        before, self._live = self._live.version, held
        self._say(PolicyChange.LOADED, version, before=before)

    def _begin(self, version: str) -> None:
        held = self._try(version)
        if held is None:
            return
        with self._canary_lock:
            self._canary = CanaryRecord(version=version, beside=self._live.version or BUILT_IN)
            self._shadow = held
        self._say(PolicyChange.CANARY, version, before=self._live.version)

    def _end(self, record: CanaryRecord) -> None:
        """Promotes it or not; either way it is no candidate any more. A person's word that came meanwhile stands: who
        was promoted by hand is not replaced by one that was never compared with it, and who was nominated is next.
        """
        before, shadow = self._live.version, self._shadow
        passed = record.verdict is CanaryVerdict.PASSED
        try:
            if passed and self._is_another_to_decide(before):
                return  # the next look begins anew, beside that one
            if passed:
                self._store.promote(record.version)
            if self._store.nominated() == record.version:
                self._store.nominate(None)
        except (EsperError, OSError) as error:
            self._refuse(record.version, f"it was in shadow, and its end cannot be noted: {error}")
            return
        if shadow is not None and shadow.version == record.version:  # else another was nominated meanwhile
            self._live = shadow if passed else self._live
            self._shadow = None
        self._say(
            PolicyChange.PASSED if passed else PolicyChange.FAILED,
            record.version,
            before=before,
            reason=record.reason,
            record=record,
        )

    def _is_another_to_decide(self, before: str | None) -> bool:
        """Whether somebody promoted another one since, which can be loaded as far as anybody knows."""
        try:
            promoted = self._store.promoted()
        except TamperedError:
            return False
        return promoted not in (None, before) and promoted not in self._refused

    def _try(self, version: str) -> Held | None:
        """Loads a policy; None, and an event, if that fails."""
        try:
            return self._loaded_as(version)
        except (EsperError, OSError) as error:
            self._refuse(version, str(error))
            return None

    def _loaded_as(self, version: str) -> Held:
        with self._lock:
            if version in self._loaded:
                self._loaded.move_to_end(version)
                return self._loaded[version]
        card, weights = self._store.get(version)
        held = Held(version, self._load(card, weights))
        with self._lock:
            self._loaded[version] = held
            while len(self._loaded) > _NUM_KEPT:
                self._loaded.popitem(last=False)
        self._refused.pop(version, None)
        return held

    def _refuse(self, version: str, reason: str, *, key: str = "") -> None:
        if self._refused.get(key or version) != reason:  # once, however often it is looked at
            self._refused[key or version] = reason
            self._say(PolicyChange.REFUSED, version, before=self._live.version, reason=reason)

    def _say(
        self,
        change: PolicyChange,
        version: str,
        *,
        before: str | None,
        reason: str = "",
        record: CanaryRecord | None = None,
    ) -> None:
        _LOG.info(f"policy.{change.value}", extra={"version": version, "before": before, "reason": reason})
        self._tell(PolicyEvent(change=change, version=version, before=before, reason=reason, canary=record))
