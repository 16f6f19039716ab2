"""The launcher file passes Ray's own validator, offline, and keeps what it promises about access and sizes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from esper.config import OonaConfig, TezzeretConfig, TolariaConfig

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the autoscaler's own modules
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PATH = Path(__file__).parents[2] / "ray_cluster.yaml"


@pytest.fixture
def config():
    return yaml.safe_load(PATH.read_text())


def validate(config):
    """Ray's own two steps before `ray up` touches a cloud."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    filled = fillout_defaults(copy.deepcopy(config))
    validate_config(filled)
    return filled


def test_ray_accepts_it(config):
    filled = validate(config)
    assert filled["head_node_type"] == "head"
    assert set(filled["available_node_types"]) == {"head", "compile", "train"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_worker",), 3),
        (("max_workers",), "many"),
        (("available_node_types", "train", "resource"), {"GPU": 1}),
        (("head_node_type",), "nobody"),
    ],
)
def test_the_validator_would_have_said_so(config, path, value):
    *parents, leaf = path
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    with pytest.raises(Exception, match=r"(?i)valid|nobody|type|minimum"):
        validate(config)


def test_every_actor_fits_its_node(config):
    cpus = {name: kind["resources"]["CPU"] for name, kind in config["available_node_types"].items()}
    urza, nissa, tamiyo = 0.1, 0.05, 0.2
    assert 0.05 * OonaConfig().num_shards + urza + nissa + tamiyo <= cpus["head"]
    assert TezzeretConfig().cpus_per_worker <= cpus["compile"]
    assert TolariaConfig().cpus_per_worker <= cpus["train"]
    assert config["available_node_types"]["train"]["resources"]["GPU"] >= 1
    assert all("GPU" not in config["available_node_types"][name]["resources"] for name in ("head", "compile"))
    assert config["available_node_types"]["compile"]["min_workers"] >= 1


def test_nothing_listens_to_strangers(config):
    (head,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    (worker,) = [line for line in config["worker_start_ray_commands"] if "--address" in line]
    for line in (head, worker):
        assert "RAY_AUTH_MODE=token" in line
        assert "RAY_SERVE_ENABLE_DIRECT_INGRESS=0" in line
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port=0" in head
    rules = config["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert all(r["CidrIp"] != "0.0.0.0/0" for rule in rules for r in rule["IpRanges"])
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_the_nodes_have_the_settings_of_a_ray_started_here(config):
    from actors import cluster

    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        text = " ".join(commands)
        for key, value in cluster._SETTINGS.items():
            if key.startswith(("RAY_SERVE", "RAY_TRAIN_HEALTH", "RAY_AUTH")):
                assert f"{key}={value}" in text
