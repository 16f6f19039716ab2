"""What each worker of `scale` does: it steps several arms in turns, or grafts again and again and times the parts.

Workers are processes over gloo, also where there is only one; rank 0 leaves what it found in a file.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from esper import kasmina
from esper.api import local_hub
from esper.config import RunConfig, parse_config
from esper.hosts import build_host
from esper.leyline import (
    Action,
    AdaptationSignal,
    AssetHub,
    BlendStrategy,
    HealthSignal,
    KasminaControlCommand,
    SeedStage,
    SiteSignature,
    SystemStatePacket,
)
from esper.tolaria import snapshot
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.ranks import Ranks, SoloRanks, TorchRanks
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.workload import evaluation_batches
from jobs.bench.overhead import HOSTS

ARMS = ("plain", "idle", "wrapped", "trainer")
BATCH = 16
WARM_UP = 3

WIDTH = 64
"""Of the host that grafts are measured on, at its site: the kernel is the same however large the host is."""
BLOCK = 1_000_000
"""Its parameters lie in blocks of about so many."""
BLUEPRINT = "mlp_2x"
STEPS_PER_EPOCH = 2
WATCHED = 10
"""Steps after a graft on which the governor looks at the weights' norm."""
STEPS_OF_A_GRAFT = 6 * WATCHED
"""More than from one graft to the next: a kernel that is refused again and again is told, not waited for."""
PARTS = ("check", "attach", "group", "agree", "rebuild", "count")


@dataclass(frozen=True)
class StepJob:
    """Times steps of a host of `bench overhead`.

    Attributes:
        rounds: in each every arm has two blocks.
        steps: of a block.
    """

    host: str
    rounds: int
    steps: int


@dataclass(frozen=True)
class GraftJob:
    """Times grafts onto a host of about so many parameters."""

    params: int
    grafts: int


@dataclass
class Grafts:
    """Milliseconds; one figure a graft, but for `idle`, `snapshots` and the steps.

    Attributes:
        whole: of the boundary with the graft: the decision, and all that is done on it until the next step may begin.
        idle: of boundaries at which nothing was decided.
        parts: of `whole`, by name.
        first: of the first step after a graft.
        watched: of the other steps while the governor watches the weights.
        usual: of steps long after.
    """

    params: int = 0
    tensors: int = 0
    whole: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    first: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    snapshots: list[float] = field(default_factory=list)


def spawned(job: StepJob | GraftJob, world: int) -> dict[str, Any]:
    """Runs a job on so many workers, and returns what rank 0 found: milliseconds by arm, or the fields of `Grafts`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a worker raised.
    """
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        spawn(_worker, args=(world, folder, job), nprocs=world)
        return json.loads((Path(folder) / "found.json").read_text())


def _worker(rank: int, world: int, folder: str, job: StepJob | GraftJob) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    ranks: Ranks = TorchRanks() if world > 1 else SoloRanks()
    found = steps_of(job, ranks) if isinstance(job, StepJob) else vars(grafts_of(job, ranks))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends


# ---------------------------------------------------------------- steps


def steps_of(job: StepJob, ranks: Ranks) -> dict[str, list[float]]:
    """Milliseconds of a step by arm, one figure a round. Collective.

    The arms have the same weights and the same batch. `plain` and `idle` are the model under DDP; `wrapped` is the host
    with dormant seeds under DDP; `trainer` is that in a session, with governor, ledger and telemetry.
    """
    kind, shape, outputs = HOSTS[job.host]
    is_text = job.host == "gpt"
    x = torch.randint(outputs, (BATCH, *shape)) if is_text else torch.randn(BATCH, *shape)
    y = torch.randint(outputs, (BATCH, *shape) if is_text else (BATCH,))
    models = [build_host(kind, input_shape=shape, num_outputs=outputs, seed=0) for _ in ARMS]
    step = {
        "plain": _plain_step(models[0], x, y, ranks),
        "idle": _plain_step(models[1], x, y, ranks),
        "wrapped": _wrapped_step(models[2], x, y, ranks, causal=is_text),
        "trainer": _trainer_step(models[3], x, y, ranks, task="language_model" if is_text else "classification"),
    }
    for take in step.values():
        for _ in range(WARM_UP):
            take()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    gc.collect()
    gc.disable()  # a collection would fall into one block or the other
    try:
        for number in range(job.rounds):
            turn = number % len(ARMS)
            order = (*ARMS[turn:], *ARMS[:turn])
            seconds = dict.fromkeys(ARMS, 0.0)
            for arm in (*order, *reversed(order)):  # a drift of the machine cancels
                began = time.perf_counter()
                for _ in range(job.steps):
                    step[arm]()
                seconds[arm] += time.perf_counter() - began
            for arm in ARMS:
                found[arm].append(1e3 * seconds[arm] / (2 * job.steps))
            gc.collect()
    finally:
        gc.enable()
    return found


