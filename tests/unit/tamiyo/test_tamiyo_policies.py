from __future__ import annotations

import collections

import pytest
from tamiyo_story import PaperHost, layer, option, packet, told

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import SeedStage
from esper.tamiyo import initial_state, step

FLAT = [1.0] * 30
OPTIONS = tuple(option(site, name, params=n) for site in ("a", "b") for name, n in (("conv", 600), ("se", 40)))


def test_none_never_grows_but_tends_what_somebody_else_began():
    config = TamiyoConfig(policy="none")
    host = PaperHost(config, OPTIONS, {"a": 1.0, "b": 1.0}, FLAT)
    host.run()
    assert host.germinated == []
    assert {signal.reason for signal in host.signals} == {"policy none: the host does not grow"}
    under_way = layer("a", stage=SeedStage.GERMINATED, is_ready_for_transition=True, gate="kernel is loaded")
    _, signal = step(initial_state(config, 0), packet(0, under_way), config)
    assert [command.action for command in signal.commands] == ["advance"]
    assert signal.reason == "advancing a/s0 from GERMINATED towards TRAINING: kernel is loaded"


def test_random_spends_its_adaptations_at_epochs_and_pairs_that_vary_with_the_seed():
    config = TamiyoConfig(policy="random", max_adaptations=1)
    first = collections.Counter()
    pairs = set()
    for seed in range(60):
        host = PaperHost(config, OPTIONS, {"a": 1.0, "b": None}, FLAT, seed=seed)
        host.run()
        ((epoch, site, blueprint),) = host.germinated  # the last chance is certain
        assert 2 <= epoch <= 20
        first[epoch] += 1
        pairs.add((site, blueprint))
    assert pairs == {("a", "conv"), ("a", "se"), ("b", "conv"), ("b", "se")}
    assert len(first) >= 10
    assert max(first.values()) <= 15


def test_random_depends_on_the_seed_alone():
    config = TamiyoConfig(policy="random", max_adaptations=3)
    runs = []
    for seed in (7, 7, 8):
        host = PaperHost(config, OPTIONS, {"a": 1.0, "b": 1.0}, FLAT, seed=seed)
        host.run()
        runs.append(host)
    assert runs[0].signals == runs[1].signals
    assert runs[0].germinated != runs[2].germinated


def test_random_explains_its_coin():
    config = TamiyoConfig(policy="random")
    host = PaperHost(config, (), {"a": 1.0}, FLAT, seed=3)
    host.run()
    reasons = [signal.reason for signal in host.signals]
    assert "random policy: a coin with 24% for growth said wait" in reasons
    assert "random policy: would grow, but no site is eligible (a: no kernel is ready)" in reasons


def graft(epoch, site="a", blueprint="conv", strategy="ramp"):
    return ScheduledGraft(epoch=epoch, site=site, blueprint=blueprint, strategy=strategy)


def test_schedule_is_kept_to_the_epoch_warm_up_or_not():
    config = TamiyoConfig(policy="schedule", schedule=(graft(1), graft(12, "b", "se", "direct")))
    host = PaperHost(config, OPTIONS, {"a": None, "b": None}, [1.0 * 0.8**e for e in range(30)])
    state = host.run()
    assert host.germinated == [(1, "a", "conv"), (12, "b", "se")]
    assert host.signals[1].reason == "scheduled for epoch 1: germinating conv at site a"
    assert host.signals[12].commands[0].strategy == "direct"
    assert host.signals[0].reason == "the schedule's next entry is for epoch 1"
    assert host.signals[29].reason == "the schedule holds no more entries"
    assert state["schedule_done"] == [0, 1]
    assert all(signal.vetoes == () for signal in host.signals)


def test_a_schedule_may_name_a_kernel_by_any_name_of_its_design():
    """The IR of `mine` is that of a shipped design, which was compiled first; embargoes go by the name of that one."""
    config = TamiyoConfig(policy="schedule", schedule=(graft(1, blueprint="mine"),))
    options = (option("a", "conv", aliases=("other", "mine")),)
    host = PaperHost(config, options, {"a": 1.0}, FLAT)
    host.run()
    assert host.germinated == [(1, "a", "conv")]
    expected = "scheduled for epoch 1: germinating mine at site a (a kernel made from conv)"
    assert host.signals[1].reason == expected
    asked = packet(1, layer("a", 1), options=options, embargoed=("a:conv",))
    _, signal = step(initial_state(config, 0), asked, config)
    assert (signal.commands, told(signal)) == (
        (),
        [("schedule", "schedule, epoch 1, mine at a: conv is under embargo there")],
    )


def test_a_scheduled_graft_that_must_wait_is_vetoed_until_it_can_be_done():
    config = TamiyoConfig(policy="schedule", schedule=(graft(2), graft(3, "b")))
    host = PaperHost(config, OPTIONS, {"a": 1.0, "b": 1.0}, FLAT)
    host.run()
    assert host.germinated == [(2, "a", "conv"), (9, "b", "conv")]
    assert told(host.signals[3]) == [
        ("schedule", "schedule, epoch 3, conv at b: conv at a (GERMINATED) under way, and one adaptation at a time")
    ]
    assert [bool(signal.vetoes) for signal in host.signals[:11]] == [False] * 3 + [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("entry", "words", "is_final"),
    [
        (graft(2, "nowhere"), "there is no site nowhere; the sites are a, b", True),
        (graft(25), "epoch 25 of 30 is too late to begin", True),
        (graft(2, "a", "unknown"), "no kernel of unknown is ready", False),
        (graft(2, "a", "raw", "direct"), "raw is not zero at birth", False),
        (graft(2, "a", "huge"), "9,000 parameters exceed the 4,812 left", False),
    ],
)
def test_a_scheduled_graft_that_cannot_be_done_is_a_veto_with_its_reason(entry, words, is_final):
    config = TamiyoConfig(policy="schedule", schedule=(entry,))
    options = (*OPTIONS, option("a", "raw", zero=False), option("a", "huge", params=9_000))
    host = PaperHost(config, options, {"a": 1.0, "b": 1.0}, FLAT)
    state = host.run()
    assert host.germinated == []
    vetoes = [veto for signal in host.signals for veto in signal.vetoes]
    assert words in vetoes[0].in_words
    assert (len(vetoes) == 1) == is_final
    assert state["schedule_done"] == [0]  # given up at the latest when growth is over
    assert vetoes[-1].what.startswith("schedule gives up")
    assert words in host.signals[entry.epoch].reason


def test_a_schedule_may_repeat_a_blueprint_that_failed():
    config = TamiyoConfig(policy="schedule", schedule=(graft(2), graft(10)))
    host = PaperHost(config, OPTIONS, {"a": 1.0}, FLAT, harmful=frozenset({"conv"}))
    host.run()
    assert host.germinated == [(2, "a", "conv"), (10, "a", "conv")]
