"""What stands before the HTTP app: the bearer token, the Host header, and the limit of a request's body."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from esper.config import HttpConfig, PageConfig
from esper.urza import token

if TYPE_CHECKING:  # this module is read wherever a gateway may be deployed from
    from starlette.responses import Response

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Values of the Host header that a server on loopback answers, beside its own."""

Scope = Any
Receive = Any
Send = Any


class Limits(NamedTuple):
    """What is let in.

    Attributes:
        token_digest: SHA-256 of the bearer token that every request must carry; None asks for none.
        hosts: values of the Host header that are answered; None answers all.
        max_body_bytes: of a request.
    """

    token_digest: str | None = None
    hosts: tuple[str, ...] | None = None
    max_body_bytes: int = 1 << 20


def limits_of(http: HttpConfig | PageConfig) -> Limits:
    """What a server with these settings lets in: on loopback this machine's users, else who has the token.

    Raises:
        ConfigError: if the token cannot be had.
    """
    is_local = is_loopback(http.host)
    needs_token = http.always_token or not is_local
    return Limits(
        token_digest=token.digest(token.load_or_create(http.token_file)) if needs_token else None,
        hosts=(*LOOPBACK, bracketed(http.host)) if is_local else None,
        max_body_bytes=http.max_body_kb * 1024 if isinstance(http, HttpConfig) else 0,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`; a name other than localhost is not believed."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


class Guard:
    """ASGI middleware. A request that it refuses reaches no route, and its body is not read further than the limit.

    Args:
        app: what comes behind it.
        limits: what is let in.
        refuse: makes the answer from a status, a problem, its field and a remedy.
    """

    def __init__(self, app: Any, *, limits: Limits, refuse: Callable[..., Response]) -> None:
        self._app = app
        self._limits = limits
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] != "websocket":  # there are none here; closing it unanswered is a 403
                await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(headers)
        body = b""
        if refusal is None:
            body, refusal = await self._read(receive, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _replaying(body, receive), send)

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        hosts = self._limits.hosts
        host = headers.get(b"host", b"").decode("latin-1")
        if hosts is not None and _without_port(host) not in hosts:
            # a page of another site, whose name was made to point here, would be a browser's way in
            return self._refuse(400, f"no such host here: {host[:100]}", "Host", f"ask for {hosts[0]}")
        if self._limits.token_digest is not None and not self._has_token(headers.get(b"authorization", b"")):
            return self._refuse(
                401, "no valid bearer token", "Authorization", "send the token of urza.http.token_file: Bearer TOKEN"
            )
        return None

    def _has_token(self, value: bytes) -> bool:
        scheme, _, token = value.partition(b" ")
        digest = hashlib.sha256(token.strip()).hexdigest()
        expected = self._limits.token_digest or ""
        return scheme.lower() == b"bearer" and hmac.compare_digest(digest, expected)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> tuple[bytes, Response | None]:
        most = self._limits.max_body_bytes
        too_large = self._refuse(
            413, f"the body has more than {most} bytes", "body", "send less, or raise urza.http.max_body_kb"
        )
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            return b"", too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"", self._refuse(400, "the client went away before its body had come", "body")
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                return b"", too_large
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts), None


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, once, and then what comes."""
    is_given = False

    async def replay() -> dict[str, Any]:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
