"""Does it pay to upgrade a trained model? Fashion-MNIST, paired over seeds, accuracy over the FLOPs that come on top.

Somebody has a small trained host. For each seed, in this order:

    small      trains that host; what it cost is spent already, and on no arm's account
    upgrade    goes on from its weights and grows
    more       goes on from its weights and does not grow, to the FLOPs of `upgrade`
    scratch    the network that `upgrade` ended with, newly initialised, to the FLOPs of `upgrade`
    long       the same for the epochs of `small` and `upgrade` together, whatever that costs

FLOPs count everything: validation, telemetry, shadows and rejected kernels. Accuracies at shares of those FLOPs are of
the validation part, at the last epoch that they pay for; test data are looked at once an arm, after its last epoch.
Finished cells are kept below `--out` and not computed again; give another folder after changing code.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
from pydantic import BaseModel, ConfigDict

from esper.config import RunConfig, dump_config, load_config
from esper.data import DataSets, load_data
from esper.leyline.errors import ConfigError
from esper.tolaria.weights import Trained
from jobs.bench import Say
from jobs.bench.arms import Outcome, small, static
from jobs.bench.harness import BenchResult, goal_above, machine, mean_interval
from jobs.environment import REPOSITORY, data_root

ARMS = ("small", "upgrade", "more", "scratch", "long")
SHARES = (0.25, 0.5, 1.0)
"""Of the FLOPs of `upgrade`, at which accuracies are compared."""
SETTINGS = ("deterministic=true", "host.channels=[4,8]", "tamiyo.warmup_epochs=1", "tolaria.num_threads=1")


class Point(BaseModel):
    """An epoch's end: FLOPs so far, and validation accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops: int
    accuracy: float


class Cell(BaseModel):
    """What one arm came to for one seed.

    Attributes:
        settings: digest of what it ran with; a cell of other settings is not taken over.
        curve: from the start (only of `upgrade`, which validates before its first step) to the last epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int
    settings: str
    test_accuracy: float
    epochs: int
    params: int
    parts: tuple[str, ...]
    curve: tuple[Point, ...]

    @property
    def flops(self) -> int:
        return self.curve[-1].flops

    def accuracy_for(self, flops: float) -> float | None:
        """Validation accuracy at the last epoch that these FLOPs pay for; None if they pay for none."""
        paid = [point.accuracy for point in self.curve if point.flops <= flops * 1.001]
        return paid[-1] if paid else None


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Trains what is not trained yet, and compares; see the module.

    Raises:
        ConfigError: for fewer than two seeds, or a setting that is wrong.
        DataError: if the data are not found (`ESPER_DATA`).
    """
    options = _options(arguments)
    if options.seeds < 2:
        raise ConfigError("an interval needs two seeds", field="--seeds")
    sizes = (f"data.train_limit={options.rows}", f"tolaria.epochs={options.epochs}")
    config = load_config(REPOSITORY / "configs" / "fashion_mnist.yaml", [*SETTINGS, *sizes, *options.set])
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(config, options.small_epochs, folder, say)
    return result_of([study.cells(seed) for seed in range(options.seeds)])


def result_of(cells: Sequence[dict[str, Cell]]) -> BenchResult:
    """The table of medians and spreads, the goal, and the comparison in words.

    Args:
        cells: for each seed, the cell of each arm.
    """
    gains = [seed["upgrade"].test_accuracy - seed["scratch"].test_accuracy for seed in cells]
    goal = goal_above("upgrade minus scratch at the same extra FLOPs, test accuracy", mean_interval(gains), 0.0)
    medians = {arm: statistics.median(seed[arm].test_accuracy for seed in cells) for arm in ARMS}
    cost = statistics.median(seed["long"].flops / seed["upgrade"].flops for seed in cells)
    against = {arm: mean_interval([s["upgrade"].test_accuracy - s[arm].test_accuracy for s in cells]) for arm in ARMS}
    words = "; ".join(
        f"minus {arm}: {100 * e.value:+.1f} points, 95% interval {100 * e.low:+.1f} to {100 * e.high:+.1f}"
        for arm, e in against.items()
        if arm != "upgrade"
    )
    verdict = (
        f"{len(cells)} seeds, median test accuracy: small {medians['small']:.1%}, upgraded {medians['upgrade']:.1%}, "
        f"trained on without growth {medians['more']:.1%}, the final network from scratch {medians['scratch']:.1%} at "
        f"the same extra FLOPs and {medians['long']:.1%} at {cost:.2f} of them. Upgrade {words}."
    )
    rows = tuple(_row(arm, [seed[arm] for seed in cells], [seed["upgrade"].flops for seed in cells]) for arm in ARMS)
    return BenchResult(name="upgrade", machine=machine(), rows=rows, goals=(goal,), verdict=verdict)


