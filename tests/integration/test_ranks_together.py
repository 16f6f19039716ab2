"""Several ranks over gloo: they refuse together, agree with one rank alone, and hold the same bits. No Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tolaria_support
import torch

SCRIPT = Path(__file__).with_name("rank_script.py")
LIMIT_S = 240


@pytest.fixture
def run(tmp_path):
    """Runs all ranks of a script and returns what each saw; none outlives its test."""
    running: list[subprocess.Popen[str]] = []

    def begin(what: str, world: int = 2) -> list[dict]:
        paths = [str(Path(tolaria_support.__file__).parent), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(world):
            command = [sys.executable, str(SCRIPT), what, str(rank), str(world), str(tmp_path)]
            running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=LIMIT_S)[1] for process in running[-world:]]
        assert [process.returncode for process in running[-world:]] == [0] * world, errors
        return [torch.load(tmp_path / f"{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_a_rank_that_is_silent_past_the_deadline_makes_all_refuse_and_hears_of_it(run):
    first, second = run("agreeing")
    assert first == second  # the late one too
    nothing, own, silent, again = first["found"]
    assert nothing is None
    assert own == "my own reason"
    assert silent == "worker 1 did not answer within 0.5 s"
    assert again is None  # and the next agreement is not disturbed


def refusals(found):
    return [event["reason"] for event in found["events"] if event["refused"]]


@pytest.mark.parametrize(
    ("what", "words"),
    [("tampered", "the bytes that came for kernel"), ("silent", "worker 1 did not answer within 0.5 s")],
)
def test_a_rank_that_cannot_load_a_kernel_makes_all_refuse_it(run, what, words):
    ranks = run(what)
    for found in ranks:
        assert words in refusals(found)[0]
        assert not any(name.startswith("_esper.") for name in found["weights"])
    first, second = (found["weights"] for found in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)  # both went on, as one


def test_two_ranks_come_to_what_one_comes_to_with_the_same_batches(run):
    [alone] = run("plain", world=1)
    together = run("plain")
    assert 0 < alone["graft"] < 20
    for found in together:
        assert found["graft"] == alone["graft"]
        assert found["weights"].keys() == alone["weights"].keys()
        assert any(name.startswith("_esper.") for name in found["weights"])
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_all_ranks_hold_the_same_bits_at_every_epoch_on_every_host(run):
    first, second = run("hosts")
    for host, found in first.items():
        epochs, others = (json.loads(one[host]["digests"]) for one in (first, second))
        assert len(epochs) == 6
        for epoch, (one, other) in enumerate(zip(epochs, others, strict=True)):
            assert one == other, (host, epoch)
        assert "TRAINING" in found["stages"], host
        assert any(name.startswith("_esper.") for name in epochs[1]), host  # a seed in TRAINING was among them
    assert all("GRAFTING" in first[host]["stages"] for host in ("mlp", "cnn"))
