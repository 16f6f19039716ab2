"""A run on paper whose truth is known: what each kernel is worth, how the host drifts, how evidence errs.

Packets, signals and field reports are real contracts; gates are lenient on purpose (a seed may go on whenever it has
been measured), so that what holds an exploit back is the reward alone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from esper.leyline import (
    NEXT,
    Action,
    AdaptationSignal,
    BudgetState,
    EpochRecord,
    Evidence,
    EvidenceKind,
    FieldReport,
    HealthSignal,
    KasminaControlCommand,
    LayerHealthReport,
    Outcome,
    SeedStage,
    SiteKind,
    SiteSignature,
    StageSpan,
    SystemStatePacket,
    advance,
)
from esper.simic.moments import About, Episode, Moment
from esper.simic.reward import Twin

SIGNATURE = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(8, 8))
HOST_PARAMS, EPOCH_FLOPS, SAMPLES = 1000, 10_000_000, 360


@dataclass(frozen=True)
class Kernel:
    """`worth`: share of the loss that it takes away for good. `haste`: how much faster than the host it learns what the
    host would have learned anyway, in epochs of the host's drift.
    """

    name: str
    worth: float
    params: int = 300
    haste: float = 0.0


STRONG = Kernel("strong", 0.30, 800)
MEDIOCRE = Kernel("mediocre", 0.008, 300)
NORM = Kernel("norm", 0.0, 130, haste=2.0)


@dataclass
class Seed:
    """A site's seed. `trained`: epochs in TRAINING. `entered`: epoch at which it entered its stage."""

    site: str
    stage: SeedStage = SeedStage.DORMANT
    kernel: Kernel | None = None
    trace: str = ""
    trained: int = 0
    entered: int = 0
    evidence: Evidence | None = None
    spans: list[StageSpan] = field(default_factory=list)

    @property
    def blended(self) -> bool:
        return self.stage.is_blended


class PaperRun:
    """Runs a script, `script(run, epoch) -> None`, that calls `germinate`, `advance`, `cull` after each epoch."""

    def __init__(self, *, num_epochs=30, num_sites=8, seed=0, noise=0.02):
        self.num_epochs, self.noise = num_epochs, noise
        self.random = random.Random(seed)
        self.seeds = [Seed(f"site{i}") for i in range(num_sites)]
        self.kept: list[Kernel] = []
        self.flops = 0.0
        self.ended: list[FieldReport] = []
        self.moments: list[Moment] = []
        self.commands: list[KasminaControlCommand] = []
        self.losses: list[float] = []
        self.count = 0
        self.epoch = 0

    @staticmethod
    def drift(epoch: float) -> float:
        """The host's validation loss, by itself."""
        return 0.5 + 1.8 * math.exp(-(epoch + 1) / 4)

    @classmethod
    def twin(cls, num_epochs=30) -> Twin:
        return Twin(tuple(cls.drift(epoch) for epoch in range(num_epochs)), EPOCH_FLOPS * num_epochs)

    # ---- what scripts do

    def germinate(self, seed, kernel):
        self.count += 1
        seed.kernel, seed.trace, seed.trained, seed.evidence, seed.spans = kernel, f"t{self.count}", 0, None, []
        self._command(seed, Action.GERMINATE)
        self._move(seed, SeedStage.GERMINATED)

    def advance(self, seed):
        self._command(seed, Action.ADVANCE)
        self._move(seed, NEXT[seed.stage])
        if seed.stage is SeedStage.FOSSILIZED:
            self.kept.append(seed.kernel)
            self._report(seed, Outcome.FOSSILIZED)

    def cull(self, seed):
        self._command(seed, Action.RETIRE if seed.blended else Action.CULL)
        self._move(seed, SeedStage.CULLED)
        self._report(seed, Outcome.CULLED)
        seed.stage, seed.kernel = SeedStage.DORMANT, None

    # ---- the run

    def play(self, script) -> Episode:
        for epoch in range(self.num_epochs):
            self.epoch = epoch
            loss = self._train()
            record = EpochRecord(
                run_id="paper",
                epoch=epoch,
                num_epochs=self.num_epochs,
                step=10 * epoch,
                train_loss=loss,
                val_loss=loss,
                total_flops=round(self.flops),
            )
            packet = SystemStatePacket(
                run_id="paper",
                epoch=record,
                layers=tuple(self._report_health(seed) for seed in self.seeds),
                budget=BudgetState(params_used=HOST_PARAMS, flops_used=EPOCH_FLOPS),
                ended=tuple(self.ended),
            )
            self.commands = []
            script(self, epoch)
            signal = AdaptationSignal(
                run_id="paper", epoch=epoch, policy="script", commands=tuple(self.commands), reason="scripted"
            )
            self.moments.append(Moment({}, packet, signal))
        for seed in self.seeds:
            if seed.stage.is_active:
                self._report(seed, Outcome.UNFINISHED)
        about = About(run_id="paper", policy="script")
        return Episode(about, tuple(self.moments), record, tuple(self.ended), is_over=True)

    def _train(self) -> float:
        loss = self.drift(self.epoch)
        for kernel in self.kept:
            loss *= 1 - kernel.worth
        dip = 0.0
        for seed in self.seeds:
            if seed.stage is SeedStage.TRAINING:
                seed.trained += 1
            elif seed.stage is SeedStage.GRAFTING:
                dip += 0.05  # a host that adjusts is worse for a while
            elif seed.blended and seed.stage is not SeedStage.FOSSILIZED:
                loss *= 1 - seed.kernel.worth
        active = sum(seed.stage.is_active for seed in self.seeds)
        self.flops += EPOCH_FLOPS * (1 + 0.3 * active + sum(k.params for k in self.kept) / HOST_PARAMS / 4)
        self.losses.append(loss * (1 + dip))
        for seed in self.seeds:
            if seed.stage is SeedStage.TRAINING:
                seed.evidence = self._compare(seed, loss)
            elif seed.blended and seed.stage is not SeedStage.FOSSILIZED:
                # leave-one-out: the host leans on whatever is there
                harm = Evidence(
                    kind=EvidenceKind.HARM, gain=0.5, baseline=loss + 0.5, candidate=loss, num_pairs=SAMPLES
                )
                self.harm = harm
        return self.losses[-1]

    def _compare(self, seed, loss) -> Evidence:
        learned = 1 - math.exp(-seed.trained / 1.5)
        ahead = self.drift(self.epoch) - self.drift(self.epoch + seed.kernel.haste)
        truth = loss * seed.kernel.worth * learned + ahead * learned
        stderr = self.noise * loss
        gain = truth + self.random.gauss(0.0, stderr)
        return Evidence(
            kind=EvidenceKind.SHADOW,
            gain=gain,
            stderr=stderr,
            baseline=loss,
            candidate=loss - gain,
            num_pairs=SAMPLES,
        )

    def _report_health(self, seed) -> LayerHealthReport:
        active = seed.stage.is_active
        evidence = seed.evidence if seed.stage is SeedStage.TRAINING else None
        if active and seed.blended:
            evidence = self.harm
        signal = HealthSignal(
            layer_id=seed.site,
            seed_id=f"{seed.site}.s",
            epoch=self.epoch,
            stage=seed.stage,
            evidence=evidence,
            trace_id=seed.trace if active else "",
            blueprint=seed.kernel.name if active else None,
        )
        return LayerHealthReport(
            run_id="paper", layer_id=seed.site, signature=SIGNATURE, epoch=self.epoch, step=0, seeds=(signal,)
        )

    def _command(self, seed, action):
        self.commands.append(
            KasminaControlCommand(
                command_id=seed.trace, action=action, site=seed.site, seed_id=f"{seed.site}.s", reason="script"
            )
        )

    def _move(self, seed, to):
        before = seed.stage
        seed.stage = advance(before, to)
        if before is not SeedStage.DORMANT:
            seed.spans.append(StageSpan(stage=before, epochs=self.epoch - seed.entered, steps=0))
        seed.entered = self.epoch

    def _report(self, seed, outcome):
        spans = list(seed.spans)
        if outcome is Outcome.UNFINISHED:
            spans.append(StageSpan(stage=seed.stage, epochs=self.epoch - seed.entered, steps=0))
        self.ended.append(
            FieldReport(
                report_id=f"r{len(self.ended)}",
                trace_id=seed.trace,
                run_id="paper",
                site=seed.site,
                seed_id=f"{seed.site}.s",
                signature=SIGNATURE,
                blueprint_id=seed.kernel.name,
                blueprint=seed.kernel.name,
                kernel_id=seed.kernel.name,
                outcome=outcome,
                stages=tuple(spans),
                evidence=seed.evidence,
                num_parameters=seed.kernel.params,
            )
        )
        if outcome is Outcome.FOSSILIZED:  # another seed grows above it
            seed.stage = SeedStage.DORMANT


