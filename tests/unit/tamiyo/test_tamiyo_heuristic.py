from __future__ import annotations

import pytest
from tamiyo_story import PaperHost, layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import Action, SeedStage
from esper.tamiyo import initial_state, step
from esper.tamiyo.heuristic import choose, worth
from esper.tamiyo.plateau import fit
from esper.tamiyo.safety import Room

CONFIG = TamiyoConfig(warmup_epochs=3, plateau_window=3, plateau_threshold=0.05)
FALLING = [1.0 * 0.9**epoch for epoch in range(30)]
FLAT = [1.0 - 0.004 * epoch for epoch in range(30)]


def decide_after(losses, *layers, config=CONFIG, **rest):
    """The signal of the last of these epochs."""
    state = initial_state(config, 0)
    signal = None
    for epoch, loss in enumerate(losses):
        fresh = [one.model_copy(update={"epoch": epoch}) for one in layers]
        state, signal = step(state, packet(epoch, *fresh, val_loss=loss, **rest), config)
    return signal


TWO_SITES = (layer("blocks.0", potential=0.17), layer("blocks.1", potential=0.42))
OPTIONS = (option("blocks.0", "conv_small"), option("blocks.1", "conv_small"))


def test_a_plateau_grows_the_site_with_the_largest_potential_and_says_so():
    signal = decide_after(FLAT[:4], *TWO_SITES, options=OPTIONS)
    (command,) = signal.commands
    assert (command.action, command.site, command.blueprint) == (Action.GERMINATE, "blocks.1", "conv_small")
    assert command.kernel_id == "blocks.1-conv_small"
    assert (
        signal.reason
        == command.reason
        == (
            "host has plateaued (1.2% in 3 epochs); site blocks.1 has the largest growth potential (0.42, next 0.17):"
            " germinating conv_small, 600 parameters of 4,812 left in the budget"
        )
    )
    assert signal.vetoes == ()


def test_a_learning_host_is_left_alone_and_the_reason_says_how_fast_it_learns():
    signal = decide_after([1.0, 0.972, 0.946, 0.919], *TWO_SITES, options=OPTIONS)
    assert signal.commands == ()
    assert signal.reason == "validation loss improved 8.1% over 3 epochs; the host is still learning"


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 1.0], "epoch 1 belongs to the warm-up of 3 epochs"),
        ([1.0, 1.0, 1.0], "3 of the 4 validation losses that a plateau is judged by are there"),
        ([1.0, 1.0, 1.0, None], "no validation loss was measured at epoch 3: a plateau cannot be told from progress"),
        ([1.0, None, 1.0, 1.0], "3 of the 4 validation losses that a plateau is judged by are there"),
        ([1.0, 1.0, 1.0, 0.0], "validation loss is 0: there is nothing left to learn"),
    ],
)
def test_a_wait_says_what_is_missing(losses, words):
    signal = decide_after(losses, *TWO_SITES, options=OPTIONS)
    assert signal.commands == ()
    assert signal.reason == words


def test_a_loss_that_nears_its_floor_has_plateaued_though_it_falls_by_a_tenth_of_itself():
    losses = [(epoch, loss) for epoch, loss in enumerate([0.32, 0.30, 0.28, 0.26])]
    assert not fit(losses).has_plateaued(0.05)
    trend = fit(losses, highest=2.2)
    assert trend.has_plateaued(0.05)
    assert trend.in_words(0.05) == "host has plateaued (the last 3 epochs brought 3.1% of its progress)"


def test_progress_within_its_noise_is_a_plateau():
    noisy = [1.0, 0.7, 1.1, 0.85]
    assert decide_after(noisy, *TWO_SITES, options=OPTIONS).commands
    trend = fit(list(enumerate(noisy)))
    assert trend is not None
    assert trend.improvement < trend.noise


def test_a_rising_loss_is_a_plateau():
    assert decide_after([1.0, 1.1, 1.2, 1.3], *TWO_SITES, options=OPTIONS).reason.startswith(
        "host has plateaued (validation loss rose 30.0% in 3 epochs); site blocks.1"
    )


def test_the_trend_of_an_exact_line_is_the_line():
    trend = fit([(4, 2.0), (5, 1.9), (6, 1.8), (7, 1.7)])
    assert trend is not None
    assert trend.improvement == pytest.approx(0.15)
    assert trend.noise == pytest.approx(0.0, abs=1e-9)
    assert fit([(0, -1.0), (1, 1.0), (2, 0.0), (3, 0.0)]) is not None
    assert fit([(0, 0.0), (1, 1.0)]) is None  # nothing to take a share of


def test_unmeasured_sites_are_not_grown():
    unmeasured = (layer("blocks.0"), layer("blocks.1"))
    signal = decide_after(FLAT[:4], *unmeasured, options=OPTIONS)
    assert signal.commands == ()
    assert signal.reason.endswith("no growth potential was measured at blocks.0, blocks.1: unmeasured, no growth")
    half = decide_after(FLAT[:4], layer("blocks.0", potential=0.01), layer("blocks.1"), options=OPTIONS)
    assert half.commands[0].site == "blocks.0"
    assert "the only measured growth potential (0.01)" in half.reason


def test_zero_potential_is_no_reason_to_grow():
    signal = decide_after(FLAT[:4], layer("a", potential=0.0), options=(option("a", "se"),))
    assert signal.commands == ()
    assert signal.reason.endswith("but no site shows growth potential (all measured 0)")


