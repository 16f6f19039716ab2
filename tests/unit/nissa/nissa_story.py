"""A run as it could have been: 30 epochs on digits, two adaptations, one fossilized and one culled."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.blueprints import Blueprint, BlueprintIR, Node
from esper.leyline.contract import Contract
from esper.leyline.kernels import Check, CompiledKernelArtifact, SiteKind, SiteSignature, ValidationReport
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.native import Rung, RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import (
    Action,
    AdaptationSignal,
    EpochRecord,
    Evidence,
    EvidenceKind,
    FieldReport,
    HealthSignal,
    KasminaControlCommand,
    LayerHealthReport,
    LifecycleEvent,
    Outcome,
    RunStarted,
    StepBatch,
)
from esper.leyline.summary import (
    BusCounts,
    Flops,
    Ledger,
    Metrics,
    Params,
    RunHistory,
    RunStatus,
    RunSummary,
    Seconds,
    StepTimes,
)

RUN = "digits-20261120-7f3a"
STARTED = 1_790_000_000.0
EPOCHS, STEPS = 30, 17
SITES = {
    "stages.0": SiteSignature(kind=SiteKind.FEATURE_MAP, channels=4, extent=(8, 8)),
    "stages.1": SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(4, 4)),
    "head.norm": SiteSignature(kind=SiteKind.VECTOR, channels=8),
}
START_PARAMS, GAINED = 1_434, 1_232
CULL_REASON = "no gain within 6 epochs of training: +0.0004 ± 0.0011 is below 2 standard errors"
WINNER, LOSER = "residual_conv", "squeeze_excite"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shadow(gain: float, stderr: float) -> Evidence:
    return Evidence(
        kind=EvidenceKind.SHADOW, gain=gain, stderr=stderr, baseline=0.81, candidate=0.81 - gain, num_pairs=360
    )


def harm(gain: float) -> Evidence:
    return Evidence(
        kind=EvidenceKind.HARM, gain=gain, stderr=0.011, baseline=0.78, candidate=0.78 - gain, num_pairs=360
    )


_S = SeedStage
# ruff: noqa: E501 (a table of what happened reads best with one line a row)
_LIVES = [
    ("stages.0", "s0", LOSER, 5, _S.DORMANT, _S.GERMINATED, None, "validation loss fell 1.8% in 3 epochs, below 5%; stages.0 has the largest growth potential (0.41) and squeeze_excite fits the budget"),
    ("stages.0", "s0", LOSER, 5, _S.GERMINATED, _S.TRAINING, None, "the kernel is loaded and its signature verified"),
    ("stages.0", "s0", LOSER, 11, _S.TRAINING, _S.CULLED, shadow(0.0004, 0.0011), CULL_REASON),
    ("stages.1", "s1", WINNER, 12, _S.DORMANT, _S.GERMINATED, None, "validation loss fell 0.9% in 3 epochs, below 5%; stages.1 has the largest growth potential (0.37)"),
    ("stages.1", "s1", WINNER, 12, _S.GERMINATED, _S.TRAINING, None, "the kernel is loaded and its signature verified"),
    ("stages.1", "s1", WINNER, 15, _S.TRAINING, _S.GRAFTING, shadow(0.0412, 0.0063), "the paired gain exceeds 2 standard errors: +0.0412 ± 0.0063 over 360 samples"),
    ("stages.1", "s1", WINNER, 17, _S.GRAFTING, _S.STABILIZING, harm(0.09), "alpha is 1; validation loss is within the pre-graft band"),
    ("stages.0", "s0", LOSER, 16, _S.CULLED, _S.DORMANT, None, "the embargo of 5 epochs is over"),
    ("stages.1", "s1", WINNER, 18, _S.STABILIZING, _S.EVALUATING, harm(0.12), "stable for 1 epoch"),
    ("stages.1", "s1", WINNER, 19, _S.EVALUATING, _S.FINE_TUNING, harm(0.14), "no harm: validation loss 0.64 against 0.78 before the graft"),
    ("stages.1", "s1", WINNER, 21, _S.FINE_TUNING, _S.FOSSILIZED, harm(0.19), "fine-tuned for 1 epoch without harm"),
]  # fmt: skip


def events() -> tuple[LifecycleEvent, ...]:
    return tuple(
        LifecycleEvent(
            run_id=RUN, step=(epoch + 1) * STEPS, epoch=epoch, site=site, seed=seed, blueprint=blueprint,
            kernel_id=sha(blueprint), from_stage=old, to_stage=new, evidence=evidence, reason=reason,
            timestamp=STARTED + 3 * (epoch + 1),
        )
        for site, seed, blueprint, epoch, old, new, evidence, reason in _LIVES
    )  # fmt: skip


def rungs() -> tuple[RungChange, ...]:
    return (
        RungChange(
            run_id=RUN, step=24 * STEPS, epoch=23, site="stages.1", seed="s1", blueprint=WINNER, kernel_id=sha(WINNER),
            rung=Rung.NATIVE, reason="0.62 of eager's time, deviation 2e-07", timestamp=STARTED + 72,
        ),
    )  # fmt: skip


def epoch_record(epoch: int) -> EpochRecord:
    noise = random.Random(epoch).uniform(-0.012, 0.012)
    base = 0.76 + 1.55 * math.exp(-epoch / 3.2)
    grown = max(epoch - 15, 0)
    drop = 0.42 * (1 - math.exp(-grown / 3.5))
    accuracy = 0.72 - 0.6 * math.exp(-epoch / 2.6) + 0.17 * (1 - math.exp(-grown / 3.0))
    blended = epoch > 15
    return EpochRecord(
        run_id=RUN, epoch=epoch, num_epochs=EPOCHS, step=(epoch + 1) * STEPS,
        train_loss=base - drop - 0.03 + noise / 2, train_metric=min(accuracy + 0.01, 1.0),
        val_loss=base - drop + noise, val_metric=accuracy + noise / 3, metric_name="accuracy", learning_rate=3e-3,
        params=START_PARAMS + GAINED * blended, flops_per_sample=61_700 + 38_912 * blended,
        total_flops=int(1.9e8 * (epoch + 1) + 0.6e8 * max(min(epoch, 15) - 5, 0)), seconds=2.1 + 0.6 * blended,
        step_ms=6.4 + 2.2 * blended,
        flops_by_purpose={"host": int(1.9e8 * (epoch + 1)), "shadow": int(0.6e8 * max(min(epoch, 15) - 5, 0))},
        seconds_by_purpose={"host": 1.5 * (epoch + 1), "control": 0.01 * (epoch + 1)}, kernels_ready=min(8 + 3 * epoch, 21), pending=max(13 - 3 * epoch, 0),
    )  # fmt: skip


def step_ms() -> tuple[float, ...]:
    rng = random.Random(4)
    graft = 16 * STEPS
    return tuple(
        (6.4 if step < graft else 8.6) * rng.lognormvariate(0, 0.09)
        + (9.0 if step in {graft, graft + 1} else 0.0)
        + (14.0 if step == 0 else 0.0)
        for step in range(EPOCHS * STEPS)
    )


def summary(**changes) -> RunSummary:
    fields = {
        "run_id": RUN, "task": "classification", "seed": 7, "status": RunStatus.FINISHED, "num_epochs": EPOCHS,
        "started_at": STARTED, "finished_at": STARTED + 94.2,
        "metrics": Metrics(val_accuracy=0.889, test_accuracy=0.881, val_loss=0.349, test_loss=0.362),
        "params": Params(start=START_PARAMS, final=START_PARAMS + GAINED), "events": events(),
        "rungs": rungs(),
        "field_reports": field_reports(),
        "ledger": Ledger(
            flops=Flops(host=5_900_000_000, shadow=1_310_000_000, telemetry=94_000_000, validation=720_000_000,
                        total=8_024_000_000),
            seconds=Seconds(host=58.1, shadow=17.2, telemetry=1.9, validation=8.8, control=0.9, checkpoint=2.3,
                            total=89.2),
        ),
        "steps": StepTimes(count=510, median_ms=6.6, p99_ms=10.9, worst_in_graft_ms=18.3),
        "bus": BusCounts(published=1_284, delivered=1_284, redelivered=3),
        "went_without": ("Tamiyo for 1 epoch: no answer within 5.0 s",),
        "last_checkpoint": "checkpoints/epoch-29",
        "versions": {"esper": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.9"},
    }  # fmt: skip
    return RunSummary(**{**fields, **changes})


def field_reports() -> tuple[FieldReport, ...]:
    return tuple(
        FieldReport(
            run_id=RUN, site=site, seed_id=seed, signature=SITES[site], blueprint_id=sha(blueprint)[:32],
            blueprint=blueprint, kernel_id=sha(blueprint), outcome=outcome, evidence=evidence, num_parameters=params,
            failure_reason=why,
        )
        for site, seed, blueprint, outcome, evidence, params, why in (
            ("stages.0", "s0", LOSER, Outcome.CULLED, shadow(0.0004, 0.0011), 22, CULL_REASON),
            ("stages.1", "s1", WINNER, Outcome.FOSSILIZED, shadow(0.0412, 0.0063), GAINED, ""),
        )
    )  # fmt: skip


def history() -> RunHistory:
    return RunHistory(
        run_id=RUN,
        epochs=tuple(epoch_record(epoch) for epoch in range(EPOCHS)),
        step_ms=step_ms(),
        graft_steps=(16 * STEPS,),
        decisions=tuple((epoch, decision(epoch).reason) for epoch in range(EPOCHS)),
    )


def decision(epoch: int) -> AdaptationSignal:
    orders = [e for e in events() if e.epoch == epoch and e.from_stage is not SeedStage.CULLED]
    commands = tuple(
        KasminaControlCommand(
            action=Action.CULL if e.to_stage is SeedStage.CULLED else Action.ADVANCE, site=e.site, seed_id=e.seed,
            reason=e.reason,
        )
        for e in orders[:1]
    )  # fmt: skip
    wait = (
        "wait: the host still learns, validation loss fell 21% in 3 epochs"
        if epoch < 15
        else "wait: stages.1 is in its stage"
    )
    reason = commands[0].reason if commands else wait
    return AdaptationSignal(run_id=RUN, epoch=epoch, policy="heuristic", commands=commands, reason=reason)


def run_started(resumed_from: int | None = None) -> RunStarted:
    return RunStarted(
        run_id=RUN, task="classification", num_epochs=EPOCHS, sites=SITES, params=START_PARAMS,
        directory=f"~/.esper/runs/{RUN}", resumed_from_epoch=resumed_from, started_at=STARTED,
    )  # fmt: skip


def artifact(name: str, signature: SiteSignature) -> CompiledKernelArtifact:
    return CompiledKernelArtifact(
        kernel_id=sha(name + signature.key), compile_key=sha("key" + name + signature.key),
        blueprint_id=sha(name)[:32], blueprint_name=name, signature=signature, fingerprint="cpu", num_parameters=8,
        flops_per_sample=10, memory_bytes=100, size_bytes=100, zero_at_birth=True,
        report=ValidationReport(checks=(Check(name="shape", passed=True),)),
    )  # fmt: skip


def blueprint(name: str) -> Blueprint:
    return Blueprint(
        blueprint_id=sha(name)[:32], name=name, ir_hash=sha(name), targets=tuple(SITES.values()),
        ir=BlueprintIR(
            fit=(SiteKind.FEATURE_MAP,), output="a", nodes=(Node(id="a", op="relu", inputs=("input",)),)
        ),
    )  # fmt: skip


def health(epoch: int, site: str, seed: str, stage: SeedStage, alpha: float = 0.0) -> LayerHealthReport:
    done = [e for e in events() if e.seed == seed and e.epoch < epoch and e.evidence]
    active = stage.is_active or stage is SeedStage.FOSSILIZED
    return LayerHealthReport(
        run_id=RUN, layer_id=site, signature=SITES[site], epoch=epoch, step=(epoch + 1) * STEPS,
        seeds=(
            HealthSignal(
                layer_id=site, seed_id=seed, epoch=epoch, stage=stage, alpha=alpha, health_score=0.8,
                grow_potential=0.37 + epoch / 1000, blueprint=(WINNER if seed == "s1" else LOSER) if active else None,
                evidence=done[-1].evidence if done and active else None,
                gate="training: 2 of at least 2 epochs" if stage is SeedStage.TRAINING else "",
                runs=STEPS + 1 if stage.is_blended else 0, latency_ms=0.25 + epoch / 1000 if stage.is_blended else None,
            ),
        ),
    )  # fmt: skip


def messages(last_epoch: int = EPOCHS - 1) -> list[OonaMessage]:
    """Everything that was on the bus up to the end of `last_epoch`, in the order of sending."""
    out: list[OonaMessage] = []

    def send(topic: Topic, body, at: float, key: str = RUN) -> None:
        message = OonaMessage.of(topic, body, sender_id="trainer", key=key)
        out.append(message.model_copy(update={"timestamp": at, "event_id": sha(f"{len(out)}")[:32]}))

    send(Topic.RUN_STARTED, run_started(), STARTED)
    for name in (WINNER, LOSER):
        send(Topic.BLUEPRINT_SUBMITTED, blueprint(name), STARTED, key="urza")
    for signature in SITES.values():
        send(Topic.KERNEL_READY, artifact(WINNER, signature), STARTED + 1, key="urza")
    stages = {"s0": SeedStage.DORMANT, "s1": SeedStage.DORMANT, "s2": SeedStage.DORMANT}
    times = step_ms()
    for epoch in range(last_epoch + 1):
        at = STARTED + 3.1 * (epoch + 1)
        record = epoch_record(epoch)
        for first in range(epoch * STEPS, (epoch + 1) * STEPS, 8):
            end = min(first + 8, (epoch + 1) * STEPS)
            batch = StepBatch(
                run_id=RUN, first_step=first, losses=(record.train_loss,) * (end - first),
                milliseconds=times[first:end], steps_per_epoch=STEPS,
            )  # fmt: skip
            send(Topic.STEPS, batch, at - 2 + (first % STEPS) / 10)
        send(Topic.EPOCH, record, at)
        for site, seed in zip(SITES, stages, strict=True):
            alpha = min(max((epoch - 15) / 2, 0.0), 1.0) if stages[seed].is_blended else 0.0
            send(Topic.SEED_HEALTH, health(epoch, site, seed, stages[seed], alpha), at)
        send(Topic.KASMINA_COMMANDS, decision(epoch), at)
        for event in (e for e in events() if e.epoch == epoch):
            stages[event.seed] = event.to_stage
            send(Topic.LIFECYCLE, event, at)
        for topic, body in endings(epoch):
            send(topic, body, at)
    return out


def endings(epoch: int) -> Iterator[tuple[Topic, Contract]]:
    """What is told of kernels after an epoch's transitions."""
    yield from ((Topic.RUNGS, change) for change in rungs() if change.epoch == epoch)
    ends = {Outcome.CULLED: 11, Outcome.FOSSILIZED: 21}
    yield from ((Topic.FIELD_REPORTS, report) for report in field_reports() if ends[report.outcome] == epoch)


def events_by_epoch() -> list[LifecycleEvent]:
    """The events in the order in which `messages` sends them."""
    return sorted(events(), key=lambda event: event.epoch)


def alert(**changes) -> Alert:
    fields = {
        "alert_id": "a1", "kind": AlertKind.LOSS_SPIKE, "run_id": RUN, "since": STARTED + 9.5, "since_step": 40,
        "updated_at": STARTED + 9.6, "summary": "the loss jumped", "detector": "robust z-score",
        "evidence": "3.1 where 0.8 is usual: 12 deviations above", "command": f"esper runs show {RUN}",
        "figures": {"value": 3.1, "usual": 0.8, "score": 12.0},
    }  # fmt: skip
    return Alert(**{**fields, **changes})


def told(body: Alert, number: int = 0) -> OonaMessage:
    message = OonaMessage.of(Topic.ALERTS, body, sender_id="nissa", key=body.run_id or "platform")
    return message.model_copy(update={"event_id": f"{body.alert_id}-{number}", "timestamp": body.updated_at})
