"""The asset hub's settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esper.config.section import PositiveFloat, PositiveInt, Section


class HttpConfig(Section):
    """Urza's HTTP gateway, on Ray Serve. Its routes and their form: /docs below its address."""

    enabled: bool | None = None
    """null: on for a platform that runs share (`esper platform up`, or a run that joins a cluster), off on a Ray that
    ends with its run: it is two more processes."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Bound to anything but loopback, every request must carry the bearer token. One for all platforms of a cluster."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Where Ray Serve's proxy listens; one for all platforms of a cluster."""
    always_token: bool = False
    """Ask for the bearer token on loopback too, where a machine has other users."""
    token_file: str = "~/.config/esper/http_token"  # noqa: S105 - a path
    """The bearer token, mode 0600; made where there is none."""
    max_body_kb: PositiveInt = 1024
    """Larger requests are refused."""


class UrzaConfig(Section):
    """The asset hub."""

    maintain_every_s: PositiveFloat | None = 3600.0
    """From one round of maintenance to the next: compaction, checkpoint, vacuum, blobs that nothing names, the tables
    for other readers. null leaves it to `esper urza maintain`."""
    kept_hours: Annotated[float, Field(ge=0)] = 24.0
    """Replaced files of a table stay so long, for whoever reads it meanwhile."""
    grace_hours: Annotated[float, Field(ge=1)] = 24.0
    """A blob that no record names stays so long: longer than any upload, lease or clock is late."""
    hot_mb: PositiveFloat = 256.0
    """Kernels that Urza keeps at hand in the object store."""
    http: HttpConfig = HttpConfig()
