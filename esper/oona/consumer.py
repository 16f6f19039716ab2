"""The receiving end: a member of a group that decodes whole batches and acknowledges many messages a call."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from esper.leyline.contract import new_id
from esper.leyline.errors import EsperError, UnavailableError
from esper.leyline.ports import Delivery
from esper.oona.acknowledged import Acknowledged
from esper.oona.codec import decode_apart
from esper.oona.spans import spans_of
from esper.oona.transport import Received, Transport

RETRY_S = 0.2
"""Pause before acknowledgements are sent again to a shard that is not there."""

logger = logging.getLogger(__name__)


class Consumer:
    """A subscription. One thread polls; any may acknowledge.

    What was handed out and not acknowledged within the lease comes again with a higher `attempt`; what was
    acknowledged here does not, even if the broker lost that. What cannot be decoded goes to the dead letters at once.

    Args:
        transport: the way to the broker.
        group: to be a member of.
        is_alone: whether the group ends with this member.
    """

    def __init__(self, transport: Transport, group: str, *, is_alone: bool = False) -> None:
        self._transport = transport
        self._group = group
        self._is_alone = is_alone
        self._member = new_id()
        self._held: list[Delivery] = []
        self._acked = Acknowledged()
        self._outgoing: dict[int, list[range]] = defaultdict(list)
        self._num_sending = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure: EsperError | None = None
        self._is_closed = False

    def poll(self, *, max_messages: int = 256, timeout_s: float = 1.0) -> list[Delivery]:
        """Returns the next messages, at most `max_messages`; an empty list after `timeout_s`.

        Raises:
            UnavailableError: if the broker does not answer, or this is closed.
        """
        end = time.monotonic() + timeout_s
        while not self._held:
            self._raise_if_unusable()
            remaining = max(0.0, end - time.monotonic())
            received = self._transport.poll(self._group, self._member, max_records=max_messages, timeout_s=remaining)
            deliveries, refused = decode_apart(self._without_acked(received))
            self._held = deliveries
            if refused:
                self._give_up(refused, "it cannot be decoded")
            if not received and time.monotonic() >= end:
                break
        few, self._held = self._held[:max_messages], self._held[max_messages:]
        return few

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledges; a thread sends what has gathered. `close` returns after all of it is safe."""
        spans = _spans_by_shard(deliveries)
        with self._changed:
            self._raise_if_unusable()
            for shard, some in spans.items():
                if fresh := self._acked.add(shard, some):
                    self._outgoing[shard] += fresh
            self._send_soon()

    def reject(self, deliveries: Sequence[Delivery], *, reason: str) -> None:
        """Gives messages up for the group; returns once they are among the dead letters.

        Raises:
            UnavailableError: if the broker does not answer, or this is closed; then they come again.
        """
        with self._changed:
            self._raise_if_unusable()
        self._give_up([(delivery.shard, delivery.offset) for delivery in deliveries], reason)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Sends the acknowledgements, then leaves the group. Closing twice is harmless.

        Raises:
            UnavailableError: if the broker does not answer; the lease will give back what is held.
        """
        with self._changed:
            if self._is_closed:
                return
            is_sent = self._changed.wait_for(
                lambda: self._failure is not None or not (self._outgoing or self._num_sending), timeout_s
            )
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._transport.leave(self._group, self._member)
        if self._is_alone:
            self._transport.forget(self._group)
        if self._failure is not None:
            raise self._failure
        if not is_sent:
            raise UnavailableError(f"acknowledgements of group {self._group} were not taken within {timeout_s:g} s")

    # ---- within

    def _raise_if_unusable(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise UnavailableError(f"the subscription of group {self._group} is closed")

    def _give_up(self, positions: Sequence[tuple[int, int]], reason: str) -> None:
        offsets: dict[int, list[int]] = defaultdict(list)
        for shard, offset in positions:
            offsets[shard].append(offset)
        spans = {shard: spans_of(some) for shard, some in offsets.items()}
        self._transport.reject(self._group, spans, reason)

    def _without_acked(self, received: Sequence[Received]) -> list[Received]:
        fresh: list[Received] = []
        with self._changed:
            for one in received:
                known = self._acked.known(one.shard, one.span)
                if not known:
                    fresh.append(one)
                    continue
                self._outgoing[one.shard] += known  # the broker has not heard of it: tell it again
                self._send_soon()
                others = self._acked.fresh(one.shard, one.span)
                fresh += [one.part(span.start - one.offset, span.stop - one.offset) for span in others]
        return fresh

    def _send_soon(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._ack_loop, name="oona-acks", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _ack_loop(self) -> None:
        """Sends acknowledgements; what comes in meanwhile goes with the next call."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outgoing or self._is_closed)
                if self._is_closed:
                    return
                spans, self._outgoing = self._outgoing, defaultdict(list)
                self._num_sending = sum(map(len, spans.values()))
            failure = self._send({shard: spans_of(some) for shard, some in spans.items()})
            with self._changed:
                self._num_sending = 0
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _send(self, spans: dict[int, list[range]]) -> EsperError | None:
        while not self._is_closed:
            try:
                self._transport.ack(self._group, spans)
            except UnavailableError as error:
                logger.warning("oona.ack.retried", extra={"group": self._group, "error": str(error)})
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, RETRY_S)
            except EsperError as error:
                return error
            else:
                return None
        return None


def _spans_by_shard(deliveries: Sequence[Delivery]) -> dict[int, list[range]]:
    """Where they lie; most often they follow each other."""
    spans: dict[int, list[range]] = {}
    for shard in {delivery[0] for delivery in deliveries}:
        offsets = [delivery[1] for delivery in deliveries if delivery[0] == shard]
        run = range(offsets[0], offsets[0] + len(offsets))
        spans[shard] = [run] if offsets == list(run) else spans_of(offsets)
    return spans
