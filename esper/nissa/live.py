"""The fold of bus messages into `LiveView`s: idempotent, bounded, and free of input and output.

Order holds only within (topic, key), so a fold never assumes that another topic has arrived first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from esper.leyline.alerts import Alert
from esper.leyline.blueprints import Blueprint
from esper.leyline.contract import Contract
from esper.leyline.kernels import CompiledKernelArtifact, KernelStatus, Pipeline, SiteSignature
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.native import RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import (
    AdaptationSignal,
    EpochRecord,
    Evidence,
    FieldReport,
    LayerHealthReport,
    LifecycleEvent,
    RunStarted,
    Severity,
    StepBatch,
)
from esper.nissa.stages import word
from esper.nissa.viewmodel import (
    NUM_ALERTS,
    NUM_CLOCK,
    NUM_NOTES,
    NUM_POINTS,
    NUM_SEEDS,
    NUM_STEP_LOSSES,
    KernelRuns,
    LiveView,
    Note,
    Point,
    SeedView,
    Tone,
)
from esper.nissa.words import RUNGS, WORTH, is_share

TOPICS: tuple[Topic, ...] = (
    Topic.RUN_STARTED,
    Topic.EPOCH,
    Topic.STEPS,
    Topic.SEED_HEALTH,
    Topic.LIFECYCLE,
    Topic.RUNGS,
    Topic.KASMINA_COMMANDS,
    Topic.BLUEPRINT_SUBMITTED,
    Topic.KERNEL_READY,
    Topic.FIELD_REPORTS,
    Topic.POLICIES,
    Topic.ALERTS,
)
"""What Nissa listens to."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

MAX_RUNS = 16
MAX_IDS = 16_384
MAX_KERNELS = 4_096
UNKNOWN = "unknown"
"""The design of a kernel that nobody named."""
MAX_STORY = 12_000
"""Notes of one run that can be asked for; a `LiveView` carries the latest few."""


class Compiled(NamedTuple):
    """Kernels that came from the compilers, and the seconds that they took."""

    kernels: int = 0
    seconds: float = 0.0


