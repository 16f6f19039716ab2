"""What a wrapped model costs while all its seeds are dormant: a ratio to the plain model, forward and whole step.

Inputs are random tensors, since only time is measured. One thread. A step is what the trainer does: `prepare`, then
forward, loss, backward and the optimizer. The row `with telemetry` also samples health every 10 steps, `with telemetry
at its share` as often as the trainer would by default: every 10 steps, or less often where that costs more than
`kasmina.telemetry_share`. `step with a seed in training` trains one kernel behind the first block as often as the
trainer does by default where epochs are not short, and from its site on, as the host tells what follows a block; `by
whole replays` is the same without that. `memory` is what the tensors of model, gradients and optimizer take.
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

from esper.api import local_hub
from esper.config import CnnHost, GptHost, Host, KasminaConfig, MlpHost, parse_config
from esper.hosts import build_host
from esper.kasmina import wrap
from esper.kasmina.layer import Layer
from esper.leyline import Action, KasminaControlCommand
from esper.leyline.growth import Growable
from esper.tolaria.pace import REPLAYS_EVERY, Pace
from jobs.bench.harness import BenchResult, Estimate, goal_at_most, interleaved, machine

GOAL = 1.01
TELEMETRY_GOAL = 1.02
TRAINING_GOAL = 1.25
MEMORY_GOAL = 1.01
BATCH = 16
TELEMETRY = "step with telemetry"
PACED = "step with telemetry at its share"
TRAINING = "step with a seed in training"
REPLAYED = "step with a seed in training, by whole replays"
BLUEPRINTS = {"cnn": "residual_conv", "mlp": "mlp_2x", "gpt": "mlp_adapter"}
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
            case = _Case(config, shape, outputs, BLUEPRINTS[name])
            for what, a, b, multiple in case.comparisons():
                estimate = interleaved(a, b, rounds=max(25, options.rounds // (multiple // 2 or 1)), multiple=multiple)
                say(f"{name}, {what}: {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]")
                rows.append(_row(name, what, estimate, multiple))
                if what in {"forward", "step"}:
                    goals.append(goal_at_most(f"{name} {what}", estimate, GOAL))
                elif what == PACED:
                    goals.append(goal_at_most(f"{name} {what}", estimate, TELEMETRY_GOAL))
                elif what in {TRAINING, REPLAYED}:
                    goals.append(goal_at_most(f"{name} {what}", estimate, TRAINING_GOAL))
            ratio = case.memory()
            say(f"{name}, memory: {ratio:.4f}")
            exact = Estimate(value=ratio, low=ratio, high=ratio, num_samples=1)
            rows.append(_row(name, "memory", exact, 1))
            goals.append(goal_at_most(f"{name} memory", exact, MEMORY_GOAL))
    return BenchResult(name="overhead", machine=machine(), rows=tuple(rows), goals=tuple(goals))


class _Case:
    """One host, plain and wrapped, with the same weights and the same batch."""

    def __init__(self, config: Host, shape: tuple[int, ...], outputs: int, blueprint: str) -> None:
        torch.manual_seed(0)
        plain = build_host(config, input_shape=shape, num_outputs=outputs, seed=0)
        is_text = isinstance(config, GptHost)
        self._x = torch.randint(outputs, (BATCH, *shape)) if is_text else torch.randn(BATCH, *shape)
        self._y = torch.randint(outputs, (BATCH, *shape) if is_text else (BATCH,))
        self._control = copy.deepcopy(plain)
        self._host: Growable = wrap(copy.deepcopy(plain), example=(self._x[:2],), causal=is_text)
        self._plain, self._blueprint, self._causal = plain, blueprint, is_text

    def comparisons(self) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
        """Yields what is compared, the plain call, the other one, and the steps after which its work recurs."""
        wrapped = self._host.module
        yield "forward", lambda: self._plain(self._x), lambda: wrapped(self._x), 1
        yield "step", self._step(self._plain), self._growing_step(observe_every=None), 1
        every = TELEMETRY_EVERY
        yield TELEMETRY, self._step(self._plain), self._growing_step(observe_every=every), every
        every = self._paced()
        yield PACED, self._step(self._plain), self._growing_step(observe_every=every), every
        every = REPLAYS_EVERY
        yield TRAINING, self._step(self._plain), self._training_step(every, replays=1), every
        yield REPLAYED, self._step(self._plain), self._training_step(every, replays=0), every
        yield "plain against itself", self._step(self._plain), self._step(self._control), 1

    def _step(self, model: nn.Module) -> Callable[[], None]:
        return self._step_of(model, list(model.parameters()))

    def _step_of(
        self, model: Callable[[torch.Tensor], torch.Tensor], parameters: list[nn.Parameter]
    ) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, 1e-4)
        target = self._y.flatten()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(self._x).flatten(0, -2), target).backward()
            optimizer.step()

        return step

    def memory(self) -> float:
        """Bytes of all tensors of the wrapped model, its gradients and its optimizer, as a ratio to the plain one's."""

        def taken(model: nn.Module) -> int:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
            functional.cross_entropy(model(self._x).flatten(0, -2), self._y.flatten()).backward()
            optimizer.step()
            states = (tensor for state in optimizer.state.values() for tensor in state.values())
            gradients = (p.grad for p in model.parameters() if p.grad is not None)
            tables = (t for layer in model.modules() if isinstance(layer, Layer) for t in layer.table.fields.values())
            tensors = (*model.state_dict().values(), *states, *gradients, *tables)
            return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

        return taken(copy.deepcopy(self._host.module)) / taken(copy.deepcopy(self._control))

    def _training_step(self, every: int, *, replays: int) -> Callable[[], None]:
        """A step with one kernel in TRAINING behind the host, on every so many steps; `replays` as for `prepare`."""
        host = wrap(copy.deepcopy(self._control), example=(self._x[:2],), causal=self._causal)
        site, signature = next(iter(host.sites.items()))
        tree = {"data": {"type": "given"}, "host": {"type": "given"}, "tezzeret": {"blueprints": [self._blueprint]}}
        hub, key = local_hub([signature], parse_config(tree, []))
        host.attach(hub, key, wait=True, native=False)
        host.load_kernel(site, host.seeds()[0].seed_id, hub.kernel_briefs(signature)[0].kernel_id)
        order = KasminaControlCommand(
            action=Action.ADVANCE, site=site, seed_id=host.seeds()[0].seed_id, reason="the benchmark asks"
        )
        host.apply(order, run_id="bench", epoch=0, step=0)
        step, numbers, target = self._step_of(host, [p for _, p in host.live_parameters()]), itertools.count(), self._y

        def training_step() -> None:
            number = next(numbers)
            trains = number % every == 0
            kept = replays if trains else 0
            host.prepare(number, epoch=0, steps_per_epoch=1_000_000, observe=False, replays=kept)
            step()
            if trains:
                host.train_shadows(
                    (self._x,), lambda outputs: functional.cross_entropy(outputs.flatten(0, -2), target.flatten())
                )

        return training_step

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
