"""Two processes under DDP (gloo): seeds in TRAINING leave no trace on any kind of host, and train alike on both."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

SUPPORT = Path(__file__).parents[1] / "unit" / "kasmina"


def mean(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())


def rank_main(rank: int, meeting: Path) -> None:
    sys.path.insert(0, str(SUPPORT))
    from identity import KINDS, trace
    from kasmina_support import assert_equal

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for kind in KINDS:
        reference = trace(kind, None, steps=4, rank=rank, parallel=DistributedDataParallel)
        for num_seeds, replays in ((0, 0), (1, 0), (3, 0), (3, 1)):
            seeds: dict[str, torch.Tensor] = {}
            found = trace(
                kind, num_seeds, steps=4, rank=rank, parallel=DistributedDataParallel, mean=mean, seeds=seeds,
                replays=replays,
            )  # fmt: skip
            assert_equal(found, reference)
            assert bool(seeds) == bool(num_seeds)
            for key, tensor in seeds.items():
                both = [torch.empty_like(tensor) for _ in range(2)]
                dist.all_gather(both, tensor)
                assert torch.equal(*both), f"{key} differs between the ranks"
    dist.barrier()
    os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends


def test_seeds_in_training_leave_no_trace_on_two_ranks(tmp_path):
    mp.spawn(rank_main, args=(tmp_path / "meeting",), nprocs=2)  # raises what a rank raised
