"""The command line from outside: what it refuses, and what it prints. Nothing here reaches Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from esper.leyline import RunStatus, RunSummary
from esper.leyline.summary import Params
from jobs import cli

CONFIGS = Path(__file__).parents[3] / "configs"
DIGITS = str(CONFIGS / "digits.yaml")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("ESPER_STORAGE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def esper(capsys):
    """Runs the command line in this process; gives exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def schedule(site, blueprint):
    return ["tamiyo.policy=schedule", f"tamiyo.schedule=[{{epoch: 0, site: {site}, blueprint: {blueprint}}}]"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tolaria.epoch=2"], ("tolaria.epoch: no such key", "did you mean epochs?")),
        (["tolaria.epochs=many"], ("tolaria.epochs:", "valid integer", "'many'")),
        (["tolaria.epochs=0"], ("tolaria.epochs:", "greater than or equal to 1")),
        (["host.type=gpt"], ("host.patch: no such key; and 2 more",)),
        (["data.type=csv"], ("data.type:", "'digits'")),
        (["task=regression"], ("task:", "regression", "esper.grow")),
        (["seed"], ("'seed' is no KEY=VALUE", "then overrides")),
        (["kasmina.sites=[nowhere]"], ("kasmina.sites", "nowhere", "stages.0.0")),
        (["tezzeret.blueprints=[conv_lite]"], ("tezzeret.blueprints: no blueprint 'conv_lite'", "conv_light?")),
        (
            ["tezzeret.blueprints=[zzz]"],
            ("tezzeret.blueprints: no blueprint 'zzz'", "esper blueprints ls, and ls --library"),
        ),
        (["tezzeret.blueprints=[mlp_2x]"], ("tezzeret.blueprints: mlp_2x:", "declared for vector", "--dry-run")),
        (schedule("nowhere", "conv_light"), ("tamiyo.schedule.0.site: no site 'nowhere'", "stages.0.0")),
        (schedule("stages.0.0", "conv_lite"), ("tamiyo.schedule.0.blueprint:", "did you mean conv_light?")),
        (schedule("stages.0.0", "mlp_2x"), ("tamiyo.schedule.0.blueprint: mlp_2x:", "--dry-run")),
        (
            [*schedule("stages.0.0", "se"), "tezzeret.blueprints=[conv_light]"],
            ("tamiyo.schedule.0.blueprint: se is not built", "tezzeret.blueprints"),
        ),
        (["storage=ftp://x/y"], ("storage: unknown scheme", "s3://")),
        (["storage={tmp}/file/below"], ("storage: cannot write", "file/below", "storage=DIR")),
        (["storage_options={key: x}"], ("storage_options.key:", "s3://")),
        (["tezzeret.key_file={tmp}/file/key.pem"], ("tezzeret.key_file: cannot write", "name a file")),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(esper, tmp_path, settings, words):
    (tmp_path / "file").write_text("in the way")
    common = [f"storage={tmp_path}/store", f"tezzeret.key_file={tmp_path}/key.pem"]
    code, out, err = esper("train", DIGITS, *common, *(text.replace("{tmp}", str(tmp_path)) for text in settings))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in words if word not in err] == [], err
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "shakespeare"])
def test_missing_data_name_the_setting_and_the_address(esper, tmp_path, name):
    missing = tmp_path / "none"
    code, out, err = esper("train", CONFIGS / f"{name}.yaml", f"data.path={missing}", f"storage={tmp_path}/store")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("esper: data.path: ")
    assert str(missing) in err
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ("no configuration given", "esper train configs/digits.yaml")),
        (["train", "{tmp}/none.yaml"], ("cannot read", "none.yaml", "give a YAML file")),
        (["train", "{tmp}/list.yaml"], ("list.yaml holds list",)),
        (["train", "{tmp}/torn.yaml"], ("torn.yaml is not YAML",)),
        (["train", "--dry-run"], ("no configuration given", "esper train configs/digits.yaml")),
        (["train", "--dry-run", "--resume", "r"], ("--dry-run needs a configuration file",)),
        (["train", "--resume", "nobody", "--storage", "{tmp}"], ("run: no run 'nobody'", "esper runs ls")),
        (["train", "--resume", "r", "seed=1", "--storage", "{tmp}"], ("keeps its configuration", "--resume alone")),
        (["runs", "show", "nobody", "--storage", "{tmp}"], ("run: no run 'nobody'", "esper runs ls")),
        (["runs", "report", "--storage", "{tmp}"], ("run: no run 'latest'", "esper runs ls")),
        (["export", "nobody", "--storage", "{tmp}"], ("run: no run 'nobody'", "esper runs ls")),
        (["blueprints", "show", "nothing"], ("no catalogue below", "no 'nothing' either", "ls --library")),
        (["blueprints", "check", "{tmp}/none.yaml"], ("file: cannot read", "none.yaml")),
        (["platform", "status"], ("RAY_ADDRESS is not set", "ray start --head")),
        (["bench", "nothing"], ("bench: no benchmark 'nothing'", "one of")),
        (["frobnicate"], ("No such command 'frobnicate'",)),
    ],
)
def test_a_wrong_command_is_one_line(esper, tmp_path, arguments, words):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    before = tree(tmp_path)
    code, out, err = esper(*(text.replace("{tmp}", str(tmp_path)) for text in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in words if word not in err] == [], err
    assert tree(tmp_path) == before


def test_errors_are_json_too_where_json_is_asked_for(esper, tmp_path):
    code, out, err = esper("train", DIGITS, "tolaria.epoch=2", f"storage={tmp_path}/store", "--json")
    assert (code, err.count("\n")) == (2, 1)
    error = json.loads(out)["error"]
    assert (error["type"], error["field"], error["remedy"]) == ("ConfigError", "tolaria.epoch", "did you mean epochs?")


def test_a_finished_run_is_not_resumed(esper, tmp_path):
    folder = tmp_path / "runs" / "done-1"
    folder.mkdir(parents=True)
    done = RunSummary(
        run_id="done-1", task="classification", seed=0, status=RunStatus.FINISHED, params=Params(start=1, final=2)
    )
    (folder / "summary.json").write_text(done.model_dump_json())
    before = tree(tmp_path)
    code, out, err = esper("train", "--resume", "done", "--storage", tmp_path)
    assert (code, out) == (2, "")
    assert err == "esper: resume: run done-1 is finished (look at it: esper runs show done-1)\n"
    assert tree(tmp_path) == before
    # the list keeps a whole id, to be copied, also where the terminal is narrow
    assert "done-1" in esper("runs", "ls", "--storage", tmp_path)[1]


# ---------------------------------------------------------------- designs

GOOD = {
    "name": "mine",
    "description": "two layers",
    "fit": ["vector"],
    "zero_at_birth": True,
    "nodes": [
        {"id": "down", "op": "linear", "out": "C//4"},
        {"id": "act", "op": "relu"},
        {"id": "up", "op": "linear", "init": "zeros"},
    ],
}


def nodes(*entries, **more):
    return {**GOOD, "zero_at_birth": False, "nodes": list(entries), **more}


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (
            nodes({"id": "a", "op": "add", "inputs": ["h", "b"]}, {"id": "b", "op": "relu", "inputs": ["a"]}),
            ("cycle",),
        ),
        (nodes({"id": "a", "op": "exec"}), ("mine.yaml: a:", "exec")),
        (nodes({"id": "a", "op": "linear", "out": "C//2"}), ("mine.yaml: ", "its output is", "it must fit")),
        (nodes(*({"id": f"n{i}", "op": "relu"} for i in range(65))), ("mine.yaml: nodes", "64")),
        (
            nodes({"id": "a", "op": "linear", "out": "C*1000000"}, {"id": "b", "op": "linear"}),
            ("mine.yaml: ", "parameters"),
        ),
        (nodes({"id": "a", "op": "linear", "width": 3}), ("mine.yaml: a:", "width")),
        (nodes({"id": "a", "op": "linear"}, zero_at_birth=True), ("mine.yaml at vector", "zero")),
        (nodes({"id": "a", "op": "relu"}, {"id": "b", "op": "relu", "inputs": ["h"]}), ("mine.yaml: a:", "depend")),
        ({**GOOD, "colour": "red"}, ("mine.yaml: colour",)),
        ({**GOOD, "fit": ["video"]}, ("mine.yaml: fit",)),
        ("nodes: [", ("mine.yaml: is no YAML",)),
        ("#" * (1 << 17), ("mine.yaml: is larger than",)),
        ("[" * 1500, ("mine.yaml: is no YAML",)),
    ],
    ids=[
        *("cycle", "unknown_op", "open_shape", "many_nodes", "many_parameters", "parameter", "not_zero", "unused"),
        *("key", "kind", "torn", "large_file", "deep"),
    ],
)
def test_a_malformed_design_is_one_line(esper, tmp_path, design, words):
    file = tmp_path / "mine.yaml"
    file.write_text(design if isinstance(design, str) else yaml.safe_dump(design))
    code, out, err = esper("blueprints", "check", file)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [word for word in words if word not in err] == [], err
    assert tree(tmp_path) == ["mine.yaml"]


