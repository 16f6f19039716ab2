"""The settings of what people see."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esper.config.section import PositiveFloat, Section


class PageConfig(Section):
    """The live page of the runs, served by Nissa; `esper ui` serves it without a platform."""

    enabled: bool = True
    """The server itself starts when somebody first looks."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Bound to anything but loopback, the page asks for the token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8420
    """The first of 16 that are tried; 0: any that is free."""
    always_token: bool = False
    """Ask for the token on loopback too, where a machine has other users."""
    token_file: str = "~/.config/esper/http_token"  # noqa: S105 - a path
    """The token, mode 0600; made where there is none. The one of `urza.http`."""


class NissaConfig(Section):
    """What people see."""

    view: Literal["auto", "live", "plain", "quiet"] = "auto"
    """`auto`: live in a terminal, plain lines elsewhere."""
    dashboard: bool = True
    """Start Ray's dashboard (on loopback) when the run starts Ray itself."""
    metrics_every_s: PositiveFloat | None = 5.0
    """Seconds between two exports of metrics for Prometheus, through Ray's agents; null exports none."""
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$")] | None = None
    """An OpenTelemetry collector (OTLP over HTTP) that gets each adaptation as a trace; null sends none. Who sends is
    told by `OTEL_EXPORTER_OTLP_HEADERS`, never in the address."""
    page: PageConfig = PageConfig()
