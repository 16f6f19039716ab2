"""The exam's machinery, on two quick tasks: cells, going on where it was broken off, cards. Not its numbers."""

from __future__ import annotations

import pytest
import torch

from esper.leyline.errors import ConfigError
from esper.leyline.policies import PolicyCard
from esper.storage import Storage
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.urza.policies import StoredPolicies
from jobs.bench.exam_table import ExamCell
from jobs.bench.tamiyo import main

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

QUICK = [
    "tolaria.epochs=4",
    "tolaria.batch_size=128",
    "tamiyo.warmup_epochs=0",
    "tezzeret.blueprints=[mlp_adapter,conv_light]",
]
SETTINGS = [word for text in QUICK for word in ("--set", text)]


@pytest.fixture
def policy(tmp_path):
    net = PolicyNet(NetShape(hidden=8, heads=2, layers=1), seed=0)
    weights = net.to_bytes()
    card = PolicyCard.of(
        weights, name="gnn", shape=net.shape.model_dump(mode="json"), observation_version=OBSERVATION_VERSION
    )
    storage = Storage.at(tmp_path / "storage")
    return ["--storage", str(tmp_path / "storage"), "--version", StoredPolicies(storage).put(card, weights)]


def test_the_exam_goes_on_where_it_was_broken_off(policy, tmp_path):
    said = []
    out = tmp_path / "cells"
    common = ["--seeds", "2", "--flops", "2.0", "--out", str(out), *SETTINGS, *policy]
    main(["--tasks", "digits_mlp.yaml", "--policies", "none,heuristic", *common], said.append)
    assert len(said) == 4
    said.clear()
    policies = "none,random,heuristic,bandit,gnn"
    result = main(["--tasks", "digits_mlp.yaml,digits.yaml", "--policies", policies, *common], said.append)
    assert len(said) == 2 * 2 * 5 - 4  # those that were there are not computed again
    assert len(result.rows) == 10
    cells = [ExamCell.model_validate_json(path.read_text()) for path in out.glob("*.json")]
    assert len(cells) == 20
    none = [one for one in cells if one.policy == "none"]
    assert all(one.tried == 0 and one.epochs == 8 for one in none)  # it trains on until it has spent as much
    assert all(one.flops == pytest.approx(2.0, abs=0.05) for one in none)
    assert all(1.5 < one.flops < 2.5 for one in cells)
    assert any(one.tried for one in cells)
    assert all(0.0 <= one.test <= 1.0 for one in cells)
    other = [*common, "--set", "tolaria.optimizer.lr=0.01"]
    said.clear()
    main(["--tasks", "digits_mlp.yaml", "--policies", "none", *other], said.append)
    assert len(said) == 2  # cells of other settings are not taken over


def test_the_table_goes_to_the_card_of_the_learned_policy(policy, tmp_path):
    page = tmp_path / "table.md"
    common = ["--seeds", "2", "--flops", "1.0", "--out", str(tmp_path / "cells"), *SETTINGS, *policy]
    tasks = ["--tasks", "digits_mlp.yaml", "--policies", "random,gnn"]
    for _ in range(2):  # the second time in place of the first
        main([*tasks, *common, "--card", "--markdown", str(page)], lambda line: None)
        card, _ = StoredPolicies(Storage.at(tmp_path / "storage")).get(policy[-1])
        assert [row["policy"] for row in card.results] == ["random", "gnn"]
    assert "| digits-mlp | random | 2 |" in page.read_text()
    with pytest.raises(ConfigError, match="card"):
        main(["--tasks", "digits_mlp.yaml", "--policies", "none", *common, "--card"], lambda line: None)
