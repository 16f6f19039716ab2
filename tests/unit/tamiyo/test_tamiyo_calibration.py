"""The ensemble: it learns what comes of choices, its doubt has the size of its errors, and grows where it was not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tamiyo_story import layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import DataError
from esper.tamiyo import initial_state
from esper.tamiyo.actions import WAIT, ActionChoice, Operation
from esper.tamiyo.calibration import Lesson, teach
from esper.tamiyo.net import NetShape, PolicyNet, collate
from esper.tamiyo.observation import RUN_FEATURES, SITE_FEATURES, observation_of

CONFIG = TamiyoConfig(warmup_epochs=0)
BASE = observation_of(
    initial_state(CONFIG, 0),
    packet(
        5, layer("a", 5, potential=0.3), layer("b", 5, potential=0.1), options=[option("a", "conv"), option("b", "x")]
    ),
    CONFIG,
)
GROW = [ActionChoice(Operation.GERMINATE, site=i, option=i, strategy=0) for i in (0, 1)]
POTENTIAL = SITE_FEATURES.index("potential")


def lessons(num_runs, *, seed=0, noise=0.02):
    """What comes of growing is the site's potential less a rent; of waiting, nothing."""
    draws = np.random.default_rng(seed)
    found = []
    for run in range(num_runs):
        for _ in range(8):
            site, features = BASE.site.copy(), BASE.run.copy()
            site[:, POTENTIAL] = draws.uniform(0, 1, 2)
            features[RUN_FEATURES.index("progress")] = draws.uniform(0, 1)
            view = replace(BASE, site=site, run=features)
            choice = [WAIT, *GROW][draws.integers(3)]
            worth = 0.0 if choice is WAIT else float(site[choice.site, POTENTIAL]) - 0.5
            found.append(Lesson(view, choice, worth + draws.normal(0, noise), f"run{run}"))
    return found


@pytest.fixture(scope="module")
def taught():
    net = PolicyNet(NetShape(hidden=16, heads=4, members=8), seed=1)
    before = net.to_bytes()
    card = teach(net, lessons(40))
    return net, card, before


def test_it_forecasts_what_comes_of_a_choice(taught):
    net, card, _ = taught
    assert card["rmse"] < 0.5 * card["baseline_rmse"]
    site = BASE.site.copy()
    site[:, POTENTIAL] = (0.9, 0.1)
    view = replace(BASE, site=site)
    with torch.no_grad():
        wait, good, bad = net.forecasts(collate([view] * 3), [WAIT, *GROW]).mean(dim=1).tolist()
    assert good > wait > bad


def test_its_doubt_has_the_size_of_its_errors_on_runs_that_it_never_saw(taught):
    net, _, _ = taught
    others = lessons(40, seed=9)
    batch, choices = collate([o.observation for o in others]), [o.choice for o in others]
    with torch.no_grad():
        found = net.forecasts(batch, choices)
    error = (found.mean(dim=1) - torch.tensor([o.outcome for o in others])).abs()
    within = float((error <= net.outcomes.scale * found.std(dim=1)).float().mean())
    assert 0.5 < within < 0.85


def test_it_is_less_certain_where_nothing_was_like_it(taught):
    net, card, _ = taught
    strange = replace(BASE, site=-BASE.site, run=1.0 - BASE.run, kernel=1.0 - BASE.kernel)
    with torch.no_grad():
        known, unknown = (
            float(net.outcomes.uncertainty(net.forecasts(collate([view]), [GROW[0]]))) for view in (BASE, strange)
        )
    assert unknown > 1.5 * known
    assert 0.0 < card["uncertainty"] < 0.5


def test_nothing_else_of_the_network_moves_and_the_calibration_is_in_its_bytes(taught):
    net, card, before = taught
    old = PolicyNet.from_bytes(before, net.shape)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, old.state_dict()[name])}
    assert moved == {f"outcomes.{name}" for name in (
        "first", "first_bias", "second", "second_bias", "scale", "spread", "center", "num_calibrated",
    )}  # fmt: skip
    again = PolicyNet.from_bytes(net.to_bytes(), net.shape)
    assert int(again.outcomes.num_calibrated) == card["num"] == 320
    assert float(again.outcomes.scale) == card["scale"]


def test_the_same_lessons_teach_the_same():
    nets = [PolicyNet(NetShape(hidden=8, heads=2, members=3), seed=1) for _ in range(2)]
    for net in nets:
        teach(net, lessons(6), passes=5)
    assert nets[0].to_bytes() == nets[1].to_bytes()


def test_few_runs_or_outcomes_without_difference_are_refused():
    net = PolicyNet(NetShape(hidden=8, heads=2, members=3))
    with pytest.raises(DataError, match="5 runs"):
        teach(net, lessons(4))
    same = [replace(lesson, outcome=0.0) for lesson in lessons(6)]
    with pytest.raises(DataError, match="same outcome"):
        teach(net, same)
    assert int(net.outcomes.num_calibrated) == 0
