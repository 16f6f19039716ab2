"""What a run does with a Tamiyo that is silent, that fails, or that answers what nobody asked."""

from __future__ import annotations

import pytest
from tolaria_support import config, train

from esper.leyline import (
    PermanentError,
    RunHistory,
    RunStatus,
    SeedStage,
    StorageError,
    TamperedError,
    UnavailableError,
)
from esper.leyline.signals import CircuitState
from esper.leyline.summary import Circuit
from esper.tamiyo.controller import LocalController, fallback_controller


class Counting:
    """Raises what it is told, and counts how often it was asked."""

    def __init__(self, error):
        self.asked, self.error = 0, error

    def decide(self, state, packet):
        self.asked += 1
        raise self.error


def test_after_three_silences_tamiyo_is_not_asked_for_a_while(tmp_path):
    deaf = Counting(UnavailableError("no answer within 5 s"))
    chosen = config(deterministic="false", tamiyo__breaker_s=600.0)
    summary, _ = train(tmp_path, chosen, controller=deaf)
    assert (deaf.asked, summary.tamiyo) == (3, Circuit(state=CircuitState.OPEN, opened=1, refused=5))
    rows = RunHistory.model_validate_json((tmp_path / "history.json").read_text()).epochs
    assert [row.tamiyo for row in rows].index(CircuitState.OPEN) == 3


@pytest.mark.parametrize(
    "error", [PermanentError("Tamiyo failed: KeyError"), TamperedError("the policy is torn"), StorageError("no disk")]
)
def test_a_tamiyo_that_fails_is_done_without(tmp_path, error):
    failing = Counting(error)
    summary, _ = train(tmp_path, config(deterministic="false"), controller=failing)
    assert (summary.status, failing.asked) == (RunStatus.FINISHED, 8)
    assert summary.events[0].to_stage is SeedStage.GERMINATED
    [words] = summary.went_without
    assert words.startswith(f"Tamiyo: it failed: {error}")


@pytest.mark.parametrize("error", [ValueError("not whole epochs"), ZeroDivisionError("0"), RuntimeError("shapes")])
def test_what_breaks_in_tamiyo_never_ends_a_run(tmp_path, error):
    failing = Counting(error)
    summary, _ = train(tmp_path, config(deterministic="false"), controller=failing)
    assert (summary.status, failing.asked) == (RunStatus.FINISHED, 8)
    assert summary.events[0].to_stage is SeedStage.GERMINATED  # by the trainer's own decision
    [words] = summary.went_without
    assert words.startswith(f"Tamiyo: it failed: {type(error).__name__}: {error}")


def test_what_breaks_in_the_trainers_own_decision_does_not_either(tmp_path, monkeypatch):
    monkeypatch.setattr("esper.api.training.fallback_controller", lambda *_, **__: Counting(ValueError("broken")))
    chosen = config(deterministic="false", tolaria__epochs=3)
    summary, _ = train(tmp_path, chosen, controller=Counting(RuntimeError("too")))
    assert (summary.status, summary.events) == (RunStatus.FINISHED, ())
    assert "Tamiyo's fallback: ValueError: broken" in summary.went_without


def test_in_deterministic_mode_a_tamiyo_that_fails_ends_the_run_with_its_error(tmp_path):
    with pytest.raises(TamperedError, match="torn"):
        train(tmp_path, controller=Counting(TamperedError("the policy is torn")))


class Astray(LocalController):
    """Answers about another epoch, another run, or for a seed that this run does not have."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change = change

    def decide(self, state, packet):
        state, signal = super().decide(state, packet)
        return state, signal.model_copy(update=self.change(signal))


@pytest.mark.parametrize(
    "change",
    [lambda signal: {"epoch": signal.epoch + 1}, lambda signal: {"run_id": "another"}, lambda _: {"epoch": 0}],
    ids=["epoch to come", "another run", "stale epoch"],
)
def test_an_answer_that_is_not_meant_for_this_epoch_is_not_obeyed(tmp_path, change):
    chosen = config(deterministic="false")
    summary, _ = train(tmp_path, chosen, controller=Astray(chosen.tamiyo, change))
    assert summary.status is RunStatus.FINISHED
    [words] = summary.went_without
    assert words.startswith("Tamiyo: it failed: the answer is about epoch")
    assert summary.events[0].to_stage is SeedStage.GERMINATED  # by the trainer's own decision


def test_commands_to_seeds_that_do_not_exist_are_vetoed_and_on_record(tmp_path):
    chosen = config(deterministic="false")

    def elsewhere(signal):
        return {"commands": tuple(one.model_copy(update={"site": "nowhere"}) for one in signal.commands)}

    summary, _ = train(tmp_path, chosen, controller=Astray(chosen.tamiyo, elsewhere))
    assert (summary.status, summary.events, summary.went_without) == (RunStatus.FINISHED, (), ())
    assert summary.vetoes[0].veto.reason == "this run has no seed 's0' at a site 'nowhere'"


def test_a_fallback_that_fails_as_well_decides_nothing(tmp_path):
    class Forgetful(Counting):
        def decide(self, state, packet):
            state["version"] = 9  # a memory that no version of Tamiyo wrote
            super().decide(state, packet)

    chosen = config(deterministic="false", tolaria__epochs=3)
    summary, _ = train(tmp_path, chosen, controller=Forgetful(UnavailableError("gone")))
    assert (summary.status, summary.events) == (RunStatus.FINISHED, ())
    assert any(words.startswith("Tamiyo's fallback: state.version: cannot read") for words in summary.went_without)
    decisions = RunHistory.model_validate_json((tmp_path / "history.json").read_text()).decisions
    assert all(words.startswith("no decision: Tamiyo: ") for _, words in decisions)


@pytest.mark.parametrize("policy", ["none", "random", "schedule", "bandit", "heuristic"])
def test_a_control_group_stays_one(policy):
    chosen = config(tamiyo__policy=policy).tamiyo
    assert fallback_controller(chosen, seed=0)._config == chosen
