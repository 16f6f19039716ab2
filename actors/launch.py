"""One run on Ray, from the driver's side: cluster, platform, trainer, view, and a clean end whatever happens.

`run` is the entry point that `esper.grow` finds (group `esper.runtime`); the command line calls it too.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from actors.cluster import Cluster, connected, joins
from esper.config import ParquetImageData, RunConfig, TextData, dump_config
from esper.leyline import (
    EsperError,
    FaultPlan,
    NoFaults,
    NotFoundError,
    RunStatus,
    RunSummary,
    StorageError,
    TransientError,
    now,
)
from esper.leyline.keys import load_or_create, public_hex
from esper.leyline.summary import CONFIG_FILE, HISTORY_FILE, REPORT_FILE, SUMMARY_FILE, VIEW_FILE, RunHistory
from esper.nissa import Follower, LiveView, otlp, view_for, write_report
from esper.nissa.replay import load, with_alerts
from esper.storage import Storage
from esper.tamiyo.gnn import pin
from esper.tolaria.patience import PatientStorage
from esper.urza.policies import StoredPolicies

if TYPE_CHECKING:
    from actors.platform import Platform
    from esper.api import RunResult, WorkloadFactory

LOCK_FILE = "platform.lock"

_LOG = logging.getLogger(__name__)


class Stop:
    """The wish to end, as a trainer asks for it at every step."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def __call__(self) -> str | None:
        return self._reason

    def ask(self, reason: str) -> None:
        """Notes the first reason."""
        self._reason = self._reason or reason


def _silent(_words: str) -> None:
    """Says nothing."""


def run(
    workload_factory: WorkloadFactory,
    config: RunConfig,
    *,
    run_id: str | None = None,
    resume: bool = False,
    on_start: Callable[[str, str], None] | None = None,
    say: Callable[[str], None] = _silent,
    faults: FaultPlan | None = None,
) -> RunResult:
    """Trains on Ray: on the cluster at `RAY_ADDRESS`, or on one that starts here and ends with the run.

    Args:
        workload_factory: makes the problem; called in each trainer, so it must pickle for `num_workers` >= 1.
        config: of the run.
        run_id: of the run; None makes one.
        resume: go on with this run from its last checkpoint.
        on_start: told the run's id and folder before anything slow begins.
        say: told what is being waited for until the view takes over.
        faults: a script of faults, for tests.

    Returns:
        Where the run lies and what it came to. An interrupted run returns too; its status says so.

    Raises:
        UserError: if a setting, the data or the storage cannot be used.
        StorageError: if another Ray of this machine serves the same directory.
        EsperError: if the run failed; the summary says FAILED and names the error.
    """
    from esper.api import RunResult, new_run_id

    storage = Storage.at(config.storage, config.storage_options)
    storage.check_writable()
    otlp.check(config.nissa.otlp_endpoint)
    config = _pin_policy(_pin_key(config), storage)
    run_id = run_id or new_run_id(config)
    folder = PatientStorage(f"{storage.uri}/runs/{run_id}", storage.options)  # as the trainer's is
    with held(storage, shared=joins()):  # before anything is written or started
        if not resume:
            folder.write(CONFIG_FILE, dump_config(_without_secrets(config)).encode())
        if on_start is not None:
            on_start(run_id, folder.shown)
        faults = faults or NoFaults()
        summary = _train(workload_factory, config, run_id, folder, resume=resume, say=say, faults=faults)
    return RunResult(run_id, folder.shown, summary)


def _train(
    workload_factory: WorkloadFactory,
    config: RunConfig,
    run_id: str,
    folder: Storage,
    *,
    resume: bool,
    say: Callable[[str], None],
    faults: FaultPlan,
) -> RunSummary:
    """Connects, brings the platform up, trains; returns with Ray as it was found."""
    stop = Stop()
    say("joining Ray" if joins() else "starting Ray")
    with connected(dashboard=config.nissa.dashboard, metadata={"esper_run_id": run_id}) as cluster:
        say(
            "bringing up Oona, Urza, Tezzeret, Tamiyo and Nissa"
            + (f"; {cluster.dashboard}" if cluster.dashboard else "")
            + ("; Ray's dashboard did not start: going on without it" if _lacks_dashboard(config, cluster) else "")
        )
        from actors import platform, room, tolaria

        with _signals(stop), platform.running(config, owned=cluster.owned) as systems:
            for note in systems.notes:
                say(note)
            job = tolaria.Job(
                run_id=run_id,
                directory=folder.shown,
                workload=workload_factory,
                config=config,
                platform=systems,
                resume=resume,
                faults=faults,
            )
            room.wait_for_room(config.tolaria, owned=cluster.owned, stop=stop, say=say)
            try:
                with Follower(systems.view.fetch(run_id), view_for(config.nissa.view, sys.stdout)):
                    summary = _in_thread(lambda: tolaria.fit(job, stop))
                    seen, missing = _catch_up(systems, run_id) if stop() is None else (None, ())
            except EsperError as error:
                _note_failure(folder, error)
                raise
            if stop() is None:
                summary = _count(systems, folder, with_alerts(summary, seen), missing)
            # here: `ray job stop` kills 3 s after it has asked, and the rest takes seconds
            _report(folder, summary, seen or _kept(folder))
            return summary


