"""A run that asks for native code of what it grafted. The code itself: `tests/integration/test_native_kernels.py`."""

from __future__ import annotations

import pytest
from tolaria_support import BLUEPRINT, KEY, SIGNATURE, SITE, config, load_at_once, train

from esper.api import local_hub
from esper.leyline import (
    Action,
    AdaptationSignal,
    Check,
    KasminaControlCommand,
    Pipeline,
    SeedStage,
    compile_key,
)
from esper.leyline.native import Rung, Timing
from esper.tezzeret.compile import Unsigned, build, sign
from esper.tezzeret.fingerprint import target_fingerprint
from esper.tolaria.native import optimizes
from esper.urabrask.gauntlet import examine


@pytest.fixture(autouse=True)
def kernels_that_come_at_once(monkeypatch):
    load_at_once(monkeypatch)


@pytest.mark.parametrize(
    ("wish", "deterministic", "cores", "expected"),
    [
        ("grafted", False, 1, True),
        ("grafted", True, 64, False),
        ("never", False, 64, False),
        ("auto", False, 2, False),
        ("auto", False, 3, True),
        ("auto", True, 64, False),
    ],
)
def test_native_code_is_asked_for_where_it_costs_the_trainer_nothing(wish, deterministic, cores, expected):
    chosen = config(tezzeret__optimize=wish, deterministic=deterministic)
    assert optimizes(chosen, num_trainers=2, num_cores=cores) is expected


def hub_and_key():
    return local_hub([SIGNATURE], config(), private_key=KEY)


def run(tmp_path, hub, key, wish="grafted", **settings):
    chosen = config(deterministic=False, tezzeret__optimize=wish, **settings)
    return train(tmp_path, chosen, hub=hub, public_key=key)[0]


@pytest.mark.parametrize("wish", ["grafted", "never"])
def test_a_graft_has_its_native_code_compiled_once(tmp_path, wish):
    hub, key = hub_and_key()
    summary = run(tmp_path, hub, key, wish)
    assert any(event.to_stage == "GRAFTING" for event in summary.events)
    job = hub.claim("w1", fingerprint=target_fingerprint())
    if wish == "never":
        assert job is None
        return
    assert (job.pipeline, job.blueprint.name, job.signature) == (Pipeline.OPTIMIZED, BLUEPRINT, SIGNATURE)
    assert job.blueprint.blueprint_id == summary.field_reports[0].blueprint_id
    assert hub.claim("w2", fingerprint=target_fingerprint()) is None
    assert summary.rungs == ()


def test_a_deterministic_run_asks_for_nothing(tmp_path):
    hub, key = hub_and_key()
    train(tmp_path, config(tezzeret__optimize="grafted"), hub=hub, public_key=key)
    assert hub.claim("w1", fingerprint=target_fingerprint()) is None


def test_code_that_was_not_kept_leaves_the_ir_and_its_reason(tmp_path):
    hub, key = hub_and_key()
    blueprint = hub.blueprints(name=BLUEPRINT)[0]
    hub.submit_blueprint(blueprint.ir, name=BLUEPRINT, targets=[SIGNATURE], pipelines=[Pipeline.OPTIMIZED])
    job = hub.claim("w1", fingerprint=target_fingerprint())
    hub.complete(job, *sign(slower(job), KEY))
    summary = run(tmp_path, hub, key)
    (rung,) = summary.rungs
    assert (rung.site, rung.rung, rung.blueprint) == (SITE, Rung.IR, BLUEPRINT)
    assert "1.08 of the eager module's time" in rung.reason
    assert hub.claim("w1", fingerprint=target_fingerprint()) is None


class Again:
    """A controller that grafts the kernel there is, removes it two epochs later, and begins again."""

    def decide(self, state, packet):
        seed = packet.layers[0].seeds[-1]
        action = None
        if seed.stage is SeedStage.DORMANT:
            action = Action.GERMINATE
        elif seed.stage is SeedStage.GERMINATED and seed.is_ready_for_transition:
            action = Action.ADVANCE
        elif seed.stage is SeedStage.GRAFTING and seed.epochs_in_stage >= 2:
            action = Action.CULL
        given = {"kernel_id": packet.options[0].kernel_id, "strategy": "direct"} if action is Action.GERMINATE else {}
        command = action and KasminaControlCommand(
            action=action, site=seed.layer_id, seed_id=seed.seed_id, reason="again", **given
        )
        commands = () if command is None else (command,)
        return state, AdaptationSignal(
            run_id=packet.run_id, epoch=packet.epoch.epoch, policy="again", commands=commands, reason="again"
        )


def test_every_life_of_a_seed_asks_anew(tmp_path):
    hub, key = hub_and_key()
    blueprint = hub.blueprints(name=BLUEPRINT)[0]
    hub.submit_blueprint(blueprint.ir, name=BLUEPRINT, targets=[SIGNATURE], pipelines=[Pipeline.OPTIMIZED])
    hub.complete(job := hub.claim("w1", fingerprint=target_fingerprint()), *sign(slower(job), KEY))
    chosen = config(deterministic=False, tezzeret__optimize="grafted", kasmina__embargo_epochs=0, tolaria__epochs=14)
    summary, _ = train(tmp_path, chosen, hub=hub, public_key=key, controller=Again())
    lives = {event.trace_id for event in summary.events if event.to_stage is SeedStage.GRAFTING}
    assert len(lives) > 1
    assert {event.seed for event in summary.events} == {"s0"}  # the same seed each time
    assert {rung.trace_id for rung in summary.rungs} == lives


def slower(job) -> Unsigned:
    """What the optimized pipeline makes of a design whose native code is slower."""
    plain = build(job.model_copy(update={"pipeline": Pipeline.FAST}), fingerprint=target_fingerprint(), examine=examine)
    detail = "no native code, it runs from its IR: it takes 1.08 of the eager module's time"
    checks = (*plain.report.checks, Check(name="native", passed=True, detail=detail))
    report = plain.report.model_copy(update={"checks": checks})
    key = compile_key(job.blueprint.ir_hash, job.signature, Pipeline.OPTIMIZED, target_fingerprint())
    timing = Timing(ratio=1.08, spread=0.01, num_pairs=15, batch=32, native_ms=1.08, eager_ms=1.0)
    changes = {"pipeline": Pipeline.OPTIMIZED, "compile_key": key, "report": report, "dropped": timing}
    return Unsigned(plain.manifest.model_copy(update=changes), plain.weights, {}, report, 1.0)
