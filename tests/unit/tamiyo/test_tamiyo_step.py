from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_story import SHADOW, PaperHost, layer, option, packet, told

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import (
    NEXT,
    TRANSITIONS,
    Action,
    BudgetState,
    ConflictError,
    Evidence,
    EvidenceKind,
    Gate,
    KernelOption,
    SeedStage,
    Severity,
)
from esper.leyline.steering import PersonsWord
from esper.tamiyo import LocalController, Order, initial_state, step
from esper.tamiyo.memory import read_state
from esper.tamiyo.safety import judge, last_growth_epoch

CONFIG = TamiyoConfig()
SITES = ("a", "b", "c")
NAMES = ("conv", "se", "mlp")


def stage_packet(stage, epoch=5, **health):
    return packet(epoch, layer("a", epoch, stage=stage, **health))


# ---------------------------------------------------------------- seeds under way


def test_a_gate_that_asks_for_removal_wins_over_one_that_is_open():
    ready = stage_packet(
        SeedStage.TRAINING, is_ready_for_transition=True, should_cull=True, gate="no gain in 6 epochs", evidence=SHADOW
    )
    _, signal = step(initial_state(CONFIG, 0), ready, CONFIG)
    (command,) = signal.commands
    assert command.action is Action.CULL
    assert command.reason == "no gain in 6 epochs"
    assert signal.reason == "culling a/s0 from TRAINING: no gain in 6 epochs"
    assert signal.severity is Severity.WARNING


def word(verdict, kernel_id="k1", **rest):
    return PersonsWord(
        run_id="run", site="a", seed_id="s0", kernel_id=kernel_id, verdict=verdict, by="ada", reason="I say so", **rest
    )


def at_the_gate(epoch=5, *, stage=SeedStage.TRAINING, words=(), ready=True):
    seed = layer(
        "a", epoch, stage=stage, kernel_id="k1", is_ready_for_transition=ready, gate="gain 0.1", evidence=SHADOW
    )
    return packet(epoch, seed, words=words)


def test_where_a_person_is_asked_nothing_enters_the_live_path_before_the_answer():
    asking = TamiyoConfig(ask_before_graft=True)
    state, first = step(initial_state(asking, 0), at_the_gate(5), asking)
    assert first.commands == ()
    assert "a/s0 waits for a person: esper runs approve run s0, or veto" in first.reason
    assert first.severity is Severity.WARNING  # people should see it
    state, second = step(state, at_the_gate(6, words=(word("approve", kernel_id="another"),)), asking)
    assert second.commands == ()
    assert second.severity is Severity.INFO
    _, third = step(state, at_the_gate(7, words=(word("approve"),)), asking)
    assert [command.action for command in third.commands] == [Action.ADVANCE]
    _, signal = step(initial_state(asking, 0), at_the_gate(5, stage=SeedStage.EVALUATING), asking)
    assert [command.action for command in signal.commands] == [Action.ADVANCE]  # it is on the live path already
    _, unasked = step(initial_state(CONFIG, 0), at_the_gate(5), CONFIG)
    assert [command.action for command in unasked.commands] == [Action.ADVANCE]


@pytest.mark.parametrize(
    ("stage", "action"),
    [(SeedStage.GERMINATED, Action.CULL), (SeedStage.TRAINING, Action.CULL), (SeedStage.EVALUATING, Action.RETIRE)],
)
def test_a_veto_removes_once_whatever_the_gate_says(stage, action):
    vetoed = (word("veto"),)
    state, signal = step(initial_state(CONFIG, 0), at_the_gate(5, stage=stage, words=vetoed), CONFIG)
    (command,) = signal.commands
    assert command.action is action
    assert command.reason == "vetoed by ada: I say so"
    if stage.is_blended:  # alpha goes down over some epochs
        _, again = step(state, at_the_gate(6, stage=stage, words=vetoed), CONFIG)
        assert again.commands == ()
        assert "a/s0 is on its way out: vetoed by ada" in again.reason


