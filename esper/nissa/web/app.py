"""The page's routes, as an ASGI app.

    GET /                      the list of runs
    GET /stream                its changes, as server-sent events
    GET /runs/{run}            a run
    GET /runs/{run}/stream     its changes; goes on after Last-Event-ID, or ?after=
    GET /runs/{run}/notes      earlier events, ?before=NUMBER, as HTML
    GET /assets/{name}         the style sheet and the script
    GET /health                that it is there

Who is let in is in `door`, what is streamed in `feed`.
"""

from __future__ import annotations

import threading
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from esper.leyline.errors import EsperError, NotFoundError
from esper.nissa.page import PICTURES, STYLE
from esper.nissa.web import documents
from esper.nissa.web.door import Door
from esper.nissa.web.feed import NUM_NOTES, Feeds, cut, last_id, tail
from esper.nissa.web.parts import note_item, parts_of
from esper.nissa.web.source import Runs

_ASSETS = files("esper.nissa") / "assets"
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_MAX_STREAMS = 64


def build_app(
    runs: Runs,
    *,
    where: str,
    token_digest: str | None = None,
    hosts: tuple[str, ...] | None = None,
    tick_s: float = 0.5,
    ending: threading.Event | None = None,
) -> Any:
    """Makes the app.

    Args:
        runs: what it shows.
        where: the storage address in words.
        token_digest: see `Door`.
        hosts: see `Door`.
        tick_s: seconds between two looks for something new, for each who looks.
        ending: set when the server ends: each stream shows the last picture and says so.
    """
    pages = _Pages(runs, Feeds(runs, where, tick_s=tick_s, ending=ending), where)
    app = Starlette(
        routes=[
            Route("/", pages.index),
            Route("/stream", pages.index_stream),
            Route("/runs/{run}", pages.run),
            Route("/runs/{run}/stream", pages.stream),
            Route("/runs/{run}/notes", pages.notes),
            Route("/assets/{name}", pages.asset),
            Route("/health", pages.health),
        ],
        exception_handlers={EsperError: _problem, 404: _no_page},
    )
    ask = lambda wrong: documents.door_page(was_wrong=wrong)  # noqa: E731 - a name for one use
    return Door(app, token_digest=token_digest, hosts=hosts, ask=ask)


class _Pages:
    def __init__(self, runs: Runs, feeds: Feeds, where: str) -> None:
        self._runs, self._feeds, self._where = runs, feeds, where
        self._style = (STYLE + PICTURES + (_ASSETS / "live.css").read_text()).encode()
        self._script = (_ASSETS / "live.js").read_bytes()

    async def index(self, _request: Request) -> Response:
        rows = await run_in_threadpool(self._runs.rows)
        return HTMLResponse(documents.runs_page(documents.runs_table(rows, self._where)))

    async def run(self, request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(self._run, request.path_params["run"]))

    def _run(self, run_id: str) -> str:
        picture = self._runs.picture(run_id)
        parts = parts_of(picture, self._runs.platform(), self._feeds.now())
        shown, num_earlier = tail(picture.story, NUM_NOTES)
        mark = last_id(self._feeds.boot, picture.story)
        return documents.run_page(run_id, parts, shown, num_earlier=num_earlier, last_id=mark)

    async def stream(self, request: Request) -> Response:
        run_id = request.path_params["run"]
        await run_in_threadpool(self._runs.picture, run_id)  # one that is not there is a 404, and no stream
        after = request.headers.get("last-event-id") or request.query_params.get("after", "")
        return self._streaming(self._feeds.of_run(run_id, after, request.is_disconnected))

    async def index_stream(self, request: Request) -> Response:
        return self._streaming(self._feeds.of_runs(request.is_disconnected))

    def _streaming(self, events: Any) -> Response:
        if self._feeds.num_open >= _MAX_STREAMS:
            return Response(f"{_MAX_STREAMS} pages are open already\n", 503, media_type="text/plain")
        return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def notes(self, request: Request) -> Response:
        try:
            before = int(request.query_params.get("before", ""))
        except ValueError:
            return Response("before=NUMBER is needed\n", 400, media_type="text/plain")
        picture = await run_in_threadpool(self._runs.picture, request.path_params["run"])
        shown, num_earlier = tail(cut(picture.story, before), NUM_NOTES)
        items = "".join(note_item(note) for note in reversed(shown))
        first = shown[0].number if shown else before
        return JSONResponse({"html": items, "first": first, "earlier": num_earlier})

    async def asset(self, request: Request) -> Response:
        found = {"page.css": (self._style, "text/css"), "live.js": (self._script, "text/javascript")}
        name = request.path_params["name"]
        if name not in found:
            return await _no_page(request, NotFoundError(f"no {name} here"))
        body, kind = found[name]
        return Response(body, media_type=kind, headers={"cache-control": "no-cache"})

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "open_streams": self._feeds.num_open})


async def _problem(_request: Request, error: Exception) -> Response:
    is_absent = isinstance(error, NotFoundError)
    title = "There is no such run" if is_absent else "This cannot be shown"
    return HTMLResponse(documents.problem_page(title, str(error)), 404 if is_absent else 503)


async def _no_page(_request: Request, _error: Exception) -> Response:
    return HTMLResponse(documents.problem_page("There is no such page", "The list of runs leads to all there is."), 404)
