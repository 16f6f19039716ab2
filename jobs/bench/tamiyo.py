"""The exam: which policy grows best, on tasks and hosts that nothing was trained on, at equal total FLOPs?

A cell is (task, policy, seed): a real training that ends when all that it spent (host, shadows, telemetry, validation)
has come to `--flops` times what the plain host costs for the configured epochs, or at its last epoch. `none` may train
longer than the others, until it has spent as much. Seeds are paired: the same host weights, split and order of samples.
Finished cells are kept below `--out` and not computed again, so the exam can be broken off at any time.

Test data are looked at once a run, after its end; no gate and no policy sees them.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from esper.api import local_hub, train_local
from esper.config import RunConfig, dump_config, load_config
from esper.data import DataSets, load_data
from esper.kasmina.sites import find_sites
from esper.leyline import EpochRecord, Outcome, PolicyCard
from esper.leyline.errors import ConfigError, DataError
from esper.leyline.policies import find_policy
from esper.simic.spending import epoch_flops
from esper.storage import Storage
from esper.tamiyo import LocalController
from esper.tolaria.schedules import optimizer_factory, scheduler_factory
from esper.tolaria.task import resolve_task
from esper.tolaria.workload import Workload, evaluation_batches, example_of, model_args
from esper.urza.policies import StoredPolicies
from jobs.bench import Say
from jobs.bench.arms import host_of
from jobs.bench.harness import BenchResult, Goal, goal_above, machine, mean_interval
from jobs.environment import REPOSITORY

POLICIES = ("none", "random", "schedule", "heuristic", "bandit", "gnn")


class ExamCell(BaseModel):
    """What one run came to.

    Attributes:
        settings: digest of all that it hangs on; a cell of others is not taken over.
        val, test: the task's headline metric at the end.
        flops: of everything, as a factor of the plain host's epochs.
        tried, kept: adaptations that began, and that became permanent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    policy: str
    seed: int
    settings: str
    val: float
    test: float
    val_loss: float
    flops: float
    params: int
    epochs: int
    tried: int
    kept: int
    seconds: float


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Trains what is not trained yet, and compares; see the module.

    Raises:
        ConfigError: for an unknown policy, fewer than two seeds, or a setting that is wrong.
        NotFoundError: if there is no such learned policy.
    """
    options = _options(arguments)
    policies = options.policies.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise ConfigError(f"no policy {policy!r}", field="--policies", remedy=f"some of {','.join(POLICIES)}")
    if options.seeds < 2:
        raise ConfigError("an interval needs two seeds", field="--seeds")
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    learned = None
    if "gnn" in policies:
        store = StoredPolicies(Storage.at(options.storage))
        learned = store.get(find_policy(store, options.version))
    cells: list[ExamCell] = []
    for name in options.tasks.split(","):
        path = Path(name) if Path(name).is_file() else REPOSITORY / "configs" / name
        config = load_config(path, ["deterministic=true", "simic.experience=false", *options.set])
        exam = Exam(config, folder, flops=options.flops, learned=learned, say=say)
        cells += [exam.cell(policy, options.first + i) for i in range(options.seeds) for policy in policies]
    rows, goals = compare(cells)
    return BenchResult(name="tamiyo", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict=_verdict(cells))


def compare(cells: Sequence[ExamCell]) -> tuple[list[dict[str, Any]], list[Goal]]:
    """The table, a row for each task and policy, and what was promised."""
    from scipy import stats

    found: dict[tuple[str, str], dict[int, ExamCell]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.policy), {})[cell.seed] = cell
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for (task, policy), own in found.items():
        test = mean_interval([cell.test for cell in own.values()])
        row: dict[str, Any] = {
            "task": task,
            "policy": policy,
            "seeds": len(own),
            "test": round(test.value, 4),
            "test_95": f"{test.low:.4f} to {test.high:.4f}",
            "val": round(statistics.fmean(cell.val for cell in own.values()), 4),
            "flops": round(statistics.fmean(cell.flops for cell in own.values()), 2),
            "params": round(statistics.fmean(cell.params for cell in own.values())),
            "tried": round(statistics.fmean(cell.tried for cell in own.values()), 1),
            "kept": round(statistics.fmean(cell.kept for cell in own.values()), 1),
            "beyond_heuristic": None,
            "p": None,
        }
        other = found.get((task, "heuristic"))
        if other is not None and policy != "heuristic":
            seeds = sorted(own.keys() & other.keys())
            pairs = [own[seed].test - other[seed].test for seed in seeds]
            row["beyond_heuristic"] = round(statistics.fmean(pairs), 4)
            if any(pairs):
                ours, theirs = ([one[seed].test for seed in seeds] for one in (own, other))
                row["p"] = round(float(stats.ttest_rel(ours, theirs).pvalue), 4)
        rows.append(row)
    for task in dict.fromkeys(cell.task for cell in cells):
        for better, worse in (("gnn", "heuristic"), ("heuristic", "random")):
            if (task, better) in found and (task, worse) in found:
                one, other = found[task, better], found[task, worse]
                pairs = [one[seed].test - other[seed].test for seed in sorted(one.keys() & other.keys())]
                goals.append(goal_above(f"{task}: {better} minus {worse}, test", mean_interval(pairs), 0.0))
    return rows, goals


class Exam:
    """The cells of one task.

    Args:
        config: of its runs.
        folder: of finished cells.
        flops: what a run may spend, as a factor of the plain host's epochs.
        learned: the policy `gnn`.
        say: takes progress.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, flops: float, learned: tuple[PolicyCard, bytes] | None, say: Say
    ) -> None:
        self._config, self._folder, self._flops, self._learned, self._say = config, folder, flops, learned, say
        self._data: DataSets = load_data(config.data, task=config.task, seed=config.seed)
        self._unit = config.tolaria.epochs * epoch_flops(config, self._data, host_of(config, self._data))

    def cell(self, policy: str, seed: int) -> ExamCell:
        """The cell, trained if it is not there."""
        config = self._configured(policy, seed)
        settings = hashlib.sha256(f"{dump_config(config)}{self._flops}".encode()).hexdigest()[:16]
        path = self._folder / f"{config.name}-{policy}-{seed}.json"
        if path.is_file():
            known = ExamCell.model_validate_json(path.read_text())
            if known.settings == settings:
                return known
        found = self._train(config, policy, settings)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(found.model_dump_json(indent=2))
        draft.replace(path)
        self._say(f"{config.name}, {policy}, seed {seed}: {found.test:.4f} on the test part, {found.flops:.2f} FLOPs")
        return found

    def _policies(self, version: str) -> tuple[PolicyCard, bytes]:
        if self._learned is None:
            raise ConfigError(f"no learned policy was given, and {version[:12]} is asked for", field="--version")
        return self._learned

    def _configured(self, policy: str, seed: int) -> RunConfig:
        config = self._config
        tamiyo = config.tamiyo.model_copy(update={"policy": policy})
        epochs = config.tolaria.epochs
        if policy == "none":
            epochs = round(epochs * self._flops)
        if policy == "schedule" and not tamiyo.schedule:
            raise ConfigError("the exam of `schedule` needs one", field="--set", remedy="--set tamiyo.schedule=[...]")
        if policy == "gnn":
            card, _ = self._policies("gnn")
            gnn = tamiyo.gnn.model_copy(update={"version": card.version})
            tamiyo = tamiyo.model_copy(update={"gnn": gnn})
        tolaria = config.tolaria.model_copy(update={"epochs": epochs})
        return config.model_copy(update={"seed": seed, "tamiyo": tamiyo, "tolaria": tolaria})

    def _train(self, config: RunConfig, policy: str, settings: str) -> ExamCell:
        data = self._data
        records: list[EpochRecord] = []
        task = resolve_task(config.task)
        if task.headline is None or data.test is None:
            raise DataError(f"{config.name} has no metric or no test part to judge by")
        model = host_of(config, data)
        workload = Workload(
            model=model,
            example=example_of(data.train),
            train=data.train,
            val=data.val,
            task=task,
            optimizer=optimizer_factory(config.tolaria.optimizer),
            scheduler=scheduler_factory(config.tolaria.scheduler),
        )
        hub, key = None, None
        if policy != "none":
            hub, key = local_hub(find_sites(model, workload.example, sites=config.kasmina.sites).values(), config)
        limit = self._flops * self._unit
        with tempfile.TemporaryDirectory(prefix="esper-exam-") as directory:
            summary = train_local(
                workload,
                config,
                directory=directory,
                run_id=f"{config.name}-{policy}-{config.seed}",
                hub=hub,
                bus=None,
                controller=LocalController(config.tamiyo, seed=config.seed, policies=self._policies),
                public_key=key,
                on_epoch=records.append,
                stop=lambda: "its FLOPs are spent" if records and records[-1].total_flops >= limit else None,
            )
        value, metric = summary.metrics, task.metrics[task.headline]
        assert value.val_loss is not None
        return ExamCell(
            task=config.name,
            policy=policy,
            seed=config.seed,
            settings=settings,
            val=_judge(model, data.val, metric, config.tolaria.batch_size),
            test=_judge(model, data.test, metric, config.tolaria.batch_size),
            val_loss=value.val_loss,
            flops=summary.ledger.flops.total / self._unit,
            params=summary.params.final,
            epochs=len(records),
            tried=len(summary.field_reports),
            kept=sum(report.outcome is Outcome.FOSSILIZED for report in summary.field_reports),
            seconds=summary.ledger.seconds.total,
        )


