"""Runs that a policy learns from, on tasks of other kinds than pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.simic.rollouts import Ask, Player, load_tasks
from esper.simic.settings import TaskOf, TrainTamiyoConfig

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.timeout(45)  # where the kernels are of other sites than the run's, it waits for its own for ever
def test_a_language_model_is_played_with_kernels_for_sites_that_look_back_only(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    settings = (
        f"data.path={text}", "data.context=16", "data.train_samples=64", "data.val_samples=64", "tolaria.epochs=3",
        "tezzeret.blueprints=[mlp_adapter]",
    )  # fmt: skip
    task = TaskOf(config="exam/text_gpt.yaml", set=settings)
    player = Player(load_tasks(TrainTamiyoConfig(tasks=(task,)), CONFIGS))
    (played,) = player.play([Ask(0, 0, "heuristic")])
    assert played.episode is not None, played.problem
    assert all(moment.packet.options for moment in played.episode.moments)
