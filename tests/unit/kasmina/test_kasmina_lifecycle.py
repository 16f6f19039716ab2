"""From DORMANT to FOSSILIZED, and the ways out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kasmina_support import SHADOW_GAIN, Driver, Shelf, assert_equal, class_loss, order, random_ir, wrapped

from esper.config import KasminaConfig
from esper.leyline import (
    TRANSITIONS,
    Action,
    BlendStrategy,
    ConflictError,
    EvidenceKind,
    IllegalTransitionError,
    NotFoundError,
    SeedStage,
)


def start(config=None, design="mlp_adapter", site="1"):
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf, config=config)
    return Driver("mlp", host), shelf.put(design, host.sites[site])


def stages(driver):
    return [e.to_stage for e in driver.events if not e.refused]


def test_a_seed_goes_from_dormant_to_fossilized():
    driver, kernel_id = start()
    host = driver.host
    driver.to_fossil("1", kernel_id)
    path = [e.from_stage for e in driver.events if e.seed == "s0"] + [SeedStage.FOSSILIZED]
    assert path == [
        SeedStage.DORMANT,
        SeedStage.GERMINATED,
        SeedStage.TRAINING,
        SeedStage.GRAFTING,
        SeedStage.STABILIZING,
        SeedStage.EVALUATING,
        SeedStage.FINE_TUNING,
        SeedStage.FOSSILIZED,
    ]
    assert all(new in TRANSITIONS[old] for old, new in pairwise(path))
    graft, stable = driver.events[2], driver.events[3]
    assert graft.evidence == SHADOW_GAIN
    assert stable.evidence.kind is EvidenceKind.HARM
    assert all(e.kernel_id == kernel_id and e.blueprint == "mlp_adapter" and e.reason for e in driver.events)
    view = driver.seed()
    assert view.evidence == SHADOW_GAIN
    assert view.alpha == 1.0
    assert [(s.stage, s.epochs, s.steps) for s in view.spans] == [
        (SeedStage.DORMANT, 0, 0),
        (SeedStage.GERMINATED, 0, 0),
        (SeedStage.TRAINING, 2, 8),
        (SeedStage.GRAFTING, 1, 4),
        (SeedStage.STABILIZING, 1, 4),
        (SeedStage.EVALUATING, 1, 4),
        (SeedStage.FINE_TUNING, 1, 4),
    ]
    (fossil, fresh) = [v for v in host.seeds() if v.site == "1"]
    assert (fossil.stage, fresh.stage) == (SeedStage.FOSSILIZED, SeedStage.DORMANT)
    assert fresh.seed_id not in {"s0", "s1"}
    with pytest.raises(IllegalTransitionError):
        driver.command(Action.CULL, "1", "s0")


def test_kernels_chain_in_graft_order():
    driver, kernel_id = start()
    driver.to_fossil("1", kernel_id)
    second = driver.host.seeds()[1].seed_id
    driver.to_fossil("1", kernel_id, second)
    module = driver.host.module
    x = driver.batches[0][0]
    with torch.no_grad():
        h = module[1](module[0](x)) if not module[1]._forward_hooks else torch.relu(module[0](x))
        layer = module.get_submodule("_esper.1")
        h = h + layer.get_submodule("s0")(h)
        h = h + layer.get_submodule(second)(h)
        expected = module[4](torch.relu(module[2](h)))
        assert torch.equal(module(x), expected)
        assert not torch.equal(expected, module[4](torch.relu(module[2](torch.relu(module[0](x))))))


def test_the_ramp_blends_step_by_step_and_ends_at_one():
    driver, kernel_id = start(KasminaConfig(ramp="linear", ramp_epochs=1.5), design=random_ir())
    driver.to_grafting("1", kernel_id)
    assert driver.seed().alpha == 0.0
    x = driver.batches[0][0]
    module = driver.host.module
    kernel = module.get_submodule("_esper.1.s0")
    for done in range(1, 9):
        driver.train(1)
        alpha = min(1.0, done / 6)
        assert driver.seed().alpha == alpha
        with torch.no_grad():
            h = torch.relu(module[0](x))
            assert torch.equal(module(x), module[4](torch.relu(module[2](h + alpha * kernel(h)))))


def test_a_blended_kernel_trains_with_the_host_and_the_host_through_it():
    driver, kernel_id = start(design=random_ir())
    driver.to_grafting("1", kernel_id).train(4)
    joined = [c.joined for c in driver.changes if c.joined]
    assert [(seed_id, len(ps)) for ((seed_id, ps),) in joined] == [("s0", 2)]
    assert any(c.path_changed for c in driver.changes)
    x, y = driver.batches[0]
    module = driver.host.module
    module.zero_grad()
    class_loss(driver.host(x), y).backward()
    kernel = module.get_submodule("_esper.1.s0")
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in kernel.parameters())
    reference = [p.grad.clone() for p in module[0].parameters()]
    module.zero_grad()
    h = torch.relu(module[0](x))
    class_loss(module[4](torch.relu(module[2](h + kernel(h)))), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(reference, module[0].parameters(), strict=True))
    assert driver.host.train_shadows((x,), lambda out: class_loss(out, y)).losses == {}


def test_direct_joins_the_live_path_at_once_without_evidence():
    driver, kernel_id = start()
    driver.close()
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id, strategy=BlendStrategy.DIRECT)
    x = driver.batches[0][0]
    before = driver.host(x)
    change = driver.command(Action.ADVANCE, "1", "s0")
    assert torch.equal(driver.host(x), before), "zero at birth"
    assert driver.seed().alpha == 1.0
    assert driver.seed().stage is SeedStage.GRAFTING
    assert change.path_changed
    assert len(change.joined[0][1]) == 6
    assert change.events[0].evidence.kind is EvidenceKind.NONE
    assert change.events[0].evidence.reason
    driver.run_epoch()
    assert driver.seed().alpha == 1.0
    assert driver.reports[0].seeds[0].is_ready_for_transition


def test_direct_refuses_a_kernel_that_is_not_zero_at_birth():
    driver, kernel_id = start(design=random_ir())
    driver.close()
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id, strategy=BlendStrategy.DIRECT)
    change = driver.command(Action.ADVANCE, "1", "s0")
    assert change.events[0].refused
    assert "zero at birth" in change.events[0].reason
    assert driver.stage() is SeedStage.GERMINATED


def test_a_shut_gate_refuses_and_says_why():
    driver, kernel_id = start()
    driver.to_training("1", kernel_id).run_epoch()
    command = order(Action.ADVANCE, "1", "s0")
    assert "no paired evidence" in driver.host.check(command)
    version = driver.host.topology_version
    (event,) = driver.command(Action.ADVANCE, "1", "s0").events
    assert event.refused
    assert (event.from_stage, event.to_stage) == (SeedStage.TRAINING, SeedStage.GRAFTING)
    assert driver.stage() is SeedStage.TRAINING
    assert driver.host.topology_version == version


def test_commands_that_the_table_does_not_hold_raise():
    driver, kernel_id = start()
    for action in (Action.ADVANCE, Action.CULL, Action.RETIRE):
        if action is Action.ADVANCE:
            # DORMANT has a way on, but only by GERMINATE, with a kernel
            assert driver.command(action, "1", "s0").events[0].refused
            continue
        assert driver.host.check(order(action, "1", "s0")) is not None
        with pytest.raises(IllegalTransitionError):
            driver.command(action, "1", "s0")
    driver.to_training("1", kernel_id)
    with pytest.raises(IllegalTransitionError, match="cull it"):
        driver.command(Action.RETIRE, "1", "s0")
    with pytest.raises(IllegalTransitionError):
        driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id)
    with pytest.raises(NotFoundError):
        driver.command(Action.ADVANCE, "1", "s9")
    with pytest.raises(NotFoundError):
        driver.command(Action.ADVANCE, "9", "s0")
    assert "no seed s9" in driver.host.check(order(Action.ADVANCE, "1", "s9"))


def test_a_cull_in_training_leaves_no_trace():
    driver, kernel_id = start()
    before = {k: t.clone() for k, t in driver.host.state_dict().items()}
    driver.to_training("1", kernel_id)
    x, y = driver.batches[0]
    driver.host.train_shadows((x,), lambda out: class_loss(out, y))
    change = driver.command(Action.CULL, "1", "s0")
    assert change.left == ()
    assert not change.path_changed
    assert_equal(dict(driver.host.state_dict()), before)
    assert all(not m._forward_hooks for m in driver.host.module.modules())
    view = driver.seed()
    assert (view.stage, view.kernel_id) == (SeedStage.CULLED, kernel_id)


def identity_again(driver):
    module, x = driver.host.module, driver.batches[0][0]
    assert not module[1]._forward_hooks
    assert not any(k.startswith("_esper.") for k in module.state_dict())
    with torch.no_grad():
        h = torch.relu(module[0](x))
        assert torch.equal(module(x), module[4](torch.relu(module[2](h))))


def test_a_cull_after_the_graft_gives_the_identity_at_once():
    driver, kernel_id = start(design=random_ir())
    driver.to_grafting("1", kernel_id).train(3)
    change = driver.command(Action.CULL, "1", "s0")
    assert len(change.left) == 2
    assert change.path_changed
    identity_again(driver)
    driver.train(2)


def test_a_retirement_ramps_down_and_ends_in_the_identity():
    driver, kernel_id = start(KasminaConfig(ramp="linear"), design=random_ir())
    driver.to_grafting("1", kernel_id).run_epoch()
    assert driver.seed().alpha == 1.0
    assert driver.command(Action.RETIRE, "1", "s0").events == ()
    assert driver.host.check(order(Action.RETIRE, "1", "s0")) == "it is retiring already"
    assert "retiring" in driver.seed().reason
    for alpha in (0.75, 0.5, 0.25):
        driver.train(1)
        assert driver.seed().alpha == alpha
        assert driver.command(Action.ADVANCE, "1", "s0").events[0].refused
    driver.train(1)
    assert driver.stage() is SeedStage.CULLED
    (change,) = [c for c in driver.changes if c.left]
    assert change.path_changed
    assert change.events[0].to_stage is SeedStage.CULLED
    assert change.events[0].run_id == "run"
    assert "retired" in change.events[0].reason
    identity_again(driver)


def test_an_embargo_ends_with_a_blank_seed():
    driver, kernel_id = start(KasminaConfig(embargo_epochs=2))
    driver.to_training("1", kernel_id)
    driver.command(Action.CULL, "1", "s0")
    driver.close()
    assert driver.stage() is SeedStage.CULLED
    driver.close()
    assert driver.stage() is SeedStage.DORMANT
    driver.train(1)
    assert stages(driver)[-1] is SeedStage.DORMANT
    view = driver.seed()
    assert (view.kernel_id, view.spans, view.evidence, view.num_parameters) == (None, (), None, 0)
    driver.to_training("1", kernel_id)


def test_harm_asks_for_removal_and_shuts_the_gate():
    driver, kernel_id = start(KasminaConfig(harm_tolerance=0.2))
    driver.to_grafting("1", kernel_id).run_epoch(1.0)
    driver.command(Action.ADVANCE, "1", "s0")
    driver.run_epoch(1.3)
    signal = driver.reports[0].seeds[0]
    assert signal.should_cull
    assert "harm" in signal.gate
    assert signal.evidence.kind is EvidenceKind.HARM
    assert driver.command(Action.ADVANCE, "1", "s0").events[0].refused
    driver.run_epoch(float("nan"))
    assert driver.reports[0].seeds[0].should_cull
    assert "not finite" in driver.reports[0].seeds[0].gate
    driver.run_epoch(None)
    assert not driver.reports[0].seeds[0].is_ready_for_transition
    driver.run_epoch(1.1)
    assert driver.reports[0].seeds[0].is_ready_for_transition


def test_evidence_of_worth_is_taken_in_training_only():
    driver, kernel_id = start()
    with pytest.raises(ConflictError):
        driver.host.record_evidence("s0", SHADOW_GAIN)
    driver.to_grafting("1", kernel_id)
    with pytest.raises(ConflictError):
        driver.host.record_evidence("s0", SHADOW_GAIN)
    with pytest.raises(ConflictError), driver.host.shadowed("s0"):
        pass


def test_the_version_tells_every_change_of_path_or_shadows():
    driver, kernel_id = start()
    seen = [driver.host.topology_version]

    def changed():
        seen.append(driver.host.topology_version)
        return seen[-1] > seen[-2]

    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id)
    assert not changed()
    driver.command(Action.ADVANCE, "1", "s0")
    assert changed()
    driver.host.record_evidence("s0", SHADOW_GAIN)
    driver.close().close()
    driver.command(Action.ADVANCE, "1", "s0")
    assert changed()
    driver.command(Action.CULL, "1", "s0")
    assert changed()
