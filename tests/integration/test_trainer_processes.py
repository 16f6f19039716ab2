"""The trainer over real processes: killed by the kernel, and two ranks over gloo. No Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import tolaria_support
import torch
from tolaria_support import equal, train

from esper.leyline import RunHistory, RunSummary, SeedStage

# Ray is hidden: the trainer's own processes need no more than the library.
PREAMBLE = """
import sys; sys.modules["ray"] = None
import warnings; warnings.simplefilter("error")
"""
KILLED = (
    PREAMBLE
    + """
import os, signal
from tolaria_support import train
class Kill:
    def at(self, place, step):
        if (place, step) == ("step", 13):
            os.kill(os.getpid(), signal.SIGKILL)
train(sys.argv[1], faults=Kill())
"""
)
RANK = (
    PREAMBLE
    + """
import os
import torch
from torch import distributed
from tolaria_support import config, train
from esper.tolaria.ranks import TorchRanks
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
ranks = TorchRanks()
assert ranks.agree("no" if rank == 1 else None) == "no" and ranks.agree(None) is None
assert ranks.gather(rank) == [0, 1] and ranks.broadcast("zero" if rank == 0 else None) == "zero"
tensors = [torch.full((2,), float(rank)), torch.tensor(4.0 * rank)]
ranks.mean_(tensors)
assert tensors[0].tolist() == [0.5, 0.5] and tensors[1].item() == 2.0
summary, weights = train(f"{folder}/run", config(), ranks=ranks)
torch.save(weights, f"{folder}/{rank}.pt")
distributed.barrier()
os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends
"""
)
DIVERGING = RANK.replace(
    'summary, weights = train(f"{folder}/run", config(), ranks=ranks)',
    """
class Diverge:  # one rank's copy of the host goes astray
    module = None
    def at(self, place, step):
        if (place, step) == ("step", 13) and rank == 1:
            with torch.no_grad():
                self.module[0].weight[0, 0] += 1e-3
            print("astray", file=sys.stderr)
from tolaria_support import workload
chosen = config()
problem = workload(chosen)
Diverge.module = problem.model
summary, weights = train(f"{folder}/run", chosen, problem=problem, ranks=ranks, faults=Diverge())
""",
)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    support = os.path.dirname(tolaria_support.__file__)  # noqa: PTH120 - a string for the environment
    env = {**os.environ, "PYTHONPATH": support, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def started():
    """Starts processes; none outlives its test."""
    running: list[subprocess.Popen[str]] = []

    def begin(script: str, *arguments: object) -> subprocess.Popen[str]:
        running.append(start(script, *arguments))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_killed_in_the_middle_of_an_epoch_by_the_kernel(tmp_path, started):
    _, weights = train(tmp_path / "undisturbed")
    died = started(KILLED, tmp_path / "killed")
    errors = died.communicate(timeout=120)[1]
    assert died.returncode == -signal.SIGKILL, errors
    _, resumed = train(tmp_path / "killed", resume=True)
    assert equal(resumed, weights)


def test_two_ranks_grow_as_one(tmp_path, started):
    ranks = [started(RANK, rank, tmp_path) for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    assert any(name.startswith("_esper.") for name in first)
    summary = RunSummary.model_validate_json((tmp_path / "run/summary.json").read_text())
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    assert graft.evidence is not None
    assert graft.evidence.num_pairs == 40


def test_ranks_that_diverge_go_back_to_where_they_were_equal(tmp_path, started):
    ranks = [started(DIVERGING, rank, tmp_path) for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert "astray" in errors[1]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    history = RunHistory.model_validate_json((tmp_path / "run/history.json").read_text())
    told = [words for _, words in history.decisions if "the ranks have diverged: 0.weight differs" in words]
    assert any(words.startswith("rolled back at step") for words in told)