@torch.no_grad()
def _judge(model: torch.nn.Module, data: Any, metric: Any, batch_size: int) -> float:
    """The mean of a metric over a split, by samples."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in evaluation_batches(data, batch_size=batch_size).epoch(0, rank=0, world=1):
        total += float(metric(model(*model_args(inputs)), targets)) * len(targets)
        count += len(targets)
    return total / count


def _verdict(cells: Sequence[ExamCell]) -> str:
    """How many FLOPs the runs of each policy took: who spent less did not lose for want of them."""
    spent: dict[str, list[float]] = {}
    for cell in cells:
        spent.setdefault(cell.policy, []).append(cell.flops)
    words = ", ".join(f"{policy} {statistics.fmean(flops):.2f}" for policy, flops in spent.items())
    return f"FLOPs that were spent, in those of the plain host's epochs: {words}."


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="esper bench tamiyo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="digits.yaml", help="configuration files (default digits.yaml)")
    parser.add_argument("--policies", default="none,random,heuristic,bandit", help=f"some of {','.join(POLICIES)}")
    parser.add_argument("--seeds", type=int, default=10, help="paired seeds (default 10)")
    parser.add_argument("--first", type=int, default=200_000, help="the first of them; training uses lower ones")
    parser.add_argument("--flops", type=float, default=4.0, help="what a run may spend (default 4.0)")
    parser.add_argument("--version", default="promoted", help="of the gnn policy: a version, or its beginning")
    parser.add_argument("--storage", default="~/.esper", help="where that policy lies")
    parser.add_argument("--out", default="~/.esper/bench/tamiyo", help="folder of the finished cells")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, may be repeated")
    return parser.parse_args(arguments)
