"""The way from publishers and consumers to the shards of Oona: calls of their actors, and for what comes thousands of
times a second, on the same node, a connection beside them (`esper.oona.link`). Who has none, or loses it, makes calls.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from esper.leyline.bus import BusStats
from esper.leyline.errors import EsperError, UnavailableError
from esper.leyline.summary import BusCounts
from esper.oona import Received, Shelf, Start, decode_leased, merged
from esper.oona.door import WAIT, Ask
from esper.oona.link import Link, LinkLostError

DEADLINE_S = 10.0
"""How long a call may take beyond the time it asks the shard to wait."""
ATTEND_S = 2.0
"""From one request of a member to be watched to the next."""
APPEND_WAIT_S = 5.0
"""How long a shard holds a batch before it says that there is no room."""
CONNECT_S = 1.0
"""From one attempt to connect to the next."""

logger = logging.getLogger(__name__)


class Address(NamedTuple):
    """Where the door of a shard is."""

    node: str
    directory: str


@dataclass
class _Way:
    """To one shard.

    Attributes:
        shard: the actor.
        link: the connection, where there is one.
        connect_at: when to try the next time.
    """

    shard: Any
    link: Link | None = None
    connect_at: float = 0.0
    connecting: threading.Thread | None = None
    guard: threading.Lock = field(default_factory=threading.Lock)


def cause_of(error: BaseException, what: str) -> EsperError | None:
    """Turns what Ray raises into the tree of Esper; None if it is neither Ray's nor Esper's."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, EsperError) else None
    if isinstance(error, GetTimeoutError):
        return UnavailableError(f"{what} did not answer in time")
    if isinstance(error, RayActorError):
        said = [line for line in str(error).splitlines() if line.strip()]
        # of one that could not begin, the last line of the traceback says why
        return UnavailableError(f"{what} is gone: {said[-1 if error.actor_init_failed else 0].strip()}")
    return None


def get(refs: Any, what: str, timeout_s: float = DEADLINE_S) -> Any:
    try:
        return ray.get(refs, timeout=timeout_s)
    except (RayTaskError, GetTimeoutError, RayActorError) as error:
        cause = cause_of(error, what)
        if cause is None:
            raise
        raise cause from error


