"""How long a trainer stands still when a network grows: the steps around a graft, against a run that does not grow.

Runs of one host take turns, a step each, in one process, so that what disturbs the machine disturbs all; while a run
loads something in the background it keeps the turn, so that this disturbs no other. `control` does not grow, `idle`
does not either (what it differs by is noise), `graft` takes kernels in, trains some behind the host, grafts others and
removes them again, and `graft and hot swap` puts native code in the place of those it grafted, while they compute.
Steps around a change of what computes are its window. A step's time is that of all the trainer does between two steps,
the carrying out of commands included; validation is none of it. At the end kernels of the same design are put in place
under `torch.compile`, as a trainer without a compile pool would.

    stall = (worst step of `graft` / its median after grafts) / (worst step of `control` / its median)

The worst of each is that of all its steps, the loading of kernels in the background among them; the worst and the p99.9
of the window stand beside it. Where the worst step went is told: what of it the trainer's own thread computed, what the
other threads of the process did meanwhile (the rest, neither had the processor), and what the run's seeds were at.
Steps on which a kernel trains behind the host are reported apart: they cost more by design.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from esper import kasmina
from esper.api import local_hub
from esper.config import parse_config
from esper.kasmina.loader import build
from esper.leyline import (
    Action,
    AdaptationSignal,
    AssetHub,
    BlendStrategy,
    HealthSignal,
    KasminaControlCommand,
    KernelRejectedError,
    SeedStage,
    SystemStatePacket,
)
from esper.leyline.container import unpack
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.workload import evaluation_batches
from jobs.bench.harness import BenchResult, Goal, machine
from jobs.bench.native_kernels import compile_native_kernel
from jobs.bench.overhead import HOSTS

BLUEPRINTS = {"cnn": "residual_conv", "gpt": "mlp_adapter"}
BATCH = 16
STEPS_PER_EPOCH = 50
WARM_UP = 20
MIN_STEPS = 5000
"""Of an arm, for its p99.9."""
FEWEST_STEPS = 6 * STEPS_PER_EPOCH
"""In which a kernel comes and goes."""
GOAL, INLINE_GOAL = 1.3, 50.0
ARMS = ("control", "idle", "graft", "graft and hot swap")


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """Where the time of one step went.

    Attributes:
        milliseconds: on the clock.
        own_ms: of the processor, of the thread that trains.
        others_ms: of the processor, of the process's other threads.
        number: of the step.
        doing: stages of the run's seeds when it began.
    """

    milliseconds: float
    own_ms: float = 0.0
    others_ms: float = 0.0
    number: int = 0
    doing: str = ""

    def __str__(self) -> str:
        return (
            f"step {self.number}, {self.milliseconds:.1f} ms: own {self.own_ms:.1f}, other threads "
            f"{self.others_ms:.1f}, {self.doing}"
        )


@dataclass
class Times:
    """Milliseconds of steps, by kind; of all but the shadow steps also which was the worst.

    Attributes:
        grafted: of those of the window, with a kernel on the live path.
    """

    plain: list[float] = field(default_factory=list)
    shadow: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)
    grafted: list[float] = field(default_factory=list)
    worst: Step = field(default_factory=lambda: Step(0.0))


class Script:
    """A controller that takes one kernel after the other in and out; every other one goes live at once.

    Args:
        kernel_id: whose. None decides nothing.
    """

    def __init__(self, kernel_id: str | None) -> None:
        self._kernel_id = kernel_id
        self._live = False

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """See `Controller`."""
        seed = packet.layers[0].seeds[-1]
        command = None if self._kernel_id is None else self._next(seed, self._kernel_id)
        signal = AdaptationSignal(
            run_id=packet.run_id,
            epoch=packet.epoch.epoch,
            policy="script",
            commands=() if command is None else (command,),
            reason="the benchmark's script",
        )
        return state, signal

    def _next(self, seed: HealthSignal, kernel_id: str) -> KasminaControlCommand | None:
        if seed.stage is SeedStage.DORMANT:
            self._live = not self._live
            strategy = BlendStrategy.DIRECT if self._live else BlendStrategy.RAMP
            return self._command(Action.GERMINATE, seed, kernel_id=kernel_id, strategy=strategy)
        if seed.stage is SeedStage.GERMINATED and seed.is_ready_for_transition:
            return self._command(Action.ADVANCE, seed)
        if seed.stage is SeedStage.TRAINING or (seed.stage is SeedStage.GRAFTING and seed.epochs_in_stage >= 2):
            return self._command(Action.CULL, seed)
        return None

    def _command(self, action: Action, seed: HealthSignal, **given: Any) -> KasminaControlCommand:
        return KasminaControlCommand(
            action=action, site=seed.layer_id, seed_id=seed.seed_id, reason="the benchmark's script", **given
        )


class Arm:
    """One run: a host, its optimizer and a session, stepped by hand.

    Args:
        name: of the host.
        hub: with one kernel for its first site; None does not grow.
        kernel_id: of that kernel.
        public_key: its signer's.
        model: a copy of the host.
        native: whether native code from the hub takes the place of what was grafted.
    """

    def __init__(
        self,
        name: str,
        *,
        hub: AssetHub | None,
        kernel_id: str | None,
        public_key: bytes,
        model: nn.Module,
        native: bool = False,
    ) -> None:
        _, shape, outputs = HOSTS[name]
        is_text = name == "gpt"
        generator = torch.Generator().manual_seed(0)
        self.x = (
            torch.randint(outputs, (BATCH, *shape), generator=generator)
            if is_text
            else torch.randn(BATCH, *shape, generator=generator)
        )
        self.y = torch.randint(outputs, (BATCH, *shape) if is_text else (BATCH,), generator=generator)
        config = parse_config(
            {
                "data": {"type": "given"}, "host": {"type": "given"}, "budget": {"params": 99.0, "flops": 99.0},
                "kasmina": {"embargo_epochs": 0}, "tezzeret": {"optimize": "grafted" if native else "never"},
            },
            [],
        )  # fmt: skip
        self.host = kasmina.wrap(
            model, example=(self.x[:2],), sites=site_of(name, model, self.x), config=config.kasmina
        )
        if hub is not None:
            self.host.attach(hub, public_key, wait=False, native=native)
        self.optimizer = torch.optim.AdamW([p for _, p in self.host.live_parameters()], lr=1e-4)
        self.session = Session(
            self.host,
            Optimization(self.optimizer),
            TASKS["language_model" if is_text else "classification"],
            example=(self.x[:2],),
            config=config,
            run_id="bench",
            ports=Ports(hub=hub, controller=Script(kernel_id)),
            val=evaluation_batches((self.x[:2], self.y[:2]), batch_size=2),
            steps_per_epoch=STEPS_PER_EPOCH,
        )
        self.session.begin()
        self.times = Times()
        self.num_steps = 0
        self._since_change = STEPS_PER_EPOCH
        self._computing = self._what_computes()
        self.num_swaps = 0
        self._carried = np.zeros(3)

    def step(self) -> None:
        """One step, and what is due at the end of an epoch."""
        trains = any(seed.stage is SeedStage.TRAINING for seed in self.host.seeds())
        doing = self._doing()
        processors = time.thread_time(), time.process_time()
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.session.course.model(self.x)
        loss = functional.cross_entropy(outputs.flatten(0, -2), self.y.flatten())
        loss.backward()
        self.session.course.optimization.step()
        self.session.step((self.x, self.y), loss)
        self._carried += _passed(began, processors)
        self.num_steps += 1
        milliseconds, own, process = (1e3 * float(seconds) for seconds in self._carried)
        self._carried = np.zeros(3)
        self._book(Step(milliseconds, own, process - own, self.num_steps, doing), trains=trains)
        if self.num_steps % STEPS_PER_EPOCH == 0:
            self.session.measure()
            processors = time.thread_time(), time.process_time()
            began = time.perf_counter()
            self.session.control()
            self._carried = _passed(began, processors)

    def _doing(self) -> str:
        stages = [
            seed.stage.value.lower() + (" (native)" if seed.native else "")
            for seed in self.host.seeds()
            if seed.stage is not SeedStage.DORMANT
        ]
        return ", ".join(stages) or "no kernel"

    def _book(self, step: Step, *, trains: bool) -> None:
        computing = self._what_computes()
        if computing != self._computing:
            self.num_swaps += computing[1] is not None
            self._computing, self._since_change = computing, 0
        self._since_change += 1
        if self.num_steps <= WARM_UP:
            return
        (self.times.shadow if trains else self.times.plain).append(step.milliseconds)
        if trains:
            return
        self.times.worst = max(self.times.worst, step)
        if self._since_change <= STEPS_PER_EPOCH:
            self.times.window.append(step.milliseconds)
            if any(seed.stage.is_blended for seed in self.host.seeds()):
                self.times.grafted.append(step.milliseconds)

    def _what_computes(self) -> tuple[int, str | None]:
        """The topology's version, and whose native code computes in it."""
        return self.host.topology_version, next((seed.native for seed in self.host.seeds() if seed.native), None)


