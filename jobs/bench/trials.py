"""Are trials by fork right, and do they choose better? On digits, where whole paired runs are affordable.

Two questions, each over seeds:

    estimate    From one state of a run every kernel is tried by a fork of a few steps. The truth is a fork that goes on
                to the end of the run, against one that does not grow: the difference of their losses on test data,
                which no trial sees. Reported: Spearman's rank correlation of the estimate with the truth, over the
                kernels of a seed, and that of the shadow's evidence at the moment of the graft.
    choice      Whole runs under the heuristic with one adaptation: with trials, and on shadow evidence alone. A kept
                adaptation helps if the run's test loss is below that of the same run without growth. Reported: the
                share that helps, with its Wilson interval, and the mean difference.

Finished cells are kept below `--out` and not computed again; give another folder after changing code. Trials run in
this process, one fork after the other: what they cost is in the FLOPs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from esper import kasmina
from esper.api import configured_workload, fork_local, local_hub, train_local
from esper.config import RunConfig, load_config, parse_config
from esper.data import DataSets, load_data
from esper.leyline import AssetHub, Fork, Outcome, Pipeline, RunSummary, SiteSignature, TrialCandidate
from esper.leyline.errors import ConfigError
from esper.tamiyo.controller import LocalController
from esper.tolaria.course import Ports
from esper.tolaria.evidence import compare, evaluate
from esper.tolaria.forks import BEHIND, BLENDING, Forked
from esper.tolaria.loop import Trainer
from esper.tolaria.numerics import numerics
from esper.tolaria.packing import pack
from esper.tolaria.ranks import SoloRanks
from esper.tolaria.trials_here import TrialsHere
from esper.tolaria.workload import Workload, evaluation_batches
from jobs.bench import Say
from jobs.bench.harness import BenchResult, Estimate, machine, mean_interval
from jobs.environment import REPOSITORY

UNLIMITED = 1 << 62
ARMS = ("none", "shadow", "trials")


class Tried(BaseModel):
    """One kernel, tried from one state. Gains are of loss; positive is better than not growing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    seed: int
    site: str
    blueprint: str
    fork: float
    stderr: float
    shadow: float
    truth: float


class Whole(BaseModel):
    """One run of one arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    seed: int
    arm: str
    test_loss: float
    test_accuracy: float
    kept: tuple[str, ...]
    flops: int
    trial_flops: int
    num_trials: int


class Cells(BaseModel):
    """What one seed came to: the unit that is kept."""

    tried: tuple[Tried, ...] = ()
    whole: tuple[Whole, ...] = ()


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Computes what is not there yet, and compares; see the module.

    Raises:
        ConfigError: for fewer than two seeds, or a setting that is wrong.
    """
    options = _options(arguments)
    if options.seeds < 2:
        raise ConfigError("an interval needs two seeds", field="--seeds")
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    verdicts: list[str] = []
    for width in options.widths:
        study = _Study(width, options, say)
        cells = [study.cell(folder, seed) for seed in range(options.seeds)]
        row, verdict = judge(f"cnn-{width}", cells)
        rows.append(row)
        verdicts.append(verdict)
    return BenchResult(name="trials", machine=machine(), rows=tuple(rows), verdict="\n".join(verdicts))


