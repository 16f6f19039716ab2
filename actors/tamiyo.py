"""Tamiyo on Ray Serve: brought up, taken down, and asked, by trainers and over HTTP. Its replica is in `deciding`.

State, packet and configuration come with each request, so one deployment serves every run of a platform, and a replica
that dies takes nothing with it. Asking again is harmless, since a step is a pure function; that is why a failed call is
repeated here until its deadline.

HTTP is off, unless `actors.gateway` has started Serve before. The two settings of Serve that halve a handle's latency
are in `actors.cluster`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from actors.cluster import may_outlive_ray
from actors.deciding import APP, Tamiyo, code_digest
from esper.config import CanaryConfig, TamiyoConfig
from esper.leyline import (
    AdaptationSignal,
    EsperError,
    PermanentError,
    PolicyShelf,
    SystemStatePacket,
    TransientError,
    UnavailableError,
)
from esper.storage import Storage
from esper.tamiyo import initial_state
from esper.tamiyo.deciders import wanted_version

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from esper.tamiyo.http import Decision, DecisionRequest

DEPLOYMENT = "Tamiyo"
NUM_CPUS = 0.2
_LARGE_QUESTIONS = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20)}
"""Serve's replicas refuse more than 4 MB, and a host of 10,000 seeds sends 7."""
_RETRY_PAUSE_S = 0.1
DEPLOYING = threading.Lock()
"""Serve pickles a deployment with a registry of the whole process: two threads at once fail."""

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def deploy(
    *, name: str = APP, timeout_s: float = 60.0, canary: CanaryConfig | None = None, poll_s: float = 2.0
) -> None:
    """Starts Serve without its HTTP proxy, if none runs, and deploys Tamiyo; returns once it answers.

    Where the same code runs already and answers, nothing changes.

    Args:
        name: of the Serve application.
        timeout_s: for everything together.
        canary: what a nominated policy must show.
        poll_s: so often the storages' policies are looked at.

    Raises:
        UnavailableError: if it is not up by then; Serve goes on trying.
    """

    def bring_up() -> None:
        serve = quiet_serve()
        with DEPLOYING:
            require_ray()
            put_in_place(serve)

    def put_in_place(serve: Any) -> None:
        serve.start(proxy_location="Disabled")
        if _runs_already(name, timeout_s / 4):
            return  # running it again would replace the replica that other runs are asking
        make_deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=1,
            ray_actor_options={"num_cpus": NUM_CPUS, "runtime_env": {"env_vars": _LARGE_QUESTIONS}},
            # what comes while others are decided is decided together
            max_ongoing_requests=128,
            health_check_period_s=2.0,
            health_check_timeout_s=10.0,
            graceful_shutdown_timeout_s=2.0,
            graceful_shutdown_wait_loop_s=0.2,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(make_deployment(Tamiyo).bind(canary, poll_s), name=name, route_prefix=None)

    require_ray()
    try:
        with serve_errors("Tamiyo"):
            within(timeout_s, bring_up)
    except TimeoutError as error:
        raise UnavailableError(
            f"Tamiyo was not up after {timeout_s:g} s",
            remedy=f"see that {NUM_CPUS} CPUs are free (`ray status`), or look at the Serve page of the dashboard",
        ) from error


def undeploy(*, name: str = APP, timeout_s: float = 30.0, stop_serve: bool = False) -> None:
    """Removes Tamiyo. Harmless where nothing is deployed.

    Args:
        name: of the Serve application.
        timeout_s: for everything together.
        stop_serve: whether to stop Serve too, if no other application runs there. On a Ray that ends with its driver
            that is not needed, and the raylet prints two lines about it.

    Raises:
        UnavailableError: if that was not done within `timeout_s`.
    """

    def take_down() -> None:
        from ray.serve.exceptions import RayServeException

        serve = quiet_serve()
        try:
            serve.delete(name)
        except RayServeException:
            return  # no Serve runs here
        if stop_serve and not serve.status().applications:
            serve.shutdown()

    if not _ray_is_up():
        return
    try:
        with serve_errors("the end of Tamiyo"):
            within(timeout_s, take_down)
    except TimeoutError as error:
        raise UnavailableError(f"Tamiyo was not gone after {timeout_s:g} s") from error