def test_a_direct_kernel_waits_before_its_first_step():
    asking = TamiyoConfig(ask_before_graft=True, policy="schedule", strategy="direct", schedule=(
        ScheduledGraft(epoch=0, site="a", blueprint="conv", strategy="direct"),
    ))  # fmt: skip
    state, signal = step(
        initial_state(asking, 0), packet(0, layer("a", 0, potential=0.5), options=[option("a", "conv")]), asking
    )
    assert [command.action for command in signal.commands] == [Action.GERMINATE]
    germinated = layer("a", 1, stage=SeedStage.GERMINATED, kernel_id="a-conv", is_ready_for_transition=True)
    _, signal = step(state, packet(1, germinated), asking)
    assert signal.commands == ()
    assert "waits for a person" in signal.reason


def test_a_kernel_that_the_host_leans_on_is_retired_and_not_torn_out():
    harmful = stage_packet(SeedStage.EVALUATING, should_cull=True, gate="harm", alpha=1.0)
    _, signal = step(initial_state(CONFIG, 0), harmful, CONFIG)
    (command,) = signal.commands
    assert command.action is Action.RETIRE
    assert signal.reason == "retiring a/s0 from EVALUATING: harm"


def test_a_shut_gate_is_waited_for_in_its_own_words():
    _, signal = step(initial_state(CONFIG, 0), stage_packet(SeedStage.TRAINING, gate="epoch 1 of at least 2"), CONFIG)
    assert signal.commands == ()
    assert signal.reason == "a/s0 stays in TRAINING: epoch 1 of at least 2"


@pytest.mark.parametrize(
    "evidence", [None, Evidence(kind=EvidenceKind.NONE), Evidence(kind=EvidenceKind.SHADOW, num_pairs=0)]
)
def test_no_graft_without_paired_evidence(evidence):
    ready = stage_packet(SeedStage.TRAINING, is_ready_for_transition=True, gate="open", evidence=evidence)
    _, signal = step(initial_state(CONFIG, 0), ready, CONFIG)
    assert signal.commands == ()
    assert told(signal) == [
        ("evidence", "advance a/s0: no paired evidence came with its health, and unmeasured is not better")
    ]


def test_no_stabilising_before_alpha_is_one():
    half = stage_packet(SeedStage.GRAFTING, is_ready_for_transition=True, gate="open", alpha=0.5)
    _, signal = step(initial_state(CONFIG, 0), half, CONFIG)
    assert told(signal) == [("stage", "advance a/s0: it is blended in to 0.50 only")]


def test_missing_or_stale_health_leaves_a_seed_as_it_is():
    begun = stage_packet(SeedStage.TRAINING, gate="too early")
    state, _ = step(initial_state(CONFIG, 0), begun, CONFIG)
    after, signal = step(state, packet(6, layer("b", 6)), CONFIG)
    assert signal.commands == ()
    assert signal.reason == "no health came from a, where s0 is under way: it is left as it is"
    assert [attempt["site"] for attempt in after["under_way"]] == ["a"]
    old = packet(6, layer("a", 5, stage=SeedStage.TRAINING, is_ready_for_transition=True, evidence=SHADOW, gate="open"))
    _, signal = step(state, old, CONFIG)
    assert signal.commands == ()
    assert signal.reason == "a/s0 is left in TRAINING: its health is of epoch 5"


def test_a_refused_germination_counts_as_failed():
    config = TamiyoConfig(policy="schedule", schedule=(ScheduledGraft(epoch=0, site="a", blueprint="conv"),))
    options = (option("a", "conv"),)
    state, signal = step(initial_state(config, 0), packet(0, layer("a", 0), options=options), config)
    assert len(signal.commands) == 1
    state, _ = step(state, packet(1, layer("a", 1), options=options), config)
    assert state["failed"] == ["a:conv"]
    assert state["under_way"] == []
    assert state["num_adaptations"] == 1


def test_after_a_removal_from_the_live_path_the_window_starts_anew():
    state = initial_state(CONFIG, 0)
    for epoch in range(5):
        grafted = layer("a", epoch, stage=SeedStage.STABILIZING, alpha=1.0, blueprint="conv", gate="settling")
        state, _ = step(state, packet(epoch, grafted), CONFIG)
    state, signal = step(state, packet(5, layer("a", 5, stage=SeedStage.ROLLED_BACK)), CONFIG)
    assert state["val_losses"] == [[5, 1.0]]
    assert state["cooldown_until"] == 5 + CONFIG.plateau_window
    assert signal.reason == (
        "conv at a was taken off the live path, and the host needs a window of its own: growth rests until epoch 8"
    )