def judge(host: str, cells: Sequence[Cells]) -> tuple[dict[str, Any], str]:
    """The row of one host, and the result in words."""
    fork = _correlations(cells, lambda tried: tried.fork)
    shadow = _correlations(cells, lambda tried: tried.shadow)
    row: dict[str, Any] = {"host": host, "seeds": len(cells), "kernels": sum(len(cell.tried) for cell in cells)}
    row |= {"rank correlation, fork": _shown(fork), "rank correlation, shadow": _shown(shadow)}
    words = [f"{host}: rank correlation with the truth {_shown(fork)} by fork, {_shown(shadow)} by shadow"]
    for arm in ARMS[1:]:
        helped, kept, gains = 0, 0, []
        for cell in cells:
            runs = {run.arm: run for run in cell.whole}
            gains.append(runs["none"].test_loss - runs[arm].test_loss)
            if runs[arm].kept:
                kept += 1
                helped += runs[arm].test_loss < runs["none"].test_loss
        share = wilson(helped, kept)
        gain = mean_interval(gains)
        cost = [runs.flops for cell in cells for runs in cell.whole if runs.arm == arm]
        row[f"{arm}: helped"] = f"{helped} of {kept} {_shown(share)}"
        row[f"{arm}: test loss below none"] = _shown(gain)
        row[f"{arm}: GFLOPs"] = sum(cost) / len(cost) / 1e9
        words.append(f"{arm}: {helped} of {kept} kept adaptations help {_shown(share)}, test loss {_shown(gain)} lower")
    return row, "; ".join(words)


def wilson(hits: int, num: int, z: float = 1.96) -> Estimate | None:
    """A share with its 95% interval (Wilson 1927); None of nothing."""
    if not num:
        return None
    share, zz = hits / num, z * z / num
    centre, reach = share + zz / 2, z * math.sqrt(share * (1 - share) / num + zz / (4 * num))
    return Estimate(value=share, low=(centre - reach) / (1 + zz), high=(centre + reach) / (1 + zz), num_samples=num)


def _correlations(cells: Sequence[Cells], of: Callable[[Tried], float]) -> Estimate | None:
    from scipy import stats

    found = []
    for cell in cells:
        truths, estimates = [tried.truth for tried in cell.tried], [of(tried) for tried in cell.tried]
        if len(truths) > 2 and len(set(truths)) > 1 and len(set(estimates)) > 1:
            found.append(float(stats.spearmanr(estimates, truths)[0]))  # pyright: ignore[reportArgumentType] - a float
    return mean_interval(found) if len(found) > 1 else None


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


class _Measuring(Forked):
    """A fork that looks at the shadow's evidence just before the graft, as a run's gate would."""

    shadow = 0.0

    def _graft(self, candidate: TrialCandidate) -> None:
        course = self.session.course
        val = evaluation_batches(self._workload.val, batch_size=course.config.tolaria.batch_size)

        def losses() -> Any:
            batches = val.epoch(0, rank=0, world=1)
            return evaluate(course.growable.module, batches, course.task, ranks=SoloRanks(), device=course.device)

        host = losses()
        with course.growable.shadowed(candidate.seed_id):
            shadow = losses()
        self.shadow = compare(host, shadow, ranks=SoloRanks(), device=course.device).gain
        super()._graft(candidate)


@dataclass(frozen=True)
class _Problem:
    """Picks up where a fork or run makes its workload."""

    config: RunConfig
    data: DataSets

    def __call__(self) -> Workload:
        return configured_workload(self.config, self.data)


