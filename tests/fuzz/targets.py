"""What is fuzzed: the way of an IR from JSON to Urabrask's verdict, and of bytes through `unpack`.

Each target takes chance or bytes and returns how far the input came; whatever it raises is a finding.
"""

from __future__ import annotations

import json
from typing import Any

from container_samples import PUBLIC, packed
from ir_mutations import Chance, any_signature, near_valid

from esper.leyline import EsperError, SiteSignature
from esper.leyline.blueprints import parse_ir
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import kernel_id_of, unpack
from esper.leyline.limits import IRLimits, screen
from esper.leyline.lower import lower
from esper.leyline.ops import fits
from esper.urabrask.gauntlet import examine

LIMITS = IRLimits(parameters=1 << 18, flops=1 << 24, activation_bytes=1 << 20)
"""Small, so that what passes is cheap to build."""

MAX_MESSAGE = 1_000
"""Characters of an error: it is stored, logged and sent over the bus."""

PACKED = packed()


def way_of(text: str | bytes, signature: SiteSignature, *, examined: bool) -> str:
    """Sends an IR all the way.

    Returns:
        `parsed` (and then refused), `screened` (built, but refused by the gauntlet), `passed`, or `refused` where it
        was not even an IR.
    """
    reached = "refused"
    try:
        ir = parse_ir(text)
        reached = "parsed"
        assert canonical_hash(ir) == canonical_hash(parse_ir(ir.model_dump_json()))
        fits(ir, signature)
        screen(ir, signature, LIMITS)
        return _built(ir, signature, examined=examined)
    except EsperError as error:
        _check_length(error)
    return reached


def _check_length(error: EsperError) -> None:
    assert len(str(error)) <= MAX_MESSAGE, f"an error of {len(str(error))} characters: {str(error)[:200]}"


def _built(ir: Any, signature: SiteSignature, *, examined: bool) -> str:
    module = lower(ir, signature)
    if not examined:
        return "screened"
    report = examine(module, ir, signature)
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert len(report.reason) <= 20 * MAX_MESSAGE
    assert report.risk_score is not None
    return "passed" if report.passed else "screened"


def fuzz_json(data: bytes) -> str:
    """Arbitrary bytes as an IR."""
    return way_of(data, SiteSignature.model_validate({"kind": "vector", "channels": 4}), examined=False)


def fuzz_ir(chance: Chance, *, examined: bool = False) -> str:
    """A nearly valid IR."""
    ir = near_valid(chance)
    return way_of(json.dumps(ir), any_signature(chance, ir), examined=examined)


def fuzz_container(data: bytes) -> str:
    """Arbitrary bytes as a container. What is read must be the one container that was signed."""
    try:
        kernel = unpack(data, PUBLIC)
    except EsperError as error:
        _check_length(error)
        return "refused"
    assert kernel.kernel_id == kernel_id_of(PACKED)
    return "passed"


def fuzz_damage(chance: Chance) -> str:
    """The signed container with a few stretches replaced by others of itself, by zeros, or by odd numbers."""
    data = bytearray(PACKED)
    for _ in range(1 + chance.randrange(4)):
        start, length = chance.randrange(len(data) + 1), chance.randrange(48)
        source = chance.randrange(len(PACKED))
        piece = chance.choice((PACKED[source : source + length], bytes(length), b"\xff" * length, b"", b"PK\x06\x07"))
        data[start : start + chance.choice((0, len(piece), length))] = piece
    return fuzz_container(bytes(data))
