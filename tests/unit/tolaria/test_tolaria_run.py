"""Whole runs in this process: growth, files, interruption, and the promise that a crash leaves no trace."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import wait

import pytest
import torch
from tolaria_support import BLUEPRINT, SIGNATURE, SITE, Crash, CrashAt, config, equal, kernel_hub, train, workload

from esper.api import local_hub
from esper.config import parse_config
from esper.kasmina.loader import KernelLoader
from esper.leyline import (
    ConfigError,
    Outcome,
    Pipeline,
    RunHistory,
    RunStatus,
    RunSummary,
    SeedStage,
    Topic,
    UnavailableError,
)
from esper.oona import MemoryBus
from esper.tamiyo.controller import LocalController
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.schedules import optimizer_factory

WAY = [
    SeedStage.GERMINATED,
    SeedStage.TRAINING,
    SeedStage.GRAFTING,
    SeedStage.STABILIZING,
    SeedStage.EVALUATING,
    SeedStage.FINE_TUNING,
    SeedStage.FOSSILIZED,
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A deterministic run to its end: its folder, summary and weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *train(folder)


def test_a_seed_goes_all_the_way_and_the_files_tell_it(undisturbed):
    folder, summary, weights = undisturbed
    assert [event.to_stage for event in summary.events] == WAY
    assert summary.status is RunStatus.FINISHED
    assert [report.outcome for report in summary.field_reports] == [Outcome.FOSSILIZED]
    assert summary.field_reports[0].flops == summary.ledger.flops.shadow > 0
    assert summary.field_reports[0].seen.layer_id == summary.field_reports[0].site
    assert summary.field_reports[0].seen.grow_potential is not None
    assert summary.params.final > summary.params.start
    assert any(name.startswith("_esper.") for name in weights)
    assert summary.metrics.test_accuracy is not None
    assert (summary.compiler_in_trainer.dynamo_frames, summary.compiler_in_trainer.inductor_compiles) == (0, 0)
    assert RunSummary.model_validate_json((folder / "summary.json").read_text()) == summary
    history = RunHistory.model_validate_json((folder / "history.json").read_text())
    assert [row.epoch for row in history.epochs] == list(range(8))
    assert len(history.step_ms) == summary.steps.count == 8 * 3
    assert history.graft_steps
    assert [epoch for epoch, _ in history.decisions] == list(range(8))
    assert summary.ledger.flops.host > summary.ledger.flops.validation > 0


def test_evidence_is_paired_sample_by_sample(undisturbed):
    _, summary, _ = undisturbed
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    assert graft.evidence is not None
    assert graft.evidence.num_pairs == 40
    assert graft.evidence.gain > 0
    assert graft.evidence.gain == pytest.approx(graft.evidence.baseline - graft.evidence.candidate)


@pytest.mark.parametrize(
    ("place", "step"),
    [("step", 10), ("logged", 2), ("checkpoint", 3), ("checkpoint", 7)],
)
def test_a_run_that_died_and_was_resumed_ends_bit_equal(undisturbed, tmp_path, place, step):
    _, expected, weights = undisturbed
    crash = CrashAt(place, step)
    with pytest.raises(Crash):
        train(tmp_path, faults=crash)
    assert crash.fired
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    summary, resumed = train(tmp_path, resume=True)
    assert equal(resumed, weights)
    assert [event.to_stage for event in summary.events] == [event.to_stage for event in expected.events]
    assert summary.ledger.flops == expected.ledger.flops
    assert summary.steps.count == expected.steps.count


def test_a_logged_decision_is_replayed_and_not_asked_for_again(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, faults=CrashAt("logged", 0))

    class Contrary(LocalController):
        asked: list[int] = []  # noqa: RUF012 - read by the test

        def decide(self, state, packet):
            self.asked.append(packet.epoch.epoch)
            return super().decide(state, packet)

    chosen = config()
    summary, _ = train(tmp_path, resume=True, controller=Contrary(chosen.tamiyo, seed=0))
    assert Contrary.asked == list(range(1, 8))
    assert summary.events[0].to_stage is SeedStage.GERMINATED


def test_a_stopped_run_names_its_last_checkpoint_and_starts_no_new_one(tmp_path):
    calls = iter(range(1000))
    summary, _ = train(tmp_path, stop=lambda: "Ctrl-C" if next(calls) >= 7 else None)
    assert summary.status is RunStatus.INTERRUPTED
    assert summary.last_checkpoint == "checkpoints/epoch-000001"
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("epoch-*")) == ["epoch-000000", "epoch-000001"]
    assert summary.metrics.test_accuracy is None
    resumed, _ = train(tmp_path, resume=True)
    assert resumed.status is RunStatus.FINISHED


def test_without_growth_the_host_is_the_host(tmp_path):
    """A wrapped run in which a kernel trains in shadow all the time, against plain PyTorch."""
    chosen = config(tolaria__epochs=4, kasmina__evidence_z=1e9, kasmina__max_training_epochs=50)
    summary, weights = train(tmp_path, chosen)
    assert summary.events[-1].to_stage is SeedStage.TRAINING
    [report] = summary.field_reports
    assert report.outcome is Outcome.UNFINISHED
    entered = summary.events[-1]
    last = report.stages[-1]
    assert (last.stage, last.steps) == (SeedStage.TRAINING, summary.steps.count - entered.step)
    assert last.epochs == 4 - entered.epoch
    problem = workload(chosen)
    plain, optimizer = problem.model, optimizer_factory(chosen.tolaria.optimizer)(list(problem.model.parameters()))
    scheduler = problem.scheduler(optimizer, 12)
    from esper.tolaria.numerics import numerics
    from esper.tolaria.workload import training_batches

    with numerics(seed=0, deterministic=True, num_threads=1):
        plain.train()
        for epoch in range(4):
            for x, y in training_batches(problem.train, batch_size=40, seed=0).epoch(epoch, rank=0, world=1):
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(plain(x), y).backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


class Deaf:
    """A controller that never answers."""

    def decide(self, state, packet):
        raise UnavailableError("no answer within 5 s")


def test_outside_deterministic_mode_the_trainer_decides_itself_and_says_so_once(tmp_path):
    summary, _ = train(tmp_path, config(deterministic="false", tamiyo__breaker_s=0.001), controller=Deaf())
    assert summary.status is RunStatus.FINISHED
    assert summary.went_without == ("Tamiyo: no answer within 5 s; the trainer decides itself meanwhile",)
    assert summary.events[0].to_stage is SeedStage.GERMINATED  # its own schedule, not that of nobody
    decisions = RunHistory.model_validate_json((tmp_path / "history.json").read_text()).decisions
    assert "decided by the trainer's own schedule" in decisions[0][1]


def test_in_deterministic_mode_it_asks_until_there_is_an_answer(undisturbed, tmp_path):
    chosen = config()

    class Slow(LocalController):
        left = 2

        def decide(self, state, packet):
            if self.left:
                self.left -= 1
                raise UnavailableError("still starting")
            return super().decide(state, packet)

    summary, weights = train(tmp_path, chosen, controller=Slow(chosen.tamiyo, seed=0))
    assert summary.went_without == ()
    assert equal(weights, undisturbed[2])


def test_a_run_that_waits_can_be_stopped(tmp_path):
    calls = iter(range(1000))
    summary, _ = train(tmp_path, controller=Deaf(), stop=lambda: "SIGTERM" if next(calls) >= 3 else None)
    assert summary.status is RunStatus.INTERRUPTED
    assert summary.last_checkpoint == "checkpoints/epoch-000000"


class WhenLoaded:
    """Waits at each decision for the loader: a kernel on its way has come by then, or was refused."""

    def __init__(self, monkeypatch):
        self.futures, request = [], KernelLoader.request

        def noted(loader, *given, **named):
            self.futures.append(request(loader, *given, **named))
            return self.futures[-1]

        monkeypatch.setattr(KernelLoader, "request", noted)

    def at(self, place, step):
        if place == "control":
            assert not wait(self.futures, timeout=60.0).not_done


def test_a_kernel_that_is_refused_has_its_report_too(tmp_path, monkeypatch):
    hub, _ = kernel_hub()
    chosen = config(tolaria__epochs=3, deterministic="false")
    summary, _ = train(tmp_path, chosen, public_key=bytes(32), faults=WhenLoaded(monkeypatch))
    assert summary.events[1].to_stage is SeedStage.CANCELLED
    [report] = [report for report in summary.field_reports if report.trace_id == summary.events[0].trace_id]
    assert (report.outcome, report.blueprint, report.value) == (Outcome.CANCELLED, BLUEPRINT, None)
    assert report.failure_reason.startswith("kernel refused")
    assert [span.stage for span in report.stages] == [SeedStage.DORMANT, SeedStage.GERMINATED]
    [brief] = hub.kernel_briefs(SIGNATURE)
    assert report.kernel_id == brief.kernel_id


def test_signals_reach_the_bus_in_batches(tmp_path):
    bus = MemoryBus()
    watcher = bus.subscribe(list(Topic), group="test", from_start=True)
    summary, _ = train(tmp_path, bus=bus)
    deliveries = watcher.poll(max_messages=1000, timeout_s=5.0)
    topics = [delivery.message.topic for delivery in deliveries]
    assert topics[0] is Topic.RUN_STARTED
    assert topics.count(Topic.EPOCH) == topics.count(Topic.SEED_HEALTH) == topics.count(Topic.KASMINA_COMMANDS) == 8
    assert topics.count(Topic.LIFECYCLE) == len(WAY)
    assert topics.count(Topic.FIELD_REPORTS) == 1
    steps = [delivery.message.body() for delivery in deliveries if delivery.message.topic is Topic.STEPS]
    assert [batch.first_step + i for batch in steps for i in range(len(batch.losses))] == list(range(24))
    assert summary.bus.published == len(deliveries)
    watcher.close()
    bus.close()


def test_patience_waits_for_an_adaptation_to_end(tmp_path):
    quiet = config(tolaria__patience=1, tolaria__optimizer="{lr: 1.0e-12}", tamiyo__policy="none")
    summary, _ = train(tmp_path / "quiet", quiet)
    assert len(RunHistory.model_validate_json((tmp_path / "quiet/history.json").read_text()).epochs) < 8
    assert summary.status is RunStatus.FINISHED
    growing = config(tolaria__patience=1, tolaria__optimizer="{lr: 1.0e-12}", kasmina__max_training_epochs=50,
                     kasmina__evidence_z=1e9)  # fmt: skip
    train(tmp_path / "growing", growing)
    assert len(RunHistory.model_validate_json((tmp_path / "growing/history.json").read_text()).epochs) == 8


def test_a_refused_command_is_an_event_with_its_reason(tmp_path):
    class Hasty(LocalController):
        def decide(self, state, packet):
            from esper.leyline import Action, AdaptationSignal, KasminaControlCommand

            seed = packet.layers[0].seeds[0]
            order = KasminaControlCommand(action=Action.ADVANCE, site=SITE, seed_id=seed.seed_id, reason="now")
            signal = AdaptationSignal(
                run_id=packet.run_id, epoch=packet.epoch.epoch, policy="hasty", commands=(order,), reason="now"
            )
            return state, signal

    chosen = config(tolaria__epochs=1)
    summary, _ = train(tmp_path, chosen, controller=Hasty(chosen.tamiyo))
    (event,) = summary.events
    assert event.refused
    assert event.from_stage is event.to_stage is SeedStage.DORMANT
    assert event.reason
    assert BLUEPRINT not in event.reason


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tezzeret__blueprints": f"[{BLUEPRINT},low_rank_adapter]"}, "tezzeret.blueprints"),
        (
            {"tamiyo__schedule": f"[{{epoch: 0, site: '{SITE}', blueprint: low_rank_adapter}}]"},
            "tamiyo.schedule.0.blueprint",
        ),
    ],
    ids=["a design", "a scheduled design"],
)
def test_a_deterministic_run_refuses_a_hub_in_memory_that_lacks_what_it_would_wait_for(tmp_path, settings, field):
    chosen = config(**settings)
    hub, key = local_hub([SIGNATURE], config())
    with pytest.raises(ConfigError, match="nobody builds it") as refused:
        train(tmp_path, chosen, hub=hub, public_key=key)
    assert refused.value.field == field
    assert not (tmp_path / "summary.json").exists()


def test_a_metric_that_the_task_lacks_is_refused(tmp_path):
    from dataclasses import replace

    from esper.tolaria.task import Task

    chosen = config(tolaria__best_metric="val_metric")
    bare = replace(workload(chosen), task=Task(torch.nn.functional.cross_entropy))
    with pytest.raises(ConfigError, match=r"tolaria\.best_metric"):
        train(tmp_path, chosen, problem=bare)


class Unfinished:
    """A hub with kernels that are never built."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def pending(self, signatures, *, pipeline=None):
        del signatures, pipeline
        return 2


