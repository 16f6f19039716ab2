"""The exam: which policy grows best, on tasks and hosts that nothing was trained on, at equal total FLOPs?

A cell is (task, policy, seed): a real training that ends when all that it spent (host, shadows, telemetry, validation)
has come to `--flops` times what the plain host costs for the configured epochs, to the nearest epoch. Policies decide
as for a run of the configured epochs (no growth begins after 70% of those); who grew little trains on for longer,
`none` longest, and it pays for no telemetry. Seeds are paired: the same host weights, split and order of samples.
Finished cells are kept below `--out` and not computed again, so the exam can be broken off at any time.

Each run begins with an empty storage, so the bandit knows what this run taught it, and no more. Test data are looked at
once a run, after its end; no gate and no policy sees them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esper.api import configured_host, configured_workload, local_hub_of, train_local
from esper.config import RunConfig, load_config
from esper.data import DataSets, load_data
from esper.leyline import AdaptationSignal, Controller, EpochRecord, Outcome, PolicyCard, SystemStatePacket
from esper.leyline.errors import ConfigError, DataError
from esper.leyline.policies import find_policy
from esper.simic.spending import epoch_flops
from esper.storage import Storage
from esper.tamiyo import LocalController
from esper.tolaria.task import resolve_task
from esper.tolaria.workload import evaluation_batches, model_args
from esper.urza.policies import StoredPolicies
from jobs.bench import Say
from jobs.bench.exam_table import ExamCell, compare, markdown, spent
from jobs.bench.harness import BenchResult, machine
from jobs.environment import REPOSITORY, data_root

POLICIES = ("none", "random", "schedule", "heuristic", "bandit", "gnn")
TASKS = "digits_cnn,fashion_mlp,fashion_cnn,text_gpt"
EXAM = 2
"""Grows when the same configuration would come to another cell."""
LATER = (
    ("tamiyo", "canary", "actions"),
    ("tamiyo", "canary", "min_action_agreement"),
    ("tolaria", "find_unused_parameters"),
)
"""Settings that came after cells were stored, and that no cell hangs on: an exam has no canary, and one process."""


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
    tasks = [_config(name, options.set) for name in options.tasks.split(",")]
    exams = [Exam(config, folder, flops=options.flops, learned=learned, say=say) for config in tasks]
    seeds = range(options.first, options.first + options.seeds)
    # seeds outermost: an exam that is broken off knows about as much of each task
    trained = {(seed, i): exams[i].cells(policies, seed) for seed in seeds for i in range(len(exams))}
    cells = [cell for i in range(len(exams)) for seed in seeds for cell in trained[seed, i]]
    rows, goals = compare(cells)
    if options.markdown:
        Path(options.markdown).write_text(markdown(rows, goals))
    if options.card:
        _tell(options, learned, rows)
    return BenchResult(name="tamiyo", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict=spent(cells))


def _config(name: str, settings: Sequence[str]) -> RunConfig:
    """A task's configuration: a file, or the name of one in configs or configs/exam."""
    folder = REPOSITORY / "configs"
    places = [Path(name), folder / name, folder / "exam" / f"{name}.yaml"]
    path = next((place for place in places if place.is_file()), places[0])
    config = load_config(path, ["deterministic=true", "simic.experience=false", *settings])
    if config.tolaria.scheduler.type != "constant":
        raise ConfigError(
            "runs of the exam end by what they spent, before a learning rate that falls with the epochs has fallen",
            field="tolaria.scheduler.type",
            remedy="constant",
        )
    return config


def _tell(options: argparse.Namespace, learned: tuple[PolicyCard, bytes] | None, rows: list[dict[str, Any]]) -> None:
    """Writes the table into the card of the learned policy, in place of one that stands there."""
    if learned is None:
        raise ConfigError("the table goes to the card of a learned policy", field="--card", remedy="--policies ...,gnn")
    card, weights = learned
    own = [row for row in card.results if "exam" not in row]
    told = [{"exam": f"seeds {options.first} on, {options.flops:g} times the FLOPs", **row} for row in rows]
    StoredPolicies(Storage.at(options.storage)).put(card.model_copy(update={"results": (*own, *told)}), weights)