def _pin_key(config: RunConfig) -> RunConfig:
    if config.kasmina.public_key is not None:
        return config
    key = public_hex(load_or_create(config.tezzeret.key_file))
    return config.model_copy(update={"kasmina": config.kasmina.model_copy(update={"public_key": key})})


def _pin_policy(config: RunConfig, storage: Storage) -> RunConfig:
    """Writes the version of a learned policy into the configuration: what is promoted may change meanwhile."""
    return config.model_copy(update={"tamiyo": pin(config.tamiyo, StoredPolicies(storage))})


def _without_secrets(config: RunConfig) -> RunConfig:
    """What is saved with the run; a resumed run takes credentials from the environment."""

    def public(options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key not in {"key", "secret", "token"}}

    changes: dict[str, Any] = {"storage_options": public(config.storage_options)}
    host = config.host.model_copy(update={"weights_options": public(config.host.weights_options)})
    changes["host"] = host
    if isinstance(config.data, ParquetImageData | TextData):
        changes["data"] = config.data.model_copy(update={"options": public(config.data.options)})
    return config.model_copy(update=changes)


def _in_thread(work: Callable[[], RunSummary]) -> RunSummary:
    """Runs `work` beside the main thread, which stays free for signals."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="tolaria") as pool:
        return pool.submit(work).result()


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into a clean end; a second Ctrl-C ends at once. Ray has set its own handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop() is not None and number == signal.SIGINT:
            os._exit(130)
        stop.ask("interrupted by Ctrl-C" if number == signal.SIGINT else "stopped by SIGTERM")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lacks_dashboard(config: RunConfig, cluster: Cluster) -> bool:
    return config.nissa.dashboard and cluster.owned and cluster.dashboard is None


def _catch_up(systems: Platform, run_id: str) -> tuple[LiveView | None, tuple[str, ...]]:
    """Lets the view take in what is on the bus; returns its last picture, which is whole then, and what is missing."""
    try:
        picture = systems.view.drain(run_id)
    except TransientError as error:
        _LOG.warning("view.behind", extra={"reason": str(error)})
        return None, (f"Nissa: its last picture may lack what came last: {error}",)
    try:
        return picture, systems.view.missing()
    except TransientError as error:
        return picture, (f"Nissa: it did not say what it could not deliver: {error}",)


def _count(systems: Platform, folder: Storage, summary: RunSummary, missing: tuple[str, ...]) -> RunSummary:
    """Takes the bus's own counts of the run, delivery to the view included, and what was missing into the summary."""
    summary = summary.model_copy(update={"went_without": (*summary.went_without, *missing)})
    bus = systems.bus.bus()
    try:
        counted = summary.model_copy(update={"bus": bus.counts(summary.run_id)})
    except TransientError as error:
        words = f"Oona: the counts of this run are those of its last epoch: {error}"
        counted = summary.model_copy(update={"went_without": (*summary.went_without, words)})
    finally:
        bus.close()
    folder.write(SUMMARY_FILE, counted.model_dump_json(indent=2).encode())
    return counted


def _note_failure(folder: Storage, error: EsperError) -> None:
    """Makes sure that a summary, where there is one, does not say that the run still runs."""
    try:
        summary = RunSummary.model_validate_json(folder.read(SUMMARY_FILE))
    except NotFoundError:
        return  # it failed before it began
    if summary.status is RunStatus.RUNNING:
        failed = summary.model_copy(update={"status": RunStatus.FAILED, "error": str(error), "finished_at": now()})
        folder.write(SUMMARY_FILE, failed.model_dump_json(indent=2).encode())


def _kept(folder: Storage) -> LiveView | None:
    """The last picture that Nissa kept in the run's folder; None where there is none, or none that can be read."""
    try:
        return load(folder.read(VIEW_FILE))
    except NotFoundError:
        return None
    except StorageError as error:
        _LOG.warning("view.unread", extra={"reason": str(error)})
        return None


def _report(folder: Storage, summary: RunSummary, seen: LiveView | None) -> None:
    history = RunHistory.model_validate_json(folder.read(HISTORY_FILE))
    with tempfile.TemporaryDirectory() as scratch:
        path = write_report(with_alerts(summary, seen), history, Path(scratch) / REPORT_FILE, seen)
        folder.write(REPORT_FILE, path.read_bytes())


@contextmanager
def held(storage: Storage, *, shared: bool) -> Iterator[None]:
    """Holds a directory: runs on a joined Ray hold it together, one that starts its own Ray holds it alone.

    This is for one machine; between machines, and on S3, Urza's own fencing must do.
    """
    if not storage.is_local:
        yield
        return
    path = Path(storage.path(LOCK_FILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise StorageError(
                f"{path.parent} is served by {f'the run of process {holder}' if holder else 'another Ray'}",
                field="storage",
                remedy="wait for it, give another --storage, or share one Ray: ray start --head, RAY_ADDRESS=auto",
            ) from error
        file.truncate(0)
        if not shared:
            file.write(str(os.getpid()))
            file.flush()
        yield