# ---------------------------------------------------------------- the governor


def test_a_critical_governor_asks_for_rollback_and_nothing_else():
    layers = (
        layer("a", 5, stage=SeedStage.TRAINING, should_cull=True, gate="harm"),
        layer("b", 5, stage=SeedStage.EVALUATING, alpha=1.0, is_ready_for_transition=True, gate="open"),
    )
    _, signal = step(initial_state(CONFIG, 0), packet(5, *layers, governor="critical: loss is not finite"), CONFIG)
    assert signal.severity is Severity.CRITICAL
    assert signal.commands == ()
    assert len(signal.vetoes) == 2
    assert signal.reason == (
        "the governor reports critical: loss is not finite: asking for a rollback to the last good snapshot"
    )


@pytest.mark.parametrize("policy", ["heuristic", "bandit", "random", "schedule"])
def test_nothing_grows_while_the_governor_is_not_ok(policy):
    config = TamiyoConfig(
        policy=policy, warmup_epochs=0, schedule=(ScheduledGraft(epoch=0, site="a", blueprint="conv"),)
    )
    state = initial_state(config, 0)
    for epoch in range(21):
        upset = packet(
            epoch, layer("a", epoch, potential=1.0), options=(option("a", "conv"),), governor="warning: drift"
        )
        state, signal = step(state, upset, config)
        assert signal.commands == ()
        assert signal.severity is Severity.WARNING
        assert "the governor reports warning: drift: nothing grows until it is ok" in signal.reason


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.FINE_TUNING])
def test_nothing_joins_or_becomes_permanent_while_the_governor_is_not_ok(stage):
    ready = layer("a", 5, stage=stage, alpha=1.0, is_ready_for_transition=True, evidence=SHADOW, gate="open")
    _, signal = step(initial_state(CONFIG, 0), packet(5, ready, governor="warning"), CONFIG)
    assert signal.commands == ()
    assert "nothing new joins the host or becomes permanent" in signal.vetoes[0].reason


# ---------------------------------------------------------------- the gates, against orders no policy of ours gives


@pytest.mark.parametrize("stage", list(SeedStage))
@pytest.mark.parametrize("action", list(Action))
def test_illegal_orders_are_dropped_whoever_gives_them(stage, action):
    kernel = option("a", "conv")
    seen = packet(
        5,
        layer("a", 5, stage=stage, alpha=1.0, is_ready_for_transition=True, evidence=SHADOW, gate="open"),
        options=(kernel,),
    )
    order = Order(action, "a", "s0", "because", kernel if action is Action.GERMINATE else None)
    verdict = judge(read_state(initial_state(CONFIG, 0)), seen, CONFIG, (order,))
    legal = {
        Action.GERMINATE: stage is SeedStage.DORMANT,
        Action.ADVANCE: stage in NEXT and stage is not SeedStage.DORMANT,
        Action.CULL: SeedStage.CULLED in TRANSITIONS[stage],
        Action.RETIRE: stage.is_blended and stage is not SeedStage.FOSSILIZED,
    }[action]
    assert bool(verdict.accepted) == legal
    assert bool(verdict.vetoes) != legal


def test_nobody_but_a_persons_schedule_grows_in_a_cooldown():
    kernel = option("a", "conv")
    seen = packet(5, layer("a", 5), options=(kernel,))
    state = read_state(initial_state(CONFIG, 0))
    resting = state.model_copy(update={"cooldown_until": 7, "cooldown_reason": "se at b has just failed"})
    order = Order(Action.GERMINATE, "a", "s0", "because", kernel)
    [veto] = judge(resting, seen, CONFIG, (order,)).vetoes
    assert (veto.gate, veto.reason) == (Gate.COOLDOWN, "se at b has just failed: growth rests until epoch 7")
    assert judge(state, seen, CONFIG, (order,)).vetoes == ()
    scheduled = Order(Action.GERMINATE, "a", "s0", "because", kernel, entry=0)
    assert judge(resting, seen, CONFIG, (scheduled,)).accepted == (scheduled,)


