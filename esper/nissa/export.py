"""A run's metrics for other tools: TensorBoard's event files, or an MLflow tracking server. Neither is a dependency.

Steps are optimizer steps since the start, as everywhere. The names of series are those of `EpochRecord`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import ConfigError
from esper.leyline.signals import EpochRecord
from esper.leyline.summary import RunHistory, RunStatus, RunSummary

TAG = "esper.run_id"
_FIGURES = (
    "train_loss",
    "val_loss",
    "learning_rate",
    "params",
    "flops_per_sample",
    "total_flops",
    "seconds",
    "step_ms",
)
_MLFLOW_STATUS = {
    RunStatus.RUNNING: "RUNNING",
    RunStatus.FINISHED: "FINISHED",
    RunStatus.INTERRUPTED: "KILLED",
    RunStatus.FAILED: "FAILED",
}


def scalars(record: EpochRecord) -> Iterator[tuple[str, float]]:
    """(name, value) of one epoch; what was not measured is left out. The headline metric goes by its own name."""
    for name in _FIGURES:
        value = getattr(record, name)
        if value is not None:
            yield name, float(value)
    for split, value in (("train", record.train_metric), ("val", record.val_metric)):
        if value is not None:
            yield f"{split}_{record.metric_name or 'metric'}", value


def finals(summary: RunSummary) -> dict[str, float]:
    """The figures of the whole run that no epoch has."""
    found = {
        "test_accuracy": summary.metrics.test_accuracy,
        "test_loss": summary.metrics.test_loss,
        **{name: value for name, value in summary.metrics.extra.items() if name.startswith("test_")},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def to_tensorboard(summary: RunSummary, history: RunHistory, config: Mapping[str, Any], out: Path) -> Path:
    """Writes event files below `out`, one folder a run: scalars at each epoch, every transition as text.

    Args:
        summary: of the run.
        history: of the run.
        config: its configuration, flat.
        out: a folder that `tensorboard --logdir` is to read.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if no writer is installed, or the run was exported there before.
    """
    writer_of = _needed("tensorboardX", "tensorboard").SummaryWriter
    folder = out / summary.run_id
    if folder.exists():
        raise ConfigError(f"{folder} exists: its curves would be doubled", field="--out", remedy="give another --out")
    last = max((record.step for record in history.epochs), default=0)
    with writer_of(logdir=str(folder)) as writer:
        ends, at = _ends(summary, history), summary.started_at
        for record in history.epochs:
            at = ends[record.epoch]
            for name, value in scalars(record):
                writer.add_scalar(name, value, record.step, walltime=at)
        for name, value in finals(summary).items():
            writer.add_scalar(name, value, last, walltime=summary.finished_at or at)
        for event in summary.events:
            refused = " refused" if event.refused else ""
            text = f"{event.site}: {event.blueprint or ''} {event.from_stage.value} to {event.to_stage.value}{refused}"
            writer.add_text("lifecycle", f"{text}. {event.reason}", event.step, walltime=event.timestamp)
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0, walltime=summary.started_at)
    return folder


def to_mlflow(
    summary: RunSummary, history: RunHistory, config: Mapping[str, Any], *, uri: str | None, experiment: str
) -> str:
    """Logs the run to an MLflow server or store.

    Args:
        summary: of the run.
        history: of the run.
        config: its configuration, flat: the run's parameters there.
        uri: of the tracking server or store; None leaves it to MLflow and its `MLFLOW_TRACKING_URI`.
        experiment: made where there is none.

    Returns:
        MLflow's id of the run.

    Raises:
        ConfigError: if MLflow is not installed, refuses, or has this run already.
    """
    mlflow = _needed("mlflow", "mlflow")
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        home = found.experiment_id if found is not None else client.create_experiment(experiment)
        if client.search_runs([home], filter_string=f"tags.`{TAG}` = '{summary.run_id}'"):
            raise ConfigError(
                f"the experiment {experiment} has run {summary.run_id} already",
                field="--experiment",
                remedy="delete it there, or name another experiment",
            )
        run = client.create_run(
            home,
            start_time=int(summary.started_at * 1e3),
            run_name=summary.run_id,
            tags={TAG: summary.run_id, "esper.task": summary.task},
        )
        _log_mlflow(mlflow, client, run.info.run_id, summary, history, config)
    except mlflow.exceptions.MlflowException as error:
        raise ConfigError(
            f"MLflow refuses: {error}", field="--uri", remedy="give --uri of a tracking server"
        ) from error
    return run.info.run_id


def _log_mlflow(
    mlflow: Any, client: Any, run: str, summary: RunSummary, history: RunHistory, config: Mapping[str, Any]
) -> None:
    entities = mlflow.entities
    params = [entities.Param(name[:250], str(value)[:6000]) for name, value in config.items()]
    for first in range(0, len(params), 100):  # so many a call
        client.log_batch(run, params=params[first : first + 100])
    ends = _ends(summary, history)
    for record in history.epochs:
        at = int(ends[record.epoch] * 1e3)
        client.log_batch(run, [entities.Metric(name, value, at, record.step) for name, value in scalars(record)])
    end = int((summary.finished_at or summary.started_at) * 1e3)
    last = max((record.step for record in history.epochs), default=0)
    client.log_batch(run, [entities.Metric(name, value, end, last) for name, value in finals(summary).items()])
    client.log_dict(run, summary.model_dump(mode="json"), "summary.json")
    client.set_terminated(run, _MLFLOW_STATUS[summary.status], end)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"tolaria": {"epochs": 2}}` as `{"tolaria.epochs": 2}`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _ends(summary: RunSummary, history: RunHistory) -> dict[int, float]:
    """When each epoch ended, seconds since the epoch: by the seconds that each took."""
    at, found = summary.started_at, {}
    for record in history.epochs:
        at += record.seconds
        found[record.epoch] = at
    return found


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        names = module if module == package else f"{module} {package}"
        raise ConfigError(f"{module} is not installed", field="--to", remedy=f"pip install {names}") from error
