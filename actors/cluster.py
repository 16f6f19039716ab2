"""Joining or starting Ray: where it runs, its token, its settings. Knows nothing of Esper's actors."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from esper.leyline import UnavailableError

NAMESPACE = "esper"
_LOG = logging.getLogger(__name__)
_OUTLIVING: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_NOTING = threading.Lock()
_LEAVING_S = 10.0
"""So long this process waits for calls of Ray that other threads are at, before it leaves."""
_LOOK_S = 0.01
TOKEN_FILE = Path(".ray") / "auth_token"
_SUBMISSION_ID, _JOB_RECORDS = "job_submission_id", "job"  # names of Ray's own

_SETTINGS: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    # the controller polls every 2 s by default, and `ray.train.report` waits for it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # else the dashboard's Train page is an error
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # half the latency of a deployment handle, and calls from plain threads
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    # the first of these would also open an HTTP port on every replica, and hold each back 30 s as it ends
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of the driver and of every worker of a Ray that is started here; what the user has set stays."""


@dataclass(frozen=True)
class Cluster:
    """A Ray that this process is connected to.

    Attributes:
        owned: whether it was started here and ends with this process.
        dashboard: address of its dashboard; None without one, or where the caller had connected already.
    """

    owned: bool
    dashboard: str | None


def prepare_environment() -> None:
    """Sets Ray's environment for this process and its children."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    if os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_private_token()
    ray = sys.modules.get("ray")
    if ray is not None and not ray.is_initialized():
        _reread_environment()


def _reread_environment() -> None:
    """Makes a Ray that was imported already take the settings in: scripts import it first, and would have no token."""
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue] - Cython

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def may_outlive_ray(thread: threading.Thread) -> threading.Thread:
    """Notes a thread that calls Ray and that nobody waits for before this process leaves Ray; returns it.

    Its next call would start a Ray of its own, or join any that runs on this machine; see `disconnect`.
    """
    with _NOTING:
        _OUTLIVING.add(thread)
    return thread


def joins() -> bool:
    """Whether `connected` would join a Ray instead of starting one."""
    ray = sys.modules.get("ray")  # who has not imported it has not started it either
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


@contextlib.contextmanager
def connected(*, dashboard: bool = True, metadata: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Joins the cluster at `RAY_ADDRESS`, or starts one here that ends with the block.

    Args:
        dashboard: whether to start the dashboard with a Ray that is started here (on loopback), if it can be.
        metadata: entries of the job's metadata, shown in the dashboard.

    Raises:
        UnavailableError: if the address does not answer.
    """
    prepare_environment()
    import ray
    from ray.job_config import JobConfig

    if ray.is_initialized():
        yield Cluster(owned=False, dashboard=None)
        return
    metadata = dict(metadata or {})
    job = JobConfig(metadata=metadata, ray_namespace=NAMESPACE)
    options: dict[str, Any]
    joining = joins()
    if joining:
        options = {"runtime_env": {"env_vars": _worker_environment()}}
    else:
        # without an address Ray would join any head that somebody started on this machine; None starts the dashboard
        # where that can be done, and True would not start Ray without it
        shown = None if dashboard else False
        options = {"address": "local", "num_cpus": max(2, os.cpu_count() or 2), "include_dashboard": shown}
    try:
        context = ray.init(
            namespace=NAMESPACE,
            job_config=job,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **options,
        )
    except Exception as error:  # Ray raises a bare Exception where its processes do not come up in time
        where = os.environ.get("RAY_ADDRESS", "here")
        raise UnavailableError(
            f"Ray did not start or answer at {where}: {' '.join(str(error).split())[:300]}",
            remedy="try again on a less busy machine; on a cluster check RAY_ADDRESS and RAY_AUTH_MODE=token",
        ) from error
    _forget_serve()  # of a Ray that somebody left by `ray.shutdown` alone
    try:
        _tell_submission(metadata)
        yield Cluster(owned=not joining, dashboard=f"http://{context.dashboard_url}" if context.dashboard_url else None)
    finally:
        disconnect()


