"""Every file that ships in configs/ loads, and digits.yaml documents every key."""

import math
import re
from pathlib import Path

import pytest
import yaml

from esper.config import RunConfig, TextData, load_config
from esper.hosts import build_host
from esper.simic.rollouts import load_tasks
from esper.simic.settings import TrainTamiyoConfig
from jobs import train_tamiyo

FOLDER = Path(__file__).parents[2] / "configs"
TRAININGS = {"tamiyo_ppo"}  # of policies, not of networks
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in TRAININGS)


def test_the_promised_files_are_there():
    expected = {"digits", "digits_mlp", "fashion_mnist", "cifar10", "shakespeare", "upgrade"}
    assert expected <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_loads_under_a_name_of_its_own(path):
    config = load_config(path)
    assert config.name == path.stem.replace("_", "-")
    assert not Path(config.storage).is_absolute()


def test_the_training_of_a_policy_names_every_key_there_is_with_the_value_it_would_have_anyway():
    """But for what is trained on and what that is worth, and how much there is of it."""
    path = FOLDER / "tamiyo_ppo.yaml"
    config = train_tamiyo.load(path, [])
    assert set(keys(yaml.safe_load(path.read_text()))) == set(keys(config.model_dump(mode="json")))
    amounts = {"overrides", "tasks", "reward", "warm_up", "explore", "iterations"}
    assert config.model_dump(exclude=amounts) == TrainTamiyoConfig().model_dump(exclude=amounts)
    assert all(task.deterministic for task in load_tasks(config, FOLDER))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_host_fits_its_data(path):
    config = load_config(path)
    shapes = {
        "digits": (1, 8, 8), "digits_mlp": (64,), "upgrade": (1, 8, 8),
        "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32),
    }  # fmt: skip
    shape = (config.data.context,) if isinstance(config.data, TextData) else shapes[path.stem]
    host = build_host(config.host, input_shape=shape, num_outputs=10, seed=config.seed)
    assert 0 < sum(parameter.numel() for parameter in host.parameters()) < 200_000


def test_the_upgrade_names_commands_that_make_its_weights():
    """Host, data and seed are those of the run that the file's comment tells people to train."""
    small, upgrade = load_config(FOLDER / "digits.yaml"), load_config(FOLDER / "upgrade.yaml")
    assert upgrade.host.weights == "small.safetensors"
    assert upgrade.host.model_copy(update={"weights": None}) == small.host
    assert (upgrade.data, upgrade.seed, upgrade.task) == (small.data, small.seed, small.task)
    text = (FOLDER / "upgrade.yaml").read_text()
    assert "esper train configs/digits.yaml tamiyo.policy=none" in text
    assert "esper export latest --out small.safetensors" in text


def keys(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def test_digits_names_every_key_there_is():
    written = set(keys(yaml.safe_load((FOLDER / "digits.yaml").read_text())))
    assert written == set(keys(RunConfig().model_dump(mode="json")))


def test_digits_explains_its_keys():
    lines = (FOLDER / "digits.yaml").read_text().splitlines()
    bare = [line.strip() for line in lines if re.match(r" *\w+:", line) and "#" not in line]
    # these say all by their names
    assert {line.split(":")[0] for line in bare} <= {
        "data", "host", "optimizer", "scheduler", "epochs", "weight_decay", "num_workers", "cpus_per_worker",
    }  # fmt: skip


def test_digits_leaves_time_for_a_seed_to_become_permanent():
    config = load_config(FOLDER / "digits.yaml")
    kasmina, tamiyo = config.kasmina, config.tamiyo
    start = max(tamiyo.warmup_epochs, tamiyo.plateau_window) + 2  # a decision an epoch: germinate, then train
    life = (
        kasmina.max_training_epochs + math.ceil(kasmina.ramp_epochs)
        + kasmina.stabilize_epochs + 1 + kasmina.fine_tune_epochs
    )  # fmt: skip
    assert start + life < config.tolaria.epochs
