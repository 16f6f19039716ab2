"""Optimizer and scheduler surgery: old state survives bit by bit, through graft, cull and a checkpoint."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from esper.config import OptimizerConfig, Optimizers, SchedulerConfig
from esper.leyline import ConfigError, ConflictError
from esper.tolaria.optim import SEED_KEY, UNSUITED, Optimization, clip_norms
from esper.tolaria.schedules import RateCurve, optimizer_factory, scheduler_factory
from esper.tolaria.tree import flatten, unflatten

STEPS = 24


def _sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    stay = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=4)
    down = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    return lr_scheduler.SequentialLR(optimizer, [warm, stay, down], milestones=[6, 12])


SCHEDULERS = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5),
    "multi_step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [4, 9, 9, 15], gamma=0.5),
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=0.3, total_iters=8),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=10),
    "sequential": _sequential,
    "onecycle": lambda optimizer: scheduler_factory(SchedulerConfig(type="onecycle"))(optimizer, STEPS),
    "wsd": lambda optimizer: scheduler_factory(SchedulerConfig(type="wsd", warmup_fraction=0.2, decay_fraction=0.3))(
        optimizer, STEPS
    ),
}


class Grower:
    """A host weight and kernels that come and go, driven by made-up gradients."""

    def __init__(self, kind: str, make=AdamW) -> None:
        self.host = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = make([self.host], lr=0.01)
        self.optimization = Optimization(optimizer, SCHEDULERS[kind](optimizer))
        self.kernels: dict[str, nn.Parameter] = {}
        self.held: tuple[str, ...] = ()

    def live(self):
        return [("host", self.host), *((f"_esper.{name}", tensor) for name, tensor in self.kernels.items())]

    def graft(self, name: str, lr_factor: float = 1.0) -> None:
        self.kernels[name] = nn.Parameter(torch.full((3,), 0.5))
        self.optimization.join(name, [self.kernels[name]], live=self.live(), lr_factor=lr_factor)

    def cull(self, name: str) -> None:
        self.optimization.leave([self.kernels.pop(name)])

    def steps(self, first: int, last: int) -> list[float]:
        rates = []
        for step in range(first, last):
            for i, (_, tensor) in enumerate(self.live()):
                tensor.grad = torch.cos(tensor.detach() * (step + 1) + i)
            rates.append(self.optimization.learning_rate)
            if self.held:
                self.optimization.hold_all_but(self.held)
            self.optimization.step()
        return rates

    def rates(self) -> set[float]:
        return {float(group["lr"]) for group in self.optimization.optimizer.param_groups}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("make", [AdamW, lambda p, lr: SGD(p, lr=lr, momentum=0.9)], ids=["adamw", "sgd"])
def test_the_host_goes_on_as_if_nothing_had_grown(kind, make):
    plain, grower = Grower(kind, make), Grower(kind, make)
    expected = plain.steps(0, STEPS)
    rates = grower.steps(0, 5)
    grower.graft("s0")
    rates += grower.steps(5, 8)
    grower.graft("s1")
    assert len(grower.rates()) == 1
    rates += grower.steps(8, 14)
    grower.cull("s0")
    assert grower.optimization.seeds == ("s1",)
    rates += grower.steps(14, STEPS)
    assert rates == expected
    assert len(grower.rates()) == 1
    assert torch.equal(grower.host, plain.host)
    old, new = (run.optimization.optimizer.state[run.host] for run in (plain, grower))
    assert all(torch.equal(torch.as_tensor(old[key]), torch.as_tensor(new[key])) for key in old)
    assert set(grower.optimization.optimizer.state) == {grower.host, grower.kernels["s1"]}


CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
SUITED = sorted(set(CLASSES) - {kind.__name__ for kind in UNSUITED})


def test_every_optimizer_of_torch_that_suits_has_its_name():
    assert {name.lower() for name in SUITED} == set(get_args(Optimizers))
    for name in SUITED:
        (optimizer,) = [optimizer_factory(OptimizerConfig(type=name))([nn.Parameter(torch.zeros(2, 2))])]
        assert type(optimizer) is CLASSES[name]


def made_by(name):
    """As configured; torch's own classes take their arguments so."""
    return lambda parameters, lr: optimizer_factory(OptimizerConfig(type=name, lr=lr))(parameters)


