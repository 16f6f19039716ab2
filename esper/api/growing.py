"""Handing a model over to be trained and grown, and the run that comes back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from esper.api.checking import check_workload
from esper.api.hosting import checkpoint_host, exported
from esper.api.runtime import RunResult, WorkloadFactory, find_runtime
from esper.api.settings import refuse, resolve
from esper.config import Budget, RunConfig
from esper.leyline.chains import Tail
from esper.leyline.summary import HISTORY_FILE, REPORT_FILE, RunHistory, RunSummary
from esper.storage import Storage
from esper.tolaria.optim import OptimizerFactory, SchedulerFactory
from esper.tolaria.schedules import optimizer_factory, scheduler_factory
from esper.tolaria.task import Task, resolve_task
from esper.tolaria.weights import Trained
from esper.tolaria.workload import Data, Workload, example_of


def grow(
    model: nn.Module,
    train_data: Data,
    val_data: Data,
    *,
    task: Task | str = "classification",
    optimizer: OptimizerFactory | None = None,
    epochs: int | None = None,
    sites: str | Sequence[str] | None = None,
    budget: Budget | None = None,
    test_data: Data | None = None,
    scheduler: SchedulerFactory | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    example: tuple[Any, ...] | None = None,
    config: RunConfig | None = None,
    overrides: Iterable[str] = (),
    tails: Mapping[str, Tail] | None = None,
) -> Run:
    """Trains a model that may grow, on Ray, and returns the finished run. Your `model` itself is not changed.

    A model that is trained already is upgraded: it computes what it did until its first step, its validation before
    that stands in the summary (`start`), and it grows within `budget`.

    Args:
        model: any `nn.Module`.
        train_data: (inputs, targets) tensors, a `Dataset`, or a factory `(rank, world, epoch) -> DataLoader`. Several
            inputs are given as a tuple, in the order of `forward`.
        val_data: likewise; evidence is taken on it.
        test_data: likewise; looked at once, after the last epoch.
        task: `classification`, `regression`, `language_model`, or an `esper.Task`.
        optimizer: from a list of parameters; None is AdamW as the configuration has it.
        epochs: `tolaria.epochs`; like the next ones it wins over `config`.
        sites: `kasmina.sites`.
        budget: `budget`.
        batch_size: `tolaria.batch_size`.
        num_workers: `tolaria.num_workers`.
        scheduler: from (optimizer, total steps), stepped each step; None is what the configuration has.
        example: positional inputs of the model for a few samples; None takes them from `train_data`.
        config: everything else; None is the defaults.
        overrides: dotted settings that win over all, such as `tolaria.patience=5`. What is handed over in Python is no
            setting.
        tails: by site, what the model computes from there on, `tail(model, h, *inputs)`: kernels train behind the host
            without a replay of what comes before (see `esper.kasmina.tails`).

    Raises:
        ConfigError: if a setting is wrong, or no runtime is installed.
        DataError: if the data are of no known kind.
        SiteError: if a site does not exist or cannot carry a seed.
    """
    overrides = tuple(overrides)
    given = {"tolaria.optimizer": optimizer, "tolaria.scheduler": scheduler}
    handed = {name: _HANDED for name, value in given.items() if value is not None}
    refuse(overrides, _OF_THE_CALL | handed, words="it is handed over")
    chosen, start = resolve_task(task), config or RunConfig()
    resolved = resolve(
        start,
        {
            "task": chosen.name if isinstance(task, str) else "custom",
            "data": {"type": "given"},
            "host": {**start.host.model_dump(include={"weights", "weights_options"}), "type": "given"},
            "budget": None if budget is None else budget.model_dump(),
            "tolaria.epochs": epochs,
            "tolaria.batch_size": batch_size,
            "tolaria.num_workers": num_workers,
            "kasmina.sites": sites
            if sites is None or sites == "auto"
            else [sites]
            if isinstance(sites, str)
            else sites,
        },
        overrides,
    )
    workload = Workload(
        model=model,
        example=example or example_of(train_data),
        train=train_data,
        val=val_data,
        test=test_data,
        task=chosen,
        optimizer=optimizer or optimizer_factory(resolved.tolaria.optimizer),
        scheduler=scheduler or scheduler_factory(resolved.tolaria.scheduler),
        trained=Trained.of(resolved.host) or Trained(),  # nobody can tell from a model whether it is: so it is measured
        tails=dict(tails or {}),
    )

    def fresh() -> Workload:
        return Workload(**{**vars(workload), "model": copy.deepcopy(workload.model)})

    check_workload(workload, resolved)
    return Run(find_runtime()(fresh, resolved), fresh, resolved)


@dataclass(frozen=True)
class Run:
    """A run that ended.

    Attributes:
        result: where it lies, and what it came to.
        workload_factory: makes the workload anew, with the host as it was at the start.
        config: as resolved.
    """

    result: RunResult
    workload_factory: WorkloadFactory
    config: RunConfig

    @property
    def summary(self) -> RunSummary:
        return self.result.summary

    @property
    def directory(self) -> str:
        return self.result.directory

    def table(self) -> str:
        """What happened to each seed, as text."""
        from esper import nissa

        return nissa.table(self.summary)

    def report(self) -> Path:
        """Writes `report.html` beside the summary (in the working folder, if that is not on this machine)."""
        from esper import nissa

        folder = Storage.at(self.directory, self.config.storage_options)
        history = RunHistory.model_validate_json(folder.read(HISTORY_FILE))
        target = (folder.local or Path.cwd() / self.summary.run_id) / REPORT_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        return nissa.write_report(self.summary, history, target)

    def export(self, *, best: bool = False, fold: bool = False) -> nn.Module:
        """The grown model as a plain `nn.Module` on the CPU, without a trace of Esper.

        Args:
            best: as it was at the best epoch instead of the last.
            fold: puts fossils into the linear layers whose outputs they grow, where both are linear (to rounding).

        Raises:
            NotFoundError: if the run left no checkpoint.
        """
        host = checkpoint_host(self.workload_factory(), self.config, directory=self.directory, best=best)
        return exported(host, fold=fold)


_HANDED = "set it in what you hand over, or hand nothing over"
_OF_THE_CALL = {"task": "the argument task", "data": "the arguments train_data, val_data", "host.type": "the model"}
"""What `grow` is handed in Python, and where."""
