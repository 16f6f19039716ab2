"""The governor: what it takes for sick, and that going back leaves nothing of what came after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolaria_support import BLUEPRINT, SITE, config, data, equal, kernel_hub, model

from esper import kasmina
from esper.config import GovernorConfig
from esper.leyline import ConfigError, NonFiniteError, Outcome, SeedStage
from esper.leyline.contract import new_id
from esper.tamiyo.controller import LocalController
from esper.tolaria import snapshot
from esper.tolaria.course import Ports
from esper.tolaria.governor import (
    Verdict,
    Vitals,
    after_rollback,
    judge,
    judge_activations,
    judge_gradient,
    judge_graft,
    judge_norm,
    vitals_from,
    vitals_state,
)
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import TASKS
from esper.tolaria.tree import clone, flatten, unflatten
from esper.tolaria.workload import evaluation_batches

LIMITS = GovernorConfig(strikes=3)


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
    vitals, _ = feed(after_rollback(Vitals(), ()), [*CALM, 9.0])
    assert vitals_from(vitals_state(vitals)) == vitals


def test_the_history_goes_back_with_the_weights():
    fast_then_flat = [1.1 * 0.9**step + 0.05 for step in range(150)]
    before, _ = feed(Vitals(), fast_then_flat[:3])
    sick, verdicts = feed(before, fast_then_flat[3:])
    assert set(verdicts) == {Verdict.OK}
    _, verdicts = feed(sick, fast_then_flat[:3])
    assert Verdict.ROLLBACK in verdicts  # what the restored weights lose is far above what came after them
    again, verdicts = feed(after_rollback(sick, before.losses), fast_then_flat)
    assert set(verdicts) == {Verdict.OK}
    assert again.rollbacks == 1


def graft_words(**norms):
    return judge_graft("mlp_2x at 3", limits=LIMITS, **norms)


def test_a_kernel_is_measured_by_its_host():
    assert graft_words(weight=3.0, update=0.5, host=0.1) is None
    assert graft_words(weight=300.0, update=50.0, host=1.0) is None
    words = graft_words(weight=2e15, update=0.0, host=0.1)
    assert words == "the weights of mlp_2x at 3 are out of line: 2e+15 against 0.1 in the host"
    words = graft_words(weight=30.0, update=11.0, host=0.1)
    assert words == "one step moved the weights of mlp_2x at 3 by 11, where the host's are 0.1"
    assert graft_words(weight=math.inf, update=math.inf, host=0.1) == "the weights of mlp_2x at 3 are not finite"
    assert graft_words(weight=5.0, update=5.0, host=0.0) is None  # a host without weights is no measure


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_whether_a_kernel_is_in_line_does_not_depend_on_the_scale_of_the_network(weight, update, host, scale):
    on_edge = any(abs(math.log10(limit * host / value)) < 1e-6 for limit, value in ((1e3, weight), (1e2, update)))
    one = graft_words(weight=weight, update=update, host=host)
    other = graft_words(weight=scale * weight, update=scale * update, host=scale * host)
    assert on_edge or (one is None) == (other is None)


@pytest.mark.parametrize(("norm", "words"), [(None, None), (1e30, None), (math.nan, "the gradient is not finite")])
def test_gradients(norm, words):
    assert judge_gradient(norm) == words


def test_activations_that_were_finite_once_must_stay_so():
    assert judge_activations({"a": (8, 0), "b": (8, 0)}, set()) is None
    assert judge_activations({"a": (0, 3)}, set()) is None  # a mask of infinities may be meant
    assert judge_activations({"a": (8, 0), "b": (8, 1)}, set()) == (
        "activations or gradients at b were not finite on 1 sampled steps"
    )
    assert "at a" in str(judge_activations({"a": (0, 1)}, {"a"}))


class Flaky(torch.nn.Module):
    """A site that puts out NaN when told to; the host behind it hides that from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(12, 12)
        self.broken = False

    def forward(self, x):
        return self.body(x) * (math.nan if self.broken else 1.0)


class Hiding(torch.nn.Module):
    def forward(self, x):
        return x.detach().nan_to_num()


