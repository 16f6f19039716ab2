"""Asking over the bus: a request on one topic, its answer on another, and who answers.

An answer goes to the asker's key and carries the request's trace id: so an asker needs one inbox for all its questions,
and whoever follows a trace sees both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from esper.leyline.contract import Contract, new_id
from esper.leyline.errors import UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Bus


class Requester:
    """Asks and waits for answers. One thread at a time.

    Args:
        bus: stays open when this closes.
        answers: the topic on which answers come.
        sender_id: who asks, in words; what is behind it makes it unique.
    """

    def __init__(self, bus: Bus, answers: Topic, *, sender_id: str) -> None:
        self.sender_id = f"{sender_id}-{new_id()[:12]}"
        self._bus = bus
        self._inbox = bus.listen([answers], key=self.sender_id)

    def ask(self, topic: Topic, body: Contract, *, key: str, timeout_s: float = 10.0) -> OonaMessage:
        """Publishes a request and returns its answer. Answers to questions that were given up are passed over.

        Raises:
            UnavailableError: if none comes in time. The request may be carried out all the same.
        """
        request = OonaMessage.of(topic, body, sender_id=self.sender_id, key=key)
        self._bus.publish([request])
        ends = time.monotonic() + timeout_s
        while (remaining := ends - time.monotonic()) > 0:
            deliveries = self._inbox.poll(timeout_s=remaining)
            self._inbox.ack(deliveries)
            for delivery in deliveries:
                if delivery.message.trace_id == request.trace_id:
                    return delivery.message
        raise UnavailableError(f"no answer to {topic.value} came within {timeout_s:g} s")

    def close(self) -> None:
        """Lets go of the inbox."""
        self._inbox.close()


class Responder:
    """Answers requests; several of one group share them. A request whose answer was not published comes again.

    Args:
        bus: stays open when this closes.
        requests: the topics of the requests.
        answers: the topic of the answers.
        answer: makes an answer of a request; what it raises leaves the request to be delivered again.
        group: of those that share the work.
    """

    def __init__(
        self,
        bus: Bus,
        requests: Sequence[Topic],
        answers: Topic,
        answer: Callable[[OonaMessage], Contract],
        *,
        group: str,
    ) -> None:
        self._bus = bus
        self._answers = answers
        self._answer = answer
        self._group = group
        self._inbox = bus.subscribe(requests, group=group)

    def serve(self, *, timeout_s: float = 1.0) -> int:
        """Answers what comes within `timeout_s`; returns how many."""
        deliveries = self._inbox.poll(timeout_s=timeout_s)
        for delivery in deliveries:
            request = delivery.message
            answer = OonaMessage.of(
                self._answers,
                self._answer(request),
                sender_id=self._group,
                key=request.sender_id,
                trace_id=request.trace_id,
            )
            self._bus.publish([answer])
            self._bus.flush()
            self._inbox.ack([delivery])
        return len(deliveries)

    def close(self) -> None:
        """Leaves the group."""
        self._inbox.close()
