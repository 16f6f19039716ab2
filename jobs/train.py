"""The main job: one run from a configuration file, for `esper train`, `python -m jobs.train` and `ray job submit`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from esper.config import RunConfig, RunHost, load_config, parse_config
from esper.leyline import ConfigError, RunStatus
from jobs.environment import data_root
from jobs.workload import ConfiguredWorkload

if TYPE_CHECKING:
    from esper.api import RunResult
    from esper.tolaria.workload import Workload

INTERRUPTED = 130
LOG_FILE = "driver.log"


def train(path: Path, overrides: list[str], *, as_json: bool) -> int:
    """Trains from a file; returns the exit code."""
    return _launch(_pin_weights(_pin_run(load_config(path, overrides))), as_json=as_json)


def host_of(run: str, path: Path, overrides: list[str]) -> str:
    """The override that makes what a run left the host of another.

    Args:
        run: its id, a unique beginning of one, or `latest`, in the storage of the configuration.
        path: of the configuration.
        overrides: of it.
    """
    from jobs.runs import RunStore

    config = load_config(path, overrides)
    return f"host={json.dumps({'type': 'run', 'run': RunStore(config.storage, config.storage_options).directory(run)})}"


def _pin_run(config: RunConfig) -> RunConfig:
    """A run to start from by an address and an epoch that stay what they are, whatever becomes of that run.

    Raises:
        ConfigError: if it has no checkpoint that can be used.
    """
    from esper.storage import Storage
    from esper.tolaria.checkpoint import Checkpoints

    host = config.host
    if not isinstance(host, RunHost):
        return config
    address = host.run if "://" in host.run else str(Path(host.run).expanduser().absolute())
    epoch = host.epoch
    if epoch is None:
        found = Checkpoints(Storage.at(address, config.storage_options if "://" in address else None)).latest()
        if found is None:
            raise ConfigError(f"{address} holds no checkpoint", field="host.run", remedy="see esper runs ls")
        epoch = found.epoch
    return config.model_copy(update={"host": host.model_copy(update={"run": address, "epoch": epoch})})


def _pin_weights(config: RunConfig) -> RunConfig:
    """A path of weights that means the same file to workers, and to who resumes the run from another folder."""
    weights = config.host.weights
    if weights is None or "://" in weights:
        return config
    host = config.host.model_copy(update={"weights": str(Path(weights).expanduser().absolute())})
    return config.model_copy(update={"host": host})


def resume(name: str, storage: str, *, as_json: bool) -> int:
    """Goes on with an interrupted run; returns the exit code."""
    import yaml

    from jobs.runs import RunStore

    store = RunStore(storage)
    run_id = store.resolve(name)
    if store.summary(run_id).status is RunStatus.FINISHED:
        raise ConfigError(f"run {run_id} is finished", field="resume", remedy=f"look at it: esper runs show {run_id}")
    config = parse_config(yaml.safe_load(store.config_text(run_id)))
    if config.host.type == "given" or config.data.type == "given":
        raise ConfigError(
            f"run {run_id} trains a model that was handed over in Python",
            field="resume",
            remedy="call esper.grow again from your script",
        )
    return _launch(config, as_json=as_json, run_id=run_id)


def _launch(config: RunConfig, *, as_json: bool, run_id: str | None = None) -> int:
    from esper.storage import Storage

    # what can be wrong is found out before Ray starts and before anything is written
    Storage.at(config.storage, config.storage_options).check_writable()
    factory = _Once(ConfiguredWorkload(config, data_root()))
    factory.prepare(config)
    from actors.launch import run

    if as_json and config.nissa.view != "quiet":
        config = config.model_copy(update={"nissa": config.nissa.model_copy(update={"view": "quiet"})})
    result = run(
        factory,
        config,
        run_id=run_id,
        resume=run_id is not None,
        on_start=partial(_begin, says=not as_json),
        say=_nothing if as_json else typer.echo,
    )
    _show(result, as_json=as_json)
    return {RunStatus.FINISHED: 0, RunStatus.INTERRUPTED: INTERRUPTED}.get(result.summary.status, 1)


class _Once:
    """A workload factory that hands the first one out once, so that the driver does not load the data twice."""

    def __init__(self, factory: ConfiguredWorkload) -> None:
        self._factory = factory
        self._ready: Workload | None = None

    def prepare(self, config: RunConfig) -> None:
        """Makes the workload; what is wrong with it, or does not go with the configuration, is raised here."""
        from esper.api import check_workload

        self._ready = self._factory()
        check_workload(self._ready, config)

    def __call__(self) -> Workload:
        ready, self._ready = self._ready, None
        return ready or self._factory()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Once, (self._factory,)


def _begin(run_id: str, directory: str, *, says: bool) -> None:
    """Names the run, and sends this process's log into its folder; the terminal is for the view."""
    from esper.nissa.logs import configure

    configure(Path(directory) / LOG_FILE if "://" not in directory else None, run=run_id)
    if says:
        typer.echo(f"run {run_id} in {directory}")