def test_orders_that_make_no_sense_are_dropped_with_a_reason():
    kernel = option("a", "conv")
    seen = packet(5, layer("a", 5), layer("b", 5), options=(kernel,), embargoed=("b",))
    state = read_state(initial_state(CONFIG, 0))

    def veto(*orders, begun=state, config=CONFIG):
        return told(judge(begun, seen, config, orders))

    def refused(*orders, **rest):
        [(gate, words)] = veto(*orders, **rest)
        return gate, words.split(": ", 1)[1]

    good = Order(Action.GERMINATE, "a", "s0", "why", kernel)
    not_ready = ("kernel", "its kernel is not among those that are ready for this site")
    assert veto(good) == []
    assert refused(good, good) == ("stage", "the seed already got an order")
    assert refused(Order(Action.CULL, "zz", "s0", "why")) == ("stage", "no health came from this seed")
    assert refused(Order(Action.GERMINATE, "b", "s0", "why", kernel)) == not_ready
    assert refused(Order(Action.GERMINATE, "b", "s0", "why", option("b", "x"))) == not_ready
    assert refused(Order(Action.GERMINATE, "a", "s0", "why")) == not_ready
    spent = state.model_copy(update={"num_adaptations": CONFIG.max_adaptations})
    assert refused(good, begun=spent) == ("time", "all 4 adaptations of this run are spent")
    full = BudgetState(params_used=10, params_limit=15, flops_used=10)
    seen, roomy = seen.model_copy(update={"budget": full}), seen
    assert refused(good) == ("budget", "600 parameters exceed the 5 left in the budget")
    seen = roomy.model_copy(update={"governor": "spike"})
    assert refused(good) == ("governor", "the governor reports spike: nothing grows until it is ok")
    seen = seen.model_copy(update={"governor": "ok", "embargoed": ("a:conv",)})
    assert veto(good) == [("embargo", "germinate conv at a: a:conv is under embargo")]


def test_the_last_growth_epoch_is_exact():
    assert last_growth_epoch(30, 0.7) == 20
    assert last_growth_epoch(10, 1.0) == 9
    assert last_growth_epoch(1, 0.5) == -1


# ---------------------------------------------------------------- properties