class _Study:
    """Both questions for one host."""

    def __init__(self, width: int, options: argparse.Namespace, say: Say) -> None:
        self._host, self._options, self._say = f"cnn-{width}", options, say
        base = load_config(REPOSITORY / "configs" / "digits.yaml", [f"host.channels=[{width}]", *options.set])
        tree = base.model_dump(mode="json")
        tree["tamiyo"] |= {"policy": "heuristic", "max_adaptations": 1}
        tree["tamiyo"]["trials"] |= {
            "steps": options.steps, "flops_share": options.share, "candidates": options.candidates,
        }  # fmt: skip
        tree["kasmina"] |= {"telemetry_share": None, "max_slowdown": None}
        self._tree = tree
        self._data: DataSets = load_data(base.data, task=base.task, seed=base.seed)

    def cell(self, folder: Path, seed: int) -> Cells:
        """The cell of one seed, computed where there is none."""
        path = folder / f"{self._host}-{seed}.json"
        if path.is_file():
            return Cells.model_validate_json(path.read_text())
        config = self._config(seed, enabled=False)
        problem = _Problem(config, self._data)
        hub, key = self._hub(problem, config)
        found = Cells(
            tried=tuple(self._tries(seed, config, problem, hub, key)),
            whole=tuple(self._whole(seed, arm, hub, key) for arm in ARMS),
        )
        draft = path.with_suffix(".draft")
        draft.write_text(found.model_dump_json(indent=1))
        draft.replace(path)
        return found

    def _config(self, seed: int, *, enabled: bool, policy: str = "heuristic") -> RunConfig:
        settings = [f"seed={seed}", f"tamiyo.trials.enabled={enabled}", f"tamiyo.policy={policy}"]
        return parse_config(self._tree, settings)

    def _hub(self, problem: _Problem, config: RunConfig) -> tuple[AssetHub, bytes]:
        host = kasmina.wrap(problem().model, example=problem().example, config=config.kasmina)
        return local_hub(host.sites.values(), config)

    # ---- the estimate

    def _tries(self, seed: int, config: RunConfig, problem: _Problem, hub: AssetHub, key: bytes) -> list[Tried]:
        packed, sites, done = self._state(config, problem, hub, key)
        steps = self._options.steps
        per_epoch = len(self._data.train[1]) // config.tolaria.batch_size
        rest = per_epoch * config.tolaria.epochs - done
        behind, blending = max(1, round(BEHIND * steps)), max(1, round(BLENDING * steps))
        on_test = replace_val(problem, self._data)
        none = fork_local(problem, config, packed, Fork("none", None, 0, steps, UNLIMITED), hub=hub, public_key=key)
        end = fork_local(on_test, config, packed, Fork("end", None, 0, rest, UNLIMITED), hub=hub, public_key=key)
        found = []
        for candidate in candidates(hub, sites)[: self._options.kernels]:
            short = Fork("short", candidate, 0, steps, UNLIMITED)
            with numerics(seed=config.seed, deterministic=False, num_threads=1):
                workload = problem()
                host = kasmina.wrap(workload.model, example=workload.example, config=config.kasmina)
                host.attach(hub, key, wait=True, native=False)
                fork = _Measuring(host, workload, config, packed=packed, fork=short)
                result = fork.run()
                host.close()
            long = Fork("long", candidate, 0, rest, UNLIMITED, behind, blending)
            truth = fork_local(on_test, config, packed, long, hub=hub, public_key=key)
            if result.failure or truth.failure or not result.losses:
                self._say(f"{self._host}, seed {seed}, {candidate.in_words}: {result.failure or truth.failure}")
                continue
            gains = np.asarray(none.losses) - np.asarray(result.losses)
            found.append(
                Tried(
                    host=self._host,
                    seed=seed,
                    site=candidate.site,
                    blueprint=candidate.blueprint,
                    fork=float(gains.mean()),
                    stderr=float(gains.std(ddof=1) / math.sqrt(len(gains))),
                    shadow=fork.shadow,
                    truth=end.loss - truth.loss,
                )
            )
            last = found[-1]
            self._say(
                f"{self._host}, seed {seed}, {last.blueprint} at {last.site}: "
                f"fork {last.fork:+.4f} ± {last.stderr:.4f}, shadow {last.shadow:+.4f}, truth {last.truth:+.4f}"
            )
        return found

    def _state(
        self, config: RunConfig, problem: _Problem, hub: AssetHub, key: bytes
    ) -> tuple[bytes, dict[str, tuple[str, SiteSignature]], int]:
        """The state of a run that has not grown, after `--at` epochs; its sites with their dormant seeds; its steps."""
        none = self._config(config.seed, enabled=False, policy="none")
        short = none.model_copy(update={"tolaria": none.tolaria.model_copy(update={"epochs": self._options.at})})
        with (
            tempfile.TemporaryDirectory() as folder,
            numerics(seed=config.seed, deterministic=False, num_threads=config.tolaria.num_threads),
        ):
            workload = problem()
            host = kasmina.wrap(workload.model, example=workload.example, config=config.kasmina)
            host.attach(hub, key, wait=False)
            ports = Ports(hub=hub, controller=LocalController(short.tamiyo, seed=config.seed))
            trainer = Trainer(host, workload, short, directory=folder, run_id="bench", ports=ports)
            trainer.run()
            host.close()
            course = trainer.session.course
            places = {seed.site: (seed.seed_id, seed.signature) for seed in host.seeds()}
            return pack(course), places, course.step

    # ---- the choice

    def _whole(self, seed: int, arm: str, hub: AssetHub, key: bytes) -> Whole:
        config = self._config(seed, enabled=arm == "trials", policy="none" if arm == "none" else "heuristic")
        problem = _Problem(config, self._data)
        trials = TrialsHere(partial(fork_local, problem, config, hub=hub, public_key=key)) if arm == "trials" else None
        summary = self._train(config, problem, hub, key, trials=trials)
        kept = [f"{r.site}:{r.blueprint}" for r in summary.field_reports if r.outcome is Outcome.FOSSILIZED]
        assert summary.metrics.test_loss is not None
        assert summary.metrics.test_accuracy is not None
        self._say(f"{self._host}, seed {seed}, {arm}: test loss {summary.metrics.test_loss:.4f}, kept {kept}")
        return Whole(
            host=self._host,
            seed=seed,
            arm=arm,
            test_loss=summary.metrics.test_loss,
            test_accuracy=summary.metrics.test_accuracy,
            kept=tuple(kept),
            flops=summary.ledger.flops.total,
            trial_flops=summary.ledger.flops.trials,
            num_trials=len(summary.trials),
        )

    def _train(
        self, config: RunConfig, problem: _Problem, hub: AssetHub, key: bytes, trials: TrialsHere | None = None
    ) -> RunSummary:
        with tempfile.TemporaryDirectory() as folder:
            return train_local(
                problem(),
                config,
                directory=folder,
                run_id="bench",
                hub=hub,
                bus=None,
                controller=LocalController(config.tamiyo, seed=config.seed),
                public_key=key,
                trials=trials,
                device=torch.device("cpu"),
            )