class Study:
    """All arms; reads and writes the cells."""

    def __init__(self, config: RunConfig, small_epochs: int, folder: Path, say: Say) -> None:
        self._config, self._small_epochs, self._folder, self._say = config, small_epochs, folder, say
        told = f"{dump_config(config)}{small_epochs}"
        self._settings = hashlib.sha256(told.encode()).hexdigest()[:16]

    def cells(self, seed: int) -> dict[str, Cell]:
        """The cell of each arm for one seed, trained where it is not there yet."""
        found = {arm: self._read(seed, arm) for arm in ARMS}
        if all(found.values()):
            return {arm: cell for arm, cell in found.items() if cell is not None}
        config = self._config.model_copy(update={"seed": seed})
        data = load_data(config.data, task=config.task, seed=seed, data_root=data_root())
        # the upgrade's topology is needed by two others, so a seed is trained whole
        return self._train(config, data)

    def _train(self, config: RunConfig, data: DataSets) -> dict[str, Cell]:
        seed, epochs = config.seed, config.tolaria.epochs
        begun = small(_lasting(config, self._small_epochs), data, policy="none", say=self._line(seed, "small"))
        weights = self._folder / f"{seed}-small.safetensors"
        safetensors.torch.save_file(begun.weights, weights)
        cells = {"small": self._keep(begun, "small", config)}
        grown = small(
            config, data, policy=config.tamiyo.policy, say=self._line(seed, "upgrade"), trained=Trained(str(weights))
        )
        cells["upgrade"] = self._keep(grown, "upgrade", config)
        paid = cells["upgrade"].flops
        more = small(
            _lasting(config, whole_epochs(paid, _per_epoch(begun))),
            data,
            policy="none",
            say=self._line(seed, "more"),
            trained=Trained(str(weights)),
        )
        cells["more"] = self._keep(more, "more", config)
        long = static(config, data, grown.growth, epochs=self._small_epochs + epochs, say=self._line(seed, "long"))
        cells["long"] = self._keep(long, "long", config)
        scratch = static(
            config, data, grown.growth, epochs=whole_epochs(paid, _per_epoch(long)), say=self._line(seed, "scratch")
        )
        cells["scratch"] = self._keep(scratch, "scratch", config)
        return cells

    def _line(self, seed: int, arm: str) -> Callable[[str], None]:
        return lambda line: self._say(f"seed {seed}, {arm}: {line}")

    def _keep(self, outcome: Outcome, arm: str, config: RunConfig) -> Cell:
        cell = cell_of(outcome, arm=arm, seed=config.seed, settings=self._settings)
        draft = self._folder / f"{config.seed}-{arm}.draft"
        draft.write_text(cell.model_dump_json(indent=1))
        draft.replace(self._path(config.seed, arm))
        self._say(
            f"seed {config.seed}, {arm}: {cell.test_accuracy:.1%} on the test part, {cell.flops / 1e9:.1f} GFLOPs"
        )
        return cell

    def _read(self, seed: int, arm: str) -> Cell | None:
        path = self._path(seed, arm)
        if not path.is_file():
            return None
        cell = Cell.model_validate_json(path.read_text())
        return cell if cell.settings == self._settings else None

    def _path(self, seed: int, arm: str) -> Path:
        return self._folder / f"{seed}-{arm}.json"


def cell_of(outcome: Outcome, *, arm: str, seed: int, settings: str) -> Cell:
    """The figures of a trained arm."""
    summary = outcome.summary
    assert summary.metrics.test_accuracy is not None
    curve = [Point(flops=row.total_flops, accuracy=row.val_metric or 0.0) for row in outcome.epochs]
    if summary.start is not None:
        curve.insert(0, Point(flops=0, accuracy=summary.start.val_metric or 0.0))
    return Cell(
        arm=arm,
        seed=seed,
        settings=settings,
        test_accuracy=summary.metrics.test_accuracy,
        epochs=len(outcome.epochs),
        params=summary.params.final,
        parts=outcome.parts,
        curve=tuple(curve),
    )


def whole_epochs(flops: int, per_epoch: float) -> int:
    """Epochs that come closest to `flops`, at least one."""
    return max(1, round(flops / per_epoch))


def _per_epoch(outcome: Outcome) -> float:
    return outcome.epochs[-1].total_flops / len(outcome.epochs)


def _lasting(config: RunConfig, epochs: int) -> RunConfig:
    return config.model_copy(update={"tolaria": config.tolaria.model_copy(update={"epochs": epochs})})


def _row(arm: str, cells: Sequence[Cell], paid: Sequence[int]) -> dict[str, object]:
    row: dict[str, object] = {
        "arm": arm,
        "test": _spread([cell.test_accuracy for cell in cells]),
        "GFLOPs": round(statistics.median(cell.flops for cell in cells) / 1e9, 1),
        "params": round(statistics.median(cell.params for cell in cells)),
    }
    for share in SHARES:
        reached = [cell.accuracy_for(share * flops) for cell, flops in zip(cells, paid, strict=True)]
        known = [accuracy for accuracy in reached if accuracy is not None]
        row[f"val at {share:.0%}"] = _spread(known) if len(known) == len(cells) and arm != "small" else None
    row["parts"] = " | ".join(" ".join(cell.parts) or "none" for cell in cells) if arm == "upgrade" else None
    return row


def _spread(accuracies: Sequence[float]) -> str:
    low, middle, high = min(accuracies), statistics.median(accuracies), max(accuracies)
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="esper bench upgrade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds, from 0 (default 5)")
    parser.add_argument("--rows", type=int, default=6000, help="training rows, before validation (default 6000)")
    parser.add_argument("--small-epochs", type=int, default=8, help="of the small host (default 8)")
    parser.add_argument("--epochs", type=int, default=14, help="of the upgrade (default 14)")
    parser.add_argument("--out", default="~/.esper/bench/upgrade", help="folder of the finished cells")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, may be repeated")
    return parser.parse_args(arguments)