def disconnect() -> None:
    """Ends this process's part in Ray, and Ray itself if this process started it. Harmless where there is none.

    While Ray takes its core worker down, another thread that lets go of an `ObjectRef` ends the whole process: exit
    status 1, and no word but in Ray's own log (Ray 2.60). The garbage collector does that in whichever thread it
    happens to run; so what waits for it goes first, and it rests meanwhile.

    Likewise a call that another thread is at ends the process, by its exit status or a signal. So such calls are waited
    for, `_LEAVING_S` at most, and those that come meanwhile fail.

    Nor does Ray start by itself before the threads have ended that are known to call it still (`may_outlive_ray`).
    """
    import ray

    with _NOTING:
        outliving = [thread for thread in _OUTLIVING if thread.is_alive()]
    _start_no_ray_for(outliving)
    was_on = gc.isenabled()
    try:
        with _refusing():
            gc.disable()
            gc.collect()
            ray.shutdown()
        _forget_serve()
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Lets every call of Ray by another thread fail, once those have ended that are under way (Ray 2.60).

    Ray goes on saying that it is there: who hears that it is not, as Ray Serve does, starts another.
    """
    from ray._private.worker import global_worker
    from ray.exceptions import RaySystemError

    leaving, asks = threading.current_thread(), global_worker.check_connected

    def refuse() -> None:
        if threading.current_thread() is not leaving:
            raise RaySystemError("this process is leaving Ray")
        asks()

    deadline = time.monotonic() + _LEAVING_S
    vars(global_worker)["check_connected"] = refuse
    try:
        while (calling := _calling()) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if calling:
            _LOG.warning("ray.calls.open", extra={"threads": calling, "waited_s": _LEAVING_S})
        yield
    finally:
        del vars(global_worker)["check_connected"]


def _calling() -> list[str]:
    """Names of the other threads that are at a call of Ray, by their stacks. Ray's own threads do not count."""
    ours = {thread.ident: thread.name for thread in threading.enumerate() if thread is not threading.current_thread()}
    return sorted(ours[ident] for ident, frame in sys._current_frames().items() if ident in ours and _is_call(frame))  # noqa: SLF001 - a documented function


def _is_call(frame: FrameType | None) -> bool:
    """Whether a stack, told by its innermost frame, goes through Ray and does not begin there, or in an event loop."""
    inside, begins_in = False, ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        inside = inside or package == "ray"
        if module not in {"threading", "concurrent.futures.thread"}:
            begins_in = package
        frame = frame.f_back
    return inside and begins_in not in {"ray", "asyncio"}


def _start_no_ray_for(threads: list[threading.Thread]) -> None:
    """Keeps Ray from starting at the first call of anybody until these threads have ended (Ray 2.60)."""
    from ray._private import auto_init_hook

    if not threads or not auto_init_hook.enable_auto_connect:
        return

    def wait() -> None:
        for thread in threads:
            thread.join()
        auto_init_hook.enable_auto_connect = True

    auto_init_hook.enable_auto_connect = False
    threading.Thread(target=wait, name="ray-rests", daemon=True).start()


def _forget_serve() -> None:
    """Drops the handle of Serve's controller that Ray keeps for this process.

    Ray tells a handle of an earlier session by its job's id, and the first job of every Ray has the same one: on the
    next Ray that this process starts, Serve would count as running there while nobody has started it (Ray 2.60).
    """
    context = sys.modules.get("ray.serve.context")
    if context is not None:
        context._set_global_client(None)  # noqa: SLF001 - nothing public forgets it without ending Serve


def _worker_environment() -> dict[str, str]:
    """The settings that workers of a joined cluster need, less those that `ray job submit` hands to them already."""
    given = _submission().get("runtime_env", {}).get("env_vars", {})
    return {key: os.environ[key] for key in _SETTINGS if key != "RAY_AUTH_MODE" and key not in given}


def _tell_submission(metadata: Mapping[str, str]) -> None:
    """Adds `metadata` to the record of the `ray job submit` that started this process, if one did.

    The dashboard and `ray job list` show that record; a driver's own metadata do not reach it.
    """
    submission = _submission().get("metadata", {}).get(_SUBMISSION_ID)
    if submission is None or not metadata:
        return
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental import internal_kv

    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission).encode()
    record = json.loads(internal_kv._internal_kv_get(key, namespace=_JOB_RECORDS))  # noqa: SLF001 - no other way
    record["metadata"] = {**(record.get("metadata") or {}), **metadata}
    internal_kv._internal_kv_put(key, json.dumps(record).encode(), namespace=_JOB_RECORDS)  # noqa: SLF001 - likewise


def _submission() -> dict[str, Any]:
    """What `ray job submit` says to the process it starts; empty in any other."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))


def _ensure_private_token() -> None:
    """Makes Ray's token file readable by its owner alone; Ray itself creates it 0644."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE)
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
