"""What encoding and decoding a signal costs, by way: microseconds of CPU a message, a batch at a time.

    the bus's own       the batch as one JSON list by a TypeAdapter, and where each message ends in it
    TypeAdapter list    the list alone; nothing tells where a message ends, so a broker cannot redeliver one
    each apart          each message by pydantic's C serializer, then joined; decoded as one JSON list
    Arrow columns       a column a field, as an Arrow stream; decoded to the same messages
    object by object    `model_dump_json` and `model_validate_json` of each

All ends have the same contracts before and after. Ways take turns, so that what disturbs the machine disturbs all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.messages import OonaMessage, Topic, decode, encode
from esper.leyline.signals import HealthSignal, LayerHealthReport, StepBatch
from esper.oona.codec import pack
from esper.oona.wire import Batch, Block, decode_batch, encode_batch
from jobs.bench import Say
from jobs.bench.harness import BenchResult, machine

BATCH = 256
_to_json = OonaMessage.__pydantic_serializer__.to_json
_LIST = TypeAdapter(list[OonaMessage])


class Way(NamedTuple):
    """One way to encode a batch, and back."""

    name: str
    encode: Callable[[list[OonaMessage]], bytes]
    decode: Callable[[bytes], list[OonaMessage]]


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures all ways on two kinds of signals."""
    parser = argparse.ArgumentParser(prog="esper bench codec", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="turns of each way (default 60)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for kind, messages in {"steps": steps(), "health": health()}.items():
        for way in WAYS:
            assert way.decode(way.encode(messages)) == messages, f"{way.name} changes {kind}"
        rows += [{"signal": kind, **row} for row in _turns(messages, options.rounds)]
        say(f"{kind}: done")
    return BenchResult(name="codec", machine=machine(), rows=tuple(rows), verdict="Medians of the turns.")


def steps() -> list[OonaMessage]:
    """A batch of step telemetry, as `esper bench oona` sends it."""
    body = StepBatch(run_id="run-0", first_step=1234, losses=(0.4375,), milliseconds=(12.25,), steps_per_epoch=64)
    return [OonaMessage.of(Topic.STEPS, body, sender_id="bench", key="run-0") for _ in range(BATCH)]


def health() -> list[OonaMessage]:
    """A batch of reports of a site's health."""
    signal = HealthSignal(
        layer_id="blocks.1", seed_id="s1", epoch=3, activation_variance=0.5, dead_neuron_ratio=0.0625,
        avg_correlation=0.25, gradient_norm=0.125, grow_potential=0.375, health_score=0.9375, alpha=1.0,
        blueprint="mlp_adapter", kernel_id="0" * 64, gate="training: 2 of at least 2 epochs",
    )  # fmt: skip
    signature = SiteSignature(kind=SiteKind.VECTOR, channels=8)
    body = LayerHealthReport(
        run_id="run-0", layer_id="blocks.1", signature=signature, epoch=3, step=192, num_samples=64, seeds=(signal,)
    )
    return [OonaMessage.of(Topic.SEED_HEALTH, body, sender_id="bench", key="run-0") for _ in range(BATCH)]


def _turns(messages: list[OonaMessage], rounds: int) -> list[dict[str, Any]]:
    bodies = {way.name: way.encode(messages) for way in WAYS}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):
        for way in WAYS:
            began = time.process_time()
            way.encode(messages)
            between = time.process_time()
            way.decode(bodies[way.name])
            ended = time.process_time()
            seconds.setdefault((way.name, "encode"), []).append(between - began)
            seconds.setdefault((way.name, "decode"), []).append(ended - between)

    def micros(name: str, what: str) -> float:
        return 1e6 * statistics.median(seconds[name, what][1:]) / len(messages)  # the first turn only warms up

    return [
        {
            "way": way.name,
            "encode, us": micros(way.name, "encode"),
            "decode, us": micros(way.name, "decode"),
            "bytes": len(bodies[way.name]) / len(messages),
        }
        for way in WAYS
    ]


# ---------------------------------------------------------------- the ways


def _own(messages: list[OonaMessage]) -> bytes:
    return encode_batch(Batch("p" * 32, 7, 7, blocks=[Block(messages[0].topic.value, messages[0].key, pack(messages))]))


def _from_own(body: bytes) -> list[OonaMessage]:
    return decode(b"[%b]" % b",".join([block.records.view for block in decode_batch(body).blocks]))


def _apart(messages: list[OonaMessage]) -> bytes:
    return b"[%b]" % b",".join([_to_json(message) for message in messages])


def _columns(messages: list[OonaMessage]) -> bytes:
    import pyarrow as pa

    arrays = [
        pa.array([message.topic.value if name == "topic" else getattr(message, name) for message in messages])
        for name in OonaMessage.model_fields
    ]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(OonaMessage.model_fields))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _from_columns(body: bytes) -> list[OonaMessage]:
    import pyarrow as pa

    return _LIST.validate_python(pa.ipc.open_stream(body).read_all().to_pylist())


def _each(messages: list[OonaMessage]) -> bytes:
    return b"\n".join(message.model_dump_json().encode() for message in messages)


def _from_each(body: bytes) -> list[OonaMessage]:
    return [OonaMessage.model_validate_json(line) for line in body.split(b"\n")]


WAYS = (
    Way("the bus's own", _own, _from_own),
    Way("TypeAdapter list", encode, decode),
    Way("each apart", _apart, decode),
    Way("Arrow columns", _columns, _from_columns),
    Way("object by object", _each, _from_each),
)