class ServeController:
    """A `Controller` that asks the deployment. Works in a driver's threads and in train workers.

    It connects at its first decision, which therefore may take `config.startup_s`; later ones have
    `config.deadline_s`. Within that time a call that failed with its replica is repeated.

    Args:
        config: policy and limits; they travel with every request.
        seed: of the run; used where a decision is asked for with an empty state, which begins a new one.
        name: of the Serve application.
        storage: where its policies lie.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0, name: str = APP, storage: Storage | None = None) -> None:
        self._config = config
        self._config_json = config.model_dump_json()
        self._seed = seed
        self._name = name
        self._storage = _address_of(storage)
        self._asking = Asking(name)
        self._has_decided = False

    def __reduce__(self) -> tuple[Any, ...]:
        # a handle belongs to its process: the copy connects for itself
        return _revive, (self._config, self._seed, self._name, self._storage)

    def initial_state(self) -> dict[str, Any]:
        """Returns the state of a run that has not begun."""
        return initial_state(self._config, self._seed)

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """Decides about one epoch, exactly as the local step does.

        Raises:
            UnavailableError: if there is no answer by the deadline.
            ConflictError: if `state` is not a state of this version.
        """
        budget_s = self._config.deadline_s if self._has_decided else self._startup_s
        from esper.tamiyo.packing import pack

        packed = pack(packet)
        after, signal_json = self._asking.ask(
            lambda handle: handle.decide.remote(
                state or self.initial_state(),
                packed,
                self._config_json,
                self._storage,
                wanted_version(self._config),
            ),
            budget_s,
        )
        self._has_decided = True
        return after, AdaptationSignal.model_validate_json(signal_json)

    def about(self) -> dict[str, Any]:
        """Returns what the replica says of itself; raises `UnavailableError` after the deadline."""
        return self._asking.ask(lambda handle: handle.about.remote(), self._config.deadline_s)

    @property
    def _startup_s(self) -> float:
        return max(self._config.deadline_s, self._config.startup_s)


class HttpDesk:
    """Where the HTTP gateway asks the deployment; see `esper.tamiyo.http.Desk`.

    Args:
        storage: where the policies lie.
        timeout_s: for one answer.
        name: of the Serve application.
    """

    def __init__(self, storage: Storage, *, timeout_s: float = 10.0, name: str = APP) -> None:
        self._storage, self._timeout_s = _address_of(storage), timeout_s
        self._asking = Asking(name)

    def decide(self, request: DecisionRequest) -> Decision:
        """Runs one step; raises as `ServeController.decide`."""
        from esper.tamiyo.http import Decision
        from esper.tamiyo.packing import pack

        packed = pack(request.packet)
        state, signal_json = self._asking.ask(
            lambda handle: handle.decide.remote(
                request.state or initial_state(request.config, request.seed),
                packed,
                request.config.model_dump_json(),
                self._storage,
                request.version or wanted_version(request.config),
            ),
            self._timeout_s,
        )
        return Decision(state=state, signal=AdaptationSignal.model_validate_json(signal_json))

    def health(self, timeout_s: float) -> str:
        """`ok`, or why Tamiyo does not answer within `timeout_s`."""
        try:
            self._asking.ask(lambda handle: handle.about.remote(), timeout_s)
        except EsperError as error:
            return str(error)
        return "ok"

    def policies(self) -> PolicyShelf:
        """The policies of the storage; raises `StorageError` and `UnavailableError`."""
        answer = self._asking.ask(lambda handle: handle.policies.remote(self._storage), self._timeout_s)
        return PolicyShelf.model_validate_json(answer)


class Asking:
    """One process's way to the deployment: connects at the first question, and again after a failure.

    Args:
        name: of the Serve application.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: DeploymentHandle | None = None

    def ask(self, call: Callable[[DeploymentHandle], Any], budget_s: float) -> Any:
        """Calls the deployment until it answers or `budget_s` is over.

        Raises:
            UnavailableError: if there is no answer by then.
            EsperError: what the replica raised.
        """
        from grpc import RpcError
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import RayServeException

        deadline = time.monotonic() + budget_s
        num_tries, last = 0, "no answer"
        while (left_s := deadline - time.monotonic()) > 0:
            num_tries += 1
            try:
                handle = self._handle or self._connect(left_s)
                return call(handle).result(timeout_s=max(0.0, deadline - time.monotonic()))
            except RayTaskError as error:
                raise _cause(error) from error
            except TimeoutError:
                break
            except (RayActorError, RayServeException, RpcError, TransientError) as error:
                # the replica died, the line to it broke, or the application is not up yet: all pass
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if said != last:  # ten times a second nobody reads the same
                    _log.warning("tamiyo.call.failed", extra={"attempt": num_tries, "error": said})
                last = said
                self._handle = None
                time.sleep(max(0.0, min(_RETRY_PAUSE_S, deadline - time.monotonic())))
        left_s = max(0.0, deadline - time.monotonic())
        raise UnavailableError(
            f"Tamiyo did not answer: tried {num_tries} times in {budget_s:g} s, {left_s:.1f} s left; last: {last}",
            field=f"serve application {self._name}",
        )

    def _connect(self, timeout_s: float) -> DeploymentHandle:
        serve = quiet_serve()
        require_ray()
        # it asks Serve's controller without a deadline of its own
        handle: DeploymentHandle = within(timeout_s, lambda: serve.get_app_handle(self._name))
        self._handle = handle
        return handle


