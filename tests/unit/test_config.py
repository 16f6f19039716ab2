import subprocess
import sys

import pytest
from pydantic import ValidationError

from esper.config import MlpHost, RunConfig, TextData, dump_config, load_config, parse_config
from esper.leyline import ConfigError


def test_defaults_stand_without_a_file():
    assert parse_config({}) == RunConfig()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("host.type=mlp", "host.hidden=[8, 4]", "data.layout=flat"),
        ("task=language_model", "data.type=text", "data.path=a.txt", "host.type=gpt", "host.tied=true"),
        ("data.type=parquet_images", "data.path=s3://b/x", "storage_options={endpoint_url: 'http://h'}"),
        ("kasmina.sites=[blocks.*]", "budget.params=null", "tamiyo.schedule=[{epoch: 3, site: a, blueprint: se}]"),
        ("host.type=import", "host.target=a.b:c", "host.args={width: 3, deep: {x: [1, 2]}}"),
    ],
)
def test_what_is_dumped_loads_to_the_same(tmp_path, overrides):
    tree = {} if not any("type" in o for o in overrides) else {"data": {"type": "digits"}, "host": {"type": "cnn"}}
    config = parse_config(tree, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("tolaria.epochs=2", lambda c: c.tolaria.epochs == 2),
        ("deterministic=true", lambda c: c.deterministic is True),
        ("budget.params=1.5", lambda c: c.budget.params == 1.5),
        ("budget.params=null", lambda c: c.budget.params is None),
        ("storage=file:///tmp/x", lambda c: c.storage == "file:///tmp/x"),
        ("storage=a=b", lambda c: c.storage == "a=b"),
        ("host.channels=[3, 5]", lambda c: c.host.channels == (3, 5)),
        ("storage_options.endpoint_url=http://h:1", lambda c: c.storage_options == {"endpoint_url": "http://h:1"}),
        ("tolaria.optimizer.lr=0.5", lambda c: c.tolaria.optimizer.lr == 0.5),
        ("host={type: mlp, hidden: [3]}", lambda c: c.host == MlpHost(hidden=(3,))),
        ("tolaria.patience=", lambda c: c.tolaria.patience is None),
    ],
)
def test_an_override_of_every_kind(override, read):
    assert read(parse_config({"host": {"type": "cnn"}}, [override]))


def test_the_last_override_wins_and_the_file_stays_as_it_was():
    tree = {"tolaria": {"epochs": 5}}
    assert parse_config(tree, ["tolaria.epochs=6", "tolaria.epochs=7"]).tolaria.epochs == 7
    assert tree == {"tolaria": {"epochs": 5}}


@pytest.mark.parametrize(
    ("tree", "overrides", "words"),
    [
        ({"tolaria": {"epoch": 3}}, (), r"^tolaria.epoch: no such key \(did you mean epochs\?\)$"),
        ({"zzz": 1}, (), r"^zzz: no such key \(known keys here: .*budget.*tolaria, urza\)$"),
        ({"host": {"type": "cnn", "chanels": [4]}}, (), r"^host.chanels: no such key \(did you mean channels\?\)"),
        ({"host": {"type": "resnet", "chanels": [4]}}, (), r"^host.chanels: no such key \(did you mean channels\?\)"),
        ({"host": {"type": "vit", "zzz": 1}}, (), r"^host.zzz: no such key \(known keys with type vit: .*width\)"),
        ({"host": {"type": "run"}}, (), r"^host.run: Field required"),
        ({"tolaria": {"epochs": "many"}}, (), r"^tolaria.epochs: .*integer.*got 'many'.*\(see the comments in"),
        ({"tolaria": {"epochs": 0}}, (), r"^tolaria.epochs: .*greater than or equal to 1, got 0"),
        ({"tolaria": {"optimizer": {"lr": -1}}}, (), r"^tolaria.optimizer.lr: .*greater than 0"),
        ({"tolaria": {"optimizer": {"type": "adma"}}}, (), r"^tolaria.optimizer.type: .*'adamw', 'sgd'"),
        ({"data": {"type": "mnist"}}, (), r"^data.type: unknown or missing type \(one of 'digits'"),
        ({"data": {"layout": "flat"}}, (), r"^data.type: unknown or missing type"),
        ({"data": {"type": "text"}, "task": "language_model"}, (), r"^data.path: Field required"),
        ({"task": "language_model"}, (), r"^task language_model does not go with data of type digits"),
        ({"name": "Has Space"}, (), r"^name: "),
        ({"host": {"type": "import", "target": "no_colon"}}, (), r"^host.target: "),
        ({}, ("tolaria.epochs",), r"override 'tolaria.epochs' has no value \(write KEY=VALUE"),
        ({}, ("=3",), r"override '=3' has no value"),
        ({"seed": 3}, ("seed.more=1",), r"^seed.more: seed is a value, not a section"),
        ({}, ("seed=[1",), r"^seed: the value '\[1' is not YAML"),
        ({"seed": -1, "tolaria": {"epochs": 0}}, (), r"and 1 more"),
    ],
)
def test_a_wrong_key_or_value_names_the_key_and_the_remedy(tree, overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(tree, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", r"is not YAML"),
        ("- a\n- b", r"holds list, not a mapping"),
        ("", r"holds NoneType, not a mapping"),
        ("just words", r"holds str, not a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_clear_line(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*no\.yaml: No such file.*\(give a YAML file, see configs/\)"):
        load_config(tmp_path / "no.yaml")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().tolaria.epochs = 3


def test_text_goes_with_language_models_only():
    config = parse_config({"task": "language_model", "data": {"type": "text", "path": "x"}})
    assert isinstance(config.data, TextData)
    with pytest.raises(ConfigError, match="does not go with"):
        parse_config({"data": {"type": "text", "path": "x"}})


def test_parsing_needs_neither_torch_nor_ray():
    code = "import sys, esper.config as c; c.parse_config({}); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
