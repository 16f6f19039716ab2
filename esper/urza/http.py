"""Urza over HTTP: its routes. Knows nothing of Ray.

    POST /api/v1/blueprints                 submit a design
    GET  /api/v1/blueprints                 ?status= &tag= &name= &order= &descending= &limit= &offset=
    GET  /api/v1/blueprints/{id}            with its targets and what it waits for
    GET  /api/v1/blueprints/{id}/lineage    from the design to its root
    GET  /api/v1/kernels                    ?blueprint_id= &status= &signature= &pipeline= and the page, as above
    GET  /api/v1/kernels/search             ?tags= &match= &min_performance= &max_risk= and the above
    GET  /api/v1/kernels/{id}               with statistics and benchmarks
    GET  /api/v1/kernels/{id}/artifact      the signed container's bytes; verify them before you use them
    GET  /health                            503 unless Urza answers
    GET  /docs, /openapi.json               written by FastAPI

What is asked and answered is in `submission` and `leyline.catalogue`, what goes wrong in `problems`, who is let in in
`guard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from esper.leyline import Blueprint, BlueprintStatus, Contract, KernelStatus, Pipeline
from esper.leyline.catalogue import (
    MAX_PAGE,
    BlueprintOrder,
    BlueprintPage,
    BlueprintQuery,
    Census,
    KernelEntry,
    KernelOrder,
    KernelPage,
    KernelQuery,
    parse_signature,
)
from esper.leyline.contract import API_VERSION, Finite, Fraction
from esper.urza import problems
from esper.urza.guard import Guard, Limits
from esper.urza.submission import Assets, BlueprintSubmission, BlueprintView, Submitted, submit, view_of

PREFIX = "/api/v1"
CHUNK_BYTES = 1 << 20
"""An artifact is sent in pieces of this size: the process never holds a copy of the whole."""


class Lineage(Contract):
    """From a design to its root."""

    lineage: tuple[Blueprint, ...]


class Health(Census):
    """That Urza answers, how much it holds, and how much waits for a compiler.

    Attributes:
        tamiyo: `ok`, or why it does not answer; null where it is not asked. Its silence is not Urza's: runs go on.
    """

    status: Literal["ok"] = "ok"
    tamiyo: str | None = None
    api_version: int = API_VERSION


def build_app(
    hub: Callable[[], Assets],
    limits: Limits,
    *,
    census: Callable[[], Census] | None = None,
    tamiyo: Callable[[], str] | None = None,
) -> FastAPI:
    """Makes the app. Its routes are synchronous: FastAPI runs them in threads, where a hub may block.

    Args:
        hub: gives the hub to ask; called for every request.
        limits: what is let in.
        census: what `/health` asks, for a shorter deadline than that of other questions.
        tamiyo: what `/health` says of Tamiyo.
    """
    app = FastAPI(
        title="Urza",
        summary="The asset hub of Esper: blueprints and compiled kernels.",
        version=f"{API_VERSION}",
        dependencies=[] if limits.token_digest is None else [Depends(HTTPBearer(auto_error=False))],
        responses={status: {"model": problems.ErrorBody} for status in (400, 401, 404, 409, 413, 422, 503)},
    )
    app.add_middleware(Guard, limits=limits, refuse=problems.refuse)
    problems.install(app)
    _add_blueprints(app, hub)
    _add_kernels(app, hub)

    @app.get("/health", tags=["health"])
    def health() -> Health:
        """Whether Urza answers, asked of Urza itself; 503 if not."""
        counted = census() if census is not None else hub().census()
        return Health(**counted.model_dump(), tamiyo=None if tamiyo is None else tamiyo())

    return app


Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Offset = Annotated[int, Query(ge=0, le=1 << 31)]


class BlueprintParameters(Contract):
    """A list of blueprints.

    Attributes:
        tag: may be repeated: each must be there.
        name: only versions of this name.
    """

    status: BlueprintStatus | None = None
    tag: tuple[str, ...] = ()
    name: str | None = None
    order: BlueprintOrder = BlueprintOrder.CREATED
    descending: bool = False
    limit: Limit = 100
    offset: Offset = 0

    def query(self) -> BlueprintQuery:
        """As the hub is asked."""
        return BlueprintQuery(**self.model_dump(exclude={"tag"}), tags_all=self.tag)


def _add_blueprints(app: FastAPI, hub: Callable[[], Assets]) -> None:
    @app.post(f"{PREFIX}/blueprints", status_code=201, tags=["blueprints"])
    def submit_blueprint(body: BlueprintSubmission, response: Response) -> Submitted:
        """Registers a design and queues it; the same design under the same name is the same blueprint."""
        submitted = submit(hub(), body)
        response.headers["Location"] = f"{PREFIX}/blueprints/{submitted.id}"
        return submitted

    @app.get(f"{PREFIX}/blueprints", tags=["blueprints"])
    def list_blueprints(parameters: Annotated[BlueprintParameters, Query()]) -> BlueprintPage:
        """Lists blueprints; of several tags each must be there."""
        return hub().search_blueprints(parameters.query())

    @app.get(f"{PREFIX}/blueprints/{{blueprint_id}}", tags=["blueprints"])
    def get_blueprint(blueprint_id: str) -> BlueprintView:
        """One blueprint, its targets, and what it waits for."""
        return view_of(hub(), blueprint_id)

    @app.get(f"{PREFIX}/blueprints/{{blueprint_id}}/lineage", tags=["blueprints"])
    def get_lineage(blueprint_id: str) -> Lineage:
        """The blueprint, the one it was derived from, and so on to the root."""
        return Lineage(lineage=tuple(hub().lineage(blueprint_id)))


class StatusFilter(StrEnum):
    """Which kernels a list shows: those of a status, or `any`."""

    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    RETIRED = "RETIRED"
    ANY = "any"

    @property
    def status(self) -> KernelStatus | None:
        """The status; None for any."""
        return None if self is StatusFilter.ANY else KernelStatus(self.value)


class KernelParameters(Contract):
    """What the two lists of kernels have in common.

    Attributes:
        signature: such as `feature_map-16x8x8-float32-cpu`.
    """

    blueprint_id: str | None = None
    status: StatusFilter = StatusFilter.VALIDATED
    signature: str | None = None
    pipeline: Pipeline | None = None
    order: KernelOrder = KernelOrder.CREATED
    descending: bool = False
    limit: Limit = 100
    offset: Offset = 0

    def query(self, **more: Any) -> KernelQuery:
        """As the hub is asked; raises `BlueprintError` for a signature that is none."""
        own: dict[str, Any] = {
            "status": self.status.status,
            "signature": None if self.signature is None else parse_signature(self.signature),
        }
        return KernelQuery(**self.model_dump(include=set(KernelParameters.model_fields) - set(own)), **own, **more)


class SearchParameters(KernelParameters):
    """A search.

    Attributes:
        tags: separated by commas.
        match: whether all of them must be there, or any.
        min_performance: times as fast as the eager module, at least.
        max_risk: risk score, at most.
    """

    tags: str = ""
    match: Literal["all", "any"] = "all"
    min_performance: Finite | None = None
    max_risk: Fraction | None = None

    def search(self) -> KernelQuery:
        """As the hub is asked."""
        tags = tuple(tag for tag in self.tags.split(",") if tag)
        named = {"tags_all": tags} if self.match == "all" else {"tags_any": tags}
        return self.query(**named, min_performance=self.min_performance, max_risk=self.max_risk)


def _add_kernels(app: FastAPI, hub: Callable[[], Assets]) -> None:
    @app.get(f"{PREFIX}/kernels", tags=["kernels"])
    def list_kernels(parameters: Annotated[KernelParameters, Query()]) -> KernelPage:
        """Lists kernels; those that are VALIDATED unless another status is named."""
        return hub().search_kernels(parameters.query())

    @app.get(f"{PREFIX}/kernels/search", tags=["kernels"])
    def search_kernels(parameters: Annotated[SearchParameters, Query()]) -> KernelPage:
        """Finds kernels by tags and measured speed."""
        return hub().search_kernels(parameters.search())

    @app.get(f"{PREFIX}/kernels/{{kernel_id}}", tags=["kernels"])
    def get_kernel(kernel_id: str) -> KernelEntry:
        """One kernel, how it was used, and what was measured."""
        return hub().kernel_entry(kernel_id)

    @app.get(
        f"{PREFIX}/kernels/{{kernel_id}}/artifact",
        tags=["kernels"],
        response_class=StreamingResponse,
        responses={
            200: {"content": {"application/octet-stream": {}}, "description": "The container."},
            304: {"description": "What `If-None-Match` names is the artifact."},
        },
    )
    def get_artifact(kernel_id: str, request: Request) -> Response:
        """The signed container. Its SHA-256 is its id, so what is cached stays right; check the signature yourself."""
        known = hub().kernel(kernel_id)
        tag = f'"{known.kernel_id}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
        if _names(request.headers.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        data = hub().fetch(kernel_id)
        headers |= {
            "Content-Length": str(data.nbytes),
            "Content-Disposition": f'attachment; filename="{kernel_id}.kernel"',
        }
        return StreamingResponse(_pieces(data), media_type="application/octet-stream", headers=headers)


def _names(if_none_match: str, tag: str) -> bool:
    """Whether the header names this tag (RFC 9110, weak comparison)."""
    named = {one.strip().removeprefix("W/") for one in if_none_match.split(",")}
    return tag in named or "*" in named


def _pieces(data: memoryview) -> Iterator[bytes]:
    for start in range(0, data.nbytes, CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])
