"""What a platform runs on Ray Serve: Tamiyo, who serves all platforms of a cluster, and its own HTTP gateway.

Serve's proxy comes with Serve or not at all, so where there shall be a gateway it has the first word.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from threading import Thread
from typing import NamedTuple

from actors import gateway, tamiyo
from actors.cluster import NAMESPACE
from actors.logs import log_as
from esper.config import HttpConfig, RunConfig, TamiyoConfig
from esper.leyline import EsperError
from esper.storage import Storage
from esper.urza.guard import Limits, limits_of

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


def deploy(
    storage: Storage,
    http: HttpConfig | None,
    config: TamiyoConfig,
    *,
    limits: Limits | None = None,
    replace: bool = True,
) -> None:
    """Deploys both, each within `config.startup_s`; what runs already stays.

    Args:
        storage: the platform's address.
        http: the gateway's settings; None for none.
        config: Tamiyo's settings.
        limits: what the gateway lets in; `limits_of(http)` if None, which reads or makes a token here.
        replace: see `gateway.deploy`.

    Raises:
        EsperError: the first thing that failed; Tamiyo is deployed even if the gateway cannot be.
    """
    timeout_s = config.startup_s
    try:
        if http is not None:
            limits = limits or limits_of(http)  # whoever has no token must not open a port
            gateway.start_serve(http, timeout_s=timeout_s)
    finally:
        tamiyo.deploy(timeout_s=timeout_s, canary=config.canary, poll_s=config.poll_s)
    if http is not None:
        gateway.deploy(storage, http, limits=limits, timeout_s=timeout_s, replace=replace)


def deploy_beside(storage: Storage, http: HttpConfig | None, config: TamiyoConfig) -> None:
    """`deploy` in an actor that ends when it is done. What fails is logged: a run goes on without a gateway, and asks
    Tamiyo for itself.

    Not in a thread of the driver, whose run may end first: a platform that others share would be left without them,
    and a driver that leaves Ray in the middle of a call may come to harm (`cluster.disconnect`).
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    limits = None
    if http is not None:
        try:
            limits = limits_of(http)  # here: the token lies on this machine
        except EsperError as error:
            _LOG.warning("gateway.deploy.failed", extra={"reason": str(error)})
            http = None
    here = ray.get_runtime_context().get_node_id()
    ray.remote(_Deploying).options(
        name=_name_of(storage),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        enable_task_events=False,
    ).remote(Storage(storage.uri, storage.options), http, limits, config)


def give_up(storage: Storage) -> None:
    """Ends a `deploy_beside` that is at it still."""
    import ray

    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(_name_of(storage), namespace=NAMESPACE))


class _Deploying:
    """Deploys in a thread, so that it answers meanwhile, and ends with it."""

    def __init__(self, storage: Storage, http: HttpConfig | None, limits: Limits | None, config: TamiyoConfig) -> None:
        log_as("serve-deploy")
        Thread(target=self._deploy, args=(storage, http, limits, config), name="serve-deploy", daemon=True).start()

    def __repr__(self) -> str:
        return "brings Tamiyo and the HTTP gateway up on Ray Serve"

    def _deploy(self, storage: Storage, http: HttpConfig | None, limits: Limits | None, config: TamiyoConfig) -> None:
        import ray

        try:
            deploy(storage, http, config, limits=limits, replace=False)
        except EsperError as error:
            _LOG.warning("serve.deploy.failed", extra={"reason": str(error)})
        finally:
            ray.kill(ray.get_runtime_context().current_actor)


def _name_of(storage: Storage) -> str:
    return f"serve-deploy-{storage.key}"


def applications(storage: Storage) -> list[Application]:
    """Both, absent ones too."""
    from ray.serve.exceptions import RayServeException

    serve = tamiyo.quiet_serve()
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
