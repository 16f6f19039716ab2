"""What a platform runs on Ray Serve: Tamiyo, who serves all platforms of a cluster, and its own HTTP gateway.

Serve's proxy comes with Serve or not at all, so where there shall be a gateway it has the first word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import NamedTuple

from actors import gateway, tamiyo
from actors.cluster import may_outlive_ray
from esper.config import HttpConfig, RunConfig, TamiyoConfig
from esper.leyline import EsperError
from esper.storage import Storage

_LOG = logging.getLogger(__name__)


class Application(NamedTuple):
    """One application as `esper platform status` shows it."""

    name: str
    state: str
    detail: str


def wanted_http(config: RunConfig, *, is_shared: bool) -> HttpConfig | None:
    """The gateway's settings, or None where there shall be none: on a Ray that ends with its run, unless asked for."""
    http = config.urza.http
    return http if (is_shared if http.enabled is None else http.enabled) else None


def deploy(storage: Storage, http: HttpConfig | None, config: TamiyoConfig, *, replace: bool = True) -> None:
    """Deploys both, each within `config.startup_s`; what runs already stays, see `gateway.deploy` for `replace`.

    Raises:
        EsperError: the first thing that failed; Tamiyo is deployed even if the gateway cannot be.
    """
    timeout_s = config.startup_s
    try:
        if http is not None:
            gateway.start_serve(http, timeout_s=timeout_s)
    finally:
        tamiyo.deploy(timeout_s=timeout_s, canary=config.canary, poll_s=config.poll_s)
    if http is not None:
        gateway.deploy(storage, http, timeout_s=timeout_s, replace=replace)


def deploy_beside(storage: Storage, http: HttpConfig | None, config: TamiyoConfig) -> None:
    """`deploy` in a thread. What fails is logged: a run goes on without a gateway, and asks Tamiyo for itself."""

    def attempt() -> None:
        try:
            deploy(storage, http, config, replace=False)
        except EsperError as error:
            _LOG.warning("serve.deploy.failed", extra={"reason": str(error)})

    may_outlive_ray(Thread(target=attempt, name="serve-deploy", daemon=True)).start()


def applications(storage: Storage) -> list[Application]:
    """Both, absent ones too."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        found = serve.status().applications
    except RayServeException:
        found = {}
    details: dict[str, Callable[[], str]] = {
        tamiyo.APP: lambda: "Ray Serve application",
        gateway.app_name(storage): lambda: gateway.address(storage),
    }
    return [
        Application(name, found[name].status.value.lower(), detail())
        if name in found
        else Application(name, "absent", "Ray Serve has no such application")
        for name, detail in details.items()
    ]
