"""The sending end: batches what is published and keeps sending until the broker has it.

A thread sends while the caller goes on. A few batches per shard are on their way at once; the broker puts them back
in order, and knows a repeated one by its number, so a lost answer is simply asked for again. The buffer is bounded:
when the broker has no room, `publish` waits.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from esper.leyline.contract import new_id
from esper.leyline.errors import EsperError, UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.oona.codec import pack
from esper.oona.transport import Transport
from esper.oona.wire import Batch, Block, encode_batch, merged_blocks, shard_of

WINDOW = 8
"""Batches on their way to one shard at once."""

RETRY_S = 0.2
"""First pause before a batch is sent again to a shard that is not there; it doubles up to `MAX_RETRY_S`."""

MAX_RETRY_S = 5.0
_MOST_DOUBLINGS = 16  # far beyond it; an outage may last for thousands

MAX_ROUTES = 4096
"""Of (topic, key) whose shard is remembered."""

_LANE = operator.attrgetter("topic", "key")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Call:
    """A batch that is not yet known to be safe. `due_at` is when to send it (again): never while it is on its way."""

    seq: int
    blocks: tuple[Block, ...]
    count: int
    end: int  # records of this shard up to and with this batch
    waiting_since: float
    due_at: float
    num_failures: int = 0


@dataclass(slots=True)
class _Outbox:
    """What is on its way to one shard."""

    buffered: deque[Block] = field(default_factory=deque)
    num_buffered: int = 0
    oldest_at: float = 0.0
    num_taken: int = 0
    next_seq: int = 0
    window: dict[int, _Call] = field(default_factory=dict)  # by number, oldest first
    flush_to: int = 0
    problem: str = ""  # why the broker did not take a batch, if it said so

    @property
    def base(self) -> int:
        return next(iter(self.window), self.next_seq)

    @property
    def num_safe(self) -> int:
        """Records known to be safe, counted from the first."""
        oldest = next(iter(self.window.values()), None)
        return self.num_taken - self.num_buffered if oldest is None else oldest.end - oldest.count

    def ripe_at(self, linger_s: float) -> float:
        """When what is queued has waited for long enough; never, where nothing is."""
        return self.oldest_at + linger_s if self.buffered else math.inf

    def put(self, block: Block) -> None:
        """Queues records."""
        self.buffered.append(block)
        self.num_buffered += len(block.records)
        self.num_taken += len(block.records)

    def cut(self, count: int) -> tuple[Block, ...]:
        """Takes the next records, at most so many, out of what is queued."""
        blocks: list[Block] = []
        while count and self.buffered:
            block = self.buffered.popleft()
            if len(block.records) > count:
                self.buffered.appendleft(block.part(count, len(block.records)))
                block = block.part(0, count)
            blocks.append(block)
            count -= len(block.records)
            self.num_buffered -= len(block.records)
        return tuple(merged_blocks(blocks))


class Publisher:
    """Publishes over a transport.

    Args:
        transport: where to.
        batch: records sent at once, at most.
        linger_s: how long a record may wait for others.
        deadline_s: without an answer for so long, `publish` raises instead of waiting for room; None waits for ever.
    """

    def __init__(
        self, transport: Transport, *, batch: int = 256, linger_s: float = 0.005, deadline_s: float | None = 30.0
    ) -> None:
        self._transport = transport
        self._batch = batch
        self._linger_s = linger_s
        self._deadline_s = deadline_s
        self._limit = WINDOW * batch
        self._producer = new_id()
        self._outboxes = [_Outbox() for _ in range(transport.num_shards)]
        self._routes: dict[tuple[Topic, str], tuple[int, str]] = {}
        guard = threading.RLock()
        self._changed = threading.Condition(guard)  # there is room, or something is safe: who publishes waits for it
        self._work = threading.Condition(guard)  # there may be something to send: the thread waits for it
        self._wakes_at = -math.inf  # when the thread looks next by itself; while it looks, it need not be woken
        self._failure: EsperError | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """Queues messages; waits while the buffer is full.

        Raises:
            UnavailableError: if the buffer is full and the broker does not answer, or the publisher is closed.
            EsperError: if the broker refused an earlier batch.
        """
        blocks = self._blocks_of(messages)
        with self._changed:
            for shard, block in blocks:
                outbox, first, number = self._outboxes[shard], 0, len(block.records)
                while first < number:
                    while not self._is_open() or outbox.num_buffered >= self._limit:
                        self._wait_for_room(outbox)
                    if not outbox.buffered:
                        outbox.oldest_at = time.monotonic()
                    stop = min(number, first + self._limit - outbox.num_buffered)
                    outbox.put(block.part(first, stop))
                    first = stop
            self._start()
            due = self._due_bodies()  # what is full goes at once: to wake the thread costs as much as to send
            ripe_at = min((outbox.ripe_at(self._linger_s) for outbox in self._outboxes), default=math.inf)
            if ripe_at < self._wakes_at:  # it is not asked to look for what it will see in time
                self._work.notify()
        self._send(due)

    def flush(self, *, timeout_s: float = 10.0) -> None:
        """Returns once all that was published before is safe.

        Raises:
            UnavailableError: if that takes longer than `timeout_s`.
            EsperError: if the broker refused a batch.
        """
        with self._changed:
            targets = [(outbox, outbox.num_taken) for outbox in self._outboxes]
            for outbox, target in targets:
                outbox.flush_to = target
            self._work.notify()
            is_safe = self._changed.wait_for(
                lambda: self._failure is not None or all(outbox.num_safe >= target for outbox, target in targets),
                timeout_s,
            )
            self._raise_failure()
            if not is_safe:
                missing = sum(max(0, target - outbox.num_safe) for outbox, target in targets)
                raise UnavailableError(
                    f"{missing} messages were not acknowledged within {timeout_s:g} s{self._problem()}"
                )

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Flushes, then ends the thread. What could not be flushed is named in the error that `flush` raises."""
        if self._is_closed:
            return
        try:
            self.flush(timeout_s=timeout_s)
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
                self._work.notify()
            if self._thread is not None:
                self._thread.join()

    # ---- the caller's side, under the lock

    def _blocks_of(self, messages: Sequence[OonaMessage]) -> list[tuple[int, Block]]:
        """Encodes messages: (shard, block) of those that follow each other with the same topic and key."""
        if not messages:
            return []
        records = pack(messages)
        blocks: list[tuple[int, Block]] = []
        first = 0
        for (topic, key), run in itertools.groupby(messages, _LANE):
            stop = first + sum(1 for _ in run)
            shard, name = self._route(topic, key)
            blocks.append((shard, Block(name, key, records.part(first, stop))))
            first = stop
        return blocks

    def _route(self, topic: Topic, key: str) -> tuple[int, str]:
        """The shard of (topic, key), and the topic's name; a producer has few."""
        route = self._routes.get((topic, key))
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[topic, key] = (shard_of(topic, key, len(self._outboxes)), topic.value)
        return route

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_loop, name="oona-publisher", daemon=True)
            self._thread.start()

    def _is_open(self) -> bool:
        self._raise_failure()
        if self._is_closed:
            raise UnavailableError("the publisher is closed")
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _problem(self) -> str:
        problems = dict.fromkeys(outbox.problem for outbox in self._outboxes if outbox.problem)
        return "".join(f"; {problem}" for problem in problems)

    def _wait_for_room(self, outbox: _Outbox) -> None:
        self._start()
        self._work.notify()
        if self._deadline_s is None:
            self._changed.wait()
            return
        oldest = next(iter(outbox.window.values()), None)
        since = time.monotonic() if oldest is None else oldest.waiting_since
        remaining = since + self._deadline_s - time.monotonic()
        if remaining <= 0:
            raise UnavailableError(
                f"the broker took nothing within {self._deadline_s:g} s and the buffer is full{self._problem()}"
            )
        self._changed.wait(remaining)

    # ---- the thread's side

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                while not self._is_due() and not self._is_closed:
                    self._wakes_at = self._soonest()
                    is_known = self._wakes_at < math.inf
                    self._work.wait(max(0.0, self._wakes_at - time.monotonic()) if is_known else None)
                    self._wakes_at = -math.inf
                if self._is_closed:
                    return
                bodies = self._due_bodies()
            self._send(bodies)

    def _send(self, bodies: Sequence[tuple[int, _Call, bytes]]) -> None:
        for shard, call, body in bodies:
            future = self._transport.append(shard, body)
            future.add_done_callback(lambda future, shard=shard, call=call: self._settle(shard, call, future))

    def _due_bodies(self) -> list[tuple[int, _Call, bytes]]:
        """What is to be sent now, and is on its way from here on."""
        now = time.monotonic()
        bodies: list[tuple[int, _Call, bytes]] = []
        for shard, outbox in enumerate(self._outboxes):
            self._cut(outbox, now)
            for call in outbox.window.values():
                if call.due_at <= now:
                    call.due_at = math.inf
                    bodies.append((shard, call, self._encode(call, outbox)))
        return bodies

    def _encode(self, call: _Call, outbox: _Outbox) -> bytes:
        return encode_batch(Batch(self._producer, call.seq, outbox.base, blocks=call.blocks))

    def _cut(self, outbox: _Outbox, now: float) -> None:
        """Cuts full or ripe batches, as many as the window has room for."""
        while outbox.buffered and len(outbox.window) < WINDOW and self._is_ripe(outbox, now):
            before = outbox.num_buffered
            blocks = outbox.cut(self._batch)
            outbox.oldest_at = now
            sent_to = outbox.num_taken - outbox.num_buffered
            call = _Call(outbox.next_seq, blocks, before - outbox.num_buffered, sent_to, now, now)
            outbox.window[call.seq] = call
            outbox.next_seq += 1
            self._changed.notify_all()

    def _is_due(self) -> bool:
        now = time.monotonic()
        return any(
            any(call.due_at <= now for call in outbox.window.values())
            or (outbox.buffered and len(outbox.window) < WINDOW and self._is_ripe(outbox, now))
            for outbox in self._outboxes
        )

    def _is_ripe(self, outbox: _Outbox, now: float) -> bool:
        is_full = outbox.num_buffered >= self._batch
        is_flushed = outbox.num_taken - outbox.num_buffered < outbox.flush_to
        return is_full or is_flushed or now >= outbox.ripe_at(self._linger_s)

    def _soonest(self) -> float:
        """When something is due by time alone."""
        at = [call.due_at for outbox in self._outboxes for call in outbox.window.values()]
        at += [box.ripe_at(self._linger_s) for box in self._outboxes if len(box.window) < WINDOW]
        return min(at, default=math.inf)

    def _settle(self, shard: int, call: _Call, future: Future[bool]) -> None:
        """Runs where the answer arrives: in the transport's thread."""
        error = future.exception()
        with self._changed:
            now = time.monotonic()
            self._outboxes[shard].problem = "" if error is None else str(error)
            if error is None and future.result():
                del self._outboxes[shard].window[call.seq]
            elif error is None:
                call.waiting_since = call.due_at = now  # the broker is there and full
            elif isinstance(error, UnavailableError):
                logger.warning("oona.publish.retried", extra={"shard": shard, "seq": call.seq, "error": str(error)})
                call.due_at = now + min(MAX_RETRY_S, RETRY_S * 2 ** min(call.num_failures, _MOST_DOUBLINGS))
                call.num_failures += 1
            else:
                self._failure = error if isinstance(error, EsperError) else EsperError(f"publishing failed: {error!r}")
            self._changed.notify_all()
            if self._outboxes[shard].buffered or call.due_at < math.inf:  # there is room for it, or it is sent again
                self._work.notify()
