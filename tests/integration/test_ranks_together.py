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
from tolaria_support import equal

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


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tampered", ("another worker cannot take it in", "the bytes that came for kernel")),
        ("silent", ("it did not come to every worker in time",) * 2),
    ],
)
def test_a_rank_that_cannot_load_a_kernel_makes_all_refuse_it(run, what, words):
    ranks = run(what)
    steps = set()
    for found, reason in zip(ranks, words, strict=True):
        [refusal] = [event for event in found["events"] if event["to_stage"] == "CANCELLED"]
        assert reason in refusal["reason"]
        steps.add(refusal["step"])
        assert not any(name.startswith("_esper.") for name in found["weights"])
    assert len(steps) == 1  # at the same step
    first, second = (found["weights"] for found in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)  # both went on, as one


def test_a_kernel_that_fails_on_one_rank_alone_leaves_no_rank_waiting_and_all_go_back_at_one_step(run):
    first, second = run("failing")
    for name, found in first.items():
        other = second[name]
        assert (found["fired"], other["fired"]) == (0, 1), name
        assert found["rollbacks"] == other["rollbacks"], name
        assert found["events"] == other["events"], name
        assert equal(found["weights"], other["weights"]), name
        assert "sabotage" in str(found["events"]), name  # rank 0 tells what went wrong on rank 1
        is_live = name.startswith("live")
        assert len(found["rollbacks"]) == is_live, name
        if is_live:
            assert "it raised RuntimeError: sabotage" in found["rollbacks"][0][2], name
        else:  # the host had never met it
            assert not any(name.startswith("_esper.") and name.endswith("weight") for name in found["weights"])
            assert [stage for _, stage, _ in found["events"]][:3] == ["GERMINATED", "TRAINING", "CULLED"], name


def test_ranks_that_diverge_whenever_they_were_equal_are_given_up_together_with_what_to_look_at(run):
    first, second = run("straying")
    assert first == second
    assert "set back 3 times in a row, and again: the ranks have diverged: 0.weight differs" in first["error"]
    assert "code that changes weights on one rank alone" in first["error"]


def test_a_race_has_one_winner_on_all_ranks_and_the_racers_are_bit_equal_at_every_epoch(run):
    first, second = run("racing")
    assert first["events"] == second["events"]
    assert equal(first["weights"], second["weights"])
    epochs, others = json.loads(first["digests"]), json.loads(second["digests"])
    assert epochs == others
    assert max(len({name.split(".")[2] for name in epoch if name.startswith("_esper.")}) for epoch in epochs) == 2
    assert sum(stage == "GRAFTING" for _, _, stage, _ in first["events"]) == 1
    assert any("lost the race" in reason for *_, reason in first["events"])


def test_two_ranks_come_to_what_one_comes_to_with_the_same_batches(run):
    [alone] = run("plain", world=1)
    together = run("plain")
    assert alone.keys() == {"layers", "vit", "gpt"}
    for host, expected in alone.items():
        assert 0 < expected["graft"] < 20, host
        for found in (one[host] for one in together):
            assert found["graft"] == expected["graft"]
            assert found["weights"].keys() == expected["weights"].keys()
            assert any(name.startswith("_esper.") for name in found["weights"])
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_host_that_leaves_parameters_unused_grows_on_two_ranks_where_that_is_said(run):
    [alone] = run("unused", world=1)
    for found in run("unused"):
        assert 0 < found["graft"] == alone["graft"] < 20
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
        assert found["words"].startswith("tolaria.find_unused_parameters: ")


def test_all_ranks_hold_the_same_bits_at_every_epoch_on_every_host(run):
    first, second = run("hosts")
    for host, found in first.items():
        epochs, others = (json.loads(one[host]["digests"]) for one in (first, second))
        assert len(epochs) == 6
        for epoch, (one, other) in enumerate(zip(epochs, others, strict=True)):
            assert one == other, (host, epoch)
        assert "TRAINING" in found["stages"], host
        assert any(name.startswith("_esper.") for name in epochs[1]), host  # a seed in TRAINING was among them
    assert all("GRAFTING" in first[host]["stages"] for host in ("mlp", "cnn", "mlp, bf16 in parts"))


def test_the_weights_that_won_a_trial_on_rank_0_begin_on_every_rank(run):
    first, second = run("trying")
    assert first["forked"], "a fork left weights"
    assert equal(first["begun"], first["forked"])
    assert equal(second["begun"], first["forked"]), "bit by bit"
    assert first["events"] == second["events"]
    assert [stage for _, stage in first["events"]][:2] == ["GERMINATED", "TRAINING"]
    assert equal(first["weights"], second["weights"])
