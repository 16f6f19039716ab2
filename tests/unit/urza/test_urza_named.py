"""Designs by name: shipped ones, and those that were submitted."""

from __future__ import annotations

import pytest
from urza_samples import VECTOR, WIDE, design

from esper.api import request_kernels
from esper.config import parse_config
from esper.leyline import ConfigError
from esper.storage import Storage
from esper.urza import named
from esper.urza.hub import Hub
from esper.urza.library import load_library
from esper.urza.memory import MemoryHub


@pytest.mark.parametrize("where", ["hub", "storage"])
def test_a_name_stands_for_the_last_version_that_was_not_retired(tmp_path, where):
    storage = Storage.at(tmp_path / "store")
    assert named.find("mine", named.in_storage(storage)) is None
    hub = Hub.open(storage)
    assert named.find("mine", named.in_hub(hub)) is None
    for width in (3, 4, 5):
        last = hub.submit_blueprint(design(width), name="mine", targets=[], tags=["own"])
    hub.retire_blueprint(last.blueprint_id, "too wide")
    hub.submit_blueprint(design(9), name="mlp_2x", targets=[])
    submitted = named.in_hub(hub) if where == "hub" else named.in_storage(storage)
    assert named.find("mine", submitted) == named.NamedDesign("mine", design(4), ("own",))
    assert named.find("mlp_2x", submitted).ir == load_library()["mlp_2x"].ir  # a shipped name is the shipped design


def test_a_run_asks_for_submitted_designs_that_it_names():
    hub = MemoryHub()
    mine = hub.submit_blueprint(design(), name="mine", targets=[])
    other = hub.submit_blueprint(design(6), name="other", targets=[])
    config = parse_config({"tezzeret": {"blueprints": ["mine"]}})
    request_kernels(hub, [VECTOR, WIDE], config, "run")
    assert hub.blueprint(mine.blueprint_id).targets == (VECTOR, WIDE)
    assert [one.name for one in hub.blueprints()] == ["mine", "other"]
    assert hub.signatures() == [VECTOR, WIDE]
    schedule = [{"epoch": 0, "site": "body", "blueprint": "other"}]
    config = parse_config({"tamiyo": {"policy": "schedule", "schedule": schedule}})
    request_kernels(hub, [WIDE], config, "run")
    assert hub.blueprint(other.blueprint_id).targets == (WIDE,)
    assert len(hub.blueprints()) > 5  # the library's as well
    with pytest.raises(ConfigError, match="no blueprint 'nothing', shipped or submitted"):
        request_kernels(hub, [VECTOR], parse_config({"tezzeret": {"blueprints": ["nothing"]}}), "run")