class Live:
    """Folds messages of any number of runs. Not thread-safe; its owner serialises calls."""

    def __init__(self, *, max_runs: int = MAX_RUNS, max_ids: int = MAX_IDS, max_kernels: int = MAX_KERNELS) -> None:
        self._views: OrderedDict[str, LiveView] = OrderedDict()
        self._stories: dict[str, deque[Note]] = {}
        # by topic: a log that is read again after a while is long in telemetry, and short in what is counted
        self._seen: dict[Topic, OrderedDict[str, None]] = {}
        self._kernels: OrderedDict[tuple[str, str], bool] = OrderedDict()  # (blueprint, signature) -> is ready
        self._alerts: OrderedDict[str, Alert] = OrderedDict()  # of the platform as a whole
        self._compiled: dict[Pipeline, Compiled] = {}
        self._max_runs, self._max_ids, self._max_kernels = max_runs, max_ids, max_kernels

    def apply(self, message: OonaMessage) -> bool:
        """Folds one message in; returns whether it was new. Raises as `take` does."""
        return self.take(message) is not None

    def take(self, message: OonaMessage) -> Contract | None:
        """Folds one message in; returns its payload if it was new.

        Raises:
            pydantic.ValidationError: if the payload is not its topic's contract; nothing has changed then.
        """
        seen = self._seen.setdefault(message.topic, OrderedDict())
        if message.event_id in seen:
            return None
        body = message.body()
        _remember(seen, message.event_id, None, self._max_ids)
        if isinstance(body, Blueprint):
            for target in body.targets:
                self._kernel(body.blueprint_id, target, ready=False)
        elif isinstance(body, CompiledKernelArtifact):
            known = self._compiled.get(body.pipeline, Compiled())
            self._compiled[body.pipeline] = Compiled(known.kernels + 1, known.seconds + body.compile_s)
            if body.status is KernelStatus.VALIDATED:
                self._kernel(body.blueprint_id, body.signature, ready=True)
        elif isinstance(body, Alert) and not body.run_id:
            self._platform_alert(body)
        elif type(body) in _FOLDS:
            self._fold(body, message.timestamp)
        return body

    def view(self, run_id: str) -> LiveView | None:
        """The run as last heard of; None if nothing was."""
        return self._views.get(run_id)

    def run_ids(self) -> tuple[str, ...]:
        """The runs that are remembered, the most recently heard of last."""
        return tuple(self._views)

    def platform_alerts(self) -> tuple[Alert, ...]:
        """The alerts of no run: those that last, and the last ones that ended."""
        return tuple(self._alerts.values())

    def compiled(self) -> Mapping[Pipeline, Compiled]:
        """What was compiled since the begin of what is still on the bus; the mapping is the caller's own."""
        return dict(self._compiled)

    def story(self, run_id: str) -> Sequence[Note]:
        """The run's notes, the oldest that is kept first; the list is the caller's own."""
        return list(self._stories.get(run_id, ()))

    def _fold(self, body: Any, at: float) -> None:
        view = self._views.get(body.run_id)
        if view is None:
            view = LiveView(run_id=body.run_id)
            for alert in self._alerts.values():
                view = _on_alert(view, alert, at) if alert.is_open else view
        view = fold(view, body, at)
        if isinstance(body, RunStarted):
            view = self._count_kernels(view)
        self._keep(view)
        _remember(self._views, body.run_id, view, self._max_runs)
        for gone in self._stories.keys() - self._views.keys():
            del self._stories[gone]

    def _keep(self, view: LiveView) -> None:
        """Adds the notes that are new to the run's story."""
        story = self._stories.setdefault(view.run_id, deque(maxlen=MAX_STORY))
        last = story[-1].number if story else 0
        story.extend(note for note in view.notes if note.number > last)

    def _platform_alert(self, alert: Alert) -> None:
        """Keeps it, and shows it with every run that it may trouble."""
        old = self._alerts.get(alert.alert_id)
        if old is None or old.is_open:
            _remember(self._alerts, alert.alert_id, alert, NUM_ALERTS)
        for run_id, view in self._views.items():
            if not view.is_done or alert.alert_id in view.alerts:
                self._views[run_id] = _on_alert(view, alert, alert.updated_at)
                self._keep(self._views[run_id])

    def _kernel(self, blueprint_id: str, signature: SiteSignature, *, ready: bool) -> None:
        key = (blueprint_id, signature.key)
        known = self._kernels.get(key)
        if known is None or (ready and not known):
            _remember(self._kernels, key, ready, self._max_kernels)
            for run_id, view in self._views.items():
                if signature.key in view.sites.values() and not view.is_done:
                    self._views[run_id] = _kernel_came(view, ready=ready, was_pending=known is False)

    def _count_kernels(self, view: LiveView) -> LiveView:
        """Counts the kernels that were there, or on their way, before the run was heard of."""
        wanted = set(view.sites.values())
        states = [ready for (_, signature), ready in self._kernels.items() if signature in wanted]
        if view.last is not None:  # the trainer's own count is newer
            return view
        return replace(view, kernels_ready=sum(states), kernels_pending=len(states) - sum(states))


def fold(view: LiveView, body: Contract, at: float) -> LiveView:
    """The view after one more signal of its run, sent at `at`; adds two notes at most.

    Raises:
        KeyError: if signals of this kind are not folded into a view.
    """
    after = _FOLDS[type(body)](view, body, at)
    return replace(after, updated_at=max(after.updated_at, at))