def _runs_already(name: str, answer_s: float) -> bool:
    """Whether the code of this checkout runs as `name` and answers within `answer_s`."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    serve = quiet_serve()
    application = serve.status().applications.get(name)
    if application is None or application.status != "RUNNING":
        return False
    try:
        about = serve.get_app_handle(name).about.remote().result(timeout_s=answer_s)
    except (RayError, RayServeException, TimeoutError):
        _log.warning("tamiyo.replica.silent", extra={"app": name})
        return False
    return about.get("code") == code_digest()


def _revive(config: TamiyoConfig, seed: int, name: str, storage: Storage | None) -> ServeController:
    return ServeController(config, seed=seed, name=name, storage=storage)


def _address_of(storage: Storage | None) -> Storage | None:
    """The address alone, without a driver that a process keeps open with it: it travels with every question."""
    return None if storage is None else Storage(storage.uri, storage.options)


def _cause(error: Any) -> EsperError:
    """The error that the replica raised, out of Ray's wrapping."""
    cause = error.cause
    if isinstance(cause, EsperError):
        return cause
    return PermanentError(f"Tamiyo failed: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")


def _ray_is_up() -> bool:
    import ray

    return ray.is_initialized()


def require_ray() -> None:
    """Raises `UnavailableError` without Ray: Serve would start one of its own, with nothing of Esper's settings."""
    if not _ray_is_up():
        raise UnavailableError("this process is not connected to Ray", remedy="enter actors.cluster.connected() first")


def quiet_serve() -> Any:
    """Ray Serve. It logs every step of a deployment, and of its end, to the terminal, where the live view is."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve


@contextmanager
def serve_errors(what: str) -> Iterator[None]:
    """Turns what Ray says of a Serve that ended meanwhile, or cannot deploy, into an `UnavailableError`."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except TimeoutError:
        raise  # the caller's own deadline
    except (RayError, RayServeException, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise UnavailableError(
            f"{what}: Ray Serve ended or refused meanwhile: {said}", remedy="try again; see `esper platform status`"
        ) from error


def within(timeout_s: float, call: Callable[[], Result]) -> Result:
    """Runs `call` in a daemon thread; raises `TimeoutError` if it takes longer, and leaves it to itself then."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread as it is
            future.set_exception(error)

    may_outlive_ray(threading.Thread(target=run, name="tamiyo-deadline", daemon=True)).start()
    return future.result(timeout=timeout_s)
