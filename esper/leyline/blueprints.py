"""What a blueprint is: pure data over an allow-list of ops. No code, no pickle, no name that resolves to Python."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from esper.leyline.contract import API_VERSION, Contract, Finite, Name, Sha256, new_id, now
from esper.leyline.errors import BlueprintError
from esper.leyline.kernels import BlueprintStatus, SiteKind, SiteSignature

MAX_NODES = 64
MAX_IR_BYTES = 1 << 18
INPUT = "h"
"""The name by which nodes refer to the site's tensor."""

Param = int | float | bool | str
"""A value of an op parameter. Integers may be given as a dim expression (`C`, `C//4`, `max(1, C//16)`)."""


class Node(Contract):
    """One operation.

    Attributes:
        id: unique within the IR; not part of the canonical hash.
        op: a name of the op table (`esper.leyline.ops`).
        inputs: ids of earlier nodes, or `h`; the order matters (`sub(a, b)` is not `sub(b, a)`).
        params: the op's parameters; the op table says which exist and which are required.
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    op: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    inputs: tuple[str, ...] = (INPUT,)
    params: dict[str, Param] = Field(default_factory=dict)


class BlueprintIR(Contract):
    """A graph that computes the residual r(h), without the skip; h and r(h) have the same shape.

    Attributes:
        fit: the kinds of site it fits.
        nodes: in any order; cycles are refused.
        output: id of the node whose value is r(h).
        replaces: the graph computes k(h), and the site blends `(1 - a) h + a k(h)`.
        zero_at_birth: declared and checked: r(h) is exactly 0 with the initial parameters.
    """

    fit: Annotated[tuple[SiteKind, ...], Field(min_length=1)]
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, max_length=MAX_NODES)]
    output: str
    replaces: bool = False
    zero_at_birth: bool = False


def parse_ir(text: str | bytes) -> BlueprintIR:
    """Reads an IR from JSON. Whether it is well formed is for `ops.validate` to say.

    Raises:
        BlueprintError: if it is no JSON or not of this form; `field` names the place.
    """
    if len(text) > MAX_IR_BYTES:
        raise BlueprintError(f"has {len(text)} bytes of JSON", field="ir", remedy=f"use at most {MAX_IR_BYTES}")
    try:
        return BlueprintIR.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        raise BlueprintError(first["msg"], field=where or "ir") from error


class Blueprint(Contract):
    """A design as Urza keeps it.

    Attributes:
        blueprint_id: unique; chosen by the submitter, so that a retried submission is the same one.
        name, version: a name may have many versions, numbered from 1.
        parent_id: the blueprint it was derived from.
        ir_hash: the canonical hash of `ir`.
        priority: 0 (background) to 9 (a run waits for it).
        targets: site signatures to compile for.
        reason: why it is INVALID, where it is.
    """

    api_version: int = API_VERSION
    blueprint_id: Name = Field(default_factory=new_id)
    name: Name
    version: Annotated[int, Field(ge=1)] = 1
    parent_id: Name | None = None
    ir: BlueprintIR
    ir_hash: Sha256
    tags: tuple[Name, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    submitted_by: str = "unknown"
    targets: tuple[SiteSignature, ...] = ()
    status: BlueprintStatus = BlueprintStatus.UNVALIDATED
    reason: str = ""
    created_at: Finite = Field(default_factory=now)
