"""The HTTP gateway as a Ray Serve deployment: the app of `esper.urza.http`, with Tamiyo's routes, behind Serve's proxy.

It keeps nothing and holds no secret but the hash of the bearer token. It shares Serve with Tamiyo: Serve's proxy, its
host and its port are settled for the whole cluster when Serve starts, so whoever wants HTTP must start it
(`start_serve`). Where Serve runs without a proxy already, there is no gateway, and `deploy` says so.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING, Any

from actors import tamiyo, urza
from actors.logs import log_as
from esper.config import HttpConfig
from esper.leyline import ConflictError, UnavailableError
from esper.storage import Storage
from esper.urza.guard import Limits, bracketed, is_loopback, limits_of

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fastapi import FastAPI


NUM_CPUS = 0.1
HEALTH_S = 5.0
"""`/health` says that Urza does not answer after so long."""
_PREFIX = "urza-http-"
_RECONNECT_S = 5.0
"""A platform that was taken down and brought up again has another Urza: the gateway looks for it as often as this."""


def app_name(storage: Storage) -> str:
    """The Serve application of a storage address."""
    return f"{_PREFIX}{storage.key}"


class Gateway:
    """The deployment.

    Args:
        storage: whose Urza it asks.
        limits: what it lets in.
    """

    def __init__(self, storage: Storage, limits: Limits) -> None:
        log_as("urza-http")
        self._storage = storage
        self._limits = limits
        self._desk = tamiyo.HttpDesk(storage)
        self._hub: urza.UrzaHandle | None = None
        self._connected_at = 0.0

    def __serve_build_asgi_app__(self) -> FastAPI:
        from esper.tamiyo.http import add_routes
        from esper.urza.http import build_app  # only a replica pays for FastAPI

        app = build_app(
            self.hub,
            self._limits,
            census=lambda: self.hub().within(HEALTH_S).census(),
            tamiyo=lambda: self._desk.health(HEALTH_S),
        )
        add_routes(app, lambda: self._desk)
        return app

    def limits(self) -> Limits:
        """What it lets in."""
        return self._limits

    def hub(self) -> urza.UrzaHandle:
        """The Urza of the address; raises `UnavailableError` if none runs."""
        if self._hub is None or time.monotonic() - self._connected_at > _RECONNECT_S:
            self._hub = urza.connect(self._storage.uri)
            self._connected_at = time.monotonic()
        return self._hub


def start_serve(http: HttpConfig, *, timeout_s: float = 60.0) -> None:
    """Starts Serve with its HTTP proxy on the head node; where Serve runs, it stays as it is.

    Raises:
        ConflictError: if the port is taken.
        UnavailableError: if it is not up after `timeout_s`, or this process has left Ray.
    """

    def bring_up() -> None:
        serve = tamiyo.quiet_serve()
        with tamiyo.DEPLOYING:
            tamiyo.require_ray()
            if serve_runs():
                return
            _check_port(http)
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": http.host, "port": http.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )

    _within(timeout_s, bring_up, "Ray Serve")


def deploy(
    storage: Storage,
    http: HttpConfig,
    *,
    limits: Limits | None = None,
    replace: bool = True,
    timeout_s: float = 60.0,
) -> str:
    """Deploys the gateway of a storage address and returns where it listens.

    One that runs with the same limits stays as it is; one with other limits is replaced if `replace` says so. A run
    must not: its configuration knows nothing of the token that somebody asked for when the platform came up.

    Args:
        storage: whose Urza it asks.
        http: where it listens.
        limits: what it lets in; None: as `http` says, with the token of this machine.
        replace: see above.
        timeout_s: for everything together.

    Raises:
        ConflictError: if Serve runs without HTTP or more openly than `http` says, or another platform has the routes.
        ConfigError: if the token that the host needs cannot be had.
        UnavailableError: if it is not up after `timeout_s`, or this process has left Ray.
    """
    wanted = limits or limits_of(http)
    answer_s = timeout_s / 4  # one that is slow on a busy machine is not replaced for it

    def bring_up() -> None:
        serve = tamiyo.quiet_serve()
        with tamiyo.DEPLOYING:
            tamiyo.require_ray()
            status = serve.status()
            check_place(http, _listens_at() if status.proxies else None)
            if not replace and app_name(storage) in status.applications:
                return
            if wanted == _limits_in_force(storage, answer_s):
                return
            _check_routes(storage, status)
            make_deployment = serve.deployment(
                name="Gateway",
                num_replicas=1,
                ray_actor_options={"num_cpus": NUM_CPUS},
                max_ongoing_requests=64,
                graceful_shutdown_timeout_s=2.0,
                graceful_shutdown_wait_loop_s=0.2,
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            app: Any = make_deployment(serve.ingress()(Gateway))  # pyright: ignore[reportArgumentType] - untyped
            serve.run(app.bind(Storage(storage.uri, storage.options), wanted), name=app_name(storage), route_prefix="/")

    _within(timeout_s, bring_up, "the HTTP gateway")
    tamiyo.require_ray()
    return address(storage, answer_s=answer_s)


def undeploy(storage: Storage, *, timeout_s: float = 30.0) -> None:
    """Removes the gateway; harmless where there is none. Raises `UnavailableError` after `timeout_s`."""
    import ray

    def take_down() -> None:
        serve = tamiyo.quiet_serve()
        if serve_runs() and app_name(storage) in serve.status().applications:
            serve.delete(app_name(storage))

    if ray.is_initialized():
        _within(timeout_s, take_down, "the end of the HTTP gateway")


def address(storage: Storage, *, answer_s: float = HEALTH_S) -> str:
    """Where the gateway of a storage address listens, or why it does not; it is given `answer_s` to answer."""
    serve = tamiyo.quiet_serve()
    status = serve.status()
    if app_name(storage) not in status.applications:
        return "Ray Serve has no such application"
    host, port = _listens_at()
    where = f"http://{bracketed(host)}:{port}"
    limits = _limits_in_force(storage, answer_s)
    if limits is None:
        return f"{where} does not answer yet"
    return where if limits.token_digest is None else f"{where} (bearer token required)"


def _limits_in_force(storage: Storage, answer_s: float) -> Limits | None:
    """What the gateway that runs lets in; None if none runs and answers within `answer_s`."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    serve = tamiyo.quiet_serve()
    application = serve.status().applications.get(app_name(storage))
    if application is None or application.status != "RUNNING":
        return None
    try:
        limits = serve.get_app_handle(app_name(storage)).limits.remote().result(timeout_s=answer_s)
    except (RayError, RayServeException, TimeoutError):
        _LOG.warning("gateway.replica.silent", extra={"app": app_name(storage)})
        return None
    return limits


