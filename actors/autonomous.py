"""AutonomousTamiyo: watches the bus and tells runs that listen what to do, without being asked, many runs at once.

One thread takes in, another decides, so that what comes while it decides is taken in. It keeps no run's memory: that
comes with the run's state and goes back with the command. So one that dies costs its runs a decision and no more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from actors.cluster import NAMESPACE
from actors.logs import log_as
from esper.config import CanaryConfig
from esper.leyline import Bus, EsperError, OonaMessage, PolicyChange, PolicyEvent, Subscription, Topic
from esper.storage import Storage
from esper.tamiyo.deciders import Decided, Question, wanted_version
from esper.tamiyo.gathering import TOPICS, Gathering, StrangeHealthError
from esper.tamiyo.shelf import Shelf
from esper.tolaria.listening import WATCHER
from esper.urza.policies import StoredPolicies

NUM_CPUS = 0.1
GROUP = "tamiyo"
_POLL_S = 0.2
_LOOK_S = 2.0
"""So often it looks which policy is promoted or nominated, while nobody asks."""
_PAUSES_S = (0.1, 5.0)
_LOG = logging.getLogger("actors.autonomous")


class AutonomousTamiyo:
    """The service; begins to watch when it is made.

    Args:
        bus_factory: connects to the bus; called in its threads, again after the bus was lost.
        storage: where policies lie.
        canary: see `actors.deciding.Tamiyo`.
    """

    def __init__(self, bus_factory: Callable[[], Bus], storage: Storage, canary: CanaryConfig | None = None) -> None:
        self._bus_factory = bus_factory
        self._gathering = Gathering()
        self._shelf = Shelf(StoredPolicies(storage), canary or CanaryConfig(), tell=self._note)
        self._questions: deque[Question | PolicyEvent] = deque()
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._listens = threading.Event()
        self._num_messages = self._num_refused = self._num_told = self._num_failed = self._num_overtaken = 0
        self._threads = [
            threading.Thread(target=self._again, args=(loop,), name=name, daemon=True)
            for loop, name in ((self._take_in, "taking-in"), (self._decide, "deciding"))
        ]
        reason = f"process {os.getpid()} watches the runs of this storage from now on"
        self._note(PolicyEvent(change=PolicyChange.SERVING, version="", reason=reason))
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"AutonomousTamiyo(runs={self._gathering.num_runs}, told={self._num_told})"

    def about(self) -> dict[str, Any]:
        """What came in and what became of it; see `Gathering.counts`."""
        return {
            "pid": os.getpid(),
            "runs": self._gathering.num_runs,
            "messages": self._num_messages,
            "refused": self._num_refused,
            "told": self._num_told,
            "failed": self._num_failed,
            "overtaken": self._num_overtaken,
            "waiting": len(self._questions),
            **asdict(self._gathering.counts),
        }

    def wait(self, timeout_s: float) -> bool:
        """Returns whether it hears what runs tell, within `timeout_s` at the latest."""
        return self._listens.wait(timeout_s)

    def stop(self) -> None:
        """Watches no more."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(10.0)

    # ---------------------------------------------------------------- threads

    def _again(self, loop: Callable[[Bus], None]) -> None:
        """Runs a loop on a bus of its own; begins again when the bus was lost."""
        pause_s = _PAUSES_S[0]
        while not self._over.is_set():
            try:
                bus = self._bus_factory()
                try:
                    loop(bus)
                finally:
                    bus.close()
            except Exception as error:  # noqa: BLE001 - the edge of the actor's own threads: they must go on
                _LOG.warning(
                    "watch.interrupted", extra={"thread": threading.current_thread().name, "error": str(error)}
                )
                self._over.wait(pause_s)
                pause_s = min(2 * pause_s, _PAUSES_S[1])

    def _take_in(self, bus: Bus) -> None:
        subscription = bus.subscribe(TOPICS, group=GROUP)
        try:
            while not self._over.is_set():
                self._take(subscription)
        finally:
            subscription.close()

    def _take(self, subscription: Subscription) -> None:
        deliveries = subscription.poll(max_messages=1024, timeout_s=_POLL_S)
        self._listens.set()
        good, bad = [], {}
        for delivery in deliveries:
            try:
                question = self._gathering.take(delivery.message.body())
            except ValidationError as error:
                bad.setdefault(str(error.errors(include_url=False)[0]["msg"]), []).append(delivery)
                continue
            except StrangeHealthError as error:
                bad.setdefault(str(error), []).append(delivery)
                continue
            good.append(delivery)
            if question is not None:
                self._ask(question)
        self._num_messages += len(deliveries)
        if good:
            subscription.ack(good)
        for reason, refused in bad.items():  # to the dead letters, where people find them
            self._num_refused += len(refused)
            _LOG.warning("message.refused", extra={"reason": reason, "count": len(refused)})
            subscription.reject(refused, reason=reason)

    def _ask(self, question: Question) -> None:
        with self._changed:
            run = question.packet.run_id
            before = [one for one in self._questions if isinstance(one, Question) and one.packet.run_id == run]
            for one in before:  # the run is further on: nobody would obey that any more
                self._questions.remove(one)
                self._num_overtaken += 1
            self._questions.append(question)
            self._changed.notify_all()

    def _note(self, event: PolicyEvent) -> None:
        with self._changed:
            self._questions.append(event)
            self._changed.notify_all()

    def _decide(self, bus: Bus) -> None:
        while not self._over.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._questions or self._over.is_set(), timeout=_LOOK_S)
                one = self._questions.popleft() if self._questions else None
            if isinstance(one, Question):
                self._tell(bus, one)
            elif one is not None:
                bus.publish([OonaMessage.of(Topic.POLICIES, one, sender_id=WATCHER, key="policies")])
            elif self._num_told:  # else nobody listens: the replica alone follows what is promoted and nominated
                self._shelf.refresh()

    def _tell(self, bus: Bus, question: Question) -> None:
        run_id = question.packet.run_id
        try:
            state, signal = self._step(question)
        except Exception as error:  # noqa: BLE001 - one run's question must not end the watch over the others
            self._num_failed += 1
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _LOG.warning("step.failed", extra={"run": run_id, "error": words})
            return
        told = signal.model_copy(update={"memory": state})
        bus.publish([OonaMessage.of(Topic.KASMINA_COMMANDS, told, sender_id=WATCHER, key=run_id)])
        self._num_told += 1

    def _step(self, question: Question) -> Decided:
        held = self._shelf.held(wanted_version(question.config))
        [answer] = held.decider.decide([question])
        if isinstance(answer, EsperError):
            raise answer
        self._shelf.compare(question, held, answer.signal)
        return answer


