"""Tamiyo's replica: decides with whatever policy a question asks for, and follows the policies of every storage that it
was asked about.

It keeps no run's state: that comes with each question and goes back with the answer. What it keeps, loaded policies and
the record of one in shadow, it finds again in the storage, or begins anew.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

import esper.leyline
import esper.tamiyo
from actors import oona
from actors.batching import Batching
from actors.logs import log_as
from esper.config import CanaryConfig, TamiyoConfig
from esper.leyline import (
    Action,
    EsperError,
    KasminaControlCommand,
    OonaMessage,
    PermanentError,
    PolicyChange,
    PolicyEvent,
    SystemStatePacket,
    Topic,
)
from esper.storage import Storage
from esper.tamiyo.deciders import Decided, Question, Steps
from esper.tamiyo.shelf import Held, Shelf
from esper.urza.policies import StoredPolicies

APP = "tamiyo"
ALONE = 8
"""So many callers at once are answered one by one."""
TOGETHER = 64
_MAX_IN_SHADOW = 64
"""Comparisons that wait; more are left out, so that what is in shadow cannot hold up what decides."""

_log = logging.getLogger("actors.tamiyo")


def code_digest() -> str:
    """Returns a hash of the sources that decide, so that a platform left from yesterday is not taken for today's."""
    digest = hashlib.sha256()
    for package in (esper.tamiyo, esper.leyline):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Asked(NamedTuple):
    """A question as it comes in; see `Tamiyo.decide`."""

    state: dict[str, Any]
    packet: bytes | str
    config_json: str
    storage: Storage | None
    version: str | None


Answer = tuple[dict[str, Any], str]


class Tamiyo:
    """The deployment. Arguments are packed or JSON, results JSON; they are validated at this edge.

    Args:
        canary: what a nominated policy must show.
        poll_s: so often the storages are looked at.
    """

    def __init__(self, canary: CanaryConfig | None = None, poll_s: float = 2.0) -> None:
        log_as(APP)
        self._canary, self._poll_s = canary or CanaryConfig(), poll_s
        self._num_decisions = 0
        self._code = code_digest()
        self._built_in = Held(None, Steps())
        self._shelves: dict[str, Shelf] = {}
        self._storages: dict[str, Storage] = {}
        self._batching: Batching[Asked, Answer] = Batching(self._answer, above=ALONE, longest=TOGETHER)
        self._in_shadow = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._num_in_shadow = threading.Semaphore(_MAX_IN_SHADOW)
        self._lock = threading.Lock()
        self._controller: int | None = None
        self._has_ended = threading.Event()
        self._num_modules = 0
        threading.Thread(target=self._follow, name="policies", daemon=True).start()

    def __repr__(self) -> str:
        return f"Tamiyo(decisions={self._num_decisions})"

    async def decide(
        self,
        state: dict[str, Any],
        packet: bytes | str,
        config_json: str,
        storage: Storage | None = None,
        version: str | None = None,
    ) -> Answer:
        """Runs one step; returns the next state and the signal's JSON.

        Args:
            state: Tamiyo's, of the run.
            packet: a `SystemStatePacket`, packed (see `esper.tamiyo.packing`) or its JSON.
            config_json: a `TamiyoConfig`.
            storage: where the run's policies lie.
            version: of the stored policy that shall decide, or `promoted`; None: the one that the configuration names.

        Raises:
            PermanentError: if packet or configuration are none.
            EsperError: if there is no such policy, or it cannot be loaded.
        """
        return await self._batching.ask(Asked(state, packet, config_json, storage, version))

    def close(self) -> None:
        """Ends its following of storages. Ray ends a replica's process; in others somebody has to."""
        self._has_ended.set()

    async def policies(self, storage: Storage) -> str:
        """Returns the JSON of the storage's `PolicyShelf`; raises `StorageError`."""
        return await asyncio.to_thread(self._view, storage)  # a slow storage must not hold decisions up

    def _view(self, storage: Storage) -> str:
        shelf = self._shelf(storage)
        shelf.refresh()
        return shelf.view().model_dump_json()

    def about(self) -> dict[str, Any]:
        """Returns its code's digest, process id, decisions so far, whether torch came into the process, and the process
        of Serve's controller as it was seen last; None before it was.
        """
        return {
            "code": self._code,
            "pid": os.getpid(),
            "decisions": self._num_decisions,
            "batches": self._batching.num_batches,
            "largest_batch": self._batching.largest,
            "imports_torch": "torch" in sys.modules,
            "serve_controller": self._controller,
        }

    # ---------------------------------------------------------------- in the deciding thread

    def _answer(self, asked: Sequence[Asked]) -> list[Answer | Exception]:
        """Answers all, those of one policy together."""
        answers: list[Answer | Exception] = [PermanentError("not answered")] * len(asked)
        by_policy: dict[tuple[str | None, str | None], tuple[Held, Shelf | None, list[tuple[int, Question]]]] = {}
        for place, one in enumerate(asked):
            try:
                question = _question(one)
                shelf = None if one.storage is None else self._shelf(one.storage)
                held = self._held(shelf, one.version)
            except EsperError as error:
                answers[place] = error
                continue
            group = by_policy.setdefault((one.storage and one.storage.uri, held.version), (held, shelf, []))
            group[2].append((place, question))
        for held, shelf, group in by_policy.values():
            for (place, question), decided in zip(group, _decide([one for _, one in group], held), strict=True):
                answers[place] = self._note(question, held, shelf, decided)
        self._settle()
        return answers

    def _settle(self) -> None:
        """Tells the garbage collector to leave alone what stays: going through all that torch, Ray and Serve brought
        along takes 50 ms and more, amid a decision.
        """
        if len(sys.modules) == self._num_modules:
            return
        self._num_modules = len(sys.modules)
        gc.collect()
        gc.freeze()

    def _held(self, shelf: Shelf | None, version: str | None) -> Held:
        if shelf is not None:
            return shelf.held(version)
        if version is not None:
            raise PermanentError(f"no storage was named where the policy {version} lies")
        return self._built_in

    def _note(
        self, question: Question, held: Held, shelf: Shelf | None, decided: Decided | Exception
    ) -> Answer | Exception:
        if isinstance(decided, Exception):
            return decided
        self._num_decisions += 1
        for command in decided.signal.commands:
            _log.info("command.given", extra=_fields(command, question.packet))
        if shelf is not None and self._num_in_shadow.acquire(blocking=False):
            self._in_shadow.submit(self._compare, shelf, question, held, decided)
        return decided.state, decided.signal.model_dump_json()

    # ---------------------------------------------------------------- beside it

    def _compare(self, shelf: Shelf, question: Question, held: Held, decided: Decided) -> None:
        try:
            shelf.compare(question, held, decided.signal)
        except Exception:  # noqa: BLE001 - the edge of the shadow's thread: an error in a future that nobody reads
            _log.exception("shadow.failed", extra={"run": question.packet.run_id})
        finally:
            self._num_in_shadow.release()

    def _shelf(self, storage: Storage) -> Shelf:
        with self._lock:
            if storage.uri not in self._shelves:
                self._shelves[storage.uri] = Shelf(
                    StoredPolicies(storage), self._canary, tell=lambda event: _publish(storage, event)
                )
                self._storages[storage.uri] = storage
                # one that comes again after a death says so too
                _publish(storage, _serving(f"process {os.getpid()} decides for this storage from now on"))
            return self._shelves[storage.uri]

    def _follow(self) -> None:
        while not self._has_ended.wait(self._poll_s):
            self._look_at_serve()
            for shelf in list(self._shelves.values()):
                try:
                    shelf.refresh()
                except Exception:  # noqa: BLE001 - the edge of the replica's own thread, which must go on
                    _log.exception("policies.refresh.failed")

    def _look_at_serve(self) -> None:
        """Tells of a controller of Serve that died and came again: replicas answer on, so nobody else notices."""
        before, pid = self._controller, controller_pid()
        self._controller = pid or before
        if pid and before and pid != before:
            for storage in list(self._storages.values()):
                _publish(storage, _serving(f"Serve's controller, process {before}, has died; process {pid} took over"))


