"""What the systems tell each other: telemetry upward, commands downward, events to whoever listens."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator

from esper.leyline.contract import API_VERSION, Contract, Finite, Fraction, Name, new_id, now
from esper.leyline.evidence import PAIRED, BlendStrategy, Evidence, EvidenceKind
from esper.leyline.flags import AlertFlag, Severity
from esper.leyline.kernels import SiteSignature, ValidationReport
from esper.leyline.seeds import SeedStage
from esper.leyline.steering import PersonsWord
from esper.leyline.track import TrackRecord
from esper.leyline.trials import TrialRequest, TrialState

# ---------------------------------------------------------------- telemetry


class ChunkHealth(Contract):
    """The health of one chunk, a run of neighbouring channels of a site; the figures are as in `HealthSignal`.

    Attributes:
        first_channel, num_channels: which of the site's channels.
        avg_correlation: between the chunk's own channels; None with fewer than two that are watched.
    """

    chunk_id: Annotated[int, Field(ge=0)]
    first_channel: Annotated[int, Field(ge=0)]
    num_channels: Annotated[int, Field(ge=1)]
    activation_variance: Finite | None = None
    dead_neuron_ratio: Fraction | None = None
    avg_correlation: Fraction | None = None
    gradient_norm: Finite | None = None
    grow_potential: Finite | None = None
    health_score: Fraction | None = None


class HealthSignal(Contract):
    """The health of one seed, or of its site while the seed is dormant, over one epoch (or control interval).

    A figure that was not measured is None, and a gate or policy that needs it says so: unmeasured is not healthy.

    Attributes:
        layer_id: the site's name (module path).
        seed_id: unique within the run.
        chunk_id: the chunk of the site's channels with the largest growth potential (see `LayerHealthReport.chunks`);
            0 where the site is one chunk. The other figures are of all channels, as a kernel is.
        activation_variance: mean over channels of the variance of h.
        dead_neuron_ratio: share of channels whose activation never exceeded a small threshold.
        avg_correlation: mean absolute correlation between channels of h.
        gradient_norm: norm of dL/dh, per sample.
        grow_potential: norm of the loss gradient at a zero-initialised last layer placed here.
        health_score: 1 is healthy, 0 is a layer that carries nothing.
        alpha: how far the seed is blended in.
        epochs_in_stage: control intervals since it entered `stage`.
        runs: forwards of its kernel on the live path in this interval, on the worker that reports.
        latency_ms: mean time of such a forward, on the sampled steps of training.
        is_ready_for_transition: whether the gate of the next stage is open.
        should_cull: whether the gate asks for removal (harm, or no gain within its time).
        gate: the gate's words.
        trace_id: of the adaptation under way; empty without one.
    """

    layer_id: str
    seed_id: str
    chunk_id: Annotated[int, Field(ge=0)] = 0
    epoch: Annotated[int, Field(ge=0)]
    stage: SeedStage = SeedStage.DORMANT
    activation_variance: Finite | None = None
    dead_neuron_ratio: Fraction | None = None
    avg_correlation: Fraction | None = None
    gradient_norm: Finite | None = None
    grow_potential: Finite | None = None
    health_score: Fraction | None = None
    alpha: Fraction = 0.0
    epochs_in_stage: Annotated[int, Field(ge=0)] = 0
    blueprint: str | None = None
    kernel_id: str | None = None
    evidence: Evidence | None = None
    train_loss: Finite | None = None
    runs: Annotated[int, Field(ge=0)] = 0
    latency_ms: Annotated[Finite, Field(ge=0.0)] | None = None
    is_ready_for_transition: bool = False
    should_cull: bool = False
    gate: str = ""
    trace_id: str = ""


class LayerHealthReport(Contract):
    """All seeds of one site, with the site's place in the host.

    Attributes:
        num_samples: that the figures are of, over all ranks.
        chunks: the figures of each chunk, where the site is cut into several (`kasmina.chunks`).
    """

    api_version: int = API_VERSION
    run_id: str
    layer_id: str
    signature: SiteSignature
    epoch: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    num_samples: Annotated[int, Field(ge=0)] = 0
    chunks: tuple[ChunkHealth, ...] = ()
    seeds: tuple[HealthSignal, ...]


class KernelOption(Contract):
    """A kernel that fits a site and is ready, as Tamiyo sees it. Costs are per sample, forward.

    `risk` is Urabrask's `risk_score`, None where there is none. `blueprint`, `aliases` and `record`: see `KernelBrief`.
    `others` are further sites of the same signature for which this very kernel is ready: it travels once for all.
    """

    site: str
    others: tuple[str, ...] = ()
    kernel_id: str
    blueprint_id: str
    blueprint: str
    num_parameters: Annotated[int, Field(ge=0)]
    flops_per_sample: Annotated[int, Field(ge=0)]
    zero_at_birth: bool
    tags: tuple[str, ...] = ()
    risk: Fraction | None = None
    aliases: tuple[str, ...] = ()
    record: TrackRecord | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites that it is ready for."""
        return (self.site, *self.others)


