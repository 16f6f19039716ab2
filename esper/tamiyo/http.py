"""Tamiyo over HTTP: its routes, for an app that lets people in and tells them what went wrong. Knows nothing of Ray.

POST /api/v1/decide      one step: state, packet and configuration in, the next state and the signal out
GET  /api/v1/policies    the stored policies, which of them decides, and how the one in shadow stands
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Protocol

from fastapi import FastAPI
from pydantic import Field

from esper.config import TamiyoConfig
from esper.leyline import (
    AdaptationSignal,
    ConflictError,
    Contract,
    NotFoundError,
    PolicyShelf,
    SiteError,
    SystemStatePacket,
    UserError,
)
from esper.leyline.contract import API_VERSION
from esper.leyline.errors import excerpt
from esper.tamiyo.memory import read_state

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
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None


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
        """One step. Asking again with the same state is harmless: nothing is kept here."""
        check(body)
        try:
            return desk().decide(body)
        except NotFoundError as error:  # only the policy is looked for
            named_by = "config.gnn.version" if body.version is None else "version"
            raise NotFoundError(error.message, field=error.field or named_by, remedy=error.remedy) from error

    @app.get(f"{PREFIX}/policies", tags=["tamiyo"])
    def policies() -> PolicyShelf:
        """The stored policies, which of them decides, and how the one in shadow stands."""
        return desk().policies()


def check(request: DecisionRequest) -> None:
    """Refuses what has the right form and cannot be meant: parts of other runs, of epochs to come, epochs seen before.

    A trainer of Esper puts its packet together itself, and what comes by the bus is checked as it is gathered; over
    HTTP anybody may put one together. Missing and older health is Tamiyo's to judge.

    Raises:
        UserError: if the packet's parts do not belong together; it names the first that does not.
        SiteError: if a site has two reports.
        ConflictError: if `state` is none of this version, or has seen the epoch already.
    """
    packet = request.packet
    _check_version(packet.api_version, "packet")
    _check_layers(packet)
    seen, epoch = read_state(request.state).epoch if request.state else -1, packet.epoch.epoch
    if epoch <= seen:
        raise ConflictError(
            f"the state has seen epoch {seen} already, and this is epoch {epoch}",
            field="packet.epoch.epoch",
            remedy="send the state that was returned for the epoch before; an empty one begins a run",
        )


def _check_layers(packet: SystemStatePacket) -> None:
    known: set[str] = set()
    for i, layer in enumerate(packet.layers):
        where = f"packet.layers.{i}"
        _check_version(layer.api_version, where)
        if layer.layer_id in known:
            raise SiteError(
                f"a second report of {excerpt(layer.layer_id)}", field=f"{where}.layer_id", remedy="send one a site"
            )
        known.add(layer.layer_id)
        _check_same(layer.run_id, packet.run_id, f"{where}.run_id", "packet.run_id")
        if layer.epoch > packet.epoch.epoch:
            raise UserError(
                f"epoch {layer.epoch} is later than the packet's own, {packet.epoch.epoch}",
                field=f"{where}.epoch",
                remedy="send the health that was measured up to packet.epoch.epoch",
            )
        for k, seed in enumerate(layer.seeds):
            _check_same(seed.layer_id, layer.layer_id, f"{where}.seeds.{k}.layer_id", f"{where}.layer_id")
    _check_same(packet.epoch.run_id, packet.run_id, "packet.epoch.run_id", "packet.run_id")


def _check_same(value: str | int, expected: str | int, field: str, other: str) -> None:
    if value != expected:
        raise UserError(
            f"{excerpt(value)} is not the {excerpt(expected)} of {other}",
            field=field,
            remedy="send what one run reports, each site under its own name",
        )


def _check_version(version: int, where: str) -> None:
    if version != API_VERSION:
        raise UserError(
            f"version {version} of the contracts is not spoken here",
            field=f"{where}.api_version",
            remedy=f"send version {API_VERSION}, as /openapi.json describes it, or leave the field out",
        )