def spawn(
    make_bus: Callable[[], Bus], storage: Storage, *, detached: bool = False, canary: CanaryConfig | None = None
) -> Any:
    """Starts it for a storage address, or joins the one there is. Returns at once."""
    import ray

    options = ray.remote(_Logged).options(
        name=name_of(storage),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached" if detached else None,
        num_cpus=NUM_CPUS,
        max_restarts=-1,
        max_concurrency=8,
        enable_task_events=False,
    )
    return options.remote(make_bus, Storage(storage.uri, storage.options), canary)


def wait_for(watcher: Any, timeout_s: float) -> None:
    """Returns once it hears what runs tell: nothing is told again, so that a run which began before would lose its
    first epochs. A run decides itself where nobody watches, so one that does not come up in time is logged, no error.
    """
    import ray
    from ray.exceptions import RayError

    try:
        is_there = ray.get(watcher.wait.remote(timeout_s), timeout=timeout_s)
    except RayError as error:
        _LOG.warning("watch.silent", extra={"reason": " ".join(str(error).split())[:300], "timeout_s": timeout_s})
        return
    if not is_there:
        _LOG.warning("watch.silent", extra={"reason": "it does not reach the bus", "timeout_s": timeout_s})


def name_of(storage: Storage) -> str:
    """The actor of a storage address."""
    return f"tamiyo-watcher-{storage.key}"


class _Logged(AutonomousTamiyo):
    """In a process of its own, with logging set up for it."""

    def __init__(self, make_bus: Callable[[], Bus], storage: Storage, canary: CanaryConfig | None) -> None:
        log_as(WATCHER)
        super().__init__(make_bus, storage, canary)