class BudgetState(Contract):
    """What growth may still spend. Limits are absolute; None is no limit."""

    params_used: Annotated[int, Field(ge=0)]
    params_limit: Annotated[int, Field(ge=0)] | None = None
    flops_used: Annotated[int, Field(ge=0)]
    flops_limit: Annotated[int, Field(ge=0)] | None = None


class CircuitState(StrEnum):
    """Whether another system is asked: always, not at all for a while, or once to see whether it is back."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class EpochRecord(Contract):
    """One row of a run's history.

    Attributes:
        epoch, step: epochs are numbered from 0, steps count optimizer steps since the start.
        val_metric: the task's headline metric on validation data, in [0, 1] for accuracy; None without one.
        params: trainable parameters on the live path.
        flops_per_sample: forward FLOPs of the live path for one sample.
        total_flops: FLOPs of everything so far (the ledger's total).
        flops_by_purpose, seconds_by_purpose: the ledger so far (see `Flops` and `Seconds`), without its totals; empty
            in records from before it was told.
        rollbacks: returns to a last good state so far.
        pending: kernels that are submitted and not yet ready.
        urza, tamiyo: the trainer's circuit breakers towards them.
        cache_hits, cache_misses: look-ups in the trainer's kernel cache since it started.
    """

    run_id: str
    epoch: Annotated[int, Field(ge=0)]
    num_epochs: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    train_loss: Finite
    train_metric: Finite | None = None
    val_loss: Finite | None = None
    val_metric: Finite | None = None
    metric_name: str | None = None
    learning_rate: Finite = 0.0
    params: Annotated[int, Field(ge=0)] = 0
    flops_per_sample: Annotated[int, Field(ge=0)] = 0
    total_flops: Annotated[int, Field(ge=0)] = 0
    flops_by_purpose: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    seconds_by_purpose: dict[str, Finite] = Field(default_factory=dict)
    rollbacks: Annotated[int, Field(ge=0)] = 0
    seconds: Finite = 0.0
    step_ms: Finite = 0.0
    kernels_ready: Annotated[int, Field(ge=0)] = 0
    pending: Annotated[int, Field(ge=0)] = 0
    urza: CircuitState = CircuitState.CLOSED
    tamiyo: CircuitState = CircuitState.CLOSED
    cache_hits: Annotated[int, Field(ge=0)] = 0
    cache_misses: Annotated[int, Field(ge=0)] = 0


class SystemStatePacket(Contract):
    """All that Tamiyo may use for one decision; replicas keep no state of their own.

    Attributes:
        layers: health of every site.
        options: the kernels that fit and are ready.
        embargoed: `site` or `site:blueprint` keys that must not be grown at present.
        missing: systems the run goes without at present, in words.
        words: what people said of adaptations, the newest of each.
        ended: what became of the run's adaptations so far, in their order.
        trials: of trials by fork; None in a run without them.
        alerts: Nissa's, of this run, that stand as far as it has heard; none in deterministic mode.
    """

    api_version: int = API_VERSION
    run_id: str
    epoch: EpochRecord
    layers: tuple[LayerHealthReport, ...]
    options: tuple[KernelOption, ...] = ()
    budget: BudgetState
    embargoed: tuple[str, ...] = ()
    governor: str = "ok"
    missing: tuple[str, ...] = ()
    words: tuple[PersonsWord, ...] = ()
    ended: tuple[FieldReport, ...] = ()
    trials: TrialState | None = None
    alerts: tuple[AlertFlag, ...] = ()


class RunState(Contract):
    """What a run that listens tells of itself once an epoch, beside its health and its epoch's row: with these two it
    makes the packet. A run that asks sends the packet itself.

    Attributes:
        sites: whose reports belong to the packet.
        memory: Tamiyo's, as the run keeps it.
        config: how Tamiyo shall decide, as `tamiyo` of the run's configuration.
        The others are as in `SystemStatePacket`.
    """

    api_version: int = API_VERSION
    run_id: str
    epoch: Annotated[int, Field(ge=0)]
    sites: tuple[str, ...]
    memory: dict[str, Any]
    config: dict[str, Any]
    options: tuple[KernelOption, ...] = ()
    budget: BudgetState
    embargoed: tuple[str, ...] = ()
    governor: str = "ok"
    missing: tuple[str, ...] = ()
    words: tuple[PersonsWord, ...] = ()
    ended: tuple[FieldReport, ...] = ()
    alerts: tuple[AlertFlag, ...] = ()


# ---------------------------------------------------------------- commands


class Action(StrEnum):
    """What a command asks of a seed."""

    GERMINATE = "germinate"  # DORMANT → GERMINATED: request the kernel
    ADVANCE = "advance"  # to the next stage, through its gate
    CULL = "cull"  # in TRAINING without a trace; once blended the site returns to the identity at once
    RETIRE = "retire"  # alpha ramps to 0 while the host trains; then the site is exactly the identity


class KasminaControlCommand(Contract):
    """One order to one seed.

    Attributes:
        command_id: that of a GERMINATE is the trace id of the adaptation that begins with it.
        kernel_id, blueprint, strategy: for GERMINATE.
        lr_factor: likewise; the kernel's learning rate on the live path, as a factor of the host's.
        trial_id: likewise, of the trial that it has won: it begins with the weights that its fork trained.
        reason: why, in words; shown to people and kept in the summary.
    """

    command_id: str = Field(default_factory=new_id)
    action: Action
    site: str
    seed_id: str
    kernel_id: str | None = None
    blueprint: str | None = None
    strategy: BlendStrategy = BlendStrategy.RAMP
    lr_factor: Annotated[Finite, Field(gt=0)] = 1.0
    trial_id: str = ""
    reason: Annotated[str, Field(min_length=1)]


class Gate(StrEnum):
    """What stands between a policy's wish and a command; every veto names one."""

    GOVERNOR = "governor"  # it is not ok, or asks for a rollback
    ALERT = "alert"  # Nissa says that the loss runs away
    STAGE = "stage"  # the seed cannot take this order where it stands
    EVIDENCE = "evidence"  # its gate is shut, or nothing paired was measured
    TIME = "time"  # too late in the run, or all adaptations are spent
    CONCURRENCY = "concurrency"  # others are under way
    COOLDOWN = "cooldown"  # an adaptation has just ended, or a trial found nothing
    EMBARGO = "embargo"
    BUDGET = "budget"  # of parameters or FLOPs
    KERNEL = "kernel"  # it is not ready, or does not suit the strategy
    SCHEDULE = "schedule"  # an entry cannot be carried out at present, or never
    UNCERTAINTY = "uncertainty"  # a learned policy knows too little of what comes of its choice
    CONFIDENCE = "confidence"  # or its choice is not clear enough


class Veto(Contract):
    """An order that a policy gave and that was not passed on.

    Attributes:
        what: the order, in words.
        reason: why not.
        seed_id: empty where no seed was chosen yet.
        blueprint: of the kernel; None for orders to a seed that has one.
    """

    gate: Gate
    action: Action
    site: str
    seed_id: str = ""
    blueprint: str | None = None
    what: str
    reason: Annotated[str, Field(min_length=1)]

    @property
    def in_words(self) -> str:
        """Order and reason."""
        return f"{self.what}: {self.reason}"

    @property
    def subject(self) -> tuple[str, ...]:
        """What it is about: equal for a veto that lasts, though the figures of a learned policy differ each time."""
        has_figures = self.gate in {Gate.UNCERTAINTY, Gate.CONFIDENCE}
        return (self.gate, self.site, self.seed_id, self.what, "" if has_figures else self.reason)


class Attribution(Contract):
    """What one feature contributed to a learned policy's choice.

    Attributes:
        of: the node: `run`, a site, a seed or a design.
        feature: its name, as in `esper.tamiyo.features` and `esper.tamiyo.observation`.
        value: what it was.
        effect: by how much the choice's log-probability would fall, to first order, if it were 0.
    """

    of: str
    feature: str
    value: Finite
    effect: Finite

    @property
    def in_words(self) -> str:
        """Node, feature, value and effect."""
        return f"{self.of} {self.feature} {self.value:.2f} ({self.effect:+.2f})"


class Explanation(Contract):
    """Why a learned policy chose what it chose, in numbers.

    Attributes:
        version: of the policy.
        operation: what it wanted, and where, with which design and strategy; done if no veto says otherwise.
        chances: of each operation that the masks allow.
        confidence: that of the chosen one.
        log_prob: of the whole choice; None where it was held back, so that something else was done.
        entropy: of the choice, natural logarithm.
        value: expected of the run from here on, in units of the policy's reward.
        forecast, forecast_error: what an ensemble expects to come of the choice, in units of its training's outcome,
            and the standard error that its members' disagreement stood for on runs held out; None where that was never
            measured.
        uncertainty: from 0 to 1, see `tamiyo.gnn.max_uncertainty`; likewise.
        attention: the sites with the largest shares of the network's attention.
        attributions: the features that contributed most, for and against.
    """

    version: str
    operation: str
    site: str | None = None
    seed_id: str | None = None
    blueprint: str | None = None
    strategy: BlendStrategy | None = None
    chances: dict[str, Fraction]
    confidence: Fraction
    log_prob: Finite | None
    entropy: Finite
    value: Finite
    forecast: Finite | None = None
    forecast_error: Finite | None = None
    uncertainty: Fraction | None = None
    attention: dict[str, Fraction] = Field(default_factory=dict)
    attributions: tuple[Attribution, ...] = ()

    @property
    def in_words(self) -> str:
        """One sentence for a person."""
        what = " ".join(part for part in (self.operation, self.blueprint, self._where, self._how) if part)
        others = sorted(((p, op) for op, p in self.chances.items() if op != self.operation), reverse=True)
        beside = "".join(f", {op} {p:.0%}" for p, op in others[:2])
        parts = [f"policy {self.version[:8]} chose {what} ({self.confidence:.0%}{beside})"]
        if not others:
            return f"{parts[0]}: nothing else is allowed"
        if self.forecast is not None:
            parts.append(
                f"expects {self.forecast:+.3g} ± {self.forecast_error:.2g} of it (uncertainty {self.uncertainty:.2f})"
            )
        if self.attention:
            parts.append("looked at " + ", ".join(f"{site} {share:.0%}" for site, share in self.attention.items()))
        told = [("for it", 1.0), ("against it", -1.0)]
        for words, sign in told:
            found = [one.in_words for one in self.attributions if sign * one.effect > 0.0]
            parts.extend([f"{words}: {', '.join(found)}"] if found else [])
        return "; ".join(parts)

    @property
    def _where(self) -> str:
        return "" if self.site is None else f"at {self.site}" if self.seed_id is None else f"{self.site}/{self.seed_id}"

    @property
    def _how(self) -> str:
        return "" if self.strategy is None else f"by {self.strategy}"


class AdaptationSignal(Contract):
    """Tamiyo's answer to one packet. No commands means: wait; `reason` says why.

    Attributes:
        value: what the policy expects of the run from here on, in units of its reward; None where it expects nothing.
        explanation: of a learned policy's choice.
        memory: Tamiyo's state after it, where nobody asked and so nobody gets it as an answer: the run keeps it.
        trial: what is asked for before anything begins.
    """

    api_version: int = API_VERSION
    signal_id: str = Field(default_factory=new_id)
    run_id: str
    epoch: Annotated[int, Field(ge=0)]
    policy: str
    severity: Severity = Severity.INFO
    commands: tuple[KasminaControlCommand, ...] = ()
    vetoes: tuple[Veto, ...] = ()
    trial: TrialRequest | None = None
    reason: Annotated[str, Field(min_length=1)]
    value: Finite | None = None
    explanation: Explanation | None = None
    memory: dict[str, Any] | None = None

    @field_validator("vetoes", mode="before")
    @classmethod
    def _not_words(cls, vetoes: Any) -> Any:
        """Leaves out vetoes that are words alone, as they were told before gates had names: `reason` has them too."""
        return (
            tuple(veto for veto in vetoes if not isinstance(veto, str)) if isinstance(vetoes, list | tuple) else vetoes
        )


# ---------------------------------------------------------------- events and reports


class LifecycleEvent(Contract):
    """One transition of one seed, as the summary lists it.

    `refused` marks a command whose gate was shut: the stage did not change. `trace_id` is that of the adaptation.
    """

    run_id: str
    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    site: str
    seed: str
    blueprint: str | None = None
    kernel_id: str | None = None
    from_stage: SeedStage
    to_stage: SeedStage
    evidence: Evidence | None = None
    reason: str
    refused: bool = False
    trace_id: str = ""
    timestamp: Finite = Field(default_factory=now)


class Choice(Contract):
    """Where an adaptation begins: what was seen of a site when a kernel was chosen for it.

    Attributes:
        trace_id: of the adaptation: the id of the command.
        epoch, step: after which it was chosen.
        policy: who chose.
        health: of the seed's site over that epoch.
        reason: the policy's words.
        timestamp: of the answer, seconds since the epoch.
    """

    trace_id: str
    epoch: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    policy: str
    health: HealthSignal
    reason: str
    timestamp: Finite = Field(default_factory=now)


class VetoRecord(Contract):
    """A veto as a run remembers it. The same veto at one decision after the other is one record.

    Attributes:
        policy: whose order it was.
        trace_id: of the adaptation that was to be advanced or removed; empty for one that was to begin.
        epoch, step, timestamp: of the first time.
        last_epoch: of the last time.
        num: how often.
    """

    veto: Veto
    policy: str
    trace_id: str = ""
    epoch: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    last_epoch: Annotated[int, Field(ge=0)]
    num: Annotated[int, Field(ge=1)] = 1
    timestamp: Finite = Field(default_factory=now)


class Outcome(StrEnum):
    """How an adaptation ended."""

    FOSSILIZED = "fossilized"
    CULLED = "culled"
    CANCELLED = "cancelled"
    ROLLED_BACK = "rolled_back"
    UNFINISHED = "unfinished"  # the run ended first
    TRIED = "tried"  # in a fork alone: another won the trial, none did, or the run refused the one that did


class StageSpan(Contract):
    """How long a seed stood in one stage."""

    stage: SeedStage
    epochs: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]


