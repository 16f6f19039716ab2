"""What a compiler process and its worker say to each other, as frames of bytes: no pickle, so that a process that a
blueprint has broken can make its worker run nothing. Knows neither pipes nor processes.

A frame is a head in JSON and any number of blobs: `8 bytes of length, 4 bytes of the head's length, head, blobs`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import safetensors.numpy
from pydantic import Field, TypeAdapter

from esper.leyline import CompileJob, Contract, Fault, ValidationReport
from esper.leyline.container import MAX_CONTAINER_BYTES, KernelManifest
from esper.leyline.contract import Finite
from esper.tezzeret.compile import Unsigned

_LENGTHS = struct.Struct(">QI")
MAX_FRAME_BYTES = MAX_CONTAINER_BYTES + (64 << 20)


class Order(Contract):
    """Build this. The one thing that a worker says."""

    kind: Literal["order"] = "order"
    job: CompileJob
    fingerprint: str


class Ready(Contract):
    """The process has its imports; `fingerprint` is its build."""

    kind: Literal["ready"] = "ready"
    fingerprint: str


class Refused(Contract):
    """The blueprint is at fault, and would be on every machine."""

    kind: Literal["refused"] = "refused"
    reason: str
    log: str = ""


class Broken(Contract):
    """The compiler failed or died: another try may succeed. `log` is what it wrote last."""

    kind: Literal["broken"] = "broken"
    fault: Fault
    reason: str
    log: str = ""


class _Built(Contract):
    """The head of an `Unsigned`; its blobs are the weights, in safetensors form, and each member of the payload."""

    kind: Literal["built"] = "built"
    manifest: KernelManifest
    report: ValidationReport
    compile_s: Finite
    sizes: tuple[int, ...]
    members: tuple[str, ...]


Message = Order | Ready | Refused | Broken | Unsigned
_HEAD: TypeAdapter[Order | Ready | Refused | Broken | _Built] = TypeAdapter(
    Annotated[Order | Ready | Refused | Broken | _Built, Field(discriminator="kind")]
)


def encode(message: Message) -> bytes:
    """One message as a frame."""
    blobs: list[bytes] = []
    head: Order | Ready | Refused | Broken | _Built
    if isinstance(message, Unsigned):
        weights = {name: np.ascontiguousarray(array) for name, array in message.weights.items()}
        blobs = [safetensors.numpy.save(weights), *(bytes(data) for data in message.payload.values())]
        head = _Built(
            manifest=message.manifest,
            report=message.report,
            compile_s=message.compile_s,
            sizes=tuple(len(blob) for blob in blobs),
            members=tuple(message.payload),
        )
    else:
        head = message
    text = head.model_dump_json().encode()
    return b"".join((_LENGTHS.pack(len(text) + sum(map(len, blobs)), len(text)), text, *blobs))


class Frames:
    """Takes bytes as they come and gives the messages that are whole.

    Raises:
        ValueError: from `feed`, for what is no message; nothing after it can be read.
    """

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Adds bytes; yields each message that they complete."""
        self._data += data
        while len(self._data) >= _LENGTHS.size:
            size, head_size = _LENGTHS.unpack_from(self._data)
            if size > MAX_FRAME_BYTES or head_size > size:
                raise ValueError(f"a frame of {size} bytes with a head of {head_size}")
            end = _LENGTHS.size + size
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTHS.size : end])
            del self._data[:end]
            yield _decode(body[:head_size], memoryview(body)[head_size:])


def _decode(text: bytes, blobs: memoryview) -> Message:
    head = _HEAD.validate_json(text)
    if not isinstance(head, _Built):
        return head
    if len(head.sizes) != 1 + len(head.members) or sum(head.sizes) != len(blobs) or min(head.sizes) < 0:
        raise ValueError("the blobs are not those that the head names")
    ends = np.cumsum(head.sizes).tolist()
    parts = [bytes(blobs[end - size : end]) for end, size in zip(ends, head.sizes, strict=True)]
    try:
        weights = safetensors.numpy.load(parts[0])
    except Exception as error:
        raise ValueError(f"the weights cannot be read: {error}") from error
    payload = dict(zip(head.members, parts[1:], strict=True))
    return Unsigned(head.manifest, weights, payload, head.report, head.compile_s)
