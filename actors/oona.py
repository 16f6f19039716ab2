"""Oona on Ray: one named async actor a shard, and the bus that programs on the cluster use.

The actor is a journal behind long polls; what the bus promises is decided in `esper.oona`. Its log lies on the node
where the shard was spawned, so the shard is pinned there. Imports no torch.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.logs import log_as
from actors.oona_transport import DEADLINE_S, Address, RayTransport, get
from esper.config import OonaConfig
from esper.leyline.bus import BusStats
from esper.leyline.errors import ConflictError, EsperError, NotFoundError, UnavailableError
from esper.leyline.summary import BusCounts
from esper.oona import (
    Admission,
    Broker,
    BusClient,
    Journal,
    Shelf,
    Start,
    decode_batch,
    encode_leased,
)
from esper.oona.archivist import archive_group
from esper.oona.door import Door
from esper.storage import Storage

NAMESPACE = "esper"
START_S = 60.0
"""How long a shard may take to start and read its log."""
WATCH_S = 0.2
"""From one answer of a member's actor to the next question."""
TIDY_S = 30.0
"""From one look for what is too old to the next."""
RECOVER_S = 1.0
"""From a sync that failed to the next attempt."""
PROTOCOL = 3
"""Of the calls between programs and shards: it rises whenever one of them changes, as a platform may be older or newer
than who joins it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says of itself.

    Attributes:
        protocol: see `PROTOCOL`; shards from before it was told have none.
    """

    num_shards: int
    config: OonaConfig
    pid: int
    protocol: int


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
        gc.set_threshold(100_000, 50, 1000)  # what is kept has no cycles, and looking at all of it again costs much
        self._name = name
        self._num_shards = num_shards
        self._config = config
        number = int(name.rpartition("-")[2])
        lasting = (archive_group(config.archive),) if config.archive else ()
        self._journal = Journal.open(
            Path(directory),
            Broker.of(config),
            now=time.monotonic(),
            wait_s=DEADLINE_S,
            shard=number,
            lasting=lasting,
            is_synced=config.fsync != "never",
            at=time.time(),
        )
        gc.freeze()  # nor at what Ray and the log have made until now
        self._room = asyncio.Event()  # set when a batch that waits may be admitted
        self._news: dict[str, asyncio.Event] = {}  # by group: set when a poll of it may find something
        self._num_written = self._num_synced = 0
        self._syncing: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._homes: dict[str, Home] = {}  # processes whose members end with them
        self._directory = Path(directory)
        self._door: Door | None = None
        self._fault: EsperError | None = None  # what the disk, or that this is closed, makes every call end with
        self._is_closed = False

    def __repr__(self) -> str:
        return self._name

    async def describe(self) -> ShardInfo:
        """Answers once the log is read."""
        return ShardInfo(self._num_shards, self._config, os.getpid(), PROTOCOL)

    async def door(self) -> Address | None:
        """Where programs on this node come in without calls (`esper.oona.door`); None where no socket can be."""
        if self._door is None:
            door = Door(self._directory, self)
            try:
                await door.open()
            except OSError as error:
                logger.warning("oona.door.shut", extra={"shard": self._name, "reason": str(error)})
                return None
            self._door = door
        return Address(ray.get_runtime_context().get_node_id(), str(self._directory))

    async def append(self, body: bytes, wait_s: float) -> bool:
        """Takes a batch in its turn; False if there was no room within `wait_s`."""
        deadline = time.monotonic() + wait_s
        batch = decode_batch(body)
        while True:
            self._check()
            admission = self._journal.append(batch, body, at=time.time())
            if admission is Admission.ACCEPT:
                self._note_write()
                self._make_room()  # the producer's next batch may be here already
                self._tell(self._journal.takers(batch))
            if admission in (Admission.ACCEPT, Admission.DUPLICATE):
                await self._durable()
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            await _happens(self._room, remaining)

    async def subscribe(self, group: str, topics: Sequence[str], key: str | None, start: Start) -> None:
        """See `Journal.join`."""
        self._check()
        self._journal.join(group, topics, key=key, start=start, now=time.monotonic())
        self._note_write()
        await self._durable()

    async def poll(self, group: str, member: str, number: int, max_records: int, wait_s: float) -> bytes:
        """Long poll: the next records as `encode_leased` makes bytes of them, or none after `wait_s`. Bytes are
        what costs Ray least.
        """
        deadline = time.monotonic() + wait_s
        while not self._journal.has_left(member):
            self._check()
            now, at = time.monotonic(), time.time()
            if self._journal.expire(now, at):
                self._tell_all()  # the lane that is free may be another group's
            if self._journal.bury_exhausted(group, at=at):
                self._note_write()
                self._tell_all()
            leased = self._journal.poll(group, member, number, max_records, now)
            if leased:
                self._note_write()
            remaining = deadline - now
            if leased or remaining <= 0:
                return encode_leased(leased)
            news = self._news.setdefault(group, asyncio.Event())
            await _happens(news, min(remaining, max(0.0, self._journal.next_expiry - now)))
        return b""

    async def ack(self, group: str, spans: Sequence[range]) -> None:
        """See `Journal.ack`."""
        self._check()
        if self._journal.ack(group, spans, time.monotonic()):
            self._note_write()
            self._make_room()
            self._tell((group,))  # a lane may be free for another member
        await self._durable()

    async def reject(self, group: str, spans: Sequence[range], reason: str) -> None:
        """See `Journal.bury`."""
        self._check()
        if self._journal.bury(group, spans, reason, at=time.time()):
            self._note_write()
            self._tell_all()
        await self._durable()

    async def requeue(self, group: str, spans: Sequence[range]) -> int:
        """See `Journal.requeue`."""
        self._check()
        count = self._journal.requeue(group, spans)
        if count:
            self._note_write()
            self._tell((group,))
        await self._durable()
        return count

    async def read(self, start: Start, topics: Sequence[str], key: str | None, max_records: int) -> Shelf:
        """See `Journal.read`."""
        self._check_open()
        return self._journal.read(start, topics, key, max_records)

    async def stats(self) -> BusStats:
        """See `Broker.stats`."""
        self._check_open()
        return self._journal.stats(time.monotonic())

    async def leave(self, group: str, member: str) -> None:
        """Takes back what the member holds and ends its polls."""
        self._check()
        self._leave(group, member)

    async def attend(self, group: str, member: str, home: Any, process: str) -> None:
        """Watches a member's actor: if it dies, what the member holds goes to others at once, not after the lease.

        Args:
            group: of the member.
            member: as it polls.
            home: a weak handle of the actor that the member lives in.
            process: which of that actor's lives.
        """
        known = self._homes.get(process)
        if known is None:
            known = self._homes[process] = Home(process)
            known.task = asyncio.create_task(self._watch(home, known))
        known.members.add((group, member))

    async def forget(self, group: str) -> None:
        """See `Journal.forget`."""
        self._check()
        self._journal.forget(group)
        self._note_write()
        self._tell((group,))
        self._make_room()  # it may have been what kept publishers waiting

    async def counts(self, key: str) -> BusCounts:
        """See `Broker.counts`."""
        self._check_open()
        return self._journal.counts(key)

    async def close(self) -> None:
        """Makes everything durable and lets go of the log; every later call is refused."""
        self._fault, self._is_closed = UnavailableError(f"{self._name} is closed"), True
        watches = [home.task for home in self._homes.values()]
        for task in (self._syncing, self._recovering, self._tidying, *watches):
            if task is not None:
                task.cancel()
        if self._door is not None:
            self._door.close()
        self._journal.close()
        self._tell_all()

    # ---- within

    def _check_open(self) -> None:
        """For those who only look: they may while the disk fails, and not once this is closed."""
        if self._is_closed and self._fault is not None:
            raise self._fault

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self._tidy())

    async def _tidy(self) -> None:
        """Lets go of what is too old, also where nobody publishes or asks."""
        while True:
            await asyncio.sleep(TIDY_S)
            try:
                self._journal.tidy(time.monotonic(), time.time())
            except UnavailableError as error:
                logger.warning("oona.tidy.failed", extra={"shard": self._name, "reason": str(error)})
            except Exception:
                logger.exception("oona.tidy.ended", extra={"shard": self._name})
                raise  # begun again with the next call
            self._tell_all()

    def _leave(self, group: str, member: str) -> None:
        for home in self._homes.values():
            home.members.discard((group, member))
        self._journal.leave(group, member)
        self._note_write()
        self._tell((group,))

    async def _watch(self, actor: Any, home: Home) -> None:
        """Asks the actor who it is, again and again. A busy actor does not answer, and need not: a dead one fails."""
        while not self._is_closed and home.members:
            try:
                is_alive = await actor.__ray_call__.remote(_process_of) == home.process
            except RayActorError as error:
                is_alive = isinstance(error, ActorUnavailableError)  # of that one is not known what became of it
            if not is_alive:
                break
            await asyncio.sleep(WATCH_S)
        del self._homes[home.process]
        if not self._is_closed:
            for group, member in sorted(home.members):
                logger.warning("oona.member.died", extra={"group": group, "member": member, "shard": self._name})
                try:
                    self._leave(group, member)
                except UnavailableError as error:  # it is done; only a broker that comes again waits for the lease
                    logger.warning("oona.leave.unwritten", extra={"member": member, "reason": str(error)})

    def _tell(self, groups: Iterable[str]) -> None:
        """Wakes the polls of these groups; of thousands that wait, the others sleep on."""
        for group in groups:
            news = self._news.pop(group, None)
            if news is not None:
                news.set()

    def _tell_all(self) -> None:
        self._tell(list(self._news))
        self._make_room()

    def _make_room(self) -> None:
        room, self._room = self._room, asyncio.Event()
        room.set()

    def _note_write(self) -> None:
        self._num_written += 1
        if self._fault is None:  # else `_recover` sees to it
            self._begin_sync()

    def _begin_sync(self) -> None:
        if self._config.fsync == "interval" and (self._syncing is None or self._syncing.done()):
            self._syncing = asyncio.create_task(self._sync_later())

    async def _durable(self) -> None:
        """With `fsync: always`: returns once all that is written is on the disk. Whoever comes while a sync is under
        way waits for the next, which they share.
        """
        if self._config.fsync != "always":
            return
        target = self._num_written
        while self._num_synced < target:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.create_task(self._sync())
            await asyncio.shield(self._syncing)
            self._check()

    async def _sync_later(self) -> None:
        """Syncs at the configured interval while there is something to sync."""
        while self._num_synced < self._num_written and self._fault is None:
            await asyncio.sleep(self._config.fsync_ms / 1e3)
            await self._sync()

    async def _sync(self) -> None:
        target = self._num_written
        try:
            await asyncio.to_thread(self._journal.sync)
        except UnavailableError as error:  # nothing more may be promised until the disk has all that was
            logger.exception("oona.sync.failed", extra={"shard": self._name})
            self._fault = error
            self._recovering = asyncio.create_task(self._recover())
            self._tell_all()
        else:
            self._num_synced = target

    async def _recover(self) -> None:
        """Syncs again and again; once the disk has everything, the shard goes on."""
        while True:
            await asyncio.sleep(RECOVER_S)
            target = self._num_written
            try:
                await asyncio.to_thread(self._journal.sync)
            except UnavailableError as error:
                self._fault = error
            else:
                break
        logger.warning("oona.sync.recovered", extra={"shard": self._name})
        self._num_synced, self._fault = target, None
        if self._num_synced < self._num_written:  # written meanwhile, as when a member died; nobody else would sync it
            self._begin_sync()
        self._tell_all()