class FieldReport(Contract):
    """What became of one adaptation, for Urza's statistics and for learning. `trace_id` is that of its events.

    Attributes:
        blueprint_id: empty where the kernel was refused or never came: it is known by name alone then.
        stages: those it went through, the last of them up to its end.
        evidence: of its worth, as it was last measured; None where nothing was.
        trial: what its fork came to, of an adaptation that had won a trial.
        seen: what was seen of the site when it was chosen; None of what a trial alone tried, and of what nobody chose.
        flops, seconds: of all that was computed for it behind the host.
        failure_reason: why it ended, in words; empty for a fossil.
    """

    api_version: int = API_VERSION
    report_id: str = Field(default_factory=new_id)
    trace_id: str = ""
    run_id: str
    site: str
    seed_id: str
    signature: SiteSignature
    blueprint_id: str
    blueprint: str
    kernel_id: str
    outcome: Outcome
    stages: tuple[StageSpan, ...] = ()
    evidence: Evidence | None = None
    trial: Evidence | None = None
    seen: HealthSignal | None = None
    num_parameters: Annotated[int, Field(ge=0)] = 0
    flops: Annotated[int, Field(ge=0)] = 0
    seconds: Finite = 0.0
    failure_reason: str = ""

    @property
    def worth(self) -> Evidence | None:
        """The evidence that says what it was worth: of a fossil that had won a trial, what its fork came to beside one
        that did not grow; else what was measured last. None where that was not paired.
        """
        tried = self.trial if self.outcome is Outcome.FOSSILIZED else None
        evidence = tried if tried is not None and tried.kind is EvidenceKind.FORK and tried.num_pairs else self.evidence
        return evidence if evidence is not None and evidence.kind in PAIRED and evidence.num_pairs else None

    @property
    def value(self) -> float | None:
        """What the adaptation was worth: its paired gain as a share of the larger of both losses, in [-1, 1].

        A kernel that was taken off the live path again is worth nothing at best, whatever it promised behind the host.
        None where nothing paired was measured, and where nothing was decided (cancelled, or the run ended first): what
        the host gained by itself meanwhile is nobody's.
        """
        evidence = self.worth
        if evidence is None:
            return None
        if self.outcome in {Outcome.CANCELLED, Outcome.UNFINISHED}:
            return None
        size = max(abs(evidence.baseline), abs(evidence.candidate), abs(evidence.gain))
        share = evidence.gain / size if size else 0.0
        was_live = self.outcome is Outcome.ROLLED_BACK or any(span.stage.is_blended for span in self.stages)
        return min(0.0, share) if was_live and self.outcome is not Outcome.FOSSILIZED else share


