"""Telling what happened to the seeds: into the run's record, over the bus, and to Urza when an adaptation ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from esper.leyline.errors import NotFoundError
from esper.leyline.growth import SeedView
from esper.leyline.messages import Topic
from esper.leyline.native import RungChange
from esper.leyline.ports import AssetHub
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import (
    Action,
    AdaptationSignal,
    Choice,
    FieldReport,
    KasminaControlCommand,
    LayerHealthReport,
    LifecycleEvent,
    Outcome,
    StageSpan,
    VetoRecord,
)
from esper.leyline.trials import TrialResult, key_of
from esper.tolaria.course import Course
from esper.tolaria.outbox import Outbox
from esper.tolaria.reach import Reach
from esper.tolaria.recorder import Recorder, report_id

log = logging.getLogger(__name__)

_OUTCOMES = {
    SeedStage.FOSSILIZED: Outcome.FOSSILIZED,
    SeedStage.CULLED: Outcome.CULLED,
    SeedStage.CANCELLED: Outcome.CANCELLED,
    SeedStage.ROLLED_BACK: Outcome.ROLLED_BACK,
}


class Chronicle:
    """The teller of one run.

    Args:
        course: the run.
        recorder: its record.
        outbox: to the bus.
        reach: to Urza.
    """

    def __init__(self, course: Course, *, recorder: Recorder, outbox: Outbox, reach: Reach) -> None:
        self._course = course
        self.recorder = recorder
        self.outbox = outbox
        self._reach = reach
        self._seen: dict[str, SeedView] = {}

    def look(self) -> None:
        """Remembers the seeds that are under way: one that ends is reported as it was last seen with its kernel."""
        seeds = self._course.growable.seeds()
        self._seen.update({seed.seed_id: seed for seed in seeds if seed.stage.is_active and seed.kernel_id})

    def event(
        self, seed: SeedView, to: SeedStage, reason: str, *, refused: bool = False, blueprint: str | None = None
    ) -> LifecycleEvent:
        """An event of this moment.

        Args:
            seed: as it stood before.
            to: where it went, or would have gone.
            reason: why.
            refused: whether it stayed where it was.
            blueprint: what was asked for, where the seed has none yet.
        """
        return LifecycleEvent(
            run_id=self._course.run_id,
            step=self._course.step,
            epoch=self._course.epoch,
            site=seed.site,
            seed=seed.seed_id,
            blueprint=seed.blueprint or blueprint,
            kernel_id=seed.kernel_id,
            from_stage=seed.stage,
            to_stage=to,
            evidence=seed.evidence,
            reason=reason,
            refused=refused,
            trace_id=seed.trace_id,
        )

    def chose(self, command: KasminaControlCommand, policy: str, reports: Sequence[LayerHealthReport]) -> None:
        """Keeps what was seen of a site for which a kernel was chosen; other commands begin nothing."""
        if command.action is not Action.GERMINATE:
            return
        seen = (seed for report in reports for seed in report.seeds if seed.seed_id == command.seed_id)
        health = next(seen, None)
        if health is not None:  # else there is no such seed, and the command will be refused
            self.recorder.choice(
                Choice(
                    trace_id=command.command_id,
                    epoch=self._course.epoch,
                    step=self._course.step,
                    policy=policy,
                    health=health,
                    reason=command.reason,
                )
            )

    def refused(self, signal: AdaptationSignal, reports: Sequence[LayerHealthReport]) -> None:
        """Keeps what the policy wanted and Tamiyo's gates did not let through."""
        traces = {seed.seed_id: seed.trace_id for report in reports for seed in report.seeds} if signal.vetoes else {}
        for veto in signal.vetoes:
            begins = veto.action is Action.GERMINATE
            record = VetoRecord(
                veto=veto,
                policy=signal.policy,
                trace_id="" if begins else traces.get(veto.seed_id, ""),
                epoch=self._course.epoch,
                step=self._course.step,
                last_epoch=self._course.epoch,
            )
            self.recorder.veto(record)
            if self._course.is_first:
                log.info("order.vetoed", extra=_fields_of_veto(record, signal.run_id))

    def tell(self, event: LifecycleEvent) -> None:
        """Records and publishes an event; one that ends an adaptation also makes its field report."""
        self.recorder.event(event)
        self.outbox.publish(Topic.LIFECYCLE, event, trace_id=event.trace_id)
        if self._course.is_first:
            log.info("seed.refused" if event.refused else f"seed.{event.to_stage.value.lower()}", extra=_fields(event))
        outcome = _OUTCOMES.get(event.to_stage)
        if outcome is not None and not event.refused and not self._was_rolled_back(event):
            self._report(event.seed, outcome, event.reason)

    def tell_rung(self, change: RungChange) -> None:
        """Records and publishes what a kernel runs from, and logs it."""
        self.recorder.rung(change)
        self.outbox.publish(Topic.RUNGS, change, trace_id=change.trace_id)
        log.info("seed.rung", extra={**_fields(change), "rung": change.rung.value})

    def tried(self, result: TrialResult, *, winner: str, refusal: str = "") -> None:
        """Keeps what a trial came to, and reports its candidates but for the one that now begins in the run.

        Args:
            result: of the trial.
            winner: id of that one's kernel with its site, as in `leyline.trials.key_of`; empty if none has won.
            refusal: why the run did not take it; empty if it did.
        """
        course = self._course
        self.recorder.trial(result)
        for number, outcome in enumerate(result.outcomes):
            candidate, has_won = outcome.candidate, key_of(outcome.candidate) == winner
            if outcome.evidence is None or (has_won and not refusal):
                continue
            lost = "another won the trial" if winner else "no candidate won the trial"
            report = FieldReport(
                report_id=report_id(course.run_id, f"{result.trial_id}/{number}", Outcome.TRIED),
                run_id=course.run_id,
                trace_id=f"{result.trial_id}/{number}",
                site=candidate.site,
                seed_id=candidate.seed_id,
                signature=course.growable.sites[candidate.site],
                blueprint_id=candidate.blueprint_id,
                blueprint=candidate.blueprint,
                kernel_id=candidate.kernel_id,
                outcome=Outcome.TRIED,
                evidence=outcome.evidence,
                trial=outcome.evidence,
                num_parameters=candidate.num_parameters,
                flops=outcome.flops,
                seconds=outcome.seconds,
                failure_reason=f"it had won the trial, and the run refused it: {refusal}" if has_won else lost,
            )
            self.recorder.keep(report)
            self._send(report)

    def close(self, reason: str) -> None:
        """Ends what is still under way as UNFINISHED."""
        self.look()
        for seed in self._course.growable.seeds():
            if seed.stage.is_active and not self._was_rolled_back(self.event(seed, seed.stage, reason)):
                asks = self._course.config.tamiyo.ask_before_graft and not seed.stage.is_blended
                unasked = "; nothing goes live in this run without a person's approval" if asks else ""
                self._report(seed.seed_id, Outcome.UNFINISHED, reason + unasked)

    def _was_rolled_back(self, event: LifecycleEvent) -> bool:
        """Whether this adaptation was reported as rolled back: its kernel is removed after that, which is no news."""
        for past in reversed(self.recorder.events):
            if past.seed == event.seed and past is not event and not past.refused:
                if past.to_stage is SeedStage.ROLLED_BACK:
                    return True
                if past.to_stage is SeedStage.GERMINATED:
                    return False
        return False

    def _report(self, seed_id: str, outcome: Outcome, reason: str) -> None:
        views = [view for view in (self._course.seed(seed_id), self._seen.pop(seed_id, None)) if view is not None]
        # as it stands, unless it has lost its kernel already (a rollback); one whose kernel never came had none
        with_kernel = [view for view in views if view.blueprint_id is not None]
        view = next((view for view in (*with_kernel, *views) if view.kernel_id is not None), None)
        if view is None:
            return  # nobody chose a kernel for it: there is nothing to say
        self._send(self.recorder.report(replace(view, spans=self._spans(view)), outcome, reason=reason))

    def _send(self, report: FieldReport) -> None:
        hub = self._course.ports.hub
        if self._course.is_first:
            self.outbox.publish(Topic.FIELD_REPORTS, report, trace_id=report.trace_id)
            if hub is not None:
                self._reach.ask("Urza", lambda: _report_to(hub, report))

    def _spans(self, seed: SeedView) -> tuple[StageSpan, ...]:
        """The stages that a seed went through, and that in which it stands, which only its end closes."""
        entered = (
            event
            for event in reversed(self.recorder.events)
            if (event.seed, event.to_stage) == (seed.seed_id, seed.stage) and not event.refused
        )
        event = next(entered, None) if seed.stage.is_active else None
        if event is None:
            return seed.spans
        epochs, steps = self._course.epoch - event.epoch, self._course.step - event.step
        return (*seed.spans, StageSpan(stage=seed.stage, epochs=max(0, epochs), steps=max(0, steps)))


def _report_to(hub: AssetHub, report: FieldReport) -> None:
    try:
        hub.report(report)
    except NotFoundError:  # it refused the kernel because Urza has none such: there is no record to add to
        log.warning("report.unknown_kernel", extra={"kernel": report.kernel_id, "trace": report.trace_id})


def _fields(happened: LifecycleEvent | RungChange) -> dict[str, object]:
    """What a line of the log says of it."""
    return {
        "run": happened.run_id,
        "site": happened.site,
        "seed": happened.seed,
        "step": happened.step,
        "trace": happened.trace_id,
        "reason": happened.reason,
    }


def _fields_of_veto(record: VetoRecord, run_id: str) -> dict[str, object]:
    return {
        "run": run_id,
        "site": record.veto.site,
        "seed": record.veto.seed_id,
        "step": record.step,
        "trace": record.trace_id,
        "gate": record.veto.gate.value,
        "reason": record.veto.in_words,
    }