def controller_pid() -> int | None:
    """The process of Serve's controller; None where there is none, or it does not answer."""
    import ray
    from ray.exceptions import RayError

    if not ray.is_initialized():
        return None
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return cast("int", ray.get(controller.get_pid.remote(), timeout=5.0))
    except (RayError, ValueError):  # a `ValueError` where no actor has the name
        return None


def _serving(reason: str) -> PolicyEvent:
    return PolicyEvent(change=PolicyChange.SERVING, version="", reason=reason)


def _question(asked: Asked) -> Question:
    try:
        packet = _packet(asked.packet)
        config = TamiyoConfig.model_validate_json(asked.config_json)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PermanentError(f"Tamiyo cannot read what it was sent: {where}: {first['msg']}") from error
    return Question(asked.state, packet, config)


def _packet(given: bytes | str) -> SystemStatePacket:
    if isinstance(given, bytes):
        from esper.tamiyo.packing import unpack

        return unpack(given)
    return SystemStatePacket.model_validate_json(given)


def _decide(questions: Sequence[Question], held: Held) -> Sequence[Decided | Exception]:
    """What the policy answers; what breaks it is an answer to the one who asked, and to nobody else."""
    try:
        return held.decider.decide(questions)
    except Exception as error:  # noqa: BLE001 - the edge of the replica: it becomes an answer
        if len(questions) > 1:
            return [answer for question in questions for answer in _decide([question], held)]
        _log.exception("step.failed", extra={"run": questions[0].packet.run_id, "version": held.version})
        words = " ".join(str(error).split())[:300]
        return [PermanentError(f"Tamiyo failed: {type(error).__name__}: {words}")]


def _publish(storage: Storage, event: PolicyEvent) -> None:
    """Tells the bus of the storage's platform, in a thread of its own: a bus that is silent holds nothing up."""

    def send() -> None:
        try:
            bus = oona.connect(oona.prefix_of(storage)).bus()
            try:
                bus.publish([OonaMessage.of(Topic.POLICIES, event, sender_id=APP, key="policies")])
            finally:
                bus.close()
        except EsperError as error:
            _log.warning("policy.event.unsent", extra={"change": event.change.value, "reason": str(error)})

    threading.Thread(target=send, name="policy-event", daemon=True).start()


def _fields(command: KasminaControlCommand, packet: SystemStatePacket) -> dict[str, Any]:
    """What a line of the log says of a command."""
    from esper.tamiyo.table import layers_of

    layer = layers_of(packet).named(command.site)
    seeds = () if layer is None else (seed for seed in layer.seeds if seed.seed_id == command.seed_id)
    under_way = next((seed.trace_id for seed in seeds), "")
    return {
        "run": packet.run_id,
        "action": command.action.value,
        "site": command.site,
        "seed": command.seed_id,
        "step": packet.epoch.step,
        "trace": command.command_id if command.action is Action.GERMINATE else under_way,
        "reason": command.reason,
    }
