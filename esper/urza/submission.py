"""What people send to Urza and get back, whichever way they come: over HTTP or by the command line. No FastAPI here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field

from esper.leyline import (
    Blueprint,
    BlueprintIR,
    BlueprintStatus,
    CompiledKernelArtifact,
    Contract,
    Pipeline,
    SiteSignature,
)
from esper.leyline.catalogue import (
    BlueprintPage,
    BlueprintQuery,
    Census,
    Ids,
    KernelEntry,
    KernelPage,
    KernelQuery,
    Outlook,
)
from esper.leyline.contract import Finite, Name
from esper.urza.catalog import Target, TargetState

MAX_TARGETS = 256
"""Signatures that one submission may name."""
MAX_TAGS = 32


class Queries(Protocol):
    """What can be asked of a catalogue: of a `Hub`, of its actor's handle, and of a `Reader` where no Urza runs."""

    def blueprint(self, blueprint_id: str) -> Blueprint: ...
    def search_blueprints(self, query: BlueprintQuery) -> BlueprintPage: ...
    def ids(self, prefix: str) -> Ids: ...
    def lineage(self, blueprint_id: str) -> list[Blueprint]: ...
    def descendants(self, blueprint_id: str) -> list[Blueprint]: ...
    def outlook(self, blueprint_id: str) -> Outlook: ...
    def targets(self, blueprint_id: str) -> list[Target]: ...
    def signatures(self) -> list[SiteSignature]: ...
    def kernel(self, kernel_id: str) -> CompiledKernelArtifact: ...
    def kernel_entry(self, kernel_id: str) -> KernelEntry: ...
    def search_kernels(self, query: KernelQuery) -> KernelPage: ...
    def fetch(self, kernel_id: str) -> memoryview: ...
    def census(self) -> Census: ...


class Assets(Queries, Protocol):
    """What takes submissions too: a `Hub` or its actor's handle."""

    def submit_blueprint(
        self,
        ir: BlueprintIR,
        *,
        name: str,
        targets: Sequence[SiteSignature],
        tags: Sequence[str] = (),
        priority: int = 5,
        submitted_by: str = "unknown",
        parent_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        pipelines: Sequence[Pipeline] = (Pipeline.FAST,),
    ) -> Blueprint: ...


class BlueprintSubmission(Contract):
    """A design to compile.

    Attributes:
        priority: 0 (background) to 9 (a run waits for it).
        parent_id: the blueprint it was derived from.
        metadata: plain JSON, kept with the blueprint.
        targets: site signatures; by default every one that runs have registered and whose kind the design fits.
        pipelines: how to compile: `fast` rebuilds the module from the IR, `optimized` adds native code.
    """

    ir: BlueprintIR
    name: Name
    tags: Annotated[tuple[Name, ...], Field(max_length=MAX_TAGS)] = ()
    priority: Annotated[int, Field(ge=0, le=9)] = 5
    submitted_by: Annotated[str, Field(min_length=1, max_length=128)] = "http"
    parent_id: Name | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    targets: Annotated[tuple[SiteSignature, ...], Field(min_length=1, max_length=MAX_TARGETS)] | None = None
    pipelines: Annotated[tuple[Pipeline, ...], Field(min_length=1)] = (Pipeline.FAST, Pipeline.OPTIMIZED)


class Misfit(Contract):
    """A target that the design cannot be built for, and why."""

    signature: SiteSignature
    reason: str


class Submitted(Contract):
    """Where a submission stands.

    Attributes:
        id: of the blueprint. The same design under the same name has the same id.
        targets: signatures that it is compiled for, now or before.
        misfits: targets that it does not fit.
        queue_position: targets of anyone to be compiled before its last one is done, itself included; 0: none waits.
        estimated_s: seconds until then: see `Outlook`.
        note: what a person should know, in words; empty where there is nothing.
    """

    id: Name
    name: Name
    version: int
    status: BlueprintStatus
    targets: tuple[SiteSignature, ...]
    misfits: tuple[Misfit, ...] = ()
    queue_position: int
    estimated_s: Finite
    note: str = ""