class Interrupted:
    """A hub that is away at the start: it takes no submission and tells nothing until it was asked so many times."""

    def __init__(self, inner, num_silent):
        self._inner = inner
        self.num_silent = num_silent
        self.submitted = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _answer(self):
        self.num_silent -= 1
        if self.num_silent >= 0:
            raise UnavailableError("it is away")

    def register_sites(self, sites, *, run_id):
        self._answer()
        self._inner.register_sites(sites, run_id=run_id)

    def submit_blueprint(self, *args, **given):
        self.submitted += Pipeline.OPTIMIZED not in given.get("pipelines", ())  # kernels at hand may graft
        return self._inner.submit_blueprint(*args, **given)

    def pending(self, signatures, *, pipeline=None):
        self._answer()
        return self._inner.pending(signatures, pipeline=pipeline)


def test_a_hub_that_is_away_at_the_start_is_waited_for_and_asked_for_kernels_again(tmp_path):
    hub, key = kernel_hub()
    away = Interrupted(hub, 5)
    chosen = config(deterministic=False, kasmina__breaker_failures=100)
    summary, _ = train(tmp_path, chosen, hub=away, public_key=key)
    assert away.num_silent < 0
    assert away.submitted > 0, "what it had not taken was submitted again"
    assert [words.split(":")[0] for words in summary.went_without] == ["Urza"]
    assert any(event.to_stage is SeedStage.GERMINATED for event in summary.events)


