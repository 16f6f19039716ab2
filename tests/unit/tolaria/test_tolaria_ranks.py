"""Two trainers over gloo: the same decision at the same step, and weights that stay equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tolaria_support import equal

from esper.leyline import RunSummary, SeedStage

SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
import warnings; warnings.simplefilter("error")
import torch
from torch import distributed
from tolaria_support import config, train
from esper.tolaria.ranks import TorchRanks
rank, folder = int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
ranks = TorchRanks()
assert ranks.agree("no" if rank == 1 else None) == "no" and ranks.agree(None) is None
assert ranks.gather(rank) == [0, 1] and ranks.broadcast("zero" if rank == 0 else None) == "zero"
tensors = [torch.full((2,), float(rank)), torch.tensor(4.0 * rank)]
ranks.mean_(tensors)
assert tensors[0].tolist() == [0.5, 0.5] and tensors[1].item() == 2.0
summary, weights = train(f"{folder}/run", config(), ranks=ranks)
torch.save(weights, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_ranks_grow_as_one(tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, "-c", SCRIPT, str(here), str(rank), str(tmp_path)] for rank in range(2)]
    running = [
        subprocess.Popen(command, cwd=here.parents[2], env=env, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    assert any(name.startswith("_esper.") for name in first)
    summary = RunSummary.model_validate_json((tmp_path / "run/summary.json").read_text())
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    assert graft.evidence is not None
    assert graft.evidence.num_pairs == 40