class TargetView(Contract):
    """One signature and pipeline of a blueprint; see `catalog.Target`. Worker, deadline, log: of the last lease."""

    signature: SiteSignature
    pipeline: Pipeline
    state: TargetState
    worker: str
    deadline: Finite
    attempts: int
    errors: int
    deaths: int
    kernel_ids: tuple[str, ...]
    reason: str
    log: str


class BlueprintView(Contract):
    """A blueprint, its targets, and what it waits for."""

    blueprint: Blueprint
    outlook: Outlook
    targets: tuple[TargetView, ...]


def submit(hub: Assets, body: BlueprintSubmission) -> Submitted:
    """Carries a submission out; repeating it is harmless.

    Raises:
        BlueprintError: if the IR is malformed.
        NotFoundError: if there is no such parent.
        ConflictError: if the blueprint is retired.
    """
    targets = body.targets
    if targets is None:
        targets = tuple(signature for signature in hub.signatures() if signature.kind in body.ir.fit)
    blueprint = hub.submit_blueprint(
        body.ir,
        name=body.name,
        targets=targets,
        tags=body.tags,
        priority=body.priority,
        submitted_by=body.submitted_by,
        parent_id=body.parent_id,
        metadata=body.metadata,
        pipelines=tuple(dict.fromkeys(body.pipelines)),
    )
    outlook = hub.outlook(blueprint.blueprint_id)
    unfit = (one for one in hub.targets(blueprint.blueprint_id) if one.state is TargetState.UNFIT)
    reasons = {one.signature: one.reason for one in unfit}
    return Submitted(
        id=blueprint.blueprint_id,
        name=blueprint.name,
        version=blueprint.version,
        status=blueprint.status,
        targets=blueprint.targets,
        misfits=tuple(Misfit(signature=signature, reason=reason) for signature, reason in reasons.items()),
        queue_position=outlook.queue_position,
        estimated_s=outlook.estimated_s,
        note="; ".join(filter(None, (_note(blueprint, has_targets=bool(targets)), _ignored(blueprint, body)))),
    )


def view_of(hub: Queries, blueprint_id: str) -> BlueprintView:
    """All that is known of a blueprint; raises `NotFoundError`.

    The hub goes on between the questions. What is open is asked first: where nothing is, every target has ended.
    """
    fields = TargetView.model_fields
    outlook = hub.outlook(blueprint_id)
    targets = hub.targets(blueprint_id)
    return BlueprintView(
        blueprint=hub.blueprint(blueprint_id),
        outlook=outlook,
        targets=tuple(TargetView(**{name: getattr(target, name) for name in fields}) for target in targets),
    )


def _ignored(blueprint: Blueprint, body: BlueprintSubmission) -> str:
    """What of a repeated submission has no effect, in words: a blueprint stays as it was submitted first."""
    asked = {"tags": body.tags, "priority": body.priority, "parent_id": body.parent_id, "metadata": body.metadata}
    names = [name for name, value in asked.items() if name in body.model_fields_set]
    kept = {name: getattr(blueprint, name) for name in names if getattr(blueprint, name) != asked[name]}
    if not kept:
        return ""
    words = ", ".join(f"{name} {json.dumps(value)}" for name, value in kept.items())
    is_more_urgent = body.priority > blueprint.priority and "priority" in kept
    queued = f"; what is still queued is compiled with priority {body.priority}" if is_more_urgent else ""
    return f"{blueprint.name} was submitted before and keeps its {words}{queued}; another name is another blueprint"


def _note(blueprint: Blueprint, *, has_targets: bool) -> str:
    if blueprint.targets:
        return ""
    if has_targets:
        return "it fits none of its targets: nothing will be compiled"
    kinds = ", ".join(kind.value for kind in blueprint.ir.fit)
    return f"no run has registered a site of kind {kinds} yet: nothing will be compiled; name targets"
