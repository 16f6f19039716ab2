"""What an HTTP answer says when something went wrong: `{"error": {"type", "message", "field", "remedy"}}`.

Its status: 400 for what is no JSON and for a host that is not ours, 401 without the token, 404 and 405 for what is not
there, 409 where the stored state forbids it, 413 for too large a body, 422 for a wrong field of body or query, 503
where Urza does not answer (Retry-After says when to ask again) or must not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from esper.leyline import (
    ConflictError,
    Contract,
    EsperError,
    LeaseLostError,
    NotFoundError,
    SafetyError,
    StorageError,
    TransientError,
    UserError,
)
from esper.leyline.errors import excerpt

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

RETRY_AFTER_S = 2
"""Seconds after which a client should ask an Urza again that did not answer."""

_STATUS: tuple[tuple[type[EsperError], int], ...] = (
    (StorageError, 503),  # the server's own: a client has no say in where things lie
    (UserError, 422),
    (NotFoundError, 404),
    (LeaseLostError, 409),
    (ConflictError, 409),
    (TransientError, 503),
    (SafetyError, 503),  # Urza was taken over, or its bytes are damaged: nothing that the request could change
)
_WHOLE_IDS = "ask with a whole id; GET /api/v1/blueprints and /api/v1/kernels list what there is"
_JSON = re.compile(r"application/([\w.-]+\+)?json\b", re.IGNORECASE)
_LOG = logging.getLogger(__name__)


class Problem(Contract):
    """What went wrong, what it is about, and what helps."""

    type: str
    message: str
    field: str | None = None
    remedy: str | None = None


class ErrorBody(Contract):
    """The body of every answer that is no success."""

    error: Problem


def install(app: FastAPI) -> None:
    """Makes every error of an app an answer of this form."""
    app.add_exception_handler(EsperError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)


def refuse(status: int, problem: str, field: str | None = None, remedy: str | None = None) -> Response:
    """The answer to a request that the guard does not let in."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return _answer(status, Problem(type="Refused", message=problem, field=field, remedy=remedy), headers)


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, EsperError)
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    remedy = error.remedy or (_WHOLE_IDS if isinstance(error, NotFoundError) else None)
    problem = Problem(type=type(error).__name__, message=error.message, field=error.field, remedy=remedy)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 and isinstance(error, TransientError) else None
    return _answer(status, problem, headers)


async def _on_malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    source, *path = (str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        words = f"is no JSON at character {path[0] if path else 0}: {first['ctx']['error']}"
        return _answer(400, Problem(type="MalformedRequest", message=words, field=source, remedy="send valid JSON"))
    kind = request.headers.get("content-type", "")
    if source == "body" and not path and first["type"] != "missing" and not _JSON.match(kind):
        # the framework reads no JSON where none is announced, and complains about the text that it then has
        words, remedy = f"the body is announced as {excerpt(kind)}", "send it with Content-Type: application/json"
        return _answer(422, Problem(type="MalformedRequest", message=words, field="Content-Type", remedy=remedy))
    more = f"; and {len(error.errors()) - 1} more" if len(error.errors()) > 1 else ""
    message = first["msg"].removeprefix("Value error, ") + more
    remedy = "see /docs for the form of each request"
    return _answer(
        422, Problem(type="MalformedRequest", message=message, field=".".join(path) or source, remedy=remedy)
    )


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the one that the framework itself raises: no UTF-8, or nested too deep to be read
        problem = Problem(
            type="MalformedRequest",
            message="the body cannot be read as JSON",
            field="body",
            remedy="send JSON in UTF-8, nested no deeper than its form asks",
        )
        return _answer(400, problem)
    problem = Problem(type="HTTPError", message=str(error.detail), remedy="see /docs for the routes")
    return _answer(error.status_code, problem, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    _LOG.error("gateway.failed", exc_info=error, extra={"path": request.url.path})
    words = f"the gateway failed: {type(error).__name__}"
    return _answer(500, Problem(type="InternalError", message=words, remedy="see the log of the gateway's replica"))


def _answer(status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(ErrorBody(error=problem).model_dump(), status, headers)
