"""Does it pay to upgrade a trained model? All of Fashion-MNIST, paired over seeds: accuracy over the FLOPs on top.

Somebody has a small host, trained to its end under a rate that decays to nothing. For each seed, and for each length
of the upgrade, in epochs:

    small      that host; what it cost is spent already, and on no arm's account
    upgrade    goes on from its weights and grows
    more       goes on from its weights and does not grow, under the same rates, to the FLOPs of `upgrade`
    scratch    the network that `upgrade` ended with, newly initialised, to the FLOPs of `upgrade`
    whole      that of the longest upgrade, newly initialised, to the FLOPs of `small` and `upgrade` together

Each is a run of its own, whose rate has decayed at its end: a point of one curve is not a longer run cut short. FLOPs
count everything: validation, telemetry, shadows and rejected kernels; arms come as close to each other as whole epochs
allow. Test data are looked at once a run, after its last epoch. What was tuned was tuned on seeds from 100 and on
validation data; reported are the seeds from 0. Finished runs are kept below `--out` and not done again, so that the
whole may be stopped at any moment; give another folder after changing code.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict

from esper.api import configured_host
from esper.config import RunConfig, dump_config, load_config
from esper.data import DataSets, load_data
from esper.leyline.errors import ConfigError
from esper.simic.spending import epoch_flops
from esper.tolaria.weights import Trained
from jobs.bench import Say
from jobs.bench.arms import Outcome, small, static, with_parts
from jobs.bench.harness import BenchResult, Goal, goal_above, machine, mean_interval
from jobs.bench.picture import Curve, Mark, draw
from jobs.environment import REPOSITORY, data_root

AT_EQUAL_FLOPS = ("more", "scratch")
PICTURE = "upgrade.svg"
SETTINGS = (
    "deterministic=true",
    "data.train_limit=null",
    "host={type: cnn, patch: 7, channels: [8]}",
    "budget={params: 8.0, flops: 8.0}",
    "tolaria.batch_size=512",
    "tolaria.num_threads=1",
    "tolaria.optimizer.lr=0.015",
    "tolaria.scheduler={type: wsd, warmup_fraction: 0.05, decay_fraction: 0.5}",
)
"""Of every run."""
GOING_ON = (
    "tamiyo.policy=schedule",
    "tamiyo.schedule=[{epoch: 0, site: stages.0.0, blueprint: conv_heavy, strategy: direct}]",
)
"""Of those that go on from trained weights, beside `SETTINGS`: `upgrade` and `more`."""


class Cell(BaseModel):
    """What one run came to.

    Attributes:
        arm: which of those above.
        length: epochs of the upgrade that it is or belongs to; 0 of `small`.
        settings: digest of what it ran with; a cell of other settings is not taken over.
        flops: of everything.
        validation: accuracy after each epoch; of `upgrade` and `more` that before the first step stands first.
        parts: `site:blueprint` of each kernel that it ended with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    length: int
    seed: int
    settings: str
    test_accuracy: float
    flops: int
    epochs: int
    params: int
    parts: tuple[str, ...]
    validation: tuple[float, ...]


