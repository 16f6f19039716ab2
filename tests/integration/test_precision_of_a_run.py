"""bf16 and accumulation: what they compute, and that growth, shadows, rollback and resume hold under both."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolaria_support import SITE, Crash, CrashAt, config, data, equal, kernel_hub, model, train, workload
from torch import nn

from esper import kasmina
from esper.leyline import RunStatus, SeedStage
from esper.tamiyo.controller import LocalController
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.precision import Precision
from esper.tolaria.session import Session
from esper.tolaria.stepper import _reducing
from esper.tolaria.task import TASKS
from esper.tolaria.workload import batch_len, evaluation_batches, parts_of

BOTH = {"tolaria__precision": "bf16", "tolaria__accumulate": 3}


def smooth() -> nn.Module:
    """A host whose samples do not see each other and nothing is drawn."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
    return nn.Sequential(nn.Linear(8, 12), nn.Identity(), nn.Identity(), body, nn.Linear(12, 3))


def host_part(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith("_esper.")}


# ---------------------------------------------------------------- bf16


class Output(OrderedDict):
    """Entries are attributes too, as of Hugging Face's models."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclass
class Record:
    logits: torch.Tensor
    name: str = "kept"


def output():
    out = Output()
    out["logits"], out["name"] = torch.ones(2, dtype=torch.bfloat16), "kept"
    return out


@pytest.mark.parametrize(
    "make", [output, lambda: Record(torch.ones(2, dtype=torch.bfloat16))], ids=["dict", "dataclass"]
)
def test_outputs_are_widened_within_their_own_class(make):
    given = make()
    wide = Precision("bf16").full(given)
    assert type(wide) is type(given)
    assert (wide.logits.dtype, wide.name) == (torch.float32, "kept")
    assert given.logits.dtype is torch.bfloat16


def test_forwards_run_in_bf16_and_losses_in_float32(tmp_path):
    chosen = config(tolaria__precision="bf16", tolaria__epochs=1, tamiyo__policy="none")
    problem, seen, lossy = workload(chosen), [], set()
    problem.model[4].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))

    def loss_fn(outputs, targets):
        lossy.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    problem = replace(problem, task=replace(problem.task, loss_fn=loss_fn))
    before = {name: tensor.clone() for name, tensor in problem.model.named_parameters()}
    _, after = train(tmp_path, chosen, problem=problem)
    assert seen[0] is torch.float32  # `wrap` looks for the sites
    assert len(seen) > 3
    assert set(seen[1:]) == {torch.bfloat16}
    assert lossy == {torch.float32}
    assert all(after[name].dtype is torch.float32 for name in before)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_validation_in_somebody_elses_autocast_region_does_not_stop_training():
    """The trap: a forward without gradients leaves casts of the weights behind, and the next one trains nothing."""
    x, y = data()
    chosen = config(tolaria__precision="bf16")
    host = kasmina.wrap(model(), example=(x[:2],), sites=[SITE], config=chosen.kasmina)
    hub, key = kernel_hub()
    host.attach(hub, key, wait=True)
    optimizer = torch.optim.AdamW([p for _, p in host.live_parameters()], lr=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = Session(
            host,
            Optimization(optimizer),
            TASKS["classification"],
            example=(x[:2],),
            config=chosen,
            run_id="run",
            ports=Ports(hub=hub, controller=LocalController(chosen.tamiyo)),
            val=evaluation_batches((x[120:160], y[120:160]), batch_size=40),
            steps_per_epoch=2,
        )
        session.begin()
        for step in range(8):
            if step == 2:
                assert host.seeds()[0].stage is SeedStage.GERMINATED
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(host(x[:40]).float(), y[:40])
            loss.backward()
            assert all(p.grad is not None and bool(p.grad.any()) for _, p in host.live_parameters())
            session.course.optimization.step()
            torch.clear_autocast_cache()  # as leaving the region does: the weights have changed
            session.step((x[:40], y[:40]), loss)
            if step % 2:
                session.end_epoch()
    assert host.seeds()[0].stage not in {SeedStage.DORMANT, SeedStage.GERMINATED}
    host.close()


@pytest.mark.parametrize(
    "settings",
    [
        BOTH,
        pytest.param({"tolaria__precision": "bf16"}, marks=pytest.mark.soak),
        pytest.param({"tolaria__accumulate": 3}, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_a_kernel_in_training_leaves_the_host_bit_identical(tmp_path, settings):
    waiting = config(kasmina__evidence_z=1e9, kasmina__max_training_epochs=50, tolaria__epochs=4, **settings)
    summary, shadowed = train(tmp_path / "shadowed", waiting)
    assert summary.events[-1].to_stage is SeedStage.TRAINING
    assert summary.ledger.flops.shadow > 0
    _, alone = train(tmp_path / "alone", config(tamiyo__policy="none", tolaria__epochs=4, **settings))
    assert equal(host_part(shadowed), host_part(alone))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), config(**BOTH))


@pytest.mark.parametrize(
    "crash_at", [("step", 10), ("step", 14), pytest.param(("checkpoint", 3), marks=pytest.mark.soak)], ids=str
)
def test_a_resumed_run_ends_bit_equal_under_both(tmp_path, undisturbed, crash_at):
    chosen = config(**BOTH)
    expected, weights = undisturbed
    assert expected.events[-1].to_stage is SeedStage.FOSSILIZED
    with pytest.raises(Crash):
        train(tmp_path / "disturbed", chosen, faults=CrashAt(*crash_at))
    summary, resumed = train(tmp_path / "disturbed", chosen, resume=True)
    assert equal(weights, resumed)
    assert summary.ledger.flops == expected.ledger.flops


def test_a_rollback_works_under_both(tmp_path):
    chosen = config(**BOTH)
    problem, calls = workload(chosen), []

    def poisoned(outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        if outputs.requires_grad:
            calls.append(None)
        return loss * math.nan if len(calls) == 80 and outputs.requires_grad else loss

    problem = replace(problem, task=replace(problem.task, loss_fn=poisoned))
    summary, weights = train(tmp_path, chosen, problem=problem)
    assert len(calls) > 80
    assert summary.status is RunStatus.FINISHED
    assert '"rolled back' in (tmp_path / "history.json").read_text()
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values() if tensor.is_floating_point())


def test_outputs_are_widened_wherever_they_stand():
    narrow, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    out = Precision("bf16").full({"a": (narrow, [whole, "x"])})
    assert out["a"][0].dtype is torch.float32
    assert out["a"][1][0].dtype is torch.int64
    assert Precision().full(narrow) is narrow


# ---------------------------------------------------------------- accumulation


@given(num_samples=st.integers(1, 40), num=st.integers(1, 50))
def test_parts_hold_every_sample_once_and_in_order(num_samples, num):
    x, y, other = torch.arange(num_samples), torch.arange(num_samples) * 2, torch.zeros(77)
    parts = parts_of(((x, other), y), num)
    assert len(parts) == min(num, num_samples), "the same on ranks whose shares of a step differ by a sample"
    assert torch.cat([inputs[0] for inputs, _ in parts]).equal(x)
    assert torch.cat([targets for _, targets in parts]).equal(y)
    assert all(inputs[1] is other for inputs, _ in parts)
    sizes = [batch_len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_a_step_in_parts_is_the_same_step(tmp_path):
    runs = []
    for parts in (1, 3, 40):
        chosen = config(tolaria__accumulate=parts, tolaria__epochs=3, tamiyo__policy="none")
        problem = replace(workload(chosen), model=smooth())
        summary, weights = train(tmp_path / str(parts), chosen, problem=problem)
        runs.append((weights, summary))
    for weights, summary in runs[1:]:
        assert all(torch.allclose(weights[name], runs[0][0][name], rtol=1e-3, atol=1e-5) for name in weights)
        assert summary.steps.count == runs[0][1].steps.count
        assert summary.ledger.flops.host == pytest.approx(runs[0][1].ledger.flops.host, rel=0.01)
        assert summary.metrics.test_accuracy == pytest.approx(runs[0][1].metrics.test_accuracy, abs=0.03)


def test_gradients_are_reduced_at_the_last_part_only(tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    plain = nn.Linear(2, 2)
    with _reducing(plain, now=False):
        pass
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(plain)
        with _reducing(wrapped, now=False):
            assert not wrapped.require_backward_grad_sync
        with _reducing(wrapped, now=True):
            assert wrapped.require_backward_grad_sync
    finally:
        distributed.destroy_process_group()
