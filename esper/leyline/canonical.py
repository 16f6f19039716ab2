"""The canonical hash of an IR: equal for graphs that mean the same kernel by construction, whatever their nodes are
called and in whatever order they are listed.

It does not know algebra: `add(a, b)` and `add(b, a)` hash apart, since for `sub` they are different kernels.
"""

from __future__ import annotations

import hashlib
import json

from esper.leyline.blueprints import INPUT, BlueprintIR
from esper.leyline.ops import canonical_order, filled_params, validate

_VERSION = 1


def canonical_form(ir: BlueprintIR) -> str:
    """The IR as canonical JSON: nodes numbered in the order of a walk from the output, `h` as -1.

    Numbering rather than nested hashing keeps one shared node apart from two equal ones, which have twice the weights.

    Raises:
        BlueprintError: if the IR is malformed.
    """
    validate(ir)
    number = {INPUT: -1}
    nodes = []
    for node in canonical_order(ir):
        number[node.id] = len(nodes)
        nodes.append([node.op, filled_params(node), [number[name] for name in node.inputs]])
    form = {
        "version": _VERSION,
        "fit": sorted({kind.value for kind in ir.fit}),
        "nodes": nodes,
        "replaces": ir.replaces,
        "zero_at_birth": ir.zero_at_birth,
    }
    return json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_hash(ir: BlueprintIR) -> str:
    """SHA-256 of the canonical form, 64 hexadecimal digits; raises `BlueprintError` if the IR is malformed."""
    return hashlib.sha256(canonical_form(ir).encode()).hexdigest()