def test_a_hub_that_stays_away_is_not_waited_for_forever(tmp_path):
    hub, key = kernel_hub()
    away = Interrupted(hub, 10**9)
    # nor asks it for native code, which on a slow machine it might hear again by the end
    chosen = config(deterministic=False, tamiyo__startup_s=3600.0, kasmina__breaker_s=0.1, tezzeret__optimize="never")
    summary, _ = train(tmp_path, chosen, hub=away, public_key=key)
    assert summary.status is RunStatus.FINISHED
    assert away.submitted == 0
    assert any(words.startswith("Urza") for words in summary.went_without)


class Refusing:
    """A hub that refuses the first submission."""

    def __init__(self, inner):
        self._inner = inner
        self.refused = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def submit_blueprint(self, *args, **given):
        if not self.refused:
            self.refused += 1
            raise ConfigError("not here", field="tezzeret.blueprints")
        return self._inner.submit_blueprint(*args, **given)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_hub_that_refuses_a_design_ends_the_run_in_its_words(tmp_path, deterministic):
    hub, key = kernel_hub()
    refusing = Refusing(hub)
    with pytest.raises(ConfigError, match=r"tezzeret\.blueprints: not here"):
        train(tmp_path, config(deterministic=deterministic), hub=refusing, public_key=key)
    assert refusing.refused
    summary = RunSummary.model_validate_json((tmp_path / "summary.json").read_text())
    assert summary.status is RunStatus.FAILED
    assert "not here" in summary.error


