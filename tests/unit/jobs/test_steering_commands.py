"""`esper runs approve` and `veto`: they find the adaptation that is meant, or say why there is none."""

from __future__ import annotations

import nissa_story as story
import pytest
from typer.testing import CliRunner

from esper.leyline import RunStatus
from esper.leyline.steering import PersonsWord, Verdict
from esper.storage import Storage
from esper.tolaria.steering import Steering
from jobs.cli import app
from jobs.steering import TooLateError, UnknownAdaptationError, find

EVENTS = story.events()
TRAINING = EVENTS[:5]  # the first was culled, the second trains


def running(**changes):
    return story.summary(status=RunStatus.RUNNING, **{"events": TRAINING, "rungs": (), **changes})


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "runs" / story.RUN
    run.mkdir(parents=True)
    (run / "summary.json").write_text(running().model_dump_json())
    (run / "config.yaml").write_text("seed: 1\n")
    return run


@pytest.mark.parametrize("name", ["2", "stages.1", "s1"])
def test_an_adaptation_goes_by_its_number_its_site_or_its_seed(name):
    assert find(running(), name).blueprint == story.WINNER


@pytest.mark.parametrize(
    ("summary", "name", "error", "words"),
    [
        (story.summary(), "2", TooLateError, "is finished: it hears nobody"),
        (running(), "1", TooLateError, "squeeze_excite at stages.0 is over: culled"),
        (running(), "7", UnknownAdaptationError, r"no adaptation '7' is under way .under way: 2 \(residual_conv at"),
        (running(events=()), "s1", UnknownAdaptationError, "none is under way; see esper runs show"),
    ],
)
def test_whom_nobody_would_hear_is_told_why(summary, name, error, words):
    with pytest.raises(error, match=words):
        find(summary, name)


def test_a_word_lies_beside_the_run_and_the_newest_counts(folder):
    runner = CliRunner()
    where = ["--storage", str(folder.parent.parent)]
    said = runner.invoke(app, ["runs", "approve", story.RUN[:8], "2", *where])
    assert said.exit_code == 0, said.output
    assert "residual_conv at stages.1: approved by" in said.output
    steering = Steering(Storage.at(folder))
    [word] = steering.heard()
    assert (word.verdict, word.site, word.seed_id, word.kernel_id) == (
        Verdict.APPROVE, "stages.1", "s1", story.sha(story.WINNER),
    )  # fmt: skip
    said = runner.invoke(app, ["runs", "veto", "latest", "s1", "--reason", "too large", "--json", *where])
    assert PersonsWord.model_validate_json(said.output).reason == "too large"
    [word] = steering.heard()
    assert word.in_words.endswith(": too large")
    (folder / "steering" / "9-torn.json").write_text('{"verdict": ')
    assert [one.word_id for one in steering.heard()] == [word.word_id]


def test_what_is_on_the_live_path_cannot_be_approved_any_more(folder):
    (folder / "summary.json").write_text(running(events=EVENTS[:7]).model_dump_json())
    said = CliRunner().invoke(app, ["runs", "approve", "latest", "2", "--storage", str(folder.parent.parent)])
    assert isinstance(said.exception, TooLateError) or "on the live path already" in said.output
