"""`esper policy` on a storage with two policies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from paper_run import STRONG, PaperRun, grow
from typer.testing import CliRunner

from esper.config import CanaryConfig, RewardConfig
from esper.leyline.errors import ConfigError, NotFoundError, TamperedError
from esper.leyline.policies import PolicyCard
from esper.simic.experience import Experience, append_episode
from esper.simic.moments import About
from esper.storage import Storage
from esper.tamiyo.deciders import Steps
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.tamiyo.shelf import Shelf
from esper.urza.policies import StoredPolicies
from jobs.cli import app
from jobs.policy import _complete_policy
from jobs.train_tamiyo import in_words, load, main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_STORAGE", str(tmp_path))
    return Storage.at(tmp_path)


@pytest.fixture
def versions(storage):
    store = StoredPolicies(storage)
    found = []
    for value in (0.0, 1.0):
        weights = safetensors.torch.save({"w": torch.full((2,), value)})
        rows = ({"task": "digits", "gnn": value, "seeds": 3},)
        found.append(
            store.put(
                PolicyCard.of(weights, name="gnn", observation_version=1, results=rows, created_at=value), weights
            )
        )
    return found


def run(*arguments):
    done = CliRunner().invoke(app, ["policy", *arguments], catch_exceptions=False, standalone_mode=False)
    return done.output


def test_a_policy_is_copied_from_another_storage_whole_or_not_at_all(tmp_path, storage, versions, monkeypatch):
    own = tmp_path / "own"
    monkeypatch.setenv("ESPER_STORAGE", str(own))
    assert json.loads(run("copy", versions[1][:10], "--from", str(storage.local), "--json"))["version"] == versions[1]
    assert [row["version"] for row in json.loads(run("ls", "--json"))] == [versions[1]]
    assert StoredPolicies(Storage.at(own)).get(versions[1]) == StoredPolicies(storage).get(versions[1])
    (storage.local / "policies" / versions[0] / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(TamperedError, match="are not its own"):
        run("copy", versions[0], "--from", str(storage.local))
    assert [row["version"] for row in json.loads(run("ls", "--json"))] == [versions[1]]


def test_the_policy_that_is_shipped_is_whole_and_says_what_it_came_to(tmp_path, monkeypatch):
    from esper.tamiyo.net import NetShape, PolicyNet

    monkeypatch.setenv("ESPER_STORAGE", str(tmp_path))
    (shipped,) = StoredPolicies(Storage.at(ROOT / "configs")).ls()
    run("copy", shipped.version, "--from", str(ROOT / "configs"))
    card, weights = StoredPolicies(Storage.at(tmp_path)).get(shipped.version)
    assert card.observation_version == OBSERVATION_VERSION
    PolicyNet.from_bytes(weights, NetShape.model_validate(card.shape))
    assert {row["policy"] for row in card.results if "policy" in row} >= {"none", "random", "heuristic", "gnn"}
    assert "cannot be trained again from a configuration alone" in card.notes


def test_ls_and_promote(storage, versions):
    assert [row["version"] for row in json.loads(run("ls", "--json"))] == versions
    assert not any(row["promoted"] for row in json.loads(run("ls", "--json")))
    told = json.loads(run("promote", versions[1][:10], "--json"))
    assert told == {"promoted": versions[1], "before": None, "tried_in_shadow": False}
    assert [row["promoted"] for row in json.loads(run("ls", "--json"))] == [False, True]
    said = run("promote", versions[0])
    assert versions[1][:12] in said  # says in place of which
    assert f"not tried in shadow first; that is: esper policy nominate {versions[0][:12]}" in said
    assert versions[0][:12] in run("ls")


def test_nominate_asks_for_a_trial_in_shadow_and_promotes_nobody(storage, versions):
    store = StoredPolicies(storage)
    run("promote", versions[0])
    assert f"nominated {versions[1]}" in run("nominate", versions[1][:10])
    assert (store.nominated(), store.promoted()) == (versions[1], versions[0])
    assert [row["nominated"] for row in json.loads(run("ls", "--json"))] == [False, True]
    # what Tamiyo does with it
    shelf = Shelf(store, CanaryConfig(decisions=1), tell=lambda event: None, load=lambda card, weights: Steps())
    shelf.refresh()
    assert shelf.view().canary.version == versions[1]
    assert json.loads(run("nominate", "--nobody", "--json")) == {"nominated": None, "before": versions[1]}
    assert store.nominated() is None
    with pytest.raises(ConfigError, match="promoted already"):
        run("nominate", versions[0])
    for wrong in ([], [versions[1], "--nobody"]):
        with pytest.raises(ConfigError, match="name a policy"):
            run("nominate", *wrong)


@pytest.mark.parametrize("command", ["promote", "nominate"])
def test_a_damaged_note_is_told_and_mended_by_naming_a_policy(storage, versions, command):
    name = f"{command.removesuffix('e')}ed"
    note = f"policies/{name}"
    storage.write(note, b'{"sha256": "')
    done = CliRunner().invoke(app, ["policy", "ls", "--json"], catch_exceptions=False, standalone_mode=False)
    assert f"{note} below" in done.stderr
    assert "is torn" in done.stderr
    assert [row["version"] for row in json.loads(done.stdout)] == versions
    run(command, versions[1])
    assert getattr(StoredPolicies(storage), name)() == versions[1]


@pytest.mark.parametrize("name", ["weights.safetensors", "card.json"])
def test_ls_marks_what_is_damaged_and_says_why(storage, versions, name):
    path = f"policies/{versions[0]}/{name}"
    storage.write(path, storage.read(path)[:-1])
    (reason,) = StoredPolicies(storage).damaged().values()
    done = CliRunner().invoke(app, ["policy", "ls", "--json"], catch_exceptions=False, standalone_mode=False)
    assert {row["version"]: row["damaged"] for row in json.loads(done.stdout)} == {
        versions[0]: True,
        versions[1]: False,
    }
    assert f"esper: {reason}\n" in done.stderr
    assert versions[0] in reason
    header, *rows = CliRunner().invoke(app, ["policy", "ls"], standalone_mode=False).stdout.splitlines()
    start = header.index("damaged")
    assert {row[:12]: row[start : start + len("damaged")].strip() for row in rows} == {
        versions[0][:12]: "yes",
        versions[1][:12]: "no",
    }
    store = StoredPolicies(storage)
    storage.remove(f"policies/{versions[1]}/card.json")  # one that is being written is no policy yet, and not damaged
    assert list(store.damaged()) == [versions[0]]


def test_show_names_what_it_came_to(storage, versions):
    shown = run("show", versions[0][:8])
    assert versions[0] in shown
    assert "digits" in shown
    assert json.loads(run("show", versions[0], "--json"))["version"] == versions[0]
    run("promote", versions[1])
    assert versions[1] in run("show")


def test_show_keeps_the_tables_of_different_exams_apart(storage, versions):
    store = StoredPolicies(storage)
    card, weights = store.get(versions[0])
    told = card.model_copy(update={"results": (*card.results, {"exam": "held out", "policy": "random", "test": 0.5})})
    store.put(told, weights)
    shown = run("show", versions[0])
    assert "gnn" in shown
    assert "held out" in shown


def test_runs_are_gathered_once_and_a_policy_comes_of_them_alone(storage):
    quick = ["tolaria.epochs=4", "tolaria.batch_size=128", "tezzeret.blueprints=[mlp_adapter]", "name=quick"]
    common = ["gather", "configs/digits_mlp.yaml", *quick, "--policies", "none,random,random", "--json"]
    for seeds in ("1", "2"):  # the second time those of the second seed alone
        *_, told = run(*common, "--seeds", seeds).partition("{")
        assert json.loads("{" + told) == {"played": 3}
    small = ["net.hidden=8", "net.heads=2", "net.layers=1", "imitation.epochs=1", "name=small"]
    version = run("offline", *small).splitlines()[-1].removeprefix("policy ")
    shown = json.loads(run("show", version, "--json"))
    assert shown["name"] == "small"
    runs = shown["trained_on"]["runs"]
    digest = runs[0].split("-")[1]
    assert re.fullmatch("[0-9a-f]{8}", digest)
    assert set(runs) == {
        f"quick-{digest}-{who}" for who in ("none-0", "random-0", "random-0-1", "none-1", "random-1", "random-1-1")
    }
    with pytest.raises(ConfigError, match="temperature"):
        run("offline", "temperature=-1")
    learned = ["gather", "configs/digits_mlp.yaml", *quick, "--policies", "gnn", "--seeds", "1"]
    said = run(*learned, f"tamiyo.gnn.version={version[:12]}")
    assert f"quick-{digest}-gnn-{version[:8]}-0: validation loss" in said


def test_runs_of_other_settings_are_gathered_though_they_have_the_same_name(storage):
    """`seed` parts the data; where it is stored, and what is told of it, makes no other run."""
    common = ["gather", "configs/digits_mlp.yaml", "name=quick", "--policies", "none", "--seeds", "1"]
    quick = ["tolaria.epochs=1", "tolaria.batch_size=256"]
    for changed, num in (([], 1), ([], 0), (["nissa.view=quiet", "tamiyo.policy=random"], 0), (["seed=1"], 1)):
        assert f"{num} runs are logged" in run(*common, *quick, *changed)
    assert "1 runs are logged" in run(*common, *quick, "tolaria.optimizer.lr=0.02")
    found = [one.about for one in Experience(storage).episodes()]
    assert len({one.run_id for one in found}) == 3
    assert {(one.policy, one.seed) for one in found} == {("none", 0)}


def test_gathered_runs_of_an_earlier_version_stay_and_are_not_counted(storage):
    paper = PaperRun(num_epochs=3, num_sites=1).play(grow(STRONG, at=1))
    old = replace(paper, about=About("quick-none-0", "none"))
    append_episode(storage, old, RewardConfig())
    quick = ["tolaria.epochs=1", "tolaria.batch_size=256", "name=quick", "--policies", "none", "--seeds", "1"]
    said = run("gather", "configs/digits_mlp.yaml", *quick)
    assert "1 runs of an earlier version, whose names do not tell their settings, are not counted" in said
    assert "1 runs are logged" in said
    assert [one.moments for one in Experience(storage).episodes(runs=["quick-none-0"])] == [old.moments]


@pytest.mark.parametrize(
    ("policy", "error"), [("nonsense", "there is no policy 'nonsense'"), ("gnn", "no policy was promoted")]
)
def test_nothing_is_gathered_for_a_policy_that_there_is_not(storage, policy, error):
    with pytest.raises((ConfigError, NotFoundError), match=error):
        run("gather", "configs/digits_mlp.yaml", "tolaria.epochs=2", "--policies", f"none,{policy}", "--seeds", "1")
    assert [*Experience(storage).episodes()] == []


@pytest.mark.parametrize(
    "command",
    [["train", "configs/tamiyo_ppo.yaml", "--here", "tasks=[digits_mlp.yaml]"], ["gather", "configs/digits_mlp.yaml"]],
)
def test_ctrl_c_says_that_the_same_command_goes_on(storage, monkeypatch, caplog, command):
    """In the first step of the first run."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.tolaria.session.Session.step", interrupt)
    done = CliRunner().invoke(app, ["policy", *command], standalone_mode=False)
    assert done.return_value == 130
    assert done.stderr == "esper: interrupted; the same command goes on\n"
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