class KernelCharacterized(Contract):
    """Urabrask's verdict on one kernel."""

    kernel_id: str
    blueprint_id: str
    signature: SiteSignature
    report: ValidationReport


class StepBatch(Contract):
    """Telemetry of consecutive steps, sent many at a time.

    Attributes:
        first_step: number of the first step.
        losses, milliseconds: one entry a step.
        marks: steps at which the live path changed.
    """

    run_id: str
    first_step: Annotated[int, Field(ge=0)]
    losses: tuple[Finite, ...]
    milliseconds: tuple[Finite, ...]
    steps_per_epoch: Annotated[int, Field(ge=0)] = 0
    marks: tuple[int, ...] = ()


class RunStarted(Contract):
    """A run begins, or begins again after a crash.

    Attributes:
        num_events: lifecycle events that a run which begins again has behind it; what came after those is run anew.
    """

    run_id: str
    task: Name
    num_epochs: Annotated[int, Field(ge=1)]
    sites: dict[str, SiteSignature]
    params: Annotated[int, Field(ge=0)]
    directory: str
    resumed_from_epoch: int | None = None
    num_events: Annotated[int, Field(ge=0)] = 0
    started_at: Finite = Field(default_factory=now)
    extra: dict[str, Any] = Field(default_factory=dict)
