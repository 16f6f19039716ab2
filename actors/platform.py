"""The platform: Oona, Urza, Tezzeret, Nissa and Tamiyo of one storage address, brought up, found again, taken down.

On a Ray that was started for one run it ends with that run's driver. On a joined cluster its actors are detached and
runs share them. Actor names carry the storage address's key, so that platforms do not meet.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from actors import autonomous, gateway, nissa, oona, pool, serving, tamiyo, urza
from actors.cluster import NAMESPACE
from actors.settings import Settings
from esper.config import RunConfig
from esper.leyline import Bus, ConflictError, EsperError, NotFoundError, UnavailableError
from esper.leyline.keys import load, load_or_create, public_hex
from esper.nissa import otlp
from esper.oona.log import directory_of
from esper.storage import Storage

_LOG = logging.getLogger(__name__)


class ActorState(NamedTuple):
    """One actor of a platform, as `esper platform status` shows it."""

    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Platform:
    """Handles of a running platform. Pickles: workers get it as it is.

    Attributes:
        storage: what it serves.
        bus: Oona; `bus.bus()` makes a bus for the calling process.
        hub: Urza.
        compilers: Tezzeret's pool; while a handle is held its actor lives.
        view: Nissa.
        public_key: whose signature its kernels carry, 64 hexadecimal digits.
        watcher: AutonomousTamiyo; None for a run that asks.
        notes: what people should hear of once: settings that another run's hold in place of.
    """

    storage: Storage
    bus: oona.OonaHandle
    hub: urza.UrzaHandle
    compilers: Any
    view: nissa.NissaHandle
    public_key: str
    watcher: Any = None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def running(config: RunConfig, *, owned: bool) -> Iterator[Platform]:
    """The platform of the run's storage: found, or brought up.

    Args:
        config: the run's configuration; the first run's settings of the bus, the pool and Nissa hold for all that share
            it. `Platform.notes` says what differs of Nissa's.
        owned: whether this Ray ends with this process; then the platform is taken down at the end, else left running.

    Raises:
        EsperError: if a system does not come up.
    """
    platform = up(config, detached=not owned)
    try:
        yield platform
    finally:
        if owned:
            _take_down(platform, config)


def up(config: RunConfig, *, detached: bool, wait_for_serve: bool = False) -> Platform:
    """Brings up whatever of the platform does not run yet; returns once Oona and Urza answer.

    Args:
        config: see `running`.
        detached: whether it outlives this process.
        wait_for_serve: whether to wait for what runs on Ray Serve too: Tamiyo and the HTTP gateway. A run need not, and
            goes on without a gateway.

    Raises:
        ConfigError: if traces are wanted and their exporter is not installed; nothing was started then.
        EsperError: if a system does not come up; what did stays up.
    """
    otlp.check(config.nissa.otlp_endpoint)
    storage = Storage.at(config.storage, config.storage_options)
    key = load_or_create(config.tezzeret.key_file)
    bus = _oona(storage, config, detached=detached)
    # Serve takes seconds; nobody asks for a decision before the first epoch has ended
    http = serving.wanted_http(config, is_shared=detached)
    if not wait_for_serve:
        serving.deploy_beside(storage, http, config.tamiyo)
    # actors find each other by name: a handle among an actor's arguments would not survive its restart
    make_bus = partial(_bus, bus.prefix)
    hub = urza.spawn(
        config.storage,
        config.storage_options,
        make_bus=make_bus,
        detached=detached,
        config=config.urza,
        archive=config.oona.archive,
    )
    compilers = _pool(storage, config, make_bus, public_hex(key), detached=detached)
    wanted = Settings(config.nissa.metrics_every_s, config.nissa.page, config.nissa.otlp_endpoint)
    kept = _kept_settings(f"nissa-{storage.key}", wanted)
    for words in kept:
        _LOG.warning("nissa.settings.kept", extra={"what": words})
    view = nissa.spawn(
        make_bus,
        partial(urza.connect, config.storage, config.storage_options),
        name=f"nissa-{storage.key}",
        detached=detached,
        metrics_every_s=wanted.metrics_every_s,
        storage=storage,
        page=wanted.page,
        otlp_endpoint=wanted.otlp_endpoint,
    )
    if wait_for_serve:
        serving.deploy(storage, http, config.tamiyo)
    watcher = None
    if config.tamiyo.control == "listen":
        watcher = autonomous.spawn(make_bus, storage, detached=detached, canary=config.tamiyo.canary)
        autonomous.wait_for(watcher, config.tamiyo.startup_s)
    return Platform(storage, bus, hub, compilers, view, public_hex(key), watcher, kept)


def find(address: str, options: dict[str, Any] | None = None) -> list[ActorState]:
    """Says which actors of an address's platform are there, dead ones too."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    storage = Storage.at(address, options)
    states = []
    for name in sorted(name for name in _names() if f"-{storage.key}" in name):
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            continue  # it has ended since it was listed: a worker that was let go, a shard that is being stopped
        try:
            # every actor answers this, without a method of its own
            text = str(ray.get(actor.__ray_call__.remote(repr), timeout=10.0))
        except GetTimeoutError:
            states.append(ActorState(name, "busy", "no answer within 10 s"))
        except RayActorError as error:
            states.append(ActorState(name, "dead", str(error).splitlines()[0]))
        else:
            states.append(ActorState(name, "alive", text))
    return [*states, *(ActorState(*application) for application in serving.applications(storage))]