def check_place(http: HttpConfig, listens_at: tuple[str, int] | None) -> None:
    """Refuses a Serve that these settings do not go with.

    Args:
        http: the settings.
        listens_at: host and port of Serve's proxy; None without one.

    Raises:
        ConflictError: if it has no proxy, or one that is open to more than `http` says.
    """
    if listens_at is None:
        raise ConflictError(
            "Ray Serve runs on this cluster without HTTP",
            field="urza.http.enabled",
            remedy="take all platforms down (esper platform down), then bring one up with HTTP",
        )
    host, port = listens_at
    if is_loopback(http.host) and not is_loopback(host):
        raise ConflictError(
            f"Ray Serve of this cluster listens on {host}:{port}, and a gateway for loopback asks for no token",
            field="urza.http.host",
            remedy=f"set urza.http.host={host}, or take all platforms down first",
        )


def _check_routes(storage: Storage, status: Any) -> None:
    others = [name for name in status.applications if name.startswith(_PREFIX) and name != app_name(storage)]
    if others:
        raise ConflictError(
            f"{others[0]} of another platform has the routes of this cluster",
            field="urza.http.enabled",
            remedy="set urza.http.enabled=false, or give each platform a cluster of its own",
        )


def _check_port(http: HttpConfig) -> None:
    """Serve would try a port that is taken for a minute, and leave Tamiyo waiting too."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ConflictError(
                f"cannot listen on {http.host}:{http.port}: {error.strerror}",
                field="urza.http.port",
                remedy="choose another urza.http.port",
            ) from error


def serve_runs() -> bool:
    """Whether Ray Serve runs on the cluster that this process is connected to."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _listens_at() -> tuple[str, int]:
    """Serve's own word: the options of whoever started it, which no public function tells."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config  # pyright: ignore[reportOptionalMemberAccess] - it raises instead
    return str(options.host), int(options.port)


def _within(timeout_s: float, call: Any, what: str) -> None:
    try:
        with tamiyo.serve_errors(what):
            tamiyo.within(timeout_s, call)
    except TimeoutError as error:
        raise UnavailableError(
            f"{what} was not there after {timeout_s:g} s",
            remedy=f"see that {NUM_CPUS} CPUs are free (`ray status`), or look at the Serve page of the dashboard",
        ) from error