options_of = st.lists(
    st.builds(
        option,
        st.sampled_from(SITES),
        st.sampled_from(NAMES),
        params=st.integers(0, 3_000),
        flops=st.integers(0, 60_000),
        zero=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda o: o.kernel_id,
).map(tuple)
limits = st.none() | st.integers(0, 6_000)


@st.composite
def hosts(draw):
    schedule = tuple(
        draw(
            st.lists(
                st.builds(
                    ScheduledGraft,
                    epoch=st.integers(0, 12),
                    site=st.sampled_from((*SITES, "nowhere")),
                    blueprint=st.sampled_from(NAMES),
                    strategy=st.sampled_from(("ramp", "direct")),
                ),
                max_size=5,
            )
        )
    )
    config = TamiyoConfig(
        policy=draw(st.sampled_from(("heuristic", "bandit", "random", "schedule", "none"))),
        warmup_epochs=draw(st.integers(0, 3)),
        plateau_window=draw(st.integers(1, 4)),
        max_concurrent=draw(st.integers(1, 3)),
        max_adaptations=draw(st.integers(0, 4)),
        last_epoch_fraction=draw(st.sampled_from((0.3, 0.7, 1.0))),
        strategy=draw(st.sampled_from(("ramp", "direct"))),
        schedule=schedule,
    )
    params_limit, flops_limit = draw(limits), draw(limits)
    return PaperHost(
        config,
        draw(options_of),
        {site: draw(st.none() | st.floats(0, 10)) for site in SITES},
        draw(st.lists(st.floats(-2, 10), min_size=1, max_size=18)),
        budget=BudgetState(
            params_used=0,
            params_limit=params_limit,
            flops_used=0,
            flops_limit=None if flops_limit is None else flops_limit * 20,
        ),
        harmful=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
        seed=draw(st.integers(0, 1 << 30)),
        embargo_epochs=draw(st.integers(0, 3)),
    )


@settings(max_examples=60)
@given(hosts())
def test_no_policy_breaks_a_limit_or_a_law(host):
    # an illegal transition raises inside, and the budget is asserted after every epoch
    state = host.run()
    assert host.most_active <= host.config.max_concurrent
    assert len(host.germinated) == state["num_adaptations"] <= host.config.max_adaptations
    last = last_growth_epoch(len(host.losses), host.config.last_epoch_fraction)
    assert all(epoch <= last for epoch, _, _ in host.germinated)
    if host.config.policy in {"heuristic", "random"}:
        tried = [(site, blueprint) for _, site, blueprint in host.germinated]
        assert len(set(tried)) == len(tried)
    assert all(signal.reason for signal in host.signals)
    ids = [signal.signal_id for signal in host.signals]
    ids += [command.command_id for signal in host.signals for command in signal.commands]
    assert len(set(ids)) == len(ids)


@given(hosts())
def test_the_state_survives_json_and_the_step_repeats_itself_exactly(host):
    state = initial_state(host.config, host.seed)
    for epoch in range(len(host.losses)):
        seen = host.packet(epoch)
        again = type(seen).model_validate_json(seen.model_dump_json())
        before = json.dumps(state)
        after, signal = step(state, seen, host.config)
        assert json.dumps(state) == before  # the argument is not touched
        assert step(json.loads(before), again, host.config) == (after, signal)
        assert json.loads(json.dumps(after)) == after
        state = after


def test_a_repeated_epoch_after_a_rollback_replaces_its_loss():
    state = initial_state(CONFIG, 0)
    for epoch, loss in [(0, 1.0), (1, 0.9), (2, 0.8), (1, 0.7)]:
        state, _ = step(state, packet(epoch, layer("a", epoch), val_loss=loss), CONFIG)
    assert state["val_losses"] == [[0, 1.0], [1, 0.7]]


@pytest.mark.parametrize("damage", [lambda text: text[:-8], lambda text: text[:-4], lambda _: "AAAA"])
def test_a_memory_whose_windows_are_torn_is_refused_where_it_is_read(damage):
    state, _ = step(initial_state(CONFIG, 0), packet(0, layer("a", 0), layer("b", 0)), CONFIG)
    windows = {**state["windows"], "figures": damage(state["windows"]["figures"])}
    assert read_state(state).windows is not None
    with pytest.raises(ConflictError, match=r"state\.windows.*: cannot read Tamiyo's state"):
        read_state({**state, "windows": windows})


def test_a_foreign_state_is_refused_by_name():
    with pytest.raises(ConflictError, match=r"state\.version: cannot read Tamiyo's state"):
        step({"seed": 0, "version": 2}, packet(0), CONFIG)
    with pytest.raises(ConflictError, match="begin with initial_state"):
        step({}, packet(0), CONFIG)


def test_the_local_controller_is_the_step():
    controller = LocalController(CONFIG, seed=5)
    seen = packet(0, layer("a", 0))
    assert controller.initial_state() == initial_state(CONFIG, 5)
    assert controller.decide({}, seen) == step(initial_state(CONFIG, 5), seen, CONFIG)
    state, signal = controller.decide(controller.initial_state(), seen)
    assert controller.decide(state, seen)[1].signal_id != signal.signal_id


def test_costs_of_a_kernel_that_somebody_else_loaded_are_reserved():
    kernel: KernelOption = option("a", "conv", params=3_000)
    config = TamiyoConfig(
        policy="schedule", max_concurrent=2, schedule=(ScheduledGraft(epoch=0, site="b", blueprint="mlp"),)
    )
    stranger = layer("a", 0, stage=SeedStage.TRAINING, blueprint="conv", kernel_id=kernel.kernel_id, gate="training")
    seen = packet(0, stranger, layer("b", 0), options=(kernel, option("b", "mlp", params=2_000)))
    _, signal = step(initial_state(config, 0), seen, config)
    assert signal.commands == ()
    assert "2,000 parameters exceed the 1,812 left in the budget" in signal.vetoes[0].reason
    assert signal.vetoes[0].gate is Gate.SCHEDULE
