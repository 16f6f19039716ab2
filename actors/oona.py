"""Oona on Ray: one named async actor a shard, and the bus that programs on the cluster use.

The actor is a journal behind long polls; what the bus promises is decided in `esper.oona`. Its log lies on the node
where the shard was spawned, so the shard is pinned there. Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.logs import log_as
from esper.config import OonaConfig
from esper.leyline.bus import BusStats
from esper.leyline.errors import ConflictError, EsperError, NotFoundError, StorageError, UnavailableError
from esper.leyline.summary import BusCounts
from esper.oona import Admission, Broker, BusClient, Journal, Received, Shelf, Start, decode_batch, merged

NAMESPACE = "esper"
DEADLINE_S = 10.0
"""How long a call may take beyond the time it asks the shard to wait."""
START_S = 60.0
"""How long a shard may take to start and read its log."""
APPEND_WAIT_S = 5.0
"""How long a shard holds a batch before it says that there is no room."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says of itself."""

    num_shards: int
    config: OonaConfig
    pid: int


class OonaShard:
    """One shard of the bus. Runs on an event loop: nothing here waits but on it.

    Args:
        name: the actor's name, which ends with the shard's number.
        directory: of its log.
        num_shards: of the whole bus.
        config: its settings.

    Raises:
        StorageError: if the log cannot be used.
        FencedError: if another process writes it.
    """

    def __init__(self, name: str, directory: str, num_shards: int, config: OonaConfig) -> None:
        log_as(name)
        self._name = name
        self._num_shards = num_shards
        self._config = config
        number = int(name.rpartition("-")[2])
        self._journal = Journal.open(
            Path(directory), Broker.of(config), now=time.monotonic(), wait_s=DEADLINE_S, shard=number
        )
        self._changed = asyncio.Event()
        self._is_unsynced = False
        self._syncing: asyncio.Task[None] | None = None
        self._fault: EsperError | None = None

    def __repr__(self) -> str:
        return self._name

    async def describe(self) -> ShardInfo:
        """Answers once the log is read."""
        return ShardInfo(self._num_shards, self._config, os.getpid())

    async def append(self, body: bytes, wait_s: float) -> bool:
        """Takes a batch in its turn; False if there was no room within `wait_s`."""
        deadline = time.monotonic() + wait_s
        batch = decode_batch(body)
        while True:
            self._check()
            admission = self._journal.append(batch, body, at=time.time())
            if admission is Admission.ACCEPT:
                self._note_change()
            if admission in (Admission.ACCEPT, Admission.DUPLICATE):
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            await self._wait(remaining)

    async def subscribe(self, group: str, topics: Sequence[str], key: str | None, start: Start) -> None:
        """See `Journal.join`."""
        self._check()
        self._journal.join(group, topics, key=key, start=start, now=time.monotonic())
        self._note_change()

    async def poll(
        self, group: str, member: str, number: int, max_records: int, wait_s: float
    ) -> list[tuple[int, int, bytes]]:
        """Long poll: (offset, attempt, data) of the next records, or nothing after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not self._journal.has_left(member):
            self._check()
            now = time.monotonic()
            self._journal.expire(now)
            if self._journal.bury_exhausted(group, at=time.time()):
                self._note_change()
            leased = self._journal.poll(group, member, number, max_records, now)
            if leased:
                self._note_write()
            remaining = deadline - now
            if leased or remaining <= 0:
                return [(record.offset, record.attempt, record.data) for record in leased]
            await self._wait(min(remaining, max(0.0, self._journal.next_expiry - now)))
        return []

    async def ack(self, group: str, offsets: Sequence[int]) -> None:
        """See `Journal.ack`."""
        self._check()
        if self._journal.ack(group, offsets, time.monotonic()):
            self._note_change()

    async def reject(self, group: str, offsets: Sequence[int], reason: str) -> None:
        """See `Journal.bury`."""
        self._check()
        if self._journal.bury(group, offsets, reason, at=time.time()):
            self._note_change()

    async def read(self, start: Start, topics: Sequence[str], key: str | None, max_records: int) -> Shelf:
        """See `Journal.read`."""
        return self._journal.read(start, topics, key, max_records)

    async def stats(self) -> BusStats:
        """See `Broker.stats`."""
        return self._journal.stats(time.monotonic())

    async def leave(self, group: str, member: str) -> None:
        """Takes back what the member holds and ends its polls."""
        self._check()
        self._journal.leave(group, member)
        self._note_change()

    async def counts(self, key: str) -> BusCounts:
        """See `Broker.counts`."""
        return self._journal.counts(key)

    async def close(self) -> None:
        """Makes everything durable and lets go of the log; every later call is refused."""
        self._fault = UnavailableError(f"{self._name} is closed")
        if self._syncing is not None:
            self._syncing.cancel()
        self._journal.close()
        self._changed.set()

    # ---- within

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def _wait(self, timeout_s: float) -> None:
        """Returns at the next change, or after `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._note_write()

    def _note_write(self) -> None:
        self._is_unsynced = True
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._sync())

    async def _sync(self) -> None:
        """Syncs at the configured interval while there is something to sync."""
        while self._is_unsynced and self._fault is None:
            await asyncio.sleep(self._config.fsync_ms / 1e3)
            self._is_unsynced = False
            try:
                await asyncio.to_thread(self._journal.sync)
            except StorageError as error:
                # what the kernel could not write is lost to it: nothing may be promised any more
                logger.exception("oona.sync.failed", extra={"shard": self._name})
                self._fault = error
                self._changed.set()


# ---------------------------------------------------------------- the way to the shards


def _cause(error: BaseException, what: str) -> EsperError | None:
    """Turns what Ray raises into the tree of Esper; None if it is neither Ray's nor Esper's."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, EsperError) else None
    if isinstance(error, GetTimeoutError):
        return UnavailableError(f"{what} did not answer in time")
    if isinstance(error, RayActorError):
        return UnavailableError(f"{what} is gone: {str(error).splitlines()[0]}")
    return None


def _get(refs: Any, what: str, timeout_s: float = DEADLINE_S) -> Any:
    try:
        return ray.get(refs, timeout=timeout_s)
    except (RayTaskError, GetTimeoutError, RayActorError) as error:
        cause = _cause(error, what)
        if cause is None:
            raise
        raise cause from error


class RayTransport:
    """The way to the shards from any process of the cluster."""

    def __init__(self, shards: Sequence[ActorHandle], name: str) -> None:
        self._shards: list[Any] = list(shards)
        self._name = name
        # a member's poll at a shard: its number, and the answer on its way
        self._polls: dict[tuple[str, int], tuple[int, Any]] = {}

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def append(self, shard: int, body: bytes) -> Future[bool]:
        """Sends without waiting; Ray repeats the call if the shard restarts."""
        answer: Future[bool] = Future()
        try:
            actor = self._connected()[shard]
        except UnavailableError as error:
            answer.set_exception(error)
            return answer

        def settle(future: Future[bool]) -> None:
            error = future.exception()
            if error is None:
                answer.set_result(future.result())
            else:
                answer.set_exception(_cause(error, self._name) or error)

        actor.append.remote(body, APPEND_WAIT_S).future().add_done_callback(settle)
        return answer

    def subscribe(self, group: str, topics: Sequence[str], *, key: str | None, start: Start) -> None:
        """See `Transport.subscribe`."""
        _get([shard.subscribe.remote(group, topics, key, start) for shard in self._connected()], self._name)

    def poll(self, group: str, member: str, *, max_records: int, timeout_s: float) -> list[Received]:
        """Waits for whichever shard answers first. The others' answers are taken by the next poll."""
        each = max(1, max_records // len(self._shards))
        asked: dict[Any, tuple[int, int]] = {}
        for index, shard in enumerate(self._connected()):
            number, ref = self._polls.get((member, index), (0, None))
            if ref is None:
                ref = shard.poll.remote(group, member, number, each, timeout_s)
                self._polls[member, index] = (number, ref)
            asked[ref] = (index, number)
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=timeout_s + DEADLINE_S)
        if not ready:
            raise UnavailableError(f"{self._name} did not answer in time")
        if len(asked) > 1:
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        received: list[Received] = []
        for ref in ready:
            index, number = asked[ref]
            self._polls[member, index] = (number, None)  # asked again with the same number if this answer is lost
            records = _get(ref, self._name)
            self._polls[member, index] = (number + 1, None)
            received.extend(Received(index, *record) for record in records)
        return received

    def ack(self, group: str, offsets: Mapping[int, Sequence[int]]) -> None:
        """See `Transport.ack`."""
        shards = self._connected()
        _get([shards[shard].ack.remote(group, list(some)) for shard, some in offsets.items()], self._name)

    def reject(self, group: str, offsets: Mapping[int, Sequence[int]], reason: str) -> None:
        """See `Transport.reject`."""
        shards = self._connected()
        _get([shards[shard].reject.remote(group, list(some), reason) for shard, some in offsets.items()], self._name)

    def leave(self, group: str, member: str) -> None:
        """See `Transport.leave`."""
        for index in range(len(self._shards)):
            self._polls.pop((member, index), None)
        _get([shard.leave.remote(group, member) for shard in self._connected()], self._name)

    def counts(self, key: str) -> BusCounts:
        """Sums over the shards."""
        each: list[BusCounts] = _get([shard.counts.remote(key) for shard in self._connected()], self._name)
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
        return _get([shard.read.remote(start, topics, key, max_records) for shard in shards], self._name)

    def stats(self) -> BusStats:
        """See `Transport.stats`."""
        return merged(_get([shard.stats.remote() for shard in self._connected()], self._name))

    def close(self) -> None:
        """Nothing to let go of: the shards live on."""

    def _connected(self) -> list[Any]:
        if not ray.is_initialized():  # or the thread of a bus that was left open would start a Ray of its own
            raise UnavailableError(f"{self._name} is gone: this process has left Ray")
        return self._shards


class RayBus(BusClient):
    """Oona as a program on the cluster uses it. Each process makes its own, from an `OonaHandle`."""

    def __init__(self, shards: Sequence[ActorHandle], config: OonaConfig, *, name: str = "oona") -> None:
        super().__init__(RayTransport(shards, name), config)


@dataclass(frozen=True)
class OonaHandle:
    """The running bus. Pickles: pass it to actors and workers."""

    prefix: str
    namespace: str
    shards: tuple[ActorHandle, ...]
    config: OonaConfig

    def bus(self) -> RayBus:
        """A bus for this process; close it at the end."""
        return RayBus(self.shards, self.config, name=self.prefix)

    def stop(self) -> None:
        """Makes the logs durable and ends the actors.

        Raises:
            UnavailableError: if a shard does not answer; it is ended all the same.
        """
        shards: Sequence[Any] = self.shards
        try:
            _get([shard.close.remote() for shard in shards], self.prefix)
        finally:
            for shard in shards:
                ray.kill(shard)


def spawn(
    config: OonaConfig,
    directory: Path,
    *,
    prefix: str = "oona",
    namespace: str = NAMESPACE,
    detached: bool = False,
) -> OonaHandle:
    """Starts the shards on this node and waits until they have read their logs.

    Args:
        config: settings of the bus.
        directory: on this node's disk; a log that is there is continued.
        prefix: the shards are named `<prefix>-<number>`.
        namespace: of the names.
        detached: whether the shards outlive this driver.

    Raises:
        ConflictError: if there is such a bus already, or the log was written by another number of shards.
        StorageError: if the directory cannot be used.
        UnavailableError: if the shards do not start in time.
    """
    root = directory.expanduser().resolve()
    _check_sharding(root, config.num_shards)
    cls = ray.remote(OonaShard)
    shards: list[Any] = []
    try:
        for index in range(config.num_shards):
            name = f"{prefix}-{index}"
            actor = cls.options(
                name=name,
                namespace=namespace,
                lifetime="detached" if detached else None,
                max_restarts=-1,
                max_task_retries=-1,
                # waiting batches must never keep acknowledgements out, which make room for them
                max_concurrency=10_000,
                num_cpus=0.05,
                enable_task_events=False,
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
            )
            where = root / _shard_directory(index, config.num_shards)
            shards.append(actor.remote(name, str(where), config.num_shards, config))
    except ValueError as error:  # Ray's word for a name that is taken
        for shard in shards:
            ray.kill(shard)
        raise ConflictError(f"cannot start {prefix}: {error}", remedy="connect to the one that runs") from error
    _get([shard.describe.remote() for shard in shards], prefix, START_S)
    return OonaHandle(prefix, namespace, tuple(shards), config)


def connect(prefix: str = "oona", *, namespace: str = NAMESPACE) -> OonaHandle:
    """Finds a running bus by name.

    Raises:
        NotFoundError: if there is none.
        UnavailableError: if it does not answer.
    """
    first = _find(prefix, 0, namespace)
    info: ShardInfo = _get(first.describe.remote(), prefix, START_S)
    others = [_find(prefix, index, namespace) for index in range(1, info.num_shards)]
    return OonaHandle(prefix, namespace, (first, *others), info.config)


def _find(prefix: str, index: int, namespace: str) -> Any:
    try:
        return ray.get_actor(f"{prefix}-{index}", namespace=namespace)
    except ValueError as error:
        raise NotFoundError(
            f"no actor {prefix}-{index} in namespace {namespace}", remedy="start the platform"
        ) from error


def _shard_directory(index: int, num_shards: int) -> str:
    return f"shard-{index}-of-{num_shards}"


def _check_sharding(root: Path, num_shards: int) -> None:
    """A key's records must stay with one shard, or their order is lost."""
    for path in root.glob("shard-*-of-*"):
        if not path.name.endswith(f"-of-{num_shards}"):
            raise ConflictError(
                f"{root} holds {path.name}, but {num_shards} shards are asked for",
                field="oona.num_shards",
                remedy="keep the number of shards, or use another directory",
            )