def down(address: str, options: dict[str, Any] | None = None) -> list[ActorState]:
    """Takes a detached platform down; what is stored stays. Returns what was ended."""
    import ray

    storage = Storage.at(address, options)
    ended = []
    serving.give_up(storage)
    # then, while Urza can take it: work that nobody gives back counts as the death of its worker, and two are enough
    with contextlib.suppress(ValueError):
        _dismiss(ray.get_actor(f"compilers-{storage.key}", namespace=NAMESPACE))
    with contextlib.suppress(UnavailableError):
        urza.connect(address, options).close()
    with contextlib.suppress(NotFoundError, UnavailableError):
        oona.connect(oona.prefix_of(storage)).stop()
    for state in find(address, options):
        if state.name in {tamiyo.APP, gateway.app_name(storage)}:
            continue
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(state.name, namespace=NAMESPACE))
        ended.append(ActorState(state.name, "ended"))
    gateway.undeploy(storage)
    others = [name for name in _names() if name.startswith("urza-") and storage.key not in name]
    if not others:  # Tamiyo keeps nothing and serves every platform of the cluster
        tamiyo.undeploy(stop_serve=True)
        ended.append(ActorState(tamiyo.APP, "ended"))
    return ended


def _names() -> list[str]:
    """Names of all living actors of Esper on this cluster."""
    import ray

    entries = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
    return [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE]


def _oona(storage: Storage, config: RunConfig, *, detached: bool) -> oona.OonaHandle:
    prefix = oona.prefix_of(storage)
    try:
        return oona.connect(prefix)
    except NotFoundError:
        pass
    try:
        return oona.spawn(config.oona, directory_of(storage), prefix=prefix, detached=detached)
    except ConflictError:
        # another driver was faster; anything else is told by this
        return oona.connect(prefix)


def _kept_settings(name: str, wanted: Settings) -> tuple[str, ...]:
    """A note, where a Nissa of this name runs already with other settings. Nothing waits for one that is not there."""
    try:
        view = nissa.connect(name=name)
        differ = view.settings().told_beside(wanted)
    except UnavailableError:
        return ()
    if not differ:
        return ()
    return (f"Nissa runs already, with the settings of the run that started it: {', '.join(differ)}",)


def _pool(storage: Storage, config: RunConfig, make_bus: Callable[[], Bus], public_key: str, *, detached: bool) -> Any:
    """Starts the pool; one that runs already is left as it is."""
    plan = pool.Plan(
        prefix=f"tezzeret-{storage.key}",
        address=config.storage,
        options=config.storage_options,
        config=config.tezzeret,
        make_bus=make_bus,
        private_key=partial(_signer, config.tezzeret.key_file, public_key),
    )
    return pool.spawn(f"compilers-{storage.key}", plan, detached=detached)


def _bus(prefix: str) -> Bus:
    return oona.connect(prefix).bus()


def _signer(key_file: str, public_key: str) -> Any:
    """The signing key of a compile worker, which must be the platform's own: one signer, one key."""
    key = load(key_file)
    if public_hex(key) != public_key:
        raise ConflictError(
            "this node has another signing key than the platform",
            field="tezzeret.key_file",
            remedy=f"copy the platform's {key_file} to every compile node, mode 0600",
        )
    return key


def _take_down(platform: Platform, config: RunConfig) -> None:
    """Makes everything durable before Ray ends. A system that does not answer any more is told of, no more."""
    serving.give_up(platform.storage)
    _stop_consumers(platform)
    has_gateway = serving.wanted_http(config, is_shared=False) is not None
    end_gateway = partial(gateway.undeploy, platform.storage, timeout_s=config.tamiyo.deadline_s)
    for what, end in (
        *((("gateway", end_gateway),) if has_gateway else ()),
        ("urza", platform.hub.close),
        ("oona", platform.bus.stop),
        ("tamiyo", partial(tamiyo.undeploy, timeout_s=config.tamiyo.deadline_s)),
    ):
        try:
            end()
        except EsperError as error:
            _LOG.warning("platform.end.failed", extra={"system": what, "reason": str(error)})


def _stop_consumers(platform: Platform) -> None:
    """Lets those who wait for news leave, so that no question is open when Oona ends."""
    others = (platform.view.actor, platform.watcher)
    _dismiss(platform.compilers, *(actor for actor in others if actor is not None))


def _dismiss(compilers: Any, *others: Any) -> None:
    """Asks actors to leave, and to give back what they were at. One that does not is told of, no more.

    The pool is given the time that it gives its workers: one that starts only now has to be there before it can leave,
    and one that is ended instead counts as dead to its work.
    """
    import ray

    leaves, leaving = compilers.stop.remote(), [actor.stop.remote() for actor in others]
    late = ray.wait(leaving, num_returns=len(leaving), timeout=10.0)[1] if leaving else []
    late += ray.wait([leaves], timeout=pool.LEAVES_S)[1]
    if late:
        _LOG.warning("platform.end.failed", extra={"system": "consumers", "reason": f"{len(late)} did not leave"})