def test_where_there_is_none_it_says_what_to_do(storage):
    assert "esper policy train" in run("ls")
    with pytest.raises(NotFoundError, match="no policy was promoted"):
        run("show")


def test_completion_knows_the_versions(storage, versions, monkeypatch):
    assert set(_complete_policy("")) == set(versions)
    assert _complete_policy(versions[0][:20]) == [versions[0]]
    monkeypatch.setenv("ESPER_STORAGE", "ftp://nowhere")
    assert _complete_policy("") == []


def test_a_wrong_setting_is_named(tmp_path, capsys):
    path = tmp_path / "training.yaml"
    path.write_text("name: x\nppo: {lr: 0.1}\n")
    assert load(path, ["ppo.clip=0.3", "tasks=[a.yaml]"]).ppo.clip == 0.3
    with pytest.raises(ConfigError, match=r"ppo\.lr"):
        load(path, ["ppo.lr=-1"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load(path, ["iterations"])
    for wrong, told in (("name.x=1", "holds no settings of its own"), ("seed=[", "no value")):
        with pytest.raises(ConfigError, match=told):
            load(path, [wrong])
    path.with_name("list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds no settings"):
        load(path.with_name("list.yaml"), ["a.b=1"])
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_each_step_is_told_in_words():
    rows = [
        {"stage": "rollout", "of": "update 1", "done": 1, "all": 8, "problem": "it broke"},
        {"stage": "resumed", "iteration": 3},
        {"stage": "imitation", "episodes": 0, "words": "nothing was imitated"},
        {
            "stage": "ppo", "iteration": 1, "mean_return": 0.1, "stderr": None, "episodes": 1, "kl": 0.01,
            "entropy": 1.0, "value": 0.2, "replayed": 0, "too_old": 1,
        },
        {
            "stage": "policy",
            "version": "v",
            "results": [{"task": "t", "gnn": 0.1, "drawn": 0.3, "heuristic": 0.2, "seeds": 2}],
        },
    ]  # fmt: skip
    told = [in_words(row) for row in rows]
    assert "it broke" in told[0]
    assert "update 3" in told[1]
    assert told[2] == "nothing was imitated"
    assert in_words({"stage": "resumed", "iteration": -1}) == "going on with the warm-up"
    assert "return +0.100 of 1 runs" in told[3]
    assert "drawing +0.300, the heuristic +0.200" in told[4]
