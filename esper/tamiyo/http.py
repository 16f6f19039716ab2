"""Tamiyo over HTTP: its routes, for an app that lets people in and tells them what went wrong. Knows nothing of Ray.

POST /api/v1/decide      one step: state, packet and configuration in, the next state and the signal out
GET  /api/v1/policies    the stored policies, which of them decides, and how the one in shadow stands
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI
from pydantic import Field

from esper.config import TamiyoConfig
from esper.leyline import AdaptationSignal, Contract, PolicyShelf, SystemStatePacket

PREFIX = "/api/v1"


class DecisionRequest(Contract):
    """The arguments of one `step`.

    Attributes:
        state: what the last answer returned; empty begins a run.
        seed: of a run that begins.
        version: of the stored policy that shall decide, or `promoted`; null: the one that `config` names.
    """

    packet: SystemStatePacket
    state: dict[str, Any] = Field(default_factory=dict)
    config: TamiyoConfig = TamiyoConfig()
    seed: int = 0
    version: str | None = None


class Decision(Contract):
    """The next state, to be sent with the next packet, and the signal."""

    state: dict[str, Any]
    signal: AdaptationSignal


class Desk(Protocol):
    """Where Tamiyo is asked."""

    def decide(self, request: DecisionRequest) -> Decision:
        """Runs one step."""
        ...

    def policies(self) -> PolicyShelf:
        """The policies of the storage."""
        ...


def add_routes(app: FastAPI, desk: Callable[[], Desk]) -> None:
    """Adds the routes; they are synchronous, and FastAPI runs them in threads, where a desk may block.

    Args:
        app: turns an `EsperError` into an answer, and lets in whom it should.
        desk: called for every request.
    """

    @app.post(f"{PREFIX}/decide", tags=["tamiyo"])
    def decide(body: DecisionRequest) -> Decision:
        """One step. Asking again is harmless: nothing is kept here."""
        return desk().decide(body)

    @app.get(f"{PREFIX}/policies", tags=["tamiyo"])
    def policies() -> PolicyShelf:
        """The stored policies, which of them decides, and how the one in shadow stands."""
        return desk().policies()
