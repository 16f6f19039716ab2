"""Does growing pay, on digits? Paired over seeds: the same host weights, the same order of samples, the same split.

The promise is against not growing: mean paired difference in test accuracy, with its 95% interval above zero. Beside
it stands the network that growth ended with, trained from the start: for the same epochs, and for the same FLOPs with
everything counted. Nobody is to be fooled: the verdict says how growth compares with those.

Test data are looked at once a run, after its last epoch; no gate and no policy sees them. Finished cells are kept
below `--out` and not computed again; give another folder after changing code.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from esper.config import RunConfig, dump_config, load_config
from esper.data import DataSets, load_data
from esper.leyline.errors import ConfigError
from jobs.bench import Say
from jobs.bench.arms import ARMS, Cell, cell, small, static, stopped_epochs
from jobs.bench.harness import BenchResult, Estimate, Goal, goal_above, machine, mean_interval
from jobs.environment import REPOSITORY

HOSTS = {"cnn": "digits.yaml", "mlp": "digits_mlp.yaml"}


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Trains what is not trained yet, and compares; see the module.

    Raises:
        ConfigError: for an unknown host, fewer than two seeds, or a setting that is wrong.
    """
    options = _options(arguments)
    hosts = options.hosts.split(",")
    for host in hosts:
        if host not in HOSTS:
            raise ConfigError(f"no host {host!r}", field="--hosts", remedy=f"one or more of {','.join(HOSTS)}")
    if options.seeds < 2:
        raise ConfigError("an interval needs two seeds", field="--seeds")
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows, goals, verdicts = [], [], []
    for host in hosts:
        config = load_config(REPOSITORY / "configs" / HOSTS[host], ["deterministic=true", *options.set])
        cells = _Study(host, config, folder, say).cells(range(options.seeds))
        rows.extend(_row(one) for seed in cells for one in seed.values())
        goal, verdict = compare(host, cells)
        goals.append(goal)
        verdicts.append(verdict)
    return BenchResult(
        name="growth", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict="\n".join(verdicts)
    )


def compare(host: str, cells: Sequence[dict[str, Cell]]) -> tuple[Goal, str]:
    """The promise, and how growth compares with the static networks, in words.

    Args:
        host: its name.
        cells: for each seed, the cell of each arm.
    """
    against = {
        arm: mean_interval([seed["grow"].test_accuracy - seed[arm].test_accuracy for seed in cells])
        for arm in ARMS
        if arm != "grow"
    }
    goal = goal_above(f"{host}: growing minus not growing, test accuracy", against["none"], 0.0)
    means = {arm: sum(seed[arm].test_accuracy for seed in cells) / len(cells) for arm in ARMS}
    cost = sum(seed["grow"].flops / seed["static"].flops for seed in cells) / len(cells)
    fossils = sum(seed["grow"].fossils for seed in cells)
    verdict = (
        f"{host}, {len(cells)} seeds, {fossils} fossils: growing reaches {means['grow']:.1%}, not growing "
        f"{means['none']:.1%}. The same parts from the start reach {means['static']:.1%} at the same epochs: growing "
        f"is {_words(against['static'])}, for {cost:.2f} of the FLOPs. Stopped at the FLOPs of growing they reach "
        f"{means['stopped']:.1%}: growing is {_words(against['stopped'])}."
    )
    return goal, verdict


class _Study:
    """All arms of one host; reads and writes the cells."""

    def __init__(self, host: str, config: RunConfig, folder: Path, say: Say) -> None:
        self._host, self._config, self._folder, self._say = host, config, folder, say
        self._settings = hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]
        self._data: DataSets = load_data(config.data, task=config.task, seed=config.seed)

    def cells(self, seeds: Sequence[int]) -> list[dict[str, Cell]]:
        return [self._seed(seed) for seed in seeds]

    def _seed(self, seed: int) -> dict[str, Cell]:
        config = self._config.model_copy(update={"seed": seed})
        found: dict[str, Cell] = {}
        for arm in ARMS:
            done = self._read(seed, arm)
            found[arm] = done or self._train(config, arm, found)
            if done is None:
                self._say(f"{self._host}, seed {seed}, {arm}: {found[arm].test_accuracy:.1%} on the test part")
        return found

    def _train(self, config: RunConfig, arm: str, found: dict[str, Cell]) -> Cell:
        seed = config.seed

        def say(line: str) -> None:
            self._say(f"{self._host}, seed {seed}, {arm}: {line}")

        if arm in {"none", "grow"}:
            outcome = small(config, self._data, policy="none" if arm == "none" else config.tamiyo.policy, say=say)
        else:
            epochs = config.tolaria.epochs
            if arm == "stopped":
                epochs = stopped_epochs(found["static"], found["grow"].flops)
            outcome = static(config, self._data, self._read_growth(seed), epochs=epochs, say=say)
        if arm == "grow":  # the static arms need it; written before the cell that vouches for it
            _replace(self._growth_path(seed), lambda path: torch.save(outcome.growth, path))
        parts = found["grow"].parts if "grow" in found else outcome.parts
        result = cell(outcome, host=self._host, arm=arm, seed=seed, settings=self._settings, parts=parts)
        text = result.model_dump_json(indent=2)
        _replace(self._path(seed, arm), lambda path: path.write_text(text))
        return result

    def _read(self, seed: int, arm: str) -> Cell | None:
        path = self._path(seed, arm)
        if not path.is_file():
            return None
        found = Cell.model_validate_json(path.read_text())
        return found if found.settings == self._settings else None

    def _read_growth(self, seed: int) -> dict[str, Any]:
        return torch.load(self._growth_path(seed), weights_only=True)

    def _path(self, seed: int, arm: str) -> Path:
        return self._folder / f"{self._host}-{seed}-{arm}.json"

    def _growth_path(self, seed: int) -> Path:
        return self._folder / f"{self._host}-{seed}-grow.pt"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    write(draft)
    draft.replace(path)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="esper bench growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds, from 0 (default 5)")
    parser.add_argument("--hosts", default=",".join(HOSTS), help=f"which hosts (default {','.join(HOSTS)})")
    parser.add_argument("--out", default="~/.esper/bench/growth", help="folder of the finished cells")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, may be repeated")
    return parser.parse_args(arguments)


def _words(difference: Estimate) -> str:
    points, low, high = (100 * figure for figure in (difference.value, difference.low, difference.high))
    interval = f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        return f"better ({interval})"
    return f"worse ({interval})" if high < 0 else f"not distinguishable from them ({interval})"


def _row(one: Cell) -> dict[str, object]:
    return {
        "host": one.host,
        "seed": one.seed,
        "arm": one.arm,
        "test": round(one.test_accuracy, 4),
        "val": round(one.val_accuracy, 4),
        "epochs": one.epochs,
        "params": one.params,
        "mflops": round(one.flops / 1e6, 1),
        "seconds": round(one.seconds, 1),
        "parts": " ".join(one.parts),
        "fossils": one.fossils,
    }
