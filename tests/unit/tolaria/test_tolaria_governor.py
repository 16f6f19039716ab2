"""The governor: what it takes for sick, and that going back leaves nothing of what came after."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolaria_support import BLUEPRINT, SITE, config, data, equal, kernel_hub, model

from esper import kasmina
from esper.leyline import NonFiniteError, SeedStage
from esper.tamiyo.controller import LocalController
from esper.tolaria import snapshot
from esper.tolaria.course import Ports
from esper.tolaria.governor import Limits, Verdict, Vitals, after_rollback, judge, judge_norm, vitals_from, vitals_state
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.tree import clone
from esper.tolaria.workload import evaluation_batches

LIMITS = Limits(strikes=3)


def feed(vitals: Vitals, losses: list[float]) -> tuple[Vitals, list[Verdict]]:
    verdicts = []
    for loss in losses:
        vitals, judgement = judge(vitals, loss, LIMITS)
        verdicts.append(judgement.verdict)
    return vitals, verdicts


CALM = [1.0 + 0.01 * math.sin(i) for i in range(40)]


def test_a_spike_far_below_any_absolute_floor_is_seen():
    vitals, verdicts = feed(Vitals(), CALM)
    assert set(verdicts) == {Verdict.OK}
    _, verdicts = feed(vitals, [2.0, 2.0, 2.0])
    assert verdicts == [Verdict.SUSPECT, Verdict.SUSPECT, Verdict.ROLLBACK]


def test_one_bad_batch_is_no_reason():
    vitals, _ = feed(Vitals(), CALM)
    vitals, verdicts = feed(vitals, [9.0, 1.0, 9.0, 9.0, 1.0])
    assert Verdict.ROLLBACK not in verdicts
    assert vitals.strikes == 0
    assert 9.0 not in vitals.losses


def test_a_loss_that_falls_is_never_suspect():
    _, verdicts = feed(Vitals(), [1 / (1 + step) for step in range(300)])
    assert set(verdicts) == {Verdict.OK}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_needs_no_history(loss):
    assert judge(Vitals(), loss, LIMITS)[1].verdict is Verdict.ROLLBACK


@given(st.lists(st.floats(0.5, 1.5), min_size=20, max_size=60), st.floats(1e-3, 1e3))
def test_the_verdict_does_not_depend_on_the_unit_of_the_loss(losses, unit):
    losses = [*losses, 100.0]
    assert feed(Vitals(), losses)[1][-1] == feed(Vitals(), [unit * loss for loss in losses])[1][-1] == Verdict.SUSPECT


def test_norms():
    assert judge_norm(1.0, 9.0, LIMITS) is None
    assert "2e+15" in str(judge_norm(1.0, 2e15, LIMITS))
    assert judge_norm(1.0, math.nan, LIMITS) == "the weights are not finite"


def test_vitals_round_trip():
    vitals, _ = feed(after_rollback(Vitals()), [*CALM, 9.0])
    assert vitals_from(vitals_state(vitals)) == vitals


class Loop:
    """One's own loop around a session, with real kernels."""

    def __init__(self, **settings) -> None:
        chosen = config(tolaria__epochs=20, **settings)
        x, y = data()
        torch.manual_seed(0)
        self.host = kasmina.wrap(model(), example=(x[:2],), sites=[SITE], config=chosen.kasmina)
        hub, key = kernel_hub()
        self.host.attach(hub, key, wait=True)
        self.x, self.y = x, y
        parameters = [parameter for _, parameter in self.host.live_parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=200)
        self.session = Session(
            self.host,
            Optimization(self.optimizer, scheduler),
            TASKS["classification"],
            example=(x[:2],),
            config=chosen,
            run_id="run",
            ports=Ports(hub=hub, controller=LocalController(chosen.tamiyo)),
            val=evaluation_batches((x[120:160], y[120:160]), batch_size=40),
            steps_per_epoch=3,
        )
        self.session.begin()

    def step(self, *, poison: float | None = None) -> None:
        i = self.session.course.step % 3
        x, y = self.x[40 * i : 40 * i + 40], self.y[40 * i : 40 * i + 40]
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.session.course.model(x), y)
        loss.backward()
        self.session.course.optimization.step()
        self.session.step((x, y), loss if poison is None else poison)

    def epoch(self) -> None:
        for _ in range(3):
            self.step()
        self.session.end_epoch()

    def until(self, stage: SeedStage) -> None:
        for _ in range(12):
            if self.host.seeds()[0].stage is stage:
                return
            self.epoch()
        raise AssertionError(f"never reached {stage}")

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.host.module.state_dict().items()}


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.host.close()


