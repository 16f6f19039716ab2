"""Support of `bench oona`: Oona and Redis Streams behind the same two ends, and the processes that measure over them.

Both carry the same messages in the same encoding, at least once, with groups and acknowledgements. A message's time is
its sender's clock as it is handed over; sender and receiver share a machine.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.oona import OonaHandle
from esper.leyline.messages import OonaMessage, Topic, decode, encode
from esper.leyline.ports import Delivery
from esper.leyline.signals import StepBatch

PACK = 256
"""Messages handed over at once when going flat out."""
TICK_S = 0.005
"""A paced sender hands over what is due so often."""
READ_S = 0.5
SAMPLED = 16
"""Of so many messages one's latency is kept."""

_to_json = OonaMessage.__pydantic_serializer__.to_json


class Ends(Protocol):
    """A stream to one process."""

    def send(self, messages: Sequence[OonaMessage]) -> None: ...

    def flush(self) -> None:
        """Returns once all that was sent is acknowledged by the broker."""
        ...

    def receive(self) -> list[OonaMessage]:
        """The next messages, after acknowledging those of the call before."""
        ...

    def close(self) -> None: ...


class OonaEnds:
    """Through Oona, as every program of Esper uses it."""

    def __init__(self, handle: OonaHandle, group: str | None) -> None:
        self._bus = handle.bus()
        self._inbox = self._bus.subscribe([Topic.STEPS], group=group) if group else None
        self._got: list[Delivery] = []

    def send(self, messages: Sequence[OonaMessage]) -> None:
        self._bus.publish(messages)

    def flush(self) -> None:
        self._bus.flush(timeout_s=60.0)

    def receive(self) -> list[OonaMessage]:
        assert self._inbox is not None
        if self._got:
            self._inbox.ack(self._got)
        self._got = self._inbox.poll(max_messages=4 * PACK, timeout_s=READ_S)
        return [delivery.message for delivery in self._got]

    def close(self) -> None:
        if self._inbox is not None and self._got:
            self._inbox.ack(self._got)
        self._bus.close()


class RedisEnds:
    """Through Redis Streams.

    Args:
        socket: of the server.
        group: to read with; None only sends.
        packed: one entry holds a pack of messages; else each message is one entry, a pack a pipeline.
    """

    def __init__(self, socket: str, group: str | None, *, packed: bool) -> None:
        import redis

        self._redis = redis.Redis(unix_socket_path=socket)
        self._packed = packed
        self._group, self._name = group, f"{os.getpid()}"
        self._got: list[bytes] = []
        if group is not None:
            with contextlib.suppress(redis.ResponseError):  # another member was faster
                self._redis.xgroup_create("stream", group, mkstream=True)

    def send(self, messages: Sequence[OonaMessage]) -> None:
        if self._packed:
            self._redis.xadd("stream", {"d": encode(messages)}, maxlen=20_000, approximate=True)
            return
        pipe = self._redis.pipeline(transaction=False)
        for message in messages:
            pipe.xadd("stream", {"d": _to_json(message)}, maxlen=500_000, approximate=True)
        pipe.execute()

    def flush(self) -> None:
        """Every send has waited."""

    def receive(self) -> list[OonaMessage]:
        assert self._group is not None
        if self._got:
            self._redis.xack("stream", self._group, *self._got)
        count = 4 if self._packed else 4 * PACK
        streams: Any = self._redis.xreadgroup(
            self._group, self._name, {"stream": ">"}, count=count, block=int(READ_S * 1e3)
        )
        entries = [entry for _, some in streams or () for entry in some]
        self._got = [at for at, _ in entries]
        bodies = [fields[b"d"] for _, fields in entries]
        if self._packed:
            return list(itertools.chain.from_iterable(map(decode, bodies)))
        return decode(b"[" + b",".join(bodies) + b"]") if bodies else []

    def close(self) -> None:
        if self._got and self._group is not None:
            self._redis.xack("stream", self._group, *self._got)
        self._redis.close()


@dataclass(frozen=True)
class Sent:
    """What a sender did."""

    began: float
    count: int
    cpu_s: float


@dataclass(frozen=True)
class Received:
    """What a receiver got; `latencies` are seconds of some messages, in order."""

    ended: float
    count: int
    cpu_s: float
    latencies: list[float]


class Peer:
    """A process at one end; made remote by the benchmark. One call at a time."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._ends: Ends | None = None

    def open(self, make: Callable[[], Ends]) -> None:
        """Connects; closes what was open."""
        if self._ends is not None:
            self._ends.close()
        self._ends = make()
        gc.collect()
        gc.freeze()  # as services do: or each full collection looks at all that Ray has loaded, for 40 ms and more

    def close(self) -> None:
        if self._ends is not None:
            self._ends.close()
            self._ends = None

    def send_flat_out(self, count: int) -> Sent:
        """Sends so many messages as fast as they are taken."""
        ends, messages = self._ends, _messages(self._key, PACK)
        assert ends is not None
        cpu, began = time.process_time(), time.time()
        for first in range(0, count, PACK):
            ends.send(_stamped(messages[: count - first], time.time()))
        ends.flush()
        return Sent(began, count, time.process_time() - cpu)

    def send_paced(self, rate: float, seconds: float) -> Sent:
        """Sends so many messages a second; what falls behind is sent at once."""
        ends, messages = self._ends, _messages(self._key, 4 * PACK)
        assert ends is not None
        cpu, began, count = time.process_time(), time.time(), 0
        while (passed := time.time() - began) < seconds:
            due = min(int(rate * passed) - count, len(messages))
            if due > 0:
                ends.send(_stamped(messages[:due], time.time()))
                count += due
            time.sleep(max(0.0, TICK_S - (time.time() - began - passed)))
        ends.flush()
        return Sent(began, count, time.process_time() - cpu)

    def receive(self, wanted: str) -> Received:
        """Receives until the file `wanted` holds a number and all members together have got so many: each adds to
        `<wanted>.<pid>` what it has got.
        """
        ends = self._ends
        assert ends is not None
        mine, others = Path(f"{wanted}.{os.getpid()}"), Path(wanted)
        count, latencies, ended, cpu = 0, list[float](), 0.0, time.process_time()
        while True:
            messages = ends.receive()
            now = time.time()
            if messages:
                ended = now
                count += len(messages)
                latencies += [now - message.timestamp for message in messages[::SAMPLED]]
                continue
            mine.write_text(str(count))
            if others.exists():
                got = sum(int(path.read_text() or 0) for path in others.parent.glob(f"{others.name}.*"))
                if got >= int(others.read_text()):
                    return Received(ended, count, time.process_time() - cpu, latencies)


def _messages(key: str, count: int) -> list[OonaMessage]:
    """What a trainer says of one step, in an envelope; about 310 bytes as JSON."""
    body = StepBatch(run_id=key, first_step=1234, losses=(0.4375,), milliseconds=(12.25,), steps_per_epoch=64)
    return [OonaMessage.of(Topic.STEPS, body, sender_id="bench", key=key) for _ in range(count)]


def _stamped(messages: Sequence[OonaMessage], at: float) -> Sequence[OonaMessage]:
    """The same messages, sent now. Making them is the program's own work, and is not measured."""
    for message in messages:
        object.__setattr__(message, "timestamp", at)  # frozen for everybody else
    return messages


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far (Linux only)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
