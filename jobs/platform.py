"""`esper platform`: the shared actors of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from actors.cluster import connected
from esper.config import parse_config
from esper.leyline import ConfigError


def up(storage: str, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Brings the platform up on the cluster at `RAY_ADDRESS`; returns the state of its actors.

    Args:
        storage: the address that it serves.
        overrides: of the configuration, such as `urza.http.port=8080`.
    """
    _need_cluster()
    with connected():
        from actors import platform  # imports Ray, whose settings come first

        platform.up(parse_config({"storage": storage}, overrides), detached=True, wait_for_serve=True)
        return [state._asdict() for state in platform.find(storage)]


def status(storage: str) -> list[dict[str, Any]]:
    """Returns the state of the platform's actors."""
    _need_cluster()
    with connected():
        from actors import platform  # imports Ray, whose settings come first

        return [state._asdict() for state in platform.find(storage)]


def down(storage: str) -> list[dict[str, Any]]:
    """Takes the platform down; returns what was ended."""
    _need_cluster()
    with connected():
        from actors import platform  # imports Ray, whose settings come first

        return [state._asdict() for state in platform.down(storage)]


def _need_cluster() -> None:
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS is not set: a platform lives on a running cluster",
            remedy="ray start --head, then RAY_ADDRESS=auto esper platform up; a plain `esper train` needs none of it",
        )