class Loop:
    """One's own loop around a session, with real kernels."""

    def __init__(
        self, *, host: torch.nn.Module | None = None, scaler: torch.amp.GradScaler | None = None, **settings
    ) -> None:
        chosen = config(tolaria__epochs=20, **settings)
        x, y = data()
        torch.manual_seed(0)
        self.host = kasmina.wrap(host or model(), example=(x[:2],), sites=[SITE], config=chosen.kasmina)
        hub, key = kernel_hub()
        self.host.attach(hub, key, wait=True)
        self.x, self.y = x, y
        parameters = [parameter for _, parameter in self.host.live_parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=200)
        self.session = Session(
            self.host,
            Optimization(self.optimizer, scheduler, scaler),
            TASKS["classification"],
            example=(x[:2],),
            config=chosen,
            run_id=f"run-{new_id()}",  # the hub is that of all tests, and counts an adaptation of a run once
            ports=Ports(hub=hub, controller=LocalController(chosen.tamiyo)),
            val=evaluation_batches((x[120:160], y[120:160]), batch_size=40),
            steps_per_epoch=3,
        )
        self.session.begin()

    def step(self, *, poison: float | None = None, spoil: Callable[[], None] | None = None) -> None:
        i = self.session.course.step % 3
        x, y = self.x[40 * i : 40 * i + 40], self.y[40 * i : 40 * i + 40]
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.session.course.model(x), y)
        scaler = self.session.course.optimization.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.session.course.optimization.step()
        if spoil is not None:
            spoil()
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
        return clone(dict(self.host.module.state_dict()))


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


@pytest.mark.parametrize(
    ("value", "words"), [(2e15, "out of line"), (500.0, "one step moved"), (math.nan, "are not finite")]
)
def test_a_kernel_out_of_line_with_its_host_is_taken_back_though_the_loss_is_normal(loop, value, words):
    loop.until(SeedStage.GRAFTING)
    loop.step()
    assert loop.session.recorder.rollbacks == ()
    name, weight = next((n, p) for n, p in loop.host.live_parameters() if n.startswith("_esper."))

    def spoil() -> None:
        with torch.no_grad():
            weight.fill_(value)

    loop.step(poison=1.0, spoil=spoil)
    [back] = loop.session.recorder.rollbacks
    assert words in back.reason
    assert BLUEPRINT in back.reason
    assert not any(n.startswith("_esper.") for n, _ in loop.host.live_parameters())
    assert loop.host.seeds()[0].stage is SeedStage.CULLED
    assert name not in loop.weights()


def test_kernels_that_train_as_they_should_are_never_out_of_line(loop):
    loop.until(SeedStage.FOSSILIZED)
    for _ in range(3):
        loop.epoch()
    assert loop.session.recorder.rollbacks == ()


def test_a_gradient_that_is_not_finite_is_seen_in_its_own_step(loop):
    before = loop.weights()

    def spoil() -> None:
        next(loop.host.parameters()).grad[0, 0] = math.inf

    loop.step(poison=1.0, spoil=spoil)
    assert [back.reason for back in loop.session.recorder.rollbacks] == ["the gradient is not finite"]
    assert equal(loop.weights(), before)


def test_a_step_that_overflows_is_the_scalers_to_leave_out_and_a_rollback_gives_its_scale_back():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loop = Loop(scaler=scaler)
    loop.epoch()
    first = next(loop.host.parameters())
    before = first.detach().clone()
    overflow = first.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    loop.step()
    overflow.remove()
    assert torch.equal(first, before)
    assert scaler.get_scale() == 32.0
    assert loop.session.recorder.rollbacks == ()
    loop.step(poison=math.nan)
    assert len(loop.session.recorder.rollbacks) == 1
    assert scaler.get_scale() == 64.0
    loop.host.close()


class Amplifying(torch.nn.Module):
    """The identity, whose gradient overflows on the way under a large scale."""

    def forward(self, x):
        return (1e-34 * x) * 1e34


def test_a_scaler_that_looks_for_its_scale_is_in_health():
    scaler = torch.amp.GradScaler("cpu", init_scale=1e9, backoff_factor=0.125)
    host = model()
    host.insert(4, Amplifying())
    loop = Loop(host=host, scaler=scaler)
    before = loop.weights()
    loop.step()  # health is taken on it
    assert {name for name, tensor in loop.weights().items() if not torch.equal(tensor, before[name])} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    for _ in range(3):
        loop.epoch()
    assert scaler.get_scale() < 1e8  # so more than one step was left out
    assert not torch.equal(loop.weights()["0.weight"], before["0.weight"])
    assert loop.session.recorder.rollbacks == ()
    loop.host.close()