def test_kernels_that_were_not_built_in_time_are_named(tmp_path):
    hub, key = kernel_hub()
    chosen = config(deterministic=False, tamiyo__startup_s=0.05, tolaria__epochs=1)
    summary, _ = train(tmp_path, chosen, hub=Unfinished(hub), public_key=key)
    assert summary.went_without == ("Tezzeret: 2 of the kernels for these sites were not built yet",)
    whole, _ = train(tmp_path / "whole", chosen, hub=hub, public_key=key)
    assert whole.went_without == ()


def test_after_an_interrupt_nobody_writes_any_more(tmp_path, monkeypatch):
    """Ctrl-C in a program that has no handler of ours: its folder may be gone a moment later."""
    save, saved = Checkpoints.save, []

    def slow(self, epoch, state, *, best=False):
        time.sleep(0.3)
        saved.append(save(self, epoch, state, best=best))
        return saved[-1]

    class Interrupt(CrashAt):
        def at(self, place, step):
            if (place, step) == (self.place, self.step):
                self.fired = True
                raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", slow)
    tree = config().model_dump(mode="json")
    interrupt = Interrupt("step", 4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, parse_config(tree | {"deterministic": False}), faults=interrupt)
    assert interrupt.fired
    assert saved, "what was begun is whole"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    summary = RunSummary.model_validate_json((tmp_path / "summary.json").read_text())
    assert summary.status is RunStatus.FAILED
    assert "KeyboardInterrupt" in summary.error