class RayTransport:
    """The way to the shards from any process of the cluster."""

    def __init__(self, shards: Sequence[ActorHandle], name: str) -> None:
        self._ways = [_Way(shard) for shard in shards]
        self._name = name
        # a member's poll at a shard: its number, and the answer on its way
        self._polls: dict[tuple[str, int], tuple[int, Future[bytes] | None]] = {}
        self._home = _home()
        self._attend_at: dict[str, float] = {}  # by member
        self._is_closed = False

    @property
    def num_shards(self) -> int:
        return len(self._ways)

    def append(self, shard: int, body: bytes) -> Future[bool]:
        """Sends without waiting; it is repeated if the shard restarts."""
        answer: Future[bool] = Future()

        def settle(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                answer.set_result(future.result() in (True, b"\1"))
            else:
                answer.set_exception(error)

        wait_s = WAIT.pack(APPEND_WAIT_S)
        self._ask(
            shard, Ask.APPEND, (wait_s, body), lambda actor: actor.append.remote(body, APPEND_WAIT_S)
        ).add_done_callback(settle)
        return answer

    def subscribe(self, group: str, topics: Sequence[str], *, key: str | None, start: Start) -> None:
        """See `Transport.subscribe`."""
        get([shard.subscribe.remote(group, topics, key, start) for shard in self._connected()], self._name)

    def poll(self, group: str, member: str, *, max_records: int, timeout_s: float) -> list[Received]:
        """Waits for whichever shard answers first. The others' answers are taken by the next poll."""
        each = max(1, max_records // len(self._ways))
        asked: dict[Future[bytes], tuple[int, int]] = {}
        self._ask_to_attend(group, member)
        self._connected()
        for index in range(len(self._ways)):
            number, answer = self._polls.get((member, index), (0, None))
            if answer is None:
                answer = self._ask_for_records(index, (group, member, number, each, timeout_s))
                self._polls[member, index] = (number, answer)
            asked[answer] = (index, number)
        done, _ = wait(asked, timeout_s + DEADLINE_S, FIRST_COMPLETED)
        if not done:
            raise UnavailableError(f"{self._name} did not answer in time")
        received: list[Received] = []
        for answer, (index, number) in asked.items():
            if answer not in done:
                continue
            self._polls[member, index] = (number, None)  # asked again with the same number if this answer is lost
            body = answer.result()
            self._polls[member, index] = (number + 1, None)
            received += [Received(index, *one) for one in decode_leased(body)]
        return received

    def _ask_for_records(self, index: int, request: tuple[str, str, int, int, float]) -> Future[bytes]:
        body = json.dumps(request).encode()
        return self._ask(index, Ask.POLL, (body,), lambda actor: actor.poll.remote(*request))

    def _ask_to_attend(self, group: str, member: str) -> None:
        """Where this is an actor: the shards watch it. They are asked again, as one that restarts forgets it."""
        now = time.monotonic()
        if self._home is not None and now >= self._attend_at.get(member, 0.0):
            self._attend_at[member] = now + ATTEND_S
            for way in self._ways:
                way.shard.attend.remote(group, member, *self._home)

    def ack(self, group: str, spans: Mapping[int, Sequence[range]]) -> None:
        """See `Transport.ack`."""
        self._connected()
        answers: list[Future[Any]] = []
        for index, some in spans.items():
            body = json.dumps((group, [(span.start, span.stop) for span in some])).encode()
            answers.append(
                self._ask(index, Ask.ACK, (body,), lambda actor, some=some: actor.ack.remote(group, list(some)))
            )
        ends = time.monotonic() + DEADLINE_S
        for answer in answers:
            try:
                answer.result(max(0.0, ends - time.monotonic()))
            except FutureTimeoutError as error:
                raise UnavailableError(f"{self._name} did not answer in time") from error

    def reject(self, group: str, spans: Mapping[int, Sequence[range]], reason: str) -> None:
        """See `Transport.reject`."""
        shards = self._connected()
        get([shards[shard].reject.remote(group, list(some), reason) for shard, some in spans.items()], self._name)

    def requeue(self, group: str, spans: Mapping[int, Sequence[range]]) -> int:
        """See `Transport.requeue`."""
        shards = self._connected()
        refs = [shards[shard].requeue.remote(group, list(some)) for shard, some in spans.items()]
        return sum(get(refs, self._name))

    def leave(self, group: str, member: str) -> None:
        """See `Transport.leave`."""
        self._attend_at.pop(member, None)
        for index in range(len(self._ways)):
            self._polls.pop((member, index), None)
        get([shard.leave.remote(group, member) for shard in self._connected()], self._name)

    def forget(self, group: str) -> None:
        """See `Transport.forget`."""
        get([shard.forget.remote(group) for shard in self._connected()], self._name)

    def counts(self, key: str) -> BusCounts:
        """Sums over the shards."""
        each: list[BusCounts] = get([shard.counts.remote(key) for shard in self._connected()], self._name)
        return BusCounts(
            published=sum(counts.published for counts in each),
            delivered=sum(counts.delivered for counts in each),
            redelivered=sum(counts.redelivered for counts in each),
            dropped=sum(counts.dropped for counts in each),
            dead=sum(counts.dead for counts in each),
        )

    def read(self, start: Start, topics: Sequence[str], *, key: str | None, max_records: int) -> list[Shelf]:
        """See `Transport.read`."""
        shards = self._connected()
        return get([shard.read.remote(start, topics, key, max_records) for shard in shards], self._name)

    def stats(self) -> BusStats:
        """See `Transport.stats`."""
        return merged(get([shard.stats.remote() for shard in self._connected()], self._name))

    def close(self) -> None:
        """Ends the connections; the shards live on."""
        self._is_closed = True
        for way in self._ways:
            with way.guard:
                link, way.link = way.link, None
            if link is not None:
                link.close()

    def _connected(self) -> list[Any]:
        if not ray.is_initialized():  # or the thread of a bus that was left open would start a Ray of its own
            raise UnavailableError(f"{self._name} is gone: this process has left Ray")
        return [way.shard for way in self._ways]

    # ---- by connection or by call

    def _ask(self, index: int, ask: Ask, body: tuple[bytes, ...], call: Callable[[Any], Any]) -> Future[Any]:
        """Asks a shard by the connection, or by a call where there is none or it is lost before the answer comes."""
        link = self._link(self._ways[index])
        if link is None:
            return self._call(index, call)
        answer: Future[Any] = Future()

        def settle(future: Future[bytes]) -> None:
            error = future.exception()
            if isinstance(error, LinkLostError) and not self._is_closed:
                _hand_on(self._call(index, call), answer)
            else:
                _hand_on(future, answer)

        link.ask(ask, *body).add_done_callback(settle)
        return answer

    def _call(self, index: int, call: Callable[[Any], Any]) -> Future[Any]:
        """Calls the actor; Ray repeats the call if it restarts."""
        answer: Future[Any] = Future()
        try:
            ref = call(self._connected()[index])
        except UnavailableError as error:
            answer.set_exception(error)
            return answer

        def settle(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                answer.set_result(future.result())
            else:
                answer.set_exception(cause_of(error, self._name) or error)

        ref.future().add_done_callback(settle)
        return answer

    def _link(self, way: _Way) -> Link | None:
        """The connection, if there is one; else a thread tries to make it, and others make calls meanwhile."""
        link = way.link
        if link is not None and link.is_up:
            return link if ray.is_initialized() else None
        now = time.monotonic()
        if now >= way.connect_at and not self._is_closed and ray.is_initialized():
            with way.guard:
                if way.connecting is None or not way.connecting.is_alive():
                    way.connect_at = now + CONNECT_S
                    way.connecting = threading.Thread(
                        target=self._connect, args=(way,), name="oona-connect", daemon=True
                    )
                    way.connecting.start()
        return None

    def _connect(self, way: _Way) -> None:
        try:
            address: Address | None = ray.get(way.shard.door.remote(), timeout=DEADLINE_S)
            if address is None or address.node != ray.get_runtime_context().get_node_id():
                way.connect_at = float("inf")  # shards stay where they are
                return
            link = Link(Path(address.directory))
        except Exception as error:  # the thread's edge: calls are made, and this is tried again
            logger.info("oona.link.failed", extra={"bus": self._name, "reason": str(error)}, exc_info=True)
            return
        with way.guard:
            way.link = link
        if self._is_closed:
            link.close()


def _hand_on(source: Future[Any], target: Future[Any]) -> None:
    """What becomes of one becomes of the other."""

    def settle(future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            target.set_result(future.result())
        else:
            target.set_exception(error)

    source.add_done_callback(settle)


def _home() -> tuple[Any, str] | None:
    """A handle of the actor that this process is, and which of its lives this is; None elsewhere."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None
    actor = context.current_actor
    actor._ray_weak_ref = True  # noqa: SLF001 - there is no other way to say it; the bus keeps nobody alive
    return actor, context.get_worker_id()
