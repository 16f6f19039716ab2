"""Two hundred kernels come and go, and nothing of them stays: no memory, no tensor, no thread, no file.

Kernels are large beside all else (3 MB with their optimizer), so that keeping one in ten would be seen.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from esper import kasmina
from esper.api import local_hub
from esper.config import parse_config
from esper.leyline import Action, BlendStrategy, KasminaControlCommand, SeedStage, SiteKind, SiteSignature
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.workload import evaluation_batches

CYCLES = 200
WIDTH = 192
SITE = "1"
KERNEL_MB = 3 * 4 * 2 * WIDTH * 4 * WIDTH / 2**20
"""Of an `mlp_4x`: weights and the two moments of AdamW."""


pytestmark = pytest.mark.timeout(900)  # 20 s on idle cores, minutes on busy ones

ENDINGS = ("cull", "cull_live", "retire", "roll_back")
"""How cycles end: by a cull behind the host, by a cull or a retirement from the live path, or by a rollback."""


class Cycles:
    """A host with a real loader (its thread included), optimizer, governor and session, driven by hand."""

    def __init__(self) -> None:
        config = parse_config(
            {
                "data": {"type": "given"}, "host": {"type": "given"}, "budget": {"params": 99.0, "flops": 99.0},
                "kasmina": {"sites": [SITE], "embargo_epochs": 0, "ramp_epochs": 0.5, "max_slowdown": None},
                "tezzeret": {"blueprints": ["mlp_4x"]},
            },
            [],
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(32, 16, generator=generator), torch.randint(3, (32,), generator=generator)
        model = nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
        self.host = kasmina.wrap(model, example=(self.x[:2],), sites=[SITE], config=config.kasmina)
        hub, key = local_hub([SiteSignature(kind=SiteKind.VECTOR, channels=WIDTH)], config)
        [kernel] = hub.kernel_briefs(SiteSignature(kind=SiteKind.VECTOR, channels=WIDTH))
        self.kernel_id = kernel.kernel_id
        self.host.attach(hub, key, wait=False)
        self.optimizer = torch.optim.AdamW([p for _, p in self.host.live_parameters()], lr=1e-3)
        self.session = Session(
            self.host,
            Optimization(self.optimizer),
            TASKS["classification"],
            example=(self.x[:2],),
            config=config,
            run_id="run",
            ports=Ports(hub=hub),
            val=evaluation_batches((self.x, self.y), batch_size=32),
            steps_per_epoch=2,
        )
        self.session.begin()
        self.epoch()

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.session.course.model(self.x), self.y)
        loss.backward()
        self.session.course.optimization.step()
        self.session.step((self.x, self.y), loss)

    def epoch(self) -> None:
        for _ in range(2):
            self.step()
        self.session.end_epoch()

    @property
    def stage(self) -> SeedStage:
        return self.host.seeds()[-1].stage

    def command(self, action: Action, strategy: BlendStrategy = BlendStrategy.RAMP) -> None:
        seed = self.host.seeds()[-1]
        self.session._adaptation.apply(
            KasminaControlCommand(
                action=action,
                site=SITE,
                seed_id=seed.seed_id,
                kernel_id=self.kernel_id,
                strategy=strategy,
                reason="test",
            )
        )

    def cycle(self, ending: str) -> None:
        live = ending != "cull"
        self.command(Action.GERMINATE, BlendStrategy.DIRECT if live else BlendStrategy.RAMP)
        for future in [load.future for load in self.host._life.arrivals._loading.values()]:
            future.result(timeout=60)
        self.epoch()  # takes the kernel in
        self.command(Action.ADVANCE)
        assert self.stage is (SeedStage.GRAFTING if live else SeedStage.TRAINING)
        self.epoch()
        if ending == "roll_back":
            self.session._guard.roll_back("the test asks")
        else:
            self.command(Action.RETIRE if ending == "retire" else Action.CULL)
        for _ in range(6):
            if self.stage is SeedStage.DORMANT:
                break
            self.epoch()
        assert self.stage is SeedStage.DORMANT
        assert len(self.optimizer.param_groups) == 1


def held() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "megabytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
        "modules": sum(issubclass(type(one), nn.Module) for one in objects),
        "threads": threading.active_count(),
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
    }


def come_and_go(_rank):
    torch.set_num_threads(1)  # others on the cores would make small tensors wait for each other
    cycles = Cycles()
    seen = []
    try:
        for number in range(CYCLES):
            cycles.cycle(ENDINGS[number % len(ENDINGS)])
            if number + 1 in (CYCLES // 2, CYCLES):
                seen.append(held())
    finally:
        cycles.host.close()
    half, end = seen
    assert {key: end[key] for key in ("tensors", "modules", "threads", "files")} == {
        key: half[key] for key in ("tensors", "modules", "threads", "files")
    }
    assert end["megabytes"] - half["megabytes"] < CYCLES / 2 * KERNEL_MB / 10
    # beside the optimizer's parameters no state of one that left is kept
    assert len(cycles.optimizer.state) == sum(1 for _ in cycles.host.live_parameters())


def stay(_rank):
    cycles = Cycles()
    try:
        cycles.cycle("cull")
        before = held()
        cycles.command(Action.GERMINATE)
        after = held()
        for future in [load.future for load in cycles.host._life.arrivals._loading.values()]:
            future.result(timeout=60)
        kept = cycles.host._life.arrivals.loader.load(cycles.kernel_id, cycles.host.sites[SITE], torch.device("cpu"))
    finally:
        cycles.host.close()
    assert held()["tensors"] >= before["tensors"] + len(list(kept.module.parameters()))
    assert after["threads"] == before["threads"]  # one loader, not one a kernel


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files as Linux lists them")
@pytest.mark.parametrize("happens", [come_and_go, stay])
def test_kernels_that_come_and_go_leave_nothing_and_one_that_stays_is_seen(happens):
    mp.spawn(happens, nprocs=1)  # in a process without the leftovers of other tests; raises what it raised