def test_why_no_site_is_eligible_is_said_site_by_site():
    layers = (
        layer("a", potential=1.0),
        layer("b", potential=1.0),
        layer("c", potential=1.0),
        layer("d", potential=1.0, stage=SeedStage.FOSSILIZED),
    )
    signal = decide_after(
        FLAT[:4],
        *layers,
        options=(option("a", "heavy", params=9_999), option("b", "se")),
        embargoed=("b:se",),
        pending=2,
    )
    assert signal.commands == ()
    assert signal.reason == (
        "host has plateaued (1.2% in 3 epochs), but no site is eligible (a: heavy: 9,999 parameters exceed the 4,812"
        " left in the budget; b: se is under embargo there; c: no kernel is ready; d: no dormant seed there);"
        " 2 kernels are still being compiled"
    )


def test_stale_health_is_no_health():
    signal = decide_after(FLAT[:4], options=OPTIONS)
    assert signal.reason.endswith("but no site sent a health report")
    state = initial_state(CONFIG, 0)
    for epoch in range(3):
        state, _ = step(state, packet(epoch, *TWO_SITES), CONFIG)
    _, signal = step(state, packet(3, layer("blocks.0", epoch=1, potential=1.0), options=OPTIONS), CONFIG)
    assert signal.commands == ()
    assert "its health is of epoch 1, not of 3" in signal.reason


def test_direct_growth_takes_kernels_that_are_zero_at_birth():
    config = CONFIG.model_copy(update={"strategy": "direct"})
    options = (option("a", "big", params=4_000, zero=False), option("a", "se", params=20))
    (command,) = decide_after(FLAT[:4], layer("a", potential=1.0), options=options, config=config).commands
    assert command.blueprint == "se"
    assert command.strategy == "direct"


def test_value_per_cost_prefers_neither_the_tiniest_nor_the_one_that_empties_the_budget():
    room = Room(params=2_000, flops=None)
    options = [option("a", "norm", 16), option("a", "conv", 584), option("a", "huge", 2_000)]
    assert max(options, key=lambda o: worth(o, 8, room)).blueprint == "conv"
    tight_flops = Room(params=None, flops=10_000)
    assert worth(option("a", "x", 600, flops=10_000), 8, tight_flops) < worth(
        option("a", "x", 600, flops=1_000), 8, tight_flops
    )


def test_of_kernels_that_promise_alike_the_least_risky_is_taken_and_its_risk_is_said():
    alike = [
        option("a", "bold", 600, risk=0.6),
        option("a", "safe", 600, risk=0.1),
        option("a", "unknown", 600),
        option("a", "tiny", 60, risk=0.0),
    ]
    signal = decide_after(FLAT[:4], layer("a", potential=0.4), options=alike)
    assert signal.commands[0].blueprint == "safe"
    assert "germinating safe, 600 parameters of 4,812 left in the budget, risk 0.10" in signal.reason
    for one in alike:
        assert choose([one], 8, Room(params=None, flops=None)) is one
    assert choose([alike[2], alike[0]], 8, Room(params=None, flops=None)) is alike[0]  # no score counts as the riskiest


def test_a_limit_on_risk_refuses_kernels_above_it_and_without_a_score():
    config = CONFIG.model_copy(update={"max_risk": 0.5})
    options = [option("a", "bold", risk=0.6), option("a", "unknown"), option("a", "edge", risk=0.5)]
    signal = decide_after(FLAT[:4], layer("a", potential=0.4), options=options, config=config)
    assert signal.commands[0].blueprint == "edge"
    signal = decide_after(FLAT[:4], layer("a", potential=0.4), options=options[:2], config=config)
    assert signal.commands == ()
    assert "bold: its risk score is 0.60, and the limit is 0.50" in signal.reason
    assert "unknown: has no risk score, and the limit is 0.50" in signal.reason


def test_a_seed_goes_from_dormant_to_fossil_and_growth_ends_with_the_season():
    host = PaperHost(CONFIG, OPTIONS, {"blocks.0": 0.17, "blocks.1": 0.42}, FLAT)
    host.run()
    assert host.germinated == [(3, "blocks.1", "conv_small"), (11, "blocks.0", "conv_small")]
    assert set(host.stages.values()) == {SeedStage.FOSSILIZED}
    assert host.most_active == 1
    assert "advancing blocks.1/s0 from TRAINING towards GRAFTING: gain 0.1 over 360 pairs" in [
        signal.reason for signal in host.signals
    ]
    assert "became permanent just now" in host.signals[10].reason
    assert "is too late to begin" in host.signals[25].reason


def test_a_learning_host_never_grows():
    host = PaperHost(CONFIG, OPTIONS, {"blocks.0": 0.17, "blocks.1": 0.42}, FALLING)
    host.run()
    assert host.germinated == []


def test_a_blueprint_that_failed_at_a_site_is_not_tried_there_again():
    options = tuple(option("a", name, params=n) for name, n in (("conv", 600), ("light", 120)))
    host = PaperHost(CONFIG, options, {"a": 1.0}, FLAT, harmful=frozenset({"conv", "light"}))
    state = host.run()
    assert [blueprint for _, _, blueprint in host.germinated] == ["conv", "light"]
    assert state["failed"] == ["a:conv", "a:light"]
    assert "light failed there before, conv failed there before" in host.signals[19].reason or (
        "conv failed there before, light failed there before" in host.signals[19].reason
    )