def replace_val(problem: _Problem, data: DataSets) -> Callable[[], Workload]:
    """The problem with test data where forks look for validation data."""
    return lambda: replace(problem(), val=data.test)


def candidates(hub: AssetHub, places: Mapping[str, tuple[str, SiteSignature]]) -> list[TrialCandidate]:
    """Every kernel for every site, by blueprint.

    Args:
        hub: where they are.
        places: by site, its dormant seed and its signature.
    """
    found = {
        (site, kernel.blueprint): TrialCandidate(
            site=site,
            seed_id=seed_id,
            kernel_id=kernel.kernel_id,
            blueprint_id=kernel.blueprint_id,
            blueprint=kernel.blueprint,
            flops_per_sample=kernel.flops_per_sample,
        )
        for site, (seed_id, signature) in places.items()
        for kernel in hub.kernel_briefs(signature, pipeline=Pipeline.FAST)
        if not kernel.needs_neighbour
    }
    return [found[key] for key in sorted(found)]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="esper bench trials", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 12], help="channels of the host, one each")
    parser.add_argument("--steps", type=int, default=100, help="of a trial's fork")
    parser.add_argument("--at", type=int, default=9, help="epochs before the state from which kernels are tried")
    parser.add_argument("--kernels", type=int, default=12, help="tried for the estimate, at most")
    parser.add_argument("--candidates", type=int, default=3, help="of a trial in a whole run")
    parser.add_argument("--share", type=float, default=20.0, help="tamiyo.trials.flops_share of whole runs")
    parser.add_argument("--out", default="bench-trials", help="folder of finished cells")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings")
    return parser.parse_args(arguments)
