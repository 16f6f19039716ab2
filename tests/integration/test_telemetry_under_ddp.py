"""Two processes (gloo): the telemetry of both is one, and that of the whole batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

SUPPORT = Path(__file__).parents[1] / "unit" / "kasmina"
STEPS = 3


def mean(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())


def reports_of(kind: str, share: slice, *, world: int) -> list[dict]:
    """What a host tells that takes its share of each batch; nothing in it makes the samples of a batch meet."""
    from identity import build_kind, samples
    from kasmina_support import class_loss

    from esper.config import KasminaConfig
    from esper.kasmina import wrap

    inputs, targets = samples(kind, 8 * STEPS)
    host = wrap(build_kind(kind), example=(inputs[:2],), causal=kind == "gpt", config=KasminaConfig(chunks=2))
    host.module.eval()
    host.module.get_submodule("_esper").train()  # batch norm and dropout rest, telemetry does not
    if world > 1:
        host.share(mean, world=world)
    for step in range(STEPS):
        host.prepare(step, epoch=0, steps_per_epoch=STEPS, observe=True)
        x, y = (part[8 * step : 8 * step + 8][share] for part in (inputs, targets))
        class_loss(host(x), y).backward()
    reports = host.close_epoch(run_id="r", epoch=0, step=STEPS, val_loss=None)
    return [report.model_dump() for report in reports]


def rank_main(rank: int, meeting: Path) -> None:
    sys.path.insert(0, str(SUPPORT))
    from identity import KINDS

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for kind in KINDS:
        found = reports_of(kind, slice(4 * rank, 4 * rank + 4), world=2)
        both: list = [None, None]
        dist.all_gather_object(both, found)
        assert both[0] == both[1], f"{kind}: the ranks differ"
        whole = reports_of(kind, slice(None), world=1)
        assert len(found) == len(whole) > 0
        for ours, theirs in zip(found, whole, strict=True):
            assert ours["num_samples"] == theirs["num_samples"] == 8 * STEPS
            for part, other in zip(
                (*ours["chunks"], *ours["seeds"]), (*theirs["chunks"], *theirs["seeds"]), strict=True
            ):
                for name, figure in other.items():
                    expected = pytest.approx(figure, rel=1e-4) if isinstance(figure, float) else figure
                    assert part[name] == expected, f"{kind} {ours['layer_id']} {name}"
                assert other["grow_potential"] > 0
    dist.barrier()
    os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends


def test_telemetry_of_two_ranks_is_that_of_the_whole_batch(tmp_path):
    mp.spawn(rank_main, args=(tmp_path / "meeting",), nprocs=2)  # raises what a rank raised