@pytest.mark.parametrize("kind", UNSUITED, ids=lambda kind: kind.__name__)
def test_an_optimizer_that_cannot_grow_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} cannot follow") as caught:
        Optimization(kind([nn.Parameter(torch.zeros(2, 2))]))
    assert caught.value.field == "optimizer"
    assert caught.value.remedy


@pytest.mark.parametrize("name", SUITED)
def test_any_optimizer_of_torch_grows_and_resumes(name):
    plain, grower = Grower("wsd", made_by(name)), Grower("wsd", made_by(name.lower()))
    plain.steps(0, STEPS)
    grower.steps(0, 5)
    grower.graft("s0")
    grower.steps(5, 8)
    grower.graft("s1")
    grower.steps(8, 12)
    grower.cull("s0")
    tree, tensors = flatten(grower.optimization.state_dict())
    state = unflatten(json.loads(json.dumps(tree)), tensors)
    resumed = Grower("wsd", made_by(name))
    resumed.kernels = {"s1": nn.Parameter(grower.kernels["s1"].detach().clone())}
    resumed.host.data.copy_(grower.host.detach())
    resumed.optimization.load_state_dict(state, live=resumed.live())
    for run in (grower, resumed):
        run.steps(12, STEPS)
        assert torch.equal(run.host, plain.host)
    assert torch.equal(resumed.kernels["s1"], grower.kernels["s1"])
    assert not torch.equal(grower.kernels["s1"], torch.full((3,), 0.5))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_seed_keeps_its_share_of_the_rate(kind):
    grower, plain = Grower(kind), Grower(kind)
    plain.steps(0, STEPS)
    grower.steps(0, 4)
    grower.graft("s0", lr_factor=0.25)
    for step in range(4, STEPS):
        if step == 12:  # and through a checkpoint
            tree, tensors = flatten(grower.optimization.state_dict())
            state = unflatten(json.loads(json.dumps(tree)), tensors)
            grower.optimization.load_state_dict(state, live=grower.live())
        grower.steps(step, step + 1)
        host, kernel = grower.optimization.optimizer.param_groups
        if kind not in ("cosine", "sequential"):  # whose floor is not shared
            assert float(kernel["lr"]) == pytest.approx(0.25 * float(host["lr"]), rel=1e-9)
        assert float(kernel["lr"]) < float(host["lr"]) or float(host["lr"]) < 1e-9
    assert torch.equal(grower.host, plain.host)


