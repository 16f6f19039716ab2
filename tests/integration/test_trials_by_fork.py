"""Trials by fork in this process: exact forks, failures by script, the budget, the ledger, and the winner's way in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import safetensors.torch
import torch
from tolaria_support import (
    BLUEPRINT,
    SITE,
    Crash,
    CrashAt,
    config,
    equal,
    kernel_hub,
    load_at_once,
    train,
    workload,
)

from esper.api import fork_local
from esper.config import parse_config
from esper.leyline import (
    BlendStrategy,
    ConfigError,
    EvidenceKind,
    Fork,
    ForkResult,
    KernelRejectedError,
    NonFiniteError,
    Outcome,
    RunStatus,
    RunSummary,
    SeedStage,
    TamperedError,
    TrialCandidate,
    UnavailableError,
)
from esper.tolaria import forks
from esper.tolaria.forks import Forked
from esper.tolaria.packing import pack, unpack
from esper.tolaria.tree import clone
from esper.tolaria.trials_here import TrialsHere

STEPS = 9
"""Of a fork: three epochs of the problem."""


@pytest.fixture(autouse=True)
def kernels_that_come_at_once(monkeypatch):
    load_at_once(monkeypatch)


def chosen(**settings):
    """A run that grows as soon as it may, whatever the host still learns, and tries first."""
    tree = config().model_dump(mode="json")
    tree["deterministic"] = False
    tree["tolaria"] |= {"epochs": 14}
    tree["tamiyo"] |= {
        "policy": "heuristic", "schedule": [], "warmup_epochs": 0, "plateau_window": 1, "plateau_threshold": 1000.0,
        "max_adaptations": 1,
        "trials": {"enabled": True, "steps": STEPS, "flops_share": 100.0, "z": 0.0},
    }  # fmt: skip
    tree["kasmina"] |= {"telemetry_share": None, "max_slowdown": None}
    return parse_config(tree, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])


def candidate(**changes):
    hub, _ = kernel_hub()
    kernel = next(k for k in hub.kernels() if k.pipeline == "fast")
    facts = {
        "site": SITE, "seed_id": "s0", "kernel_id": kernel.kernel_id, "blueprint_id": kernel.blueprint_id,
        "blueprint": BLUEPRINT,
    }  # fmt: skip
    return TrialCandidate(**facts | changes)


def run_fork(settings, packed, fork, **given):
    hub, key = kernel_hub()
    return fork_local(lambda: workload(settings), settings, packed, fork, hub=hub, public_key=key, **given)


def here(settings, **given):
    return TrialsHere(partial(run_fork, settings), **given)


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    """States of a run that does not grow, packed at the end of each epoch, and its weights after each."""
    settings = chosen(tamiyo__max_adaptations=0)
    states = {}

    from esper.tolaria import session as module

    control = module.Session.control

    def packing(self):
        control(self)
        states[self.course.epoch] = (pack(self.course), clone(dict(self.course.growable.module.state_dict())))

    module.Session.control = packing
    try:
        train(tmp_path_factory.mktemp("packed"), settings)
    finally:
        module.Session.control = control
    return settings, states


def forked(settings, packed, fork, **given):
    """A fork to look into, with its host."""
    from esper.kasmina import wrap

    hub, key = kernel_hub()
    problem = workload(settings)
    host = wrap(problem.model, example=problem.example, sites=settings.kasmina.sites, config=settings.kasmina)
    host.attach(hub, key, wait=True, native=False)
    return Forked(host, problem, settings, packed=packed, fork=fork, **given), host


def test_a_fork_that_does_not_grow_computes_the_bits_that_the_run_computes_next(packed_run):
    settings, states = packed_run
    fork, host = forked(settings, states[2][0], Fork("f", None, 0, STEPS, 10**15))
    result = fork.run()
    host.close()
    assert result.failure == ""
    own = clone(dict(host.module.state_dict()))
    assert equal(own, states[5][1]), "after three epochs it stands where the run stood"
    assert not equal(own, states[4][1])
    assert len(result.losses) == 40
    assert result.flops > 0


def test_a_fork_that_grows_leaves_weights_that_were_trained_behind_the_same_host(packed_run):
    settings, states = packed_run
    fork, host = forked(settings, states[2][0], Fork("f", candidate(), 0, STEPS, 10**15))
    fresh = {}
    graft = fork._graft

    def watched(tried):
        fresh.update(clone({n: t for n, t in host.module.state_dict().items() if not n.startswith("_esper.")}))
        graft(tried)

    fork._graft = watched
    result = fork.run()
    host.close()
    assert result.failure == ""
    assert result.weights is not None
    (seed,) = (seed for seed in host.seeds() if seed.seed_id == "s0")
    assert seed.stage is SeedStage.GRAFTING
    assert seed.alpha == 1.0
    none, other = forked(settings, states[2][0], Fork("n", None, 0, round(forks.BEHIND * STEPS), 10**15))
    none.run()
    other.close()
    hosts = {n: t for n, t in other.module.state_dict().items() if not n.startswith("_esper.")}
    assert equal(fresh, hosts), "until its graft the host is that of the fork without growth"


def test_other_seeds_see_other_data(packed_run):
    settings, states = packed_run
    losses = {seed: run_fork(settings, states[2][0], Fork("f", None, seed, STEPS, 10**15)).losses for seed in (0, 1, 2)}
    again = run_fork(settings, states[2][0], Fork("f", None, 1, STEPS, 10**15)).losses
    assert len(set(losses.values())) == 3
    assert again == losses[1]


def test_a_packed_state_comes_back_and_a_torn_one_is_refused(packed_run):
    _, states = packed_run
    packed = states[2][0]
    assert unpack(packed)["step"] == 6
    for torn in (packed[:-1], packed[:40], b"", safetensors.torch.save({"0": torch.zeros(1)})):
        with pytest.raises(TamperedError):
            unpack(torn)


@pytest.mark.parametrize(
    ("fork", "words"),
    [
        (Fork("f", None, 0, STEPS, 1000), "no more of its 1,000 FLOPs left"),
        (Fork("f", candidate(kernel_id="0" * 64), 0, STEPS, 10**15), "no kernel"),
        (Fork("f", candidate(seed_id="s9"), 0, STEPS, 10**15), "s9"),
        (Fork("f", candidate(strategy=BlendStrategy.DIRECT), 0, STEPS, 10**15), ""),
    ],
)
def test_how_forks_end(packed_run, fork, words):
    settings, states = packed_run
    result = run_fork(settings, states[2][0], fork)
    if words:
        assert words in result.failure
        assert result.losses == ()
    else:
        assert result.failure == ""
        assert result.weights is None, "direct kernels train on the live path alone"


class Diverge:
    """Puts NaN into the loss of one step."""

    def __init__(self, at):
        self.step, self.fired = at, False

    def at(self, place, step):
        if (place, step) == ("fork", self.step):
            self.fired = True
            raise NonFiniteError("the loss is not finite")


def test_a_fork_that_diverges_says_so(packed_run):
    settings, states = packed_run
    plan = Diverge(4)
    result = run_fork(settings, states[2][0], Fork("f", candidate(), 0, STEPS, 10**15), faults=plan)
    assert plan.fired
    assert "not finite" in result.failure
    assert result.flops > 0


# ---------------------------------------------------------------- whole runs


class Keeping(TrialsHere):
    """Remembers what came back, and lets a script change it."""

    def __init__(self, settings, change=lambda _fork, result: result):
        self.seen = {}

        def run(packed, fork):
            self.seen[fork.fork_id] = (fork, change(fork, run_fork(settings, packed, fork)))
            return self.seen[fork.fork_id][1]

        super().__init__(run)


def test_the_winner_begins_with_its_forks_weights_and_passes_every_gate(tmp_path, monkeypatch):
    settings = chosen()
    trials = Keeping(settings)
    begun = {}
    from esper.kasmina.seed import Seed

    begin = Seed.begin_training

    def watched(self, module, learning_rate):
        begun.setdefault(self.trace_id, clone(dict(module.state_dict())))
        begin(self, module, learning_rate)

    monkeypatch.setattr(Seed, "begin_training", watched)
    summary, _ = train(tmp_path, settings, trials=trials)
    assert len(summary.trials) == 1
    (trial,) = summary.trials
    assert trial.failure == ""
    (outcome,) = trial.outcomes
    assert outcome.evidence is not None
    assert outcome.evidence.kind is EvidenceKind.FORK
    none, grown = (result for _, result in trials.seen.values())
    gains = [a - b for a, b in zip(none.losses, grown.losses, strict=True)]
    assert outcome.evidence.gain == pytest.approx(sum(gains) / 40)
    assert outcome.evidence.num_pairs == 40
    way = [event.to_stage for event in summary.events]
    assert way[:2] == [SeedStage.GERMINATED, SeedStage.TRAINING]
    assert "has won a trial" in summary.events[0].reason
    trace = summary.events[0].trace_id
    assert equal(begun[trace], safetensors.torch.load(grown.weights)), "bit by bit"
    (report,) = summary.field_reports
    assert report.trial == outcome.evidence
    assert report.evidence.kind is EvidenceKind.SHADOW
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    assert graft.evidence.kind is EvidenceKind.SHADOW, "through its gate, on the run's own evidence"


def test_the_ledger_holds_what_forks_cost_to_the_flop(tmp_path):
    settings = chosen()
    trials = Keeping(settings)
    summary, _ = train(tmp_path, settings, trials=trials)
    spent = sum(result.flops for _, result in trials.seen.values())
    assert summary.ledger.flops.trials == spent == summary.trials[0].flops > 0
    flops = summary.ledger.flops
    assert flops.total == flops.host + flops.shadow + flops.telemetry + flops.validation + flops.trials
    assert all(result.flops <= fork.max_flops for fork, result in trials.seen.values())


def losing(fork, result):
    """As if growth had made every sample worse."""
    if fork.candidate is None:
        return result
    return replace(result, losses=tuple(loss + 1.0 for loss in result.losses), loss=result.loss + 1.0)


def test_where_nothing_wins_nothing_begins_and_the_loser_is_reported(tmp_path):
    settings = chosen()
    trials = Keeping(settings, losing)
    summary, _ = train(tmp_path, settings, trials=trials)
    assert summary.events == ()
    none = next(result for fork, result in trials.seen.values() if fork.candidate is None)
    row = history(tmp_path).epochs[summary.trials[0].epoch + STEPS // 3]
    assert row.val_loss == none.loss, "three epochs later the run came to what its fork without growth came to"
    (report,) = summary.field_reports
    assert report.outcome is Outcome.TRIED
    assert report.evidence.kind is EvidenceKind.FORK
    assert report.value < 0
    assert report.flops > 0


def failed(which):
    def change(fork, result):
        grows = fork.candidate is not None
        if grows is which:
            return ForkResult(fork.fork_id, flops=fork.max_flops, failure="it died")
        return result

    return change


@pytest.mark.parametrize("grows", [True, False])
def test_a_fork_that_dies_makes_the_trial_void_and_shadow_evidence_decides(tmp_path, grows):
    settings = chosen()
    trials = Keeping(settings, failed(grows))
    summary, _ = train(tmp_path, settings, trials=trials)
    assert "it died" in summary.trials[0].failure
    begun = [event for event in summary.events if event.to_stage is SeedStage.GERMINATED]
    assert begun, "the policy's own choice goes on"
    assert "the trial says nothing" in begun[0].reason or any(
        "says nothing" in words for _, words in history(tmp_path).decisions
    )
    assert summary.field_reports[0].trial is None
    limits = [fork.max_flops for fork, result in trials.seen.values() if result.failure]
    assert summary.ledger.flops.trials >= sum(limits) > 0


def history(folder):
    from esper.leyline import RunHistory

    return RunHistory.model_validate_json((folder / "history.json").read_text())


def test_one_candidate_that_fails_leaves_the_others(tmp_path):
    settings = chosen(tamiyo__trials__strategies=["ramp", "direct"])

    def change(fork, result):
        if fork.candidate is not None and fork.candidate.strategy is BlendStrategy.RAMP:
            return ForkResult(fork.fork_id, flops=1, failure="it died")
        return result

    summary, _ = train(tmp_path, settings, trials=Keeping(settings, change))
    ramp, direct = summary.trials[0].outcomes
    assert ramp.failure == "it died"
    assert direct.evidence is not None
    if direct.evidence.gain > 0:
        graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
        assert graft.evidence == direct.evidence, "a direct kernel's evidence is its fork's"


def without_trials():
    tree = chosen().model_dump(mode="json")
    tree["tamiyo"]["trials"]["enabled"] = False
    return parse_config(tree)


@pytest.mark.parametrize("case", ["no CPU is idle", "pay for none", "nowhere"])
def test_a_run_that_may_try_and_cannot_is_the_run_without_trials(tmp_path, monkeypatch, case):
    from esper.kasmina.host import Host

    attach = Host.attach  # kernels load within their command, so that no clock decides
    monkeypatch.setattr(
        Host, "attach", lambda self, hub, key, **given: attach(self, hub, key, **(given | {"wait": True}))
    )
    plain, weights = train(tmp_path / "plain", without_trials())
    settings = chosen(tamiyo__trials__flops_share=1e-9) if "pay" in case else chosen()
    ran = []
    idle = 0 if "idle" in case else 1
    trials = None if case == "nowhere" else TrialsHere(lambda *_: ran.append(1), room=lambda: idle)
    summary, own = train(tmp_path / "tries", settings, trials=trials)
    assert equal(own, weights)
    assert not ran
    assert [(e.step, e.to_stage) for e in summary.events] == [(e.step, e.to_stage) for e in plain.events]
    assert summary.ledger.flops == plain.ledger.flops
    said = [words for _, words in history(tmp_path / "tries").decisions if "on shadow evidence alone" in words]
    assert len(said) == 1
    assert case in said[0]


class Never(TrialsHere):
    """Forks that never end, until they are cancelled."""

    def __init__(self):
        super().__init__(lambda *_: None)
        self.begun, self.cancelled, self.started = (), [], 0

    def start(self, checkpoint, forks):
        del checkpoint
        self.begun, self.started = tuple(forks), self.started + 1

    def results(self):
        return {}

    def cancel(self, reason):
        self.cancelled.append(reason)
        return {f.fork_id: ForkResult(f.fork_id, flops=f.max_flops, failure=reason) for f in self.begun}


def test_a_late_trial_is_given_up_and_booked_at_its_limit(tmp_path):
    settings = chosen(tamiyo__trials__late_epochs=2)
    trials = Never()
    summary, _ = train(tmp_path, settings, trials=trials)
    assert len(trials.cancelled) == trials.started == 1
    assert "not ended 3 epochs later" in summary.trials[0].failure
    assert summary.trials[0].told - summary.trials[0].epoch == 3
    assert summary.ledger.flops.trials == sum(fork.max_flops for fork in trials.begun)
    assert any(event.to_stage is SeedStage.GERMINATED for event in summary.events)


def test_a_run_that_ends_first_cancels_its_trial_and_books_it(tmp_path):
    settings = chosen(tamiyo__trials__late_epochs=100)
    trials = Never()
    summary, _ = train(tmp_path, settings, trials=trials)
    assert len(trials.cancelled) == 1
    assert "ended first" in trials.cancelled[0]
    assert "ended first" in summary.trials[0].failure
    assert summary.ledger.flops.trials == sum(fork.max_flops for fork in trials.begun)
    assert summary.events == ()


def test_a_trial_is_void_when_the_run_was_set_back_meanwhile(tmp_path):
    settings = chosen(tamiyo__trials__late_epochs=100)
    problem, poisoned = workload(settings), []
    loss_of = problem.task.loss_fn

    def loss_fn(outputs, targets):
        loss = loss_of(outputs, targets)
        if torch.is_grad_enabled():
            poisoned.append(1)
            if 22 < len(poisoned) < 26:
                return loss * float("nan")
        return loss

    trials = Never()
    summary, _ = train(
        tmp_path, settings, problem=replace(problem, task=replace(problem.task, loss_fn=loss_fn)), trials=trials
    )
    assert summary.rollbacks
    assert any("live path changed" in trial.failure for trial in summary.trials)


def test_a_trial_that_was_lost_with_its_trainer_is_booked_and_said(tmp_path):
    settings = chosen(tamiyo__trials__late_epochs=100)
    crash = CrashAt("step", 20)
    trials = Never()
    with pytest.raises(Crash):
        train(tmp_path, settings, trials=trials, faults=crash)
    assert crash.fired
    assert trials.begun
    summary, _ = train(tmp_path, settings, trials=TrialsHere(lambda *_: None, room=lambda: 0), resume=True)
    assert summary.ledger.flops.trials == sum(fork.max_flops for fork in trials.begun)
    assert any("lost with its trainer" in words for _, words in history(tmp_path).decisions)
    assert any(event.to_stage is SeedStage.GERMINATED for event in summary.events)


class Broken(Never):
    """A port that answers to nothing."""

    def start(self, checkpoint, forks):
        raise UnavailableError("Ray is gone")


def test_a_port_that_fails_leaves_the_run_as_it_is(tmp_path):
    settings = chosen()
    summary, _ = train(tmp_path, settings, trials=Broken())
    assert "Ray is gone" in summary.trials[0].failure
    assert summary.ledger.flops.trials == 0
    assert any(event.to_stage is SeedStage.GERMINATED for event in summary.events)


def spoiled(how):
    def change(fork, result):
        if result.weights is None:
            return result
        tensors = safetensors.torch.load(result.weights)
        name = next(iter(tensors))
        tensors[name] = tensors[name] * float("nan") if how == "nan" else torch.zeros(2, 2)
        return replace(result, weights=safetensors.torch.save(tensors))

    return change


@pytest.mark.parametrize("how", ["nan", "form"])
def test_weights_that_do_not_fit_are_refused_by_the_seed(tmp_path, how):
    settings = chosen()
    summary, _ = train(tmp_path, settings, trials=Keeping(settings, spoiled(how)))
    cancelled = next(event for event in summary.events if event.to_stage is SeedStage.CANCELLED)
    assert "that came from its trial are not" in cancelled.reason


@pytest.mark.parametrize("refuses", [True, False])
def test_a_winner_that_the_run_refuses_is_reported_with_the_reason(tmp_path, monkeypatch, refuses):
    from esper.kasmina.host import Host

    check, asked = Host.check, []

    def refusing(self, command):
        asked.append(command.trial_id)
        return "its circuit breaker is open" if command.trial_id and refuses else check(self, command)

    monkeypatch.setattr(Host, "check", refusing)
    settings = chosen(tamiyo__trials__strategies=["ramp", "direct"], tamiyo__trials__candidates=2)
    summary, _ = train(tmp_path, settings, trials=Keeping(settings))
    assert any(asked), "a winner was to begin"
    (trial, *_) = summary.trials
    tried = [r for r in summary.field_reports if r.outcome is Outcome.TRIED and r.trace_id.startswith(trial.trial_id)]
    reasons = [report.failure_reason for report in tried]
    assert reasons.count("it had won the trial, and the run refused it: its circuit breaker is open") == refuses
    assert reasons.count("another won the trial") == 1
    assert all(report.evidence is not None for report in tried)


def test_the_budget_of_trials_is_held(tmp_path):
    settings = chosen(tamiyo__trials__flops_share=4.0, tamiyo__max_adaptations=4, tolaria__epochs=30)
    trials = Keeping(settings, losing)
    summary, _ = train(tmp_path, settings, trials=trials)
    flops = summary.ledger.flops
    assert summary.trials
    assert summary.trials[0].epoch > 2, "before that the run had not spent enough, and decided without"
    assert flops.trials <= 4.0 * (flops.total - flops.trials)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("deterministic=true", "deterministic"),
        ("tamiyo.policy=none", "chooses nothing"),
        ("tamiyo.strategy=performance_linked", "validations between epochs"),
        ("tamiyo.trials.strategies=[performance_linked]", "validations between epochs"),
        ("tamiyo.control=listen", "is not told what their forks have shown"),
        ("tolaria.use_gpu=true", "idle CPUs"),
    ],
)
def test_settings_that_go_with_no_trial_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(chosen().model_dump(mode="json"), [change])


def test_offers_are_of_one_kernel_and_finite():
    from esper.kasmina.seed import Offer
    from esper.leyline import Evidence

    module = torch.nn.Linear(2, 2)
    trial = Evidence(kind=EvidenceKind.FORK)
    wrong = {"weight": torch.zeros(2, 2)}
    with pytest.raises(KernelRejectedError):
        Offer("k", trial, wrong).give_to(module)


def test_a_run_that_fails_ends_its_forks_and_books_them(tmp_path):
    class Endless(TrialsHere):
        """Forks that never end by themselves."""

        forks, cancelled = (), ""

        def start(self, checkpoint, forks):
            self.forks = tuple(forks)

        def cancel(self, reason):
            self.cancelled = reason
            return {f.fork_id: ForkResult(f.fork_id, flops=f.max_flops, failure=reason) for f in self.forks}

    settings = chosen()
    trials = Endless(partial(run_fork, settings))
    crash = CrashAt("step", 20)
    with pytest.raises(Crash):
        train(tmp_path, settings, trials=trials, faults=crash)
    assert trials.forks
    assert trials.cancelled == "the run has failed"
    summary = RunSummary.model_validate_json((tmp_path / "summary.json").read_text())
    assert summary.status is RunStatus.FAILED
    assert summary.ledger.flops.trials == sum(fork.max_flops for fork in trials.forks) > 0


def test_a_port_that_breaks_does_not_hide_why_a_run_failed(tmp_path):
    class Broken(TrialsHere):
        def start(self, checkpoint, forks):
            pass

        def cancel(self, reason):
            raise RuntimeError("no port")

    settings = chosen()
    with pytest.raises(Crash):
        train(tmp_path, settings, trials=Broken(partial(run_fork, settings)), faults=CrashAt("step", 20))
