"""A small signed container, and the places in it that an attacker would change."""

from __future__ import annotations

import struct

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from esper.leyline import (
    BlueprintIR,
    Check,
    Node,
    Pipeline,
    SiteKind,
    SiteSignature,
    ValidationReport,
    compile_key,
    keys,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import KernelManifest, pack

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = keys.public_hex(KEY)
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=4)
IR = BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(Node(id="lin", op="linear", params={"init": "zeros"}),), output="lin")
NATIVE = "payload/cpu-avx512/fw.so"


def manifest(**changes) -> KernelManifest:
    ir_hash = canonical_hash(IR)
    fields = {
        "ir": IR,
        "ir_hash": ir_hash,
        "compile_key": compile_key(ir_hash, SITE, Pipeline.FAST, "here"),
        "signature": SITE,
        "pipeline": Pipeline.FAST,
        "fingerprint": "here",
        "blueprint_id": "b1",
        "blueprint_name": "lin",
        "num_parameters": 20,
        "flops_per_sample": 32,
        "memory_bytes": 96,
        "zero_at_birth": False,
        "replaces": False,
        "needs_neighbour": False,
        "report": ValidationReport(checks=(Check(name="shape", passed=True),)),
    }
    return KernelManifest.model_validate(fields | changes)


def packed(weight: float = 1.0, *, code: bytes = b"\x7fELF", key: Ed25519PrivateKey = KEY, **changes) -> bytes:
    """A valid container of a 4 x 4 layer with one payload."""
    weights = {"lin.weight": np.full((4, 4), weight, np.float32), "lin.bias": np.zeros(4, np.float32)}
    return pack(manifest(**changes), weights, key, payload={NATIVE: code})


END = struct.Struct("<4s4H2LH")
ENTRY = struct.Struct("<4s6H3L5H2L")
"""The end record, and the fixed part of a directory entry."""

ATTRIBUTES, SIZES, OFFSET = 15, (8, 9), 16
"""Fields of an entry: external attributes, compressed and plain size, offset of the local header."""


def entries(data: bytes) -> dict[str, int]:
    """Where each member's directory entry begins."""
    _, _, _, _, number, _, position, _ = END.unpack(data[-END.size :])
    found = {}
    for _ in range(number):
        fields = ENTRY.unpack_from(data, position)
        lengths = fields[10:13]  # of name, extra field, comment
        name = data[position + ENTRY.size : position + ENTRY.size + lengths[0]].decode()
        found[name] = position
        position += ENTRY.size + sum(lengths)
    return found


def with_entry(data: bytes, name: str, changes: dict[int, int]) -> bytes:
    """The container with fields of one directory entry changed."""
    changed = bytearray(data)
    position = entries(data)[name]
    fields = list(ENTRY.unpack_from(data, position))
    for index, value in changes.items():
        fields[index] = value
    ENTRY.pack_into(changed, position, *fields)
    return bytes(changed)