class Planned:
    """A controller that decides as for a run of so many epochs, however long it goes on.

    Args:
        inner: who decides.
        epochs: of the plan.
    """

    def __init__(self, inner: Controller, epochs: int) -> None:
        self._inner, self._epochs = inner, epochs

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """See `Controller.decide`."""
        planned = packet.epoch.model_copy(update={"num_epochs": self._epochs})
        return self._inner.decide(state, packet.model_copy(update={"epoch": planned}))


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
        self._data: DataSets = load_data(config.data, task=config.task, seed=config.seed, data_root=data_root())
        self._unit = config.tolaria.epochs * epoch_flops(config, self._data, configured_host(config, self._data))

    def cells(self, policies: Sequence[str], seed: int) -> list[ExamCell]:
        """A cell for each policy, in their order."""
        return [self.cell(policy, seed) for policy in policies]

    def cell(self, policy: str, seed: int) -> ExamCell:
        """The cell, trained if it is not there."""
        config = self._configured(policy, seed)
        settings = _digest(config, self._flops)
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
        kasmina = config.kasmina
        if policy == "none":  # nobody looks at its health
            kasmina = kasmina.model_copy(update={"telemetry_every": 1 << 30})
        if policy == "schedule" and not tamiyo.schedule:
            raise ConfigError("the exam of `schedule` needs one", field="--set", remedy="--set tamiyo.schedule=[...]")
        if policy == "gnn":
            card, _ = self._policies("gnn")
            gnn = tamiyo.gnn.model_copy(update={"version": card.version})
            tamiyo = tamiyo.model_copy(update={"gnn": gnn})
        longest = math.ceil(config.tolaria.epochs * self._flops)  # nothing is cheaper than the plain host
        tolaria = config.tolaria.model_copy(update={"epochs": longest})
        return config.model_copy(update={"seed": seed, "tamiyo": tamiyo, "tolaria": tolaria, "kasmina": kasmina})

    def _train(self, config: RunConfig, policy: str, settings: str) -> ExamCell:
        data = self._data
        records: list[EpochRecord] = []
        task = resolve_task(config.task)
        if task.headline is None or data.test is None:
            raise DataError(f"{config.name} has no metric or no test part to judge by")
        # the test part is looked at here, after the run
        workload = configured_workload(config, data, with_test=False)
        model = workload.model
        hub, key = None, None
        if policy != "none":
            hub, key = local_hub_of(model, workload.example, config)
        decider = LocalController(config.tamiyo, seed=config.seed, policies=self._policies)
        with tempfile.TemporaryDirectory(prefix="esper-exam-") as directory:
            summary = train_local(
                workload,
                config,
                directory=directory,
                run_id=f"{config.name}-{policy}-{config.seed}",
                hub=hub,
                bus=None,
                controller=Planned(decider, self._config.tolaria.epochs),
                public_key=key,
                on_epoch=records.append,
                stop=lambda: "its FLOPs are spent" if self._has_spent(records) else None,
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

    def _has_spent(self, records: Sequence[EpochRecord]) -> bool:
        """Whether the end of another epoch like the last would lie farther from the limit than this one does."""
        if not records:
            return False
        spent_before = records[-2].total_flops if len(records) > 1 else 0
        last = records[-1].total_flops - spent_before
        return records[-1].total_flops + last / 2 >= self._flops * self._unit


def _digest(config: RunConfig, flops: float) -> str:
    """Of all that a cell hangs on; settings of other policies and of systems that take no part are left out."""
    whole = config.model_dump(mode="json")
    parts = ("task", "seed", "data", "host", "budget", "tolaria", "kasmina", "tamiyo")
    told = {name: whole[name] for name in parts} | {name: whole["tezzeret"][name] for name in ("blueprints", "limits")}
    for policy in {"schedule", "bandit", "gnn"} - {config.tamiyo.policy}:
        del told["tamiyo"][policy]
    for *parents, name in LATER:
        del functools.reduce(dict.__getitem__, parents, told)[name]
    text = json.dumps([EXAM, flops, told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def _judge(model: torch.nn.Module, data: Any, metric: Any, batch_size: int) -> float:
    """The mean of a metric over a split, by samples."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in evaluation_batches(data, batch_size=batch_size).epoch(0, rank=0, world=1):
        total += float(metric(model(*model_args(inputs)), targets)) * len(targets)
        count += len(targets)
    return total / count


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="esper bench tamiyo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", default=TASKS, help=f"configuration files, or names in configs/exam (default {TASKS})"
    )
    parser.add_argument(
        "--policies", default="none,random,schedule,heuristic,bandit", help=f"some of {','.join(POLICIES)}"
    )
    parser.add_argument("--seeds", type=int, default=10, help="paired seeds (default 10)")
    parser.add_argument("--first", type=int, default=200_000, help="the first of them; training uses lower ones")
    parser.add_argument("--flops", type=float, default=4.0, help="what a run may spend (default 4.0)")
    parser.add_argument("--version", default="promoted", help="of the gnn policy: a version, or its beginning")
    parser.add_argument("--storage", default="~/.esper", help="where that policy lies")
    parser.add_argument("--out", default="~/.esper/bench/tamiyo", help="folder of the finished cells")
    parser.add_argument("--markdown", metavar="PATH", help="write the table there, too, for a page")
    parser.add_argument("--card", action="store_true", help="write the table into the card of the gnn policy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, may be repeated")
    return parser.parse_args(arguments)