def _plain_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, ranks: Ranks) -> Callable[[], object]:
    parallel = ranks.parallel(model, [name for name, _ in model.named_parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return lambda: _step(parallel, optimizer, x, y)


def _wrapped_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, ranks: Ranks, *, causal: bool
) -> Callable[[], object]:
    host = kasmina.wrap(model, example=(x[:2],), causal=causal)
    live = dict(host.live_parameters())
    parallel, numbers = ranks.parallel(host.module, list(live)), itertools.count()
    optimizer = torch.optim.AdamW(list(live.values()), lr=1e-4)

    def step() -> None:
        host.prepare(next(numbers), epoch=0, steps_per_epoch=1_000_000, observe=False)
        _step(parallel, optimizer, x, y)

    return step


def _trainer_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, ranks: Ranks, *, task: str
) -> Callable[[], object]:
    host = kasmina.wrap(model, example=(x[:2],), causal=task == "language_model")
    optimizer = torch.optim.AdamW([p for _, p in host.live_parameters()], lr=1e-4)
    session = Session(
        host,
        Optimization(optimizer),
        TASKS[task],
        example=(x[:2],),
        config=_config(),
        run_id="bench",
        ports=Ports(ranks=ranks),
        steps_per_epoch=1_000_000,
    )
    session.begin()
    return lambda: session.step((x, y), _step(session.course.model, optimizer, x, y))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---------------------------------------------------------------- grafts


def host_of(params: int) -> nn.Module:
    """A network of about so many parameters, in blocks from `WIDTH` channels to `WIDTH` channels; always the same."""
    torch.manual_seed(0)
    blocks = max(1, round(params / BLOCK))
    hidden = max(1, params // (blocks * (2 * WIDTH + 1)))
    return nn.Sequential(
        nn.Linear(16, WIDTH),
        *(nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH)) for _ in range(blocks)),
        nn.Linear(WIDTH, 4),
    )


class Cycle:
    """A controller that takes a kernel in, grafts it at the next boundary, and culls it once the weights are no longer
    watched.

    Args:
        kernel_id: whose.
    """

    def __init__(self, kernel_id: str) -> None:
        self._kernel_id = kernel_id
        self.last: Action | None = None

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """See `Controller`."""
        command = self._next(packet.layers[0].seeds[-1])
        self.last = None if command is None else command.action
        signal = AdaptationSignal(
            run_id=packet.run_id,
            epoch=packet.epoch.epoch,
            policy="cycle",
            commands=() if command is None else (command,),
            reason="the benchmark's cycle",
        )
        return state, signal

    def _next(self, seed: HealthSignal) -> KasminaControlCommand | None:
        given: dict[str, Any] = {}
        if seed.stage is SeedStage.DORMANT:
            action, given = Action.GERMINATE, {"kernel_id": self._kernel_id, "strategy": BlendStrategy.DIRECT}
        elif seed.stage is SeedStage.GERMINATED and seed.is_ready_for_transition:
            action = Action.ADVANCE
        elif seed.stage is SeedStage.GRAFTING and seed.epochs_in_stage * STEPS_PER_EPOCH > WATCHED + STEPS_PER_EPOCH:
            action = Action.CULL
        else:
            return None
        return KasminaControlCommand(
            action=action, site=seed.layer_id, seed_id=seed.seed_id, reason="the benchmark's cycle", **given
        )


class Timed:
    """Stands for another object and sums up the seconds that some of its methods take.

    Args:
        inner: the object.
        parts: method to the name under which it is summed up.
        seconds: where.
    """

    def __init__(self, inner: Any, parts: Mapping[str, str], seconds: dict[str, float]) -> None:
        self._inner, self._parts, self._seconds = inner, parts, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return found if name not in self._parts else self._timed(found, self._parts[name])

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

        return timed


