"""Static limits: what an IR may ask for at a site, checked from its text and numbers before anything is built.

`ops` has bounds that no configuration lifts (`MAX_NODES`, `MAX_DEPTH`, `MAX_PARAMETERS`, `MAX_ACTIVATION`); they keep
any arithmetic on an IR small. These limits are those of an installation: a kernel within them is built, examined and
kept in memory several times over, also in float64.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esper.leyline import ops
from esper.leyline.blueprints import MAX_NODES, BlueprintIR
from esper.leyline.contract import Contract
from esper.leyline.errors import KernelRejectedError
from esper.leyline.kernels import Check, SiteSignature

Limit = Annotated[int, Field(ge=1)]


class IRLimits(Contract):
    """What one kernel may cost at its site."""

    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = MAX_NODES
    depth: Annotated[int, Field(ge=1, le=ops.MAX_DEPTH)] = ops.MAX_DEPTH
    """Nodes on the longest path from h to the output."""
    parameters: Annotated[int, Field(ge=1, le=ops.MAX_PARAMETERS)] = 1 << 26
    flops: Limit = 1 << 34
    """Of the forward pass of one sample."""
    activation_bytes: Limit = 1 << 28
    """All outputs of nodes of one sample, together."""


DEFAULT_LIMITS = IRLimits()


def screen(ir: BlueprintIR, signature: SiteSignature, limits: IRLimits = DEFAULT_LIMITS) -> tuple[Check, ...]:
    """The checks `limits.nodes`, `.depth`, `.parameters`, `.flops` and `.activation_bytes`, all passed.

    Raises:
        BlueprintError: if the IR is malformed or does not fit the signature.
        KernelRejectedError: if it asks for more than the limits; the message names every one.
    """
    ops.validate(ir)
    found = {
        "nodes": len(ir.nodes),
        "depth": ops.depth(ir),
        "parameters": ops.count_parameters(ir, signature),
        "flops": ops.count_flops(ir, signature),
        "activation_bytes": ops.activation_bytes(ir, signature),
    }
    checks = tuple(
        Check(name=f"limits.{name}", passed=value <= getattr(limits, name), value=value, limit=getattr(limits, name))
        for name, value in found.items()
    )
    broken = [check for check in checks if not check.passed]
    if broken:
        words = ", ".join(f"{check.name} is {check.value:,.0f}, above {check.limit:,.0f}" for check in broken)
        raise KernelRejectedError(
            f"it asks for too much at {signature.key}: {words}",
            field=broken[0].name,
            remedy="make it smaller, or raise tezzeret.limits",
        )
    return checks