def test_what_is_held_stands_still_with_its_state_and_the_rest_learns():
    grower = Grower("none")
    grower.steps(0, 3)
    grower.graft("s0")
    grower.steps(3, 5)
    before = grower.host.detach().clone()
    state = {
        key: torch.as_tensor(value).clone() for key, value in grower.optimization.optimizer.state[grower.host].items()
    }
    grower.held = ("s0",)
    kernel = grower.kernels["s0"].detach().clone()
    grower.steps(5, 9)
    assert torch.equal(grower.host, before)
    after = grower.optimization.optimizer.state[grower.host]
    assert all(torch.equal(value, torch.as_tensor(after[key])) for key, value in state.items())
    assert not torch.equal(grower.kernels["s0"], kernel)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"beta": 1}}, "AdamW has no option 'beta' .one of betas"),
        ({"options": {"betas": [0.9, 2.0]}}, "AdamW: Invalid beta"),
    ],
)
def test_what_torch_has_not_or_refuses_is_told_with_the_field(settings, words):
    with pytest.raises(ConfigError, match=words):
        optimizer_factory(OptimizerConfig(**settings))([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_resumed_run_takes_the_same_steps(kind):
    first = Grower(kind)
    first.steps(0, 4)
    first.graft("s0")
    first.steps(4, 6)
    first.graft("s1")
    first.steps(6, 8)
    first.cull("s0")
    first.steps(8, 10)
    tree, tensors = flatten(first.optimization.state_dict())
    state = unflatten(json.loads(json.dumps(tree)), tensors)
    weights = {name: tensor.detach().clone() for name, tensor in first.live()}
    first.steps(10, STEPS)

    second = Grower(kind)
    second.kernels = {"s1": nn.Parameter(weights["_esper.s1"])}
    second.host.data.copy_(weights["host"])
    second.optimization.load_state_dict(state, live=second.live())
    second.steps(10, STEPS)
    assert torch.equal(first.host, second.host)
    assert torch.equal(first.kernels["s1"], second.kernels["s1"])
    assert first.rates() == second.rates()


def test_a_state_is_restored_over_other_seeds_and_stays_as_it_was():
    grower = Grower("one_cycle")
    grower.steps(0, 3)
    state = grower.optimization.state_dict()
    tree, tensors = flatten(state)
    kept = unflatten(tree, tensors)
    before = grower.host.detach().clone()
    for _ in range(2):
        grower.graft("s0")
        grower.steps(3, 6)
        grower.kernels.clear()
        grower.host.data.copy_(before)
        grower.optimization.load_state_dict(kept, live=grower.live())
        assert grower.optimization.seeds == ()
    plain = Grower("one_cycle")
    plain.steps(0, STEPS)
    grower.steps(3, STEPS)
    assert torch.equal(grower.host, plain.host)


def test_a_kernel_has_the_hyper_parameters_of_group_0_of_that_moment():
    grower = Grower("one_cycle")
    grower.steps(0, 5)
    grower.graft("s0")
    host, kernel = grower.optimization.optimizer.param_groups
    assert kernel[SEED_KEY] == "s0"
    assert {key: value for key, value in host.items() if key != "params"} == {
        key: value for key, value in kernel.items() if key not in ("params", SEED_KEY)
    }


def test_what_cannot_grow_is_refused_by_name():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.1)
    with pytest.raises(ConfigError, match="CyclicLR cannot follow") as error:
        Optimization(optimizer, lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=1.0, cycle_momentum=False))
    assert "OneCycleLR" in str(error.value)
    inner = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    outer = lr_scheduler.SequentialLR(optimizer, [inner], milestones=[])
    with pytest.raises(ConfigError, match="ExponentialLR"):
        Optimization(optimizer, outer)


def test_joining_twice_or_from_nowhere_is_refused():
    grower = Grower("none")
    grower.graft("s0")
    with pytest.raises(ConflictError, match="already"):
        grower.optimization.join("s0", [], live=grower.live())
    with pytest.raises(ConflictError, match="not on the live path"):
        grower.optimization.join("s1", [nn.Parameter(torch.zeros(1))], live=grower.live())


def test_a_scaler_leaves_out_what_overflows_and_its_state_is_kept():
    weight = nn.Parameter(torch.ones(3))
    optimizer = SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimization = Optimization(optimizer, scaler=scaler)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        optimization.step()

    step(1.0)
    assert torch.equal(weight, torch.full((3,), 0.9))
    tree, tensors = flatten(optimization.state_dict())
    state = unflatten(json.loads(json.dumps(tree)), tensors)
    step(math.inf)
    assert torch.equal(weight, torch.full((3,), 0.9))
    assert scaler.get_scale() == 4.0
    optimization.load_state_dict(state, live=[("weight", weight)])
    assert scaler.get_scale() == 8.0
    step(1.0)
    assert scaler.get_scale() == 16.0  # it had counted the first step, too
    with pytest.raises(ConflictError, match="differ in having a scaler"):
        Optimization(optimizer).load_state_dict(state, live=[("weight", weight)])


def test_groups_are_clipped_apart():
    host, kernel = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    host.grad, kernel.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    clip_norms([[host], [kernel], []], 1.0)
    assert torch.equal(host.grad, torch.tensor([0.3, 0.4]))
    assert torch.linalg.vector_norm(kernel.grad).item() == pytest.approx(1.0, abs=1e-5)


def test_the_wsd_curve_warms_up_stays_and_decays():
    curve = RateCurve(shape="wsd", total=100, warmup=10, decay=20)
    assert [curve(step) for step in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert {curve(step) for step in range(10, 81)} == {1.0}
    assert [curve(step) for step in (90, 100)] == [0.5, 0.0]