@dataclass
class Home:
    """A process that members live in."""

    process: str
    members: set[tuple[str, str]] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


def _process_of(_actor: object) -> str:
    """Runs in a member's actor."""
    return ray.get_runtime_context().get_worker_id()


async def _happens(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when it is set, or after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


# ---------------------------------------------------------------- starting and finding it


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
            get([shard.close.remote() for shard in shards], self.prefix)
        finally:
            for shard in shards:
                ray.kill(shard)


def prefix_of(storage: Storage) -> str:
    """What the names of a storage's shards begin with."""
    return f"oona-{storage.key}"


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
    get([shard.describe.remote() for shard in shards], prefix, START_S)
    return OonaHandle(prefix, namespace, tuple(shards), config)


def connect(prefix: str = "oona", *, namespace: str = NAMESPACE) -> OonaHandle:
    """Finds a running bus by name.

    Raises:
        NotFoundError: if there is none.
        UnavailableError: if it does not answer.
        ConflictError: if it speaks another protocol.
    """
    first = _find(prefix, 0, namespace)
    info: ShardInfo = get(first.describe.remote(), prefix, START_S)
    check_protocol(info, prefix)
    others = [_find(prefix, index, namespace) for index in range(1, info.num_shards)]
    return OonaHandle(prefix, namespace, (first, *others), info.config)


def check_protocol(info: ShardInfo, prefix: str) -> None:
    """Raises `ConflictError` for a shard that speaks another protocol than this program."""
    theirs = getattr(info, "protocol", 0)
    if theirs != PROTOCOL:
        raise ConflictError(
            f"{prefix} speaks protocol {theirs}, this program {PROTOCOL}: they are of different versions of Esper",
            remedy="run the version of the platform, or start it anew: esper platform down, then up",
        )


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