def _passed(began: float, processors: tuple[float, float]) -> Any:
    """Seconds since, on the clock, of the processor in this thread, and in the whole process."""
    thread, process = processors
    return np.array([time.perf_counter() - began, time.thread_time() - thread, time.process_time() - process])


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Measures every host; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench stall", description=__doc__)
    parser.add_argument("--steps", type=int, default=6000, help=f"of each arm; {MIN_STEPS} without shadows for p99.9")
    parser.add_argument("--hosts", nargs="+", choices=tuple(BLUEPRINTS), default=tuple(BLUEPRINTS))
    options = parser.parse_args(arguments)
    if options.steps < FEWEST_STEPS:
        parser.error(f"--steps {options.steps}: no kernel comes and goes in fewer than {FEWEST_STEPS}")
    rows, goals = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in options.hosts:
            found = measure(name, options.steps, say)
            rows.extend(found)
            goals.extend(_goals(name, found))
    finally:
        torch.set_num_threads(threads)
    fewest = min(row["steps"] for row in rows if row["arm"] in ARMS)
    words = "" if fewest >= MIN_STEPS else f"An arm has {fewest} steps, p99.9 wants {MIN_STEPS}: give more --steps."
    return BenchResult(name="stall", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict=words)


def measure(name: str, steps: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of one host: `control`, `idle`, `graft`, `graft and hot swap`, their shadow steps, and `inline`.

    Raises:
        RuntimeError: if a compiler or a frame of dynamo was seen in the trainer, or an arm did not do what it is for.
        KernelRejectedError: if the design has no kernel, or no native code, for the host.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from esper.hosts import build_host

    kind, shape, outputs = HOSTS[name]
    models = [build_host(kind, input_shape=shape, num_outputs=outputs, seed=0) for _ in range(5)]
    idle = Arm(name, hub=None, kernel_id=None, public_key=b"", model=models[0])
    config = parse_config(
        {"data": {"type": "given"}, "host": {"type": "given"}, "tezzeret": {"blueprints": [BLUEPRINTS[name]]}}, []
    )
    signature = next(iter(idle.host.sites.values()))
    private_key = Ed25519PrivateKey.generate()
    hub, key = local_hub([signature], config, private_key=private_key)
    kernels = hub.kernel_briefs(signature)
    if not kernels:
        raise KernelRejectedError(f"{BLUEPRINTS[name]} has no kernel for {signature.key}")
    kernel_id = kernels[0].kernel_id
    say(f"{name}: native code of the kernel, compiled in another process")
    compile_native_kernel(hub, kernel_id, private_key)
    control = Arm(name, hub=hub, kernel_id=None, public_key=key, model=models[1])
    graft = Arm(name, hub=hub, kernel_id=kernel_id, public_key=key, model=models[2])
    swap = Arm(name, hub=hub, kernel_id=kernel_id, public_key=key, model=models[4], native=True)
    arms = dict(zip(ARMS, (control, idle, graft, swap), strict=True))
    _take_turns(name, arms, steps, say)
    if not swap.num_swaps or graft.num_swaps:
        raise RuntimeError(
            f"native code took a place {swap.num_swaps} times where it should, {graft.num_swaps} elsewhere"
        )
    say(f"{name}: native code took its place {swap.num_swaps} times")
    for arm_name, arm in arms.items():
        say(f"{name}: the worst of {arm_name}: {arm.times.worst}")
    kernel = unpack(hub.fetch(kernel_id), key.hex())
    worst, median = _inline(name, models[3], build(kernel.manifest, kernel.weights), say)
    base = control.times
    rows = [_row(name, arm_name, arm.times.plain, arm.times, base.plain) for arm_name, arm in arms.items()]
    rows += [
        _row(name, f"{arm_name}: shadow steps", arm.times.shadow, Times(), base.plain)
        for arm_name, arm in arms.items()
        if arm.times.shadow
    ]
    ratio = worst / median / (max(base.plain) / statistics.median(base.plain))
    rows.append(
        {
            "host": name, "arm": "inline torch.compile", "steps": 1, "median ms": round(median, 3),
            "worst ms": round(worst, 1), "worst": round(worst / median, 1), "p99.9": None, "stall": round(ratio, 2),
            "window": 0, "window worst": None, "window p99.9": None,
        }
    )  # fmt: skip
    return rows


def _take_turns(name: str, arms: Mapping[Any, Arm], steps: int, say: Callable[[str], None]) -> None:
    """Lets every arm take its steps, one each in turn; one that loads something goes on until it has it.

    Raises:
        RuntimeError: if a compiler or a frame of dynamo was seen.
    """
    gc.collect()
    gc.freeze()
    try:
        for number in range(steps):
            turn = number % len(arms)
            for arm in [*arms.values()][turn:] + [*arms.values()][:turn]:
                is_first = True
                while arm.num_steps < steps and (is_first or arm.host.is_loading):
                    arm.step()
                    is_first = False
            if number % max(1, steps // 6) == 0:
                say(f"{name}: {number + 1} of {steps} steps of each arm")
            if number % 100 == 0:
                _assert_nothing_compiles()
        _assert_nothing_compiles()
    finally:
        gc.unfreeze()
        for arm in arms.values():
            arm.host.close()


def site_of(name: str, model: nn.Module, x: torch.Tensor) -> str:
    """The host's first site."""
    from esper.kasmina.sites import find_sites

    return next(iter(find_sites(model, (x[:2],), causal=name == "gpt")))


def _row(name: str, arm: str, times: list[float], changed: Times, base: list[float]) -> dict[str, Any]:
    """Worst and p99.9 of all steps and of those of the window, over the median after grafts, while the kernel is live;
    of an arm that never changes, over that of all its steps.
    """
    window = changed.window
    median = statistics.median(changed.grafted or times)
    stall = max(times) / median / (max(base) / statistics.median(base))
    return {
        "host": name, "arm": arm, "steps": len(times), "median ms": round(median, 3), "worst ms": round(max(times), 2),
        "worst": round(max(times) / median, 2), "p99.9": round(float(np.percentile(times, 99.9)) / median, 2),
        "stall": round(stall, 3), "window": len(window),
        "window worst": round(max(window) / median, 2) if window else None,
        "window p99.9": round(float(np.percentile(window, 99.9)) / median, 2) if window else None,
    }  # fmt: skip


def _goals(name: str, rows: list[dict[str, Any]]) -> list[Goal]:
    by_arm = {row["arm"]: row["stall"] for row in rows}
    noise = abs(by_arm["idle"] - 1.0)
    inline = by_arm["inline torch.compile"]
    stalls = {f"{name} {arm}": by_arm[arm] for arm in ("graft", "graft and hot swap")}
    return [
        *(
            Goal(name=f"{words}: stall", value=stall, goal=GOAL, met=stall <= GOAL,
                 interval=(stall - noise, stall + noise))
            for words, stall in stalls.items()
        ),
        Goal(name=f"{name} inline at least", value=inline, goal=INLINE_GOAL, met=inline >= INLINE_GOAL,
             interval=(inline, inline)),
    ]  # fmt: skip


def _inline(name: str, model: nn.Module, kernel: nn.Module, say: Callable[[str], None]) -> tuple[float, float]:
    """Worst and median milliseconds of steps of a host in which the kernel appears under `torch.compile`.

    Inductor's cache is empty: what an earlier run of this benchmark compiled would be found there.
    """
    from torch._inductor.utils import fresh_cache

    arm = Arm(name, hub=None, kernel_id=None, public_key=b"", model=model)
    for _ in range(WARM_UP):
        arm.step()
    say(f"{name}: the same kernel under torch.compile, in the trainer")
    compiled = torch.compile(kernel, dynamic=True)
    site = model.get_submodule(next(iter(arm.host.sites)))
    site.register_forward_hook(lambda _site, _args, h: h + compiled(h))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    times = []
    with fresh_cache():
        for _ in range(5 * WARM_UP):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(arm.x).flatten(0, -2), arm.y.flatten()).backward()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - began))
    return max(times), statistics.median(times[WARM_UP:])


def _assert_nothing_compiles() -> None:
    """No child process (a compiler would be one), and no frame that dynamo took.

    Raises:
        RuntimeError: if there is.
    """
    from torch._dynamo.utils import counters

    children = [
        child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()
    ]  # empty where there is no /proc
    if children:
        raise RuntimeError(f"the trainer has children: {', '.join(map(_command_of, children))}")
    if frames := counters["frames"]["total"]:
        raise RuntimeError(f"dynamo took {frames} frames in the trainer")


def _command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return f"process {pid}, which is gone"