def grafts_of(job: GraftJob, ranks: Ranks) -> Grafts:
    """Grafts one small kernel onto a host and culls it again, so many times, in a session. Collective."""
    x, y = torch.randn(2, 16), torch.randint(4, (2,))
    module = host_of(job.params)
    tensors = list(module.parameters())
    found = Grafts(params=sum(tensor.numel() for tensor in tensors), tensors=len(tensors))
    host = kasmina.wrap(module, example=(x,), sites="1")
    [signature] = host.sites.values()
    hub, key, kernel_id = _shared_hub(signature, ranks)
    host.attach(hub, key, wait=True, native=False)
    seconds: dict[str, float] = {}
    optimizer = torch.optim.SGD([p for _, p in host.live_parameters()], lr=1e-4)
    controller = Cycle(kernel_id)
    timed_ranks = Timed(ranks, {"agree": "agree", "broadcast": "agree", "parallel": "rebuild"}, seconds)
    session = Session(
        cast("Any", Timed(host, {"check": "check", "apply": "attach"}, seconds)),
        cast("Any", Timed(Optimization(optimizer), {"join": "group"}, seconds)),
        TASKS["classification"],
        example=(x,),
        config=_config(),
        run_id="bench",
        ports=Ports(hub=hub, controller=controller, ranks=cast("Any", timed_ranks)),
        val=evaluation_batches((x, y), batch_size=2),
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    session.begin()
    since, steps = WATCHED + 1, 0
    while len(found.whole) < job.grafts or since <= WATCHED or steps % STEPS_PER_EPOCH:
        if steps > (job.grafts + 2) * STEPS_OF_A_GRAFT:
            raise RuntimeError(f"{len(found.whole)} grafts in {steps} steps, {job.grafts} were asked for")
        began = time.perf_counter()
        session.step((x, y), _step(session.course.model, optimizer, x, y))
        milliseconds = 1e3 * (time.perf_counter() - began)
        grafted = any(seed.stage is SeedStage.GRAFTING for seed in host.seeds())
        if steps >= WARM_UP:
            kind = found.first if grafted and since == 0 else found.watched if since < WATCHED else found.usual
            kind.append(milliseconds)
        since, steps = since + 1, steps + 1
        if steps % STEPS_PER_EPOCH:
            continue
        session.measure()
        seconds.clear()
        counted = session.course.ledger.snapshot().seconds.telemetry
        began = time.perf_counter()
        session.control()
        milliseconds = 1e3 * (time.perf_counter() - began)
        seconds["count"] = session.course.ledger.snapshot().seconds.telemetry - counted
        last = ranks.broadcast(controller.last)
        if last in (Action.ADVANCE, Action.CULL):
            since = 0
        if last is Action.ADVANCE:
            found.whole.append(milliseconds)
            for part in PARTS:
                found.parts[part].append(1e3 * seconds.get(part, 0.0))
        elif last is None:
            found.idle.append(milliseconds)
    for _ in range(3):
        began = time.perf_counter()
        snapshot.take(host, session.course.optimization)
        found.snapshots.append(1e3 * (time.perf_counter() - began))
    host.close()
    return found


def _shared_hub(signature: SiteSignature, ranks: Ranks) -> tuple[AssetHub, bytes, str]:
    """A hub of one kernel, its signer's key and the kernel's id, which rank 0 built for all. Collective."""
    hub, key = local_hub([signature], _config(tezzeret={"blueprints": [BLUEPRINT]}))
    kernel_id = hub.kernel_briefs(signature)[0].kernel_id
    container, key, kernel_id = ranks.broadcast((bytes(hub.fetch(kernel_id)), key, kernel_id))
    return cast("AssetHub", _OneKernel(hub, container)), key, kernel_id


class _OneKernel:
    """A hub that gives out one container, whichever is asked for."""

    def __init__(self, hub: AssetHub, container: bytes) -> None:
        self._hub, self._container = hub, container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def fetch(self, kernel_id: str) -> bytes:  # noqa: ARG002 - there is one
        return self._container


def _config(**sections: dict[str, Any]) -> RunConfig:
    tree = {
        "data": {"type": "given"}, "host": {"type": "given"}, "budget": {"params": 999.0, "flops": 999.0},
        "kasmina": {"embargo_epochs": 0}, "tamiyo": {"policy": "none"},
    }  # fmt: skip
    return parse_config(tree | sections, [])