def test_a_snapshot_gives_everything_back_bit_by_bit(loop):
    loop.until(SeedStage.STABILIZING)
    state = snapshot.take(loop.host, loop.session.course.optimization)
    kept = clone(state)
    first = [loop.step() or loop.weights() for _ in range(2)]
    drawn = torch.rand(3)
    for _ in range(2):
        snapshot.give_back(state, loop.host, loop.session.course.optimization)
        assert equal(loop.weights(), dict(kept["module"]))
        loop.session.course.step -= 2
        again = [loop.step() or loop.weights() for _ in range(2)]
        assert all(equal(one, other) for one, other in zip(first, again, strict=True))
        assert torch.equal(torch.rand(3), drawn)


def test_a_graft_that_goes_wrong_is_undone_and_its_seed_blamed(loop):
    loop.until(SeedStage.TRAINING)
    for _ in range(3):
        loop.step()
    loop.session.measure()
    before = {name: tensor for name, tensor in loop.weights().items() if not name.startswith("_esper.")}
    optimizer = clone(loop.optimizer.state_dict())
    loop.session.control()
    assert loop.host.seeds()[0].stage is SeedStage.GRAFTING
    assert len(loop.optimizer.param_groups) == 2
    loop.step()
    loop.step(poison=math.nan)

    assert {name: loop.weights()[name].equal(tensor) for name, tensor in before.items()} == dict.fromkeys(before, True)
    assert len(loop.optimizer.param_groups) == 1
    state = loop.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][key], optimizer["state"][i][key]) for i in state for key in state[i])
    events = loop.session.recorder.events
    assert (events[-2].from_stage, events[-2].to_stage) == (SeedStage.GRAFTING, SeedStage.ROLLED_BACK)
    assert events[-2].reason == "the loss is nan"
    assert events[-1].to_stage is SeedStage.CULLED
    assert any("rolled back" in words for _, words in loop.session.recorder.history().decisions)


def test_blame_reaches_tamiyo_as_an_embargo(loop):
    loop.until(SeedStage.GRAFTING)
    loop.step()
    loop.step(poison=math.inf)
    loop.step()
    seen = []

    class Watcher:
        def decide(self, state, packet):
            seen.append(packet)
            return LocalController(loop.session.course.config.tamiyo).decide(state, packet)

    loop.session.course.ports.controller = Watcher()
    loop.session.end_epoch()
    assert seen[0].embargoed == (SITE, f"{SITE}:{BLUEPRINT}")
    assert "rolled back" in seen[0].governor


def test_weights_that_explode_at_the_end_of_an_epoch_skip_the_decision(loop):
    loop.epoch()
    for _ in range(3):
        loop.step()
    with torch.no_grad():
        next(loop.host.parameters()).fill_(2e15)
    loop.session.end_epoch()
    assert "no decision after a rollback" in loop.session.recorder.history().decisions[-1][1]
    assert all(tensor.abs().max() < 1e3 for tensor in loop.weights().values())


def test_a_host_that_diverges_by_itself_is_given_up(loop):
    for _ in range(3):
        loop.step(poison=math.nan)
    with pytest.raises(NonFiniteError, match="3 times in a row"):
        loop.step(poison=math.nan)