def test_a_good_design_passes(esper, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    code, out, err = esper("blueprints", "check", file)
    assert (code, err) == (0, "")
    assert "passed" in out
    code, out, _ = esper("blueprints", "check", file, "--json")
    assert json.loads(out)["name"] == "mine"


# ---------------------------------------------------------------- looking around


def test_dry_run_tells_what_fits_and_writes_nothing(esper, tmp_path):
    settings = (f"storage={tmp_path}/store", "budget.params=3.0", "budget.flops=null")
    code, out, err = esper("train", DIGITS, "--dry-run", *settings)
    assert (code, err) == (0, "")
    assert "site stages.0.0" in out
    assert "conv_light" in out
    code, out, _ = esper("train", DIGITS, "--dry-run", "--json", *settings)
    plan = json.loads(out)
    assert plan["budget"] == {"parameters": 2 * plan["host"]["parameters"], "flops": None}
    fits = {fit["name"]: fit for fit in plan["sites"][0]["blueprints"]}
    assert fits["conv_light"]["within_budget"] is True
    assert fits["conv_heavy"]["within_budget"] is False
    assert "mlp_2x" not in fits
    assert tree(tmp_path) == []


def test_doctor_finds_what_is_missing(esper, tmp_path):
    code, out, _ = esper("doctor", "--storage", tmp_path / "store", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["storage"]["state"] == rows["python"]["state"] == rows["torch"]["state"] == "ok"
    assert code == (1 if any(row["state"] == "missing" for row in rows.values()) else 0)
    assert tree(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    code, out, err = esper("doctor", "--storage", tmp_path / "file" / "store")
    assert (code, err) == (1, "")
    assert "FAIL storage" in out
    assert "give --storage" in out


def test_lists_are_text_or_json(esper, tmp_path):
    for command in (["blueprints", "ls", "--library"], ["version"], ["runs", "ls", "--storage", tmp_path], ["bench"]):
        code, text, err = esper(*command)
        assert (code, err, bool(text.strip())) == (0, "", True)
        code, out, err = esper(*command, "--json")
        assert (code, err) == (0, "")
        assert text != out
        json.loads(out)
    assert json.loads(esper("runs", "ls", "--storage", tmp_path, "--json")[1]) == []
    assert len(json.loads(esper("blueprints", "ls", "--library", "--json")[1])) >= 12
    assert {"torch", "ray", "esper-morphogen"} <= set(json.loads(esper("version", "--json")[1]))


@pytest.fixture
def complete(esper, monkeypatch):
    """What the shell would offer after these words; as a process of its own in the test of the catalogue's commands."""

    def ask(words):
        monkeypatch.setenv("_ESPER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"esper {words}")
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ") + 1))
        return esper()[1].split()

    return ask


def test_the_shell_completes_commands_runs_and_names(complete, tmp_path, monkeypatch):
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    (tmp_path / "runs" / "digits-1" / "summary.json").write_text("{}")
    assert {"train", "export", "doctor", "runs", "platform", "blueprints"} <= set(complete(""))
    assert complete("runs sh") == ["show"]
    assert complete("blueprints show conv_l") == ["conv_light"]
    monkeypatch.setenv("ESPER_STORAGE", str(tmp_path))
    assert complete("runs show dig") == ["digits-1"]


@pytest.mark.parametrize(("raised", "code", "words"), [(15, 143, "stopped by SIGTERM"), (3, 3, "")])
def test_the_end_that_rays_handler_makes_of_sigterm_is_said_in_words(esper, monkeypatch, raised, code, words):
    def stopped(**_):
        sys.exit(raised)

    monkeypatch.setattr(cli, "app", stopped)
    exit_code, _, err = esper("train", DIGITS)
    assert exit_code == code
    assert words in err