Cells = dict[tuple[str, int], Cell]
"""The cells of one seed, by arm and length."""


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Trains what is not trained yet, and compares; see the module.

    Raises:
        ConfigError: for fewer than two seeds, no length, or a setting that is wrong.
        DataError: if the data are not found (`ESPER_DATA`).
    """
    options = _options(arguments)
    if options.seeds < 2:
        raise ConfigError("an interval needs two seeds", field="--seeds")
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(options.set, _lengths(options.epochs), options.small_epochs, folder, say)
    cells = [study.cells(seed) for seed in range(options.first, options.first + options.seeds)]
    picture = folder / PICTURE
    picture.write_text(picture_of(cells))
    say(f"accuracy over extra FLOPs: {picture}")
    return result_of(cells)


# ---------------------------------------------------------------- what was found


def result_of(seeds: Sequence[Cells]) -> BenchResult:
    """The table, the goals and the comparison in words.

    Args:
        seeds: the cells of each seed.
    """
    arms = list(seeds[0])
    lengths = [length for arm, length in arms if arm == "upgrade"]
    goals = tuple(_goal(seeds, arm, length) for length in lengths for arm in AT_EQUAL_FLOPS)
    means = {key: statistics.mean(cells[key].test_accuracy for cells in seeds) for key in arms}
    longest = ("upgrade", lengths[-1])
    against = {arm: _difference(seeds, longest, arm) for arm in (("small", 0), ("whole", lengths[-1]))}
    said = [
        f"upgrade of {length} epochs {means['upgrade', length]:.1%}, trained on without growth "
        f"{means['more', length]:.1%}, its network from scratch {means['scratch', length]:.1%}"
        for length in lengths
    ]
    verdict = (
        f"{len(seeds)} seeds, mean test accuracy: small {means['small', 0]:.1%}; at equal extra FLOPs: "
        f"{'; '.join(said)}. The longest upgrade's network from scratch, at the FLOPs of the small host on top: "
        f"{means['whole', lengths[-1]]:.1%}. The longest upgrade minus the small host: {against['small', 0]} "
        f"points, minus that network: {against['whole', lengths[-1]]}."
    )
    rows = tuple(_row(seeds, key) for key in arms)
    return BenchResult(name="upgrade", machine=machine(), rows=rows, goals=goals, verdict=verdict)


def picture_of(seeds: Sequence[Cells]) -> str:
    """Mean test accuracy over extra FLOPs as SVG; `small` is the level that was there before."""
    names = {"upgrade": "upgraded", "more": "trained on, not grown", "scratch": "its network from scratch"}
    curves = []
    for arm, name in names.items():
        keys = [key for key in seeds[0] if key[0] == arm or (arm, key[0]) == ("scratch", "whole")]
        curves.append(Curve(name, tuple(_mark(seeds, key) for key in keys)))
    level = statistics.mean(cells["small", 0].test_accuracy for cells in seeds)
    return draw(
        f"Fashion-MNIST, mean test accuracy of {len(seeds)} seeds with 95% intervals",
        curves,
        x="GFLOPs on top of the small host's",
        level=("small host", 100 * level),
        y="%",
    )


def _goal(seeds: Sequence[Cells], arm: str, length: int) -> Goal:
    gains = [cells["upgrade", length].test_accuracy - cells[arm, length].test_accuracy for cells in seeds]
    return goal_above(f"upgrade of {length} epochs minus {arm}, equal extra FLOPs, test", mean_interval(gains), 0.0)


def _difference(seeds: Sequence[Cells], one: tuple[str, int], other: tuple[str, int]) -> str:
    found = mean_interval([100 * (cells[one].test_accuracy - cells[other].test_accuracy) for cells in seeds])
    return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _mark(seeds: Sequence[Cells], key: tuple[str, int]) -> Mark:
    found = mean_interval([100 * cells[key].test_accuracy for cells in seeds])
    return Mark(statistics.mean(cells[key].flops for cells in seeds) / 1e9, found.value, found.low, found.high)


def _row(seeds: Sequence[Cells], key: tuple[str, int]) -> dict[str, object]:
    arm, length = key
    cells = [of_seed[key] for of_seed in seeds]
    tests = [cell.test_accuracy for cell in cells]
    compared = arm not in {"small", "upgrade"}
    return {
        "upgrade of": f"{length} epochs" if length else "",
        "arm": arm,
        "test": f"{statistics.mean(tests):.1%} ({min(tests):.1%} to {max(tests):.1%})",
        "upgrade minus it": _difference(seeds, ("upgrade", length), key) if compared else None,
        "val": f"{statistics.mean(cell.validation[-1] for cell in cells):.1%}",
        "GFLOPs": round(statistics.mean(cell.flops for cell in cells) / 1e9, 1),
        "epochs": round(statistics.mean(cell.epochs for cell in cells), 1),
        "params": round(statistics.mean(cell.params for cell in cells)),
        "parts": " | ".join(" ".join(cell.parts) or "none" for cell in cells) if arm == "upgrade" else None,
    }


# ---------------------------------------------------------------- the runs


class Study:
    """All runs; reads and writes the cells.

    Args:
        settings: of every run, beside `SETTINGS`; of runs that go on they win over `GOING_ON` too.
        lengths: epochs of the upgrades, shortest first.
        small_epochs: of the small host.
        folder: of the cells.
        say: takes progress.
    """

    def __init__(
        self, settings: Sequence[str], lengths: Sequence[int], small_epochs: int, folder: Path, say: Say
    ) -> None:
        path = REPOSITORY / "configs" / "fashion_mnist.yaml"
        self._new = load_config(path, [*SETTINGS, *settings])
        self._on = load_config(path, [*SETTINGS, *GOING_ON, *settings])
        self._lengths, self._small_epochs, self._folder, self._say = lengths, small_epochs, folder, say
        begun = f"{dump_config(self._new)}{small_epochs}"
        self._settings = {"small": _digest(begun)}
        self._settings |= dict.fromkeys(("upgrade", "more", "scratch", "whole"), _digest(begun + dump_config(self._on)))

    def cells(self, seed: int) -> Cells:
        """The cells of one seed, trained where they are not there yet."""
        return {(cell.arm, cell.length): cell for cell in self._cells(seed)}

    def _cells(self, seed: int) -> Iterator[Cell]:
        begun = self._cell(seed, "small", 0, self._small)
        yield begun
        upgrade = begun
        for length in self._lengths:
            upgrade = self._cell(seed, "upgrade", length, self._upgrade)
            yield upgrade
            yield self._cell(seed, "more", length, functools.partial(self._more, flops=upgrade.flops))
            yield self._cell(seed, "scratch", length, functools.partial(self._scratch, flops=upgrade.flops))
        both = begun.flops + upgrade.flops
        yield self._cell(seed, "whole", self._lengths[-1], functools.partial(self._scratch, flops=both))

    def _cell(self, seed: int, arm: str, length: int, train: Callable[[int, int, Say], Outcome]) -> Cell:
        name = f"{seed}-{arm}-{length}"
        path = self._folder / f"{name}.json"
        if path.is_file():
            done = Cell.model_validate_json(path.read_text())
            if done.settings == self._settings[arm]:
                return done
        outcome = train(seed, length, lambda line: self._say(f"{name}: {line}"))
        cell = cell_of(outcome, arm=arm, length=length, seed=seed, settings=self._settings[arm])
        _replace(path, lambda draft: draft.write_text(cell.model_dump_json(indent=1)))
        self._say(f"{name}: {cell.test_accuracy:.1%} on the test part, {cell.flops / 1e9:.1f} GFLOPs")
        return cell

    def _small(self, seed: int, length: int, say: Say) -> Outcome:
        del length
        outcome = small(_lasting(self._new, seed, self._small_epochs), self._data, policy="none", say=say)
        _replace(self._weights(seed), lambda draft: safetensors.torch.save_file(outcome.weights, draft))
        return outcome

    def _upgrade(self, seed: int, length: int, say: Say) -> Outcome:
        config = _lasting(self._on, seed, length)
        outcome = small(config, self._data, policy=config.tamiyo.policy, say=say, trained=self._trained(seed))
        _replace(self._growth(seed, length), lambda draft: torch.save(outcome.growth, draft))
        return outcome

    def _more(self, seed: int, length: int, say: Say, *, flops: int) -> Outcome:
        config = _lasting(self._on, seed, length)
        epochs = whole_epochs(flops, epoch_flops(config, self._data, configured_host(config, self._data)))
        return small(_lasting(config, seed, epochs), self._data, policy="none", say=say, trained=self._trained(seed))

    def _scratch(self, seed: int, length: int, say: Say, *, flops: int) -> Outcome:
        config = _lasting(self._new, seed, length)
        growth: dict[str, Any] = torch.load(self._growth(seed, length), weights_only=True)
        model = with_parts(configured_host(config, self._data), growth, config, self._data)
        epochs = whole_epochs(flops, epoch_flops(config, self._data, model))
        return static(config, self._data, growth, epochs=epochs, say=say)

    @functools.cached_property
    def _data(self) -> DataSets:
        # the split is the same for every seed
        return load_data(self._new.data, task=self._new.task, seed=0, data_root=data_root())

    def _trained(self, seed: int) -> Trained:
        return Trained(str(self._weights(seed)))

    def _weights(self, seed: int) -> Path:
        return self._folder / f"{seed}-small.safetensors"

    def _growth(self, seed: int, length: int) -> Path:
        return self._folder / f"{seed}-upgrade-{length}.pt"


def cell_of(outcome: Outcome, *, arm: str, length: int, seed: int, settings: str) -> Cell:
    """The figures of a run that ended."""
    summary = outcome.summary
    assert summary.metrics.test_accuracy is not None
    validation = [row.val_metric or 0.0 for row in outcome.epochs]
    if summary.start is not None:
        validation.insert(0, summary.start.val_metric or 0.0)
    return Cell(
        arm=arm,
        length=length,
        seed=seed,
        settings=settings,
        test_accuracy=summary.metrics.test_accuracy,
        flops=outcome.epochs[-1].total_flops,
        epochs=len(outcome.epochs),
        params=summary.params.final,
        parts=outcome.parts,
        validation=tuple(validation),
    )


def whole_epochs(flops: int, per_epoch: float) -> int:
    """Epochs that come closest to `flops`, at least one."""
    return max(1, round(flops / per_epoch))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lasting(config: RunConfig, seed: int, epochs: int) -> RunConfig:
    return config.model_copy(update={"seed": seed, "tolaria": config.tolaria.model_copy(update={"epochs": epochs})})


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    write(draft)
    draft.replace(path)


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"{text!r} are no epochs", field="--epochs", remedy="such as 4,8") from error
    if lengths[0] < 1:
        raise ConfigError("an upgrade takes an epoch at least", field="--epochs")
    return lengths


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="esper bench upgrade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds (default 5)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--small-epochs", type=int, default=12, help="of the small host (default 12)")
    parser.add_argument("--epochs", default="4,8", help="of the upgrades, with commas (default 4,8)")
    parser.add_argument("--out", default="~/.esper/bench/upgrade", help="folder of the finished runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, may be repeated")
    return parser.parse_args(arguments)