def test_a_loss_that_is_not_finite_on_steps_left_out_is_no_reason_until_it_goes_on():
    vitals, _ = feed(Vitals(), CALM)
    for expected in (Verdict.SUSPECT, Verdict.SUSPECT, Verdict.ROLLBACK):
        vitals, judgement = judge(vitals, math.nan, LIMITS, left_out=True)
        assert judgement.verdict is expected
    same, judgement = judge(vitals, 1e9, LIMITS, left_out=True)
    assert (same, judgement.verdict) == (vitals, Verdict.OK)


def test_weights_that_are_not_finite_are_seen_at_the_end_of_the_epoch(loop):
    for _ in range(12):  # beyond the steps that are watched one by one
        loop.step(poison=1.0)

    def spoil() -> None:
        with torch.no_grad():
            next(loop.host.parameters())[0, 0] = math.nan

    loop.step(poison=1.0, spoil=spoil)
    loop.session.end_epoch()
    assert any("not finite" in back.reason for back in loop.session.recorder.rollbacks)
    assert all(tensor.isfinite().all() for tensor in loop.weights().values() if tensor.is_floating_point())


class Masked(torch.nn.Module):
    """A site with a buffer of infinities, as attention has them, ones that count, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(12, 12)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.extra = {"note": "kept"}

    def forward(self, x):
        return self.body(x)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_a_buffer_of_infinities_is_left_alone_and_one_that_becomes_infinite_is_not():
    host, masked = model(), Masked()
    host[3] = masked
    loop = Loop(host=host)
    loop.epoch()
    assert loop.session.recorder.rollbacks == ()
    loop.step()
    masked.count += 1
    masked.extra = {"note": "lost"}
    masked.seen.fill_(math.inf)
    loop.session.end_epoch()
    assert [back.reason for back in loop.session.recorder.rollbacks] == ["3.seen is not finite"]
    assert (float(masked.seen), float(masked.mask[0, 1])) == (0.0, -math.inf)
    assert (float(masked.count), masked.extra) == (0.0, {"note": "kept"})  # state_dict does not hold the one
    loop.host.close()


def test_activations_that_are_not_finite_are_seen_though_the_loss_is_normal():
    host = model()
    flaky = Flaky()
    host[3] = flaky
    host.insert(4, Hiding())
    loop = Loop(host=host)
    loop.epoch()
    assert loop.session.recorder.rollbacks == ()
    flaky.broken = True
    for _ in range(3):
        loop.step(poison=1.0)
    flaky.broken = False
    loop.session.end_epoch()
    [back] = loop.session.recorder.rollbacks
    assert back.reason == "activations or gradients at 3 were not finite on 1 sampled steps"
    loop.host.close()


def test_a_rollback_skips_the_pending_command_and_asks_for_none(loop):
    loop.until(SeedStage.GRAFTING)
    asked = []

    class Watcher:
        def decide(self, state, packet):
            asked.append(packet)
            return LocalController(loop.session.course.config.tamiyo).decide(state, packet)

    loop.session.course.ports.controller = Watcher()
    for _ in range(3):
        loop.step()
    with torch.no_grad():
        next(loop.host.parameters()).fill_(math.nan)
    num_events = len(loop.session.recorder.events)
    loop.session.end_epoch()
    assert asked == []
    told = loop.session.recorder.events[num_events:]
    assert [event.to_stage for event in told] == [SeedStage.ROLLED_BACK, SeedStage.CULLED]
    loop.epoch()  # and then it decides again, and hears why
    assert "rolled back" in asked[0].governor


def test_blame_reaches_urza_as_the_outcome_of_the_kernel(loop):
    loop.until(SeedStage.GRAFTING)
    hub, kernel_id = loop.session.course.ports.hub, loop.host.seeds()[0].kernel_id
    before = hub.outcomes(kernel_id)
    loop.step(poison=math.nan)
    assert hub.outcomes(kernel_id) - before == Counter({Outcome.ROLLED_BACK: 1})
    report = loop.session.recorder.reports[-1]
    assert (report.outcome, report.failure_reason) == (Outcome.ROLLED_BACK, "the loss is nan")


def test_an_adaptation_that_ends_again_in_a_resumed_run_counts_once(loop):
    loop.until(SeedStage.GRAFTING)
    hub, kernel_id = loop.session.course.ports.hub, loop.host.seeds()[0].kernel_id
    view, before = loop.host.seeds()[0], hub.outcomes(kernel_id)
    recorder = loop.session.recorder
    for _ in range(2):  # what a run does that died after the report and before its next checkpoint
        hub.report(recorder.report(view, Outcome.CULLED, reason="no gain"))
    hub.report(recorder.report(view, Outcome.UNFINISHED, reason="the run was interrupted"))
    assert hub.outcomes(kernel_id) - before == Counter({Outcome.CULLED: 1, Outcome.UNFINISHED: 1})


def test_a_kernel_that_retires_after_a_rollback_is_reported_once(loop):
    loop.until(SeedStage.EVALUATING)
    loop.step(poison=math.nan)
    assert loop.host.seeds()[0].stage.is_blended  # the snapshot knew it: it leaves by a ramp
    loop.until(SeedStage.CULLED)
    assert [report.outcome for report in loop.session.recorder.reports] == [Outcome.ROLLED_BACK]


def test_an_embargoed_site_is_not_grown_again_before_its_time(loop):
    loop.until(SeedStage.GRAFTING)
    loop.step(poison=math.nan)
    until = loop.session.course.epoch + 1 + loop.session.course.config.kasmina.embargo_epochs
    assert loop.session._guard.embargo == {SITE: until, f"{SITE}:{BLUEPRINT}": until}
    state = loop.session._guard.state_dict()
    assert state["embargo"] == loop.session._guard.embargo  # and a resumed run knows it


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
    loop.until(SeedStage.GRAFTING)
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


def test_a_run_that_is_set_back_repeats_its_higher_losses_in_peace(loop):
    falling = [1.1 * 0.8**step + 0.05 for step in range(45)]
    for loss in [*falling, math.nan, *falling]:
        loop.step(poison=loss)
    assert [back.reason for back in loop.session.recorder.rollbacks] == ["the loss is nan"]


def test_a_host_whose_weights_grow_by_themselves_is_left_alone():
    sites = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU())
    host = torch.nn.Sequential(
        torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Identity(), sites, torch.nn.Linear(12, 3)
    )
    for parameter in host.parameters():
        torch.nn.init.normal_(parameter, std=1e-3)
    loop = Loop(host=host, tamiyo__policy="none")
    before = torch.nn.utils.get_total_norm(list(host.parameters()))
    for _ in range(30):
        loop.step()
    loop.session.end_epoch()
    assert torch.nn.utils.get_total_norm(list(host.parameters())) > 10 * before
    assert loop.session.recorder.rollbacks == ()

    def double() -> None:
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.mul_(2)

    loop.step(poison=math.nan)
    for _ in range(12):  # nor is it watched after a return that no kernel is to blame for
        loop.step(poison=1.0, spoil=double)
    assert [back.reason for back in loop.session.recorder.rollbacks] == ["the loss is nan"]
    loop.host.close()


def test_the_limits_are_settings():
    loop = Loop(tolaria__governor__max_rollbacks=1)
    loop.step(poison=math.nan)
    with pytest.raises(NonFiniteError, match="set back 1 times in a row"):
        loop.step(poison=math.nan)
    loop.host.close()
    with pytest.raises(ConfigError, match="min_history 30 is more than window 10"):
        config(tolaria__governor__window=10, tolaria__governor__min_history=30)


def fall_ill(loop: Loop) -> dict[str, torch.Tensor]:
    """Lets an epoch end with a host whose sickness shows later; returns its weights at the end of the one before."""
    loop.epoch()
    sound = loop.weights()
    with torch.no_grad():
        loop.host.module[4].bias[0] = 100.0
    loop.epoch()
    return sound


def step_and_suffer(loop: Loop) -> None:
    loop.step(poison=math.nan if float(loop.host.module[4].bias.detach()[0]) > 50 else 1.0)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_host_that_was_sick_already_at_its_last_snapshot_goes_back_further(resumed):
    loop = Loop(tamiyo__policy="none")
    sound = fall_ill(loop)
    if resumed:
        state = clone(loop.session.state_dict())
        loop.host.close()
        loop = Loop(tamiyo__policy="none")
        loop.session.load_state_dict(unflatten(*flatten(state)))
        loop.session.begin()
    step_and_suffer(loop)
    assert float(loop.host.module[4].bias.detach()[0]) > 50
    step_and_suffer(loop)
    assert equal(loop.weights(), sound)
    for _ in range(3):
        step_and_suffer(loop)
    loop.session.end_epoch()
    assert len(loop.session.recorder.rollbacks) == 2
    loop.host.close()


def test_one_snapshot_is_the_last_one():
    loop = Loop(tamiyo__policy="none", tolaria__governor__snapshots=1)
    fall_ill(loop)
    for _ in range(3):
        step_and_suffer(loop)
    with pytest.raises(NonFiniteError, match="set back 3 times in a row"):
        step_and_suffer(loop)
    loop.host.close()