def _nothing(_words: str) -> None:
    """Standard output is the summary's."""


def _show(result: RunResult, *, as_json: bool) -> None:
    summary = result.summary
    if as_json:
        typer.echo(summary.model_dump_json(indent=2))
        return
    from esper.leyline.summary import REPORT_FILE
    from esper.nissa import table

    typer.echo(table(summary, report=f"{result.directory}/{REPORT_FILE}", color=sys.stdout.isatty()))
    if summary.status is RunStatus.INTERRUPTED:
        typer.echo(f"interrupted; go on with: esper train --resume {summary.run_id}")


def dry_run(path: Path, overrides: list[str], *, as_json: bool) -> None:
    """Prints what a run would have to grow with: sites, fitting blueprints, parameters and cost. Starts no Ray."""
    config = load_config(path, overrides)
    plan = plan_of(config)
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    host = plan["host"]
    console.print(
        f"host: {host['parameters']:,} parameters, {host['flops_per_sample']:,} FLOPs a sample; "
        f"growth may add {_limit(plan['budget']['parameters'])} parameters, {_limit(plan['budget']['flops'])} FLOPs"
    )
    for site in plan["sites"]:
        grid = Table("blueprint", "parameters", "FLOPs a sample", "budget", box=None, pad_edge=False)
        for fit in site["blueprints"]:
            verdict = "fits" if fit["within_budget"] else "too large"
            grid.add_row(fit["name"], f"{fit['parameters']:,}", f"{fit['flops_per_sample']:,}", verdict)
        console.print(f"\nsite {site['name']}  ({site['signature']})", highlight=False)
        console.print(grid)


def plan_of(config: RunConfig) -> dict[str, Any]:
    """What `dry_run` prints, as plain data.

    Raises:
        UserError: if a setting, a site or the data cannot be used.
    """
    from esper.api import wrap
    from esper.leyline import ops
    from esper.tolaria.costs import HostCosts
    from esper.tolaria.packet import live_params
    from esper.urza.library import designs_for

    workload = ConfiguredWorkload(config, data_root())()
    grown = wrap(
        workload.model,
        example=workload.example,
        sites=config.kasmina.sites,
        causal=config.task == "language_model",
        config=config,
    )
    parameters = live_params(grown.host)
    flops = HostCosts(grown.host, workload.task.loss_fn).forward(workload.example) // len(workload.example[0])
    spare = {
        "parameters": None if config.budget.params is None else int(parameters * (config.budget.params - 1)),
        "flops": None if config.budget.flops is None else int(flops * (config.budget.flops - 1)),
    }
    sites = []
    for name, signature in grown.sites.items():
        fits = []
        for design in designs_for(signature):
            cost = ops.count_parameters(design.ir, signature), ops.count_flops(design.ir, signature)
            within = all(
                limit is None or value <= limit
                for value, limit in zip(cost, (spare["parameters"], spare["flops"]), strict=True)
            )
            fits.append(
                {"name": design.name, "parameters": cost[0], "flops_per_sample": cost[1], "within_budget": within}
            )
        sites.append({"name": name, "signature": signature.key, "blueprints": fits})
    return {"host": {"parameters": parameters, "flops_per_sample": flops}, "budget": spare, "sites": sites}


def _limit(value: int | None) -> str:
    return "any number of" if value is None else f"{value:,}"


if __name__ == "__main__":
    from jobs.cli import main

    main(["train", *sys.argv[1:]])
