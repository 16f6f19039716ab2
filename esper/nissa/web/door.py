"""Who is let in to the page: this machine's users on loopback, elsewhere who has the token. ASGI middleware.

A browser cannot send a header with an event stream, so that whoever has shown the token gets a cookie that no script
can read. Every answer carries a policy by which a browser loads nothing from anywhere else.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

COOKIE = "esper_page"
LOGIN = "/login"
_MAX_FORM_BYTES = 4096
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Door:
    """Lets in or refuses.

    Args:
        app: what comes behind it.
        token_digest: SHA-256 of the token that is asked for; None asks for none.
        hosts: values of the Host header, without a port, that are answered; None answers all.
        ask: makes the page that asks for the token; told whether a wrong one was given.
    """

    def __init__(
        self, app: Any, *, token_digest: str | None, hosts: tuple[str, ...] | None, ask: Callable[[bool], str]
    ) -> None:
        self._app = app
        self._digest = token_digest
        self._hosts = hosts
        self._ask = ask

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] != "websocket":  # there are none here; closing it unanswered is a 403
                await self._app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope, receive)
        answer = await self._answer(request)
        await (answer or self._app)(scope, receive, guarded)

    async def _answer(self, request: Request) -> Response | None:
        """What is said at the door; None lets in."""
        host = request.headers.get("host", "")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            # a page of another site, whose name was made to point here, would be a browser's way in
            return Response(f"no such host here: {host[:100]}\n", 400, media_type="text/plain")
        if self._digest is None or self._is_known(request):
            return None
        if request.url.path == LOGIN and request.method == "POST":
            return await self._log_in(request)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(self._ask(False), 401)
        return Response("send the token: Authorization: Bearer TOKEN\n", 401, media_type="text/plain")

    async def _log_in(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM_BYTES:
                return Response("too long for a token\n", 413, media_type="text/plain")
        token = parse_qs(body.decode("latin-1")).get("token", [""])[0].strip()
        if not self._fits(token):
            return HTMLResponse(self._ask(True), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return answer

    def _is_known(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._fits(token.strip())
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._fits(cookie.value)

    def _fits(self, token: str) -> bool:
        return hmac.compare_digest(hashlib.sha256(token.encode()).hexdigest(), self._digest or "")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