def _remember(memory: OrderedDict[_Key, _Value], key: _Key, value: _Value, limit: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > limit:
        memory.popitem(last=False)


def _kernel_came(view: LiveView, *, ready: bool, was_pending: bool) -> LiveView:
    if not ready:
        return replace(view, kernels_pending=view.kernels_pending + 1)
    pending = max(view.kernels_pending - was_pending, 0)
    return replace(view, kernels_ready=view.kernels_ready + 1, kernels_pending=pending)


# ---------------------------------------------------------------- one fold a payload


def _on_run_started(view: LiveView, body: RunStarted, at: float) -> LiveView:
    seeds = dict(view.seeds)
    reporting = {seed.site for seed in seeds.values()}
    for site in list(body.sites)[:NUM_SEEDS]:
        if site not in reporting:
            seeds[_key(site, "")] = SeedView(site)
    view = replace(
        view,
        task=body.task,
        directory=body.directory,
        started_at=view.started_at or body.started_at,
        num_epochs=body.num_epochs,
        params_start=view.params_start or body.params,
        sites={site: signature.key for site, signature in body.sites.items()},
        seeds=seeds,
    )
    if body.resumed_from_epoch is None:
        return replace(view, clock=view.clock or ((at, 0.0),))
    # steps and stages since the checkpoint are undone: what comes next overrules what was heard before
    seeds = {key: replace(seed, stage_step=-1, health_step=-1, rung_step=-1) for key, seed in view.seeds.items()}
    view = replace(
        view,
        resumed_from_epoch=body.resumed_from_epoch,
        seeds=seeds,
        kernel_runs=tuple(replace(runs, step=-1) for runs in view.kernel_runs),  # they run again, and count again
        steps_seen=0,
        clock=((at, body.resumed_from_epoch / body.num_epochs),),
    )
    text = f"the run was resumed from epoch {body.resumed_from_epoch}"
    return _note(view, at, body.resumed_from_epoch, view.step, "run", text, tone=Tone.WARNING)


def _on_epoch(view: LiveView, body: EpochRecord, at: float) -> LiveView:
    point = Point(body.epoch, body.train_loss, body.val_loss, body.train_metric, body.val_metric, body.params)
    # an epoch that comes again after a resume replaces itself and what followed
    points = (*(p for p in view.points if p.epoch < body.epoch), point)[-NUM_POINTS:]
    best = view.best if view.best and view.best.epoch < body.epoch else None
    candidates = (*((best,) if best else points[:-1]), point)
    view = replace(
        view,
        num_epochs=body.num_epochs,
        epochs_done=body.epoch + 1,
        step=max(view.step, body.step) if view.steps_seen else body.step,
        steps_per_epoch=view.steps_per_epoch or body.step // (body.epoch + 1),
        points=points,
        best=max(candidates, key=lambda p: _goodness(p, body.metric_name)),
        last=body,
        kernels_ready=body.kernels_ready,
        kernels_pending=body.pending,
    )
    clock = (*(mark for mark in view.clock if mark[1] < view.progress), (at, view.progress))
    return replace(view, clock=clock[-NUM_CLOCK:])


def _goodness(point: Point, metric_name: str | None) -> tuple[float, float]:
    """Orders points. Only a share is known to be better when larger; other metrics leave it to the loss."""
    loss = point.val_loss if point.val_loss is not None else point.train_loss
    share = point.val_metric if is_share(metric_name) and point.val_metric is not None else 0.0
    return share, -loss


def _on_steps(view: LiveView, body: StepBatch, _at: float) -> LiveView:
    done = body.first_step + len(body.losses)
    if not body.losses or done <= view.steps_seen:
        return view
    mean = sum(body.losses) / len(body.losses)
    times = sorted(body.milliseconds)
    return replace(
        view,
        step=done,
        steps_seen=done,
        steps_per_epoch=body.steps_per_epoch or view.steps_per_epoch,
        step_ms=times[len(times) // 2] if times else view.step_ms,
        step_losses=(*view.step_losses, mean)[-NUM_STEP_LOSSES:],
    )


def _on_health(view: LiveView, body: LayerHealthReport, _at: float) -> LiveView:
    seeds = dict(view.seeds)
    seeds.pop(_key(body.layer_id, ""), None)
    for signal in body.seeds:
        key = _key(body.layer_id, signal.seed_id)
        old = seeds.get(key) or SeedView(body.layer_id, signal.seed_id)
        if body.step < old.health_step or (key not in seeds and len(seeds) >= NUM_SEEDS):
            continue
        new = replace(
            old,
            alpha=signal.alpha,
            blueprint=signal.blueprint or old.blueprint,
            evidence=_telling(old.evidence, signal.evidence),
            health_score=signal.health_score,
            grow_potential=signal.grow_potential,
            train_loss=signal.train_loss,
            gate=signal.gate,
            health_step=body.step,
        )
        # at one and the same step the transition came after the report that led to it
        if body.step > old.stage_step:
            since = old.since_epoch if signal.stage is old.stage else body.epoch
            new = replace(new, stage=signal.stage, since_epoch=since, stage_step=body.step)
        seeds[key] = new
    return replace(view, seeds=seeds, kernel_runs=_ran(view, body, seeds))


def _ran(view: LiveView, body: LayerHealthReport, seeds: Mapping[str, SeedView]) -> tuple[KernelRuns, ...]:
    """With what the kernels of a site did in one more interval; what was told before counts once, however long ago."""
    before = {(runs.site, runs.blueprint): runs for runs in view.kernel_runs}
    known = dict(before)
    for signal in body.seeds:
        if not signal.runs:
            continue
        seed = seeds.get(_key(body.layer_id, signal.seed_id))
        name = signal.blueprint or (seed.blueprint if seed else None) or UNKNOWN
        old = known.get((body.layer_id, name)) or KernelRuns(body.layer_id, name)
        is_told = (body.layer_id, name) in before and before[body.layer_id, name].step >= body.step
        if is_told or (not old.num and len(known) >= NUM_SEEDS):
            continue
        known[body.layer_id, name] = replace(
            old,
            num=old.num + signal.runs,
            latency_ms=old.latency_ms if signal.latency_ms is None else signal.latency_ms,
            step=body.step,
        )
    return tuple(known.values())


def _on_lifecycle(view: LiveView, body: LifecycleEvent, at: float) -> LiveView:
    seeds = dict(view.seeds)
    seeds.pop(_key(body.site, ""), None)
    key = _key(body.site, body.seed)
    old = seeds.get(key) or SeedView(body.site, body.seed)
    if not body.refused and body.step >= old.stage_step and (key in seeds or len(seeds) < NUM_SEEDS):
        reset = body.to_stage in {SeedStage.DORMANT, SeedStage.GERMINATED}
        seeds[key] = replace(
            old,
            stage=body.to_stage,
            since_epoch=body.epoch,
            stage_step=body.step,
            alpha=_alpha_after(body.to_stage, old.alpha),
            blueprint=body.blueprint if reset else body.blueprint or old.blueprint,
            evidence=body.evidence if reset else _telling(old.evidence, body.evidence),
            gate="",
            rung=None if reset else old.rung,
        )
    what = f"{body.blueprint} " if body.blueprint else ""
    text = f"{what}{word(body.from_stage)} → {word(body.to_stage)}"
    if body.refused:
        text = f"{text} refused"
    if body.refused:
        view, stage = replace(view, seeds=seeds, num_refused=view.num_refused + 1), None
    else:
        stage = body.to_stage
        view = replace(view, seeds=seeds, entered={**view.entered, stage: view.entered.get(stage, 0) + 1})
    return _note(view, at, body.epoch, body.step, body.site, text, body.reason, tone=_tone(body), stage=stage)


def _on_rung(view: LiveView, body: RungChange, at: float) -> LiveView:
    key = _key(body.site, body.seed)
    seed = view.seeds.get(key)
    if seed is not None and body.step >= seed.rung_step:
        view = replace(view, seeds={**view.seeds, key: replace(seed, rung=body.rung, rung_step=body.step)})
    what = f"{body.blueprint} " if body.blueprint else ""
    text = f"{what}runs from its {RUNGS[body.rung]}"
    return _note(view, at, body.epoch, body.step, body.site, text, body.reason, tone=Tone.INFO)


def _telling(old: Evidence | None, new: Evidence | None) -> Evidence | None:
    """The newer evidence, unless it only checks for harm where the older says what the kernel is worth."""
    if new is None or (old is not None and old.kind in WORTH and new.kind not in WORTH):
        return old
    return new


def _alpha_after(stage: SeedStage, alpha: float) -> float:
    if stage is SeedStage.GRAFTING:
        return alpha
    return 1.0 if stage.is_blended else 0.0


def _tone(body: LifecycleEvent) -> Tone:
    if body.refused:
        return Tone.WARNING
    if body.to_stage is SeedStage.FOSSILIZED:
        return Tone.GOOD
    if body.to_stage is SeedStage.ROLLED_BACK:
        return Tone.BAD
    return Tone.WARNING if body.to_stage in {SeedStage.CULLED, SeedStage.CANCELLED} else Tone.INFO


def _on_decision(view: LiveView, body: AdaptationSignal, at: float) -> LiveView:
    """A decision that acts is told by the transitions that follow; only a grave one is a note of its own."""
    if body.memory is not None:
        return view  # on its way to a run that listens, which tells what it obeys
    view = replace(view, decision=body.reason, policy=body.policy)
    if body.severity is Severity.INFO:
        return view
    tone = Tone.BAD if body.severity is Severity.CRITICAL else Tone.WARNING
    text = "asks for a rollback" if body.severity is Severity.CRITICAL else "warns"
    return _note(view, at, body.epoch, view.step, "tamiyo", text, body.reason, tone=tone)


def _on_field_report(view: LiveView, body: FieldReport, _at: float) -> LiveView:
    return replace(view, outcomes={**view.outcomes, body.outcome: view.outcomes.get(body.outcome, 0) + 1})


def _on_alert(view: LiveView, body: Alert, _at: float) -> LiveView:
    """An alert is two notes: that it began, and that it is over. What is told of it between replaces it."""
    old = view.alerts.get(body.alert_id)
    if old is not None and not old.is_open:
        return view
    alerts = _trimmed({**view.alerts, body.alert_id: body})
    view = replace(view, alerts=alerts)
    epoch = min(view.epochs_done, max(view.num_epochs - 1, 0))
    if old is None:
        view = replace(view, num_alerts={**view.num_alerts, body.kind: view.num_alerts.get(body.kind, 0) + 1})
        tone = Tone.BAD if body.severity is Severity.CRITICAL else Tone.WARNING
        step = view.step if body.since_step is None else body.since_step
        view = _note(view, body.since, epoch, step, body.place, body.summary, body.evidence, tone=tone)
    if body.ended_at is None:
        return view
    step = view.step if body.ended_step is None else body.ended_step
    text = f"{body.summary}: over"
    return _note(view, body.ended_at, epoch, step, body.place, text, body.ending, tone=Tone.GOOD)


def _trimmed(alerts: dict[str, Alert]) -> dict[str, Alert]:
    """At most `NUM_ALERTS`: of those that ended the oldest goes first, then the oldest of all."""
    while len(alerts) > NUM_ALERTS:
        del alerts[next((key for key, alert in alerts.items() if not alert.is_open), next(iter(alerts)))]
    return alerts


def _key(site: str, seed_id: str) -> str:
    return f"{site}\n{seed_id}"


def _note(
    view: LiveView,
    at: float,
    epoch: int,
    step: int,
    subject: str,
    text: str,
    reason: str = "",
    *,
    tone: Tone,
    stage: SeedStage | None = None,
) -> LiveView:
    number = view.num_notes + 1
    note = Note(number, at, epoch, step, subject, text, reason, tone, stage)
    return replace(view, notes=(*view.notes, note)[-NUM_NOTES:], num_notes=number)


_FOLDS: dict[type[Contract], Callable[[LiveView, Any, float], LiveView]] = {
    RunStarted: _on_run_started,
    EpochRecord: _on_epoch,
    StepBatch: _on_steps,
    LayerHealthReport: _on_health,
    LifecycleEvent: _on_lifecycle,
    RungChange: _on_rung,
    AdaptationSignal: _on_decision,
    FieldReport: _on_field_report,
    Alert: _on_alert,
}