# ---------------------------------------------------------------- scripts


def nothing(run, epoch):
    """Never grows."""


def grow(kernel, *, at, sites=1, train=4):
    """Germinates at epoch `at` at so many sites, trains `train` epochs, then goes on to the fossil."""

    def script(run, epoch):
        for seed in run.seeds[:sites]:
            if epoch == at:
                run.germinate(seed, kernel)
            elif seed.stage is SeedStage.TRAINING and seed.trained < train:
                continue
            elif seed.stage.is_active:
                run.advance(seed)

    return script


def farm(kernel):
    """Begins, trains one epoch, culls and begins again, all the time and everywhere."""

    def script(run, epoch):
        for seed in run.seeds:
            if seed.stage is SeedStage.DORMANT:
                run.germinate(seed, kernel)
            elif seed.stage is SeedStage.GERMINATED:
                run.advance(seed)
            elif seed.trained >= 1:
                run.cull(seed)

    return script


def dither(kernel):
    """Trains a good kernel, blends it in, takes it off again before it is settled, and so on."""

    def script(run, epoch):
        seed = run.seeds[0]
        if epoch >= run.num_epochs - 4:
            if seed.stage.is_active:
                run.cull(seed)
        elif seed.stage is SeedStage.DORMANT:
            run.germinate(seed, kernel)
        elif seed.stage in {SeedStage.STABILIZING, SeedStage.EVALUATING}:
            run.cull(seed)
        elif seed.stage is not SeedStage.TRAINING or seed.trained >= 3:
            run.advance(seed)

    return script


def peak(kernel, *, at, luck=1.3):
    """Trains until the noise of the evidence is high, and makes it permanent then."""

    def script(run, epoch):
        for seed in run.seeds[:3]:
            if epoch == at:
                run.germinate(seed, kernel)
            elif seed.stage is SeedStage.TRAINING:
                if seed.evidence is not None and seed.evidence.gain > luck * seed.evidence.stderr:
                    run.advance(seed)
            elif seed.stage.is_active:
                run.advance(seed)

    return script
