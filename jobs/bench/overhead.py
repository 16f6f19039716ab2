"""What a wrapped model costs while all its seeds are dormant: a ratio to the plain model, forward and whole step.

Inputs are random tensors, since only time is measured. One thread. A step is what the trainer does: `prepare`, then
forward, loss, backward and the optimizer. The row `with telemetry` also samples health every 10 steps, `with telemetry
at its share` as often as the trainer would by default: every 10 steps, or less often where that costs more than
`kasmina.telemetry_share`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from esper.config import CnnHost, GptHost, Host, KasminaConfig, MlpHost
from esper.hosts import build_host
from esper.kasmina import wrap
from esper.leyline.growth import Growable
from esper.tolaria.pace import Pace
from jobs.bench.harness import BenchResult, Estimate, goal_at_most, interleaved, machine

GOAL = 1.01
TELEMETRY_GOAL = 1.02
BATCH = 16
TELEMETRY = "step with telemetry"
PACED = "step with telemetry at its share"
TELEMETRY_EVERY = 10
PACING_STEPS = 200
"""Steps in which the trainer's pace is found."""
HOSTS: dict[str, tuple[Host, tuple[int, ...], int]] = {
    "cnn": (CnnHost(channels=(8, 16, 32), blocks_per_stage=2), (3, 32, 32), 10),
    "mlp": (MlpHost(hidden=(256, 128)), (784,), 10),
    "gpt": (GptHost(width=64, depth=2, heads=4), (64,), 65),
}


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Measures every host; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of four blocks a figure (default 200)")
    options = parser.parse_args(arguments)
    rows, goals = [], []
    with _one_thread():
        for name, (config, shape, outputs) in HOSTS.items():
            case = _Case(config, shape, outputs)
            for what, a, b, multiple in case.comparisons():
                estimate = interleaved(a, b, rounds=max(25, options.rounds // (multiple // 2 or 1)), multiple=multiple)
                say(f"{name}, {what}: {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]")
                rows.append(_row(name, what, estimate, multiple))
                if what in {"forward", "step"}:
                    goals.append(goal_at_most(f"{name} {what}", estimate, GOAL))
                elif what == PACED:
                    goals.append(goal_at_most(f"{name} {what}", estimate, TELEMETRY_GOAL))
    return BenchResult(name="overhead", machine=machine(), rows=tuple(rows), goals=tuple(goals))


class _Case:
    """One host, plain and wrapped, with the same weights and the same batch."""

    def __init__(self, config: Host, shape: tuple[int, ...], outputs: int) -> None:
        torch.manual_seed(0)
        plain = build_host(config, input_shape=shape, num_outputs=outputs, seed=0)
        is_text = isinstance(config, GptHost)
        self._x = torch.randint(outputs, (BATCH, *shape)) if is_text else torch.randn(BATCH, *shape)
        self._y = torch.randint(outputs, (BATCH, *shape) if is_text else (BATCH,))
        self._control = copy.deepcopy(plain)
        self._host: Growable = wrap(copy.deepcopy(plain), example=(self._x[:2],), causal=is_text)
        self._plain = plain

    def comparisons(self) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
        """Yields what is compared, the plain call, the other one, and the steps after which its work recurs."""
        wrapped = self._host.module
        yield "forward", lambda: self._plain(self._x), lambda: wrapped(self._x), 1
        yield "step", self._step(self._plain), self._growing_step(observe_every=None), 1
        every = TELEMETRY_EVERY
        yield TELEMETRY, self._step(self._plain), self._growing_step(observe_every=every), every
        every = self._paced()
        yield PACED, self._step(self._plain), self._growing_step(observe_every=every), every
        yield "plain against itself", self._step(self._plain), self._step(self._control), 1

    def _step(self, model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        target = self._y.flatten()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(self._x).flatten(0, -2), target).backward()
            optimizer.step()

        return step

    def _paced(self) -> int:
        """Steps between samples that the trainer would settle on here."""
        pace = Pace(TELEMETRY_EVERY, KasminaConfig().telemetry_share)
        step = self._step(self._host.module)
        for number in range(PACING_STEPS):
            observe = pace.samples(number, longest=PACING_STEPS)
            began = time.perf_counter()
            self._host.prepare(number, epoch=0, steps_per_epoch=1_000_000, observe=observe)
            step()
            pace.took(time.perf_counter() - began, sampled=observe)
        return pace.interval(longest=PACING_STEPS)

    def _growing_step(self, *, observe_every: int | None) -> Callable[[], None]:
        step, numbers = self._step(self._host.module), itertools.count()

        def growing_step() -> None:
            number = next(numbers)
            observe = observe_every is not None and number % observe_every == 0
            self._host.prepare(number, epoch=0, steps_per_epoch=1_000_000, observe=observe)
            step()

        return growing_step


def _row(host: str, what: str, estimate: Estimate, every: int) -> dict[str, object]:
    return {
        "host": host,
        "what": what,
        "every": every,
        "ratio": round(estimate.value, 4),
        "low": round(estimate.low, 4),
        "high": round(estimate.high, 4),
        "rounds": estimate.num_samples,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
