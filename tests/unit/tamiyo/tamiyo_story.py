"""A host that exists on paper: it sends Tamiyo packets, and its seeds obey the commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from esper.config import TamiyoConfig
from esper.leyline import (
    NEXT,
    Action,
    AdaptationSignal,
    BudgetState,
    EpochRecord,
    Evidence,
    EvidenceKind,
    HealthSignal,
    KernelOption,
    LayerHealthReport,
    SeedStage,
    SiteKind,
    SiteSignature,
    SystemStatePacket,
    advance,
)
from esper.tamiyo import initial_state, step

SIGNATURE = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(8, 8))
SHADOW = Evidence(kind=EvidenceKind.SHADOW, gain=0.1, stderr=0.01, num_pairs=360)


def option(site, blueprint, params=600, flops=10_000, *, zero=True, risk=None, aliases=()):
    return KernelOption(
        site=site,
        kernel_id=f"{site}-{blueprint}",
        blueprint_id=f"id-{blueprint}",
        blueprint=blueprint,
        num_parameters=params,
        flops_per_sample=flops,
        zero_at_birth=zero,
        risk=risk,
        aliases=aliases,
    )


def layer(site, epoch=0, *, seed_id="s0", potential=None, **health):
    signal = HealthSignal(layer_id=site, seed_id=seed_id, epoch=epoch, grow_potential=potential, **health)
    return LayerHealthReport(
        run_id="run", layer_id=site, signature=SIGNATURE, epoch=epoch, step=10 * epoch, seeds=(signal,)
    )


def packet(epoch, *layers, val_loss=1.0, num_epochs=30, options=(), budget=None, pending=0, **rest):
    return SystemStatePacket(
        run_id="run",
        epoch=EpochRecord(
            run_id="run",
            epoch=epoch,
            num_epochs=num_epochs,
            step=10 * epoch,
            train_loss=1.0,
            val_loss=val_loss,
            pending=pending,
        ),
        layers=layers,
        options=tuple(options),
        budget=budget or BudgetState(params_used=1000, params_limit=5812, flops_used=10_000, flops_limit=100_000),
        **rest,
    )


def told(signal):
    """A signal's vetoes in words, each with its gate."""
    return [(veto.gate.value, veto.in_words) for veto in signal.vetoes]


@dataclass
class PaperHost:
    """Runs epochs; `script` maps a site to (ready, cull, gate) by stage, by default every gate opens after an epoch."""

    config: TamiyoConfig
    options: tuple[KernelOption, ...]
    potentials: dict[str, float | None]
    losses: list[float]
    budget: BudgetState = field(
        default_factory=lambda: BudgetState(params_used=1000, params_limit=5812, flops_used=0, flops_limit=100_000)
    )
    harmful: frozenset[str] = frozenset()
    seed: int = 0
    embargo_epochs: int = 3

    def __post_init__(self):
        self.stages = dict.fromkeys(self.potentials, SeedStage.DORMANT)
        self.kernels: dict[str, KernelOption] = {}
        self.fossils: dict[str, int] = dict.fromkeys(self.potentials, 0)
        self.free_at: dict[str, int] = {}
        self.signals: list[AdaptationSignal] = []
        self.germinated: list[tuple[int, str, str]] = []
        self.most_active = 0

    def packet(self, epoch):
        layers = []
        for site, potential in self.potentials.items():
            stage, kernel = self.stages[site], self.kernels.get(site)
            under_way = stage.is_active
            culls = (
                under_way and stage is SeedStage.TRAINING and kernel is not None and kernel.blueprint in self.harmful
            )
            layers.append(
                layer(
                    site,
                    epoch,
                    seed_id=f"s{self.fossils[site]}",
                    potential=potential,
                    stage=stage,
                    alpha=1.0 if stage.is_blended else 0.0,
                    blueprint=kernel.blueprint if kernel else None,
                    kernel_id=kernel.kernel_id if kernel else None,
                    evidence=SHADOW if stage is SeedStage.TRAINING else None,
                    is_ready_for_transition=under_way and not culls,
                    should_cull=culls,
                    gate="no gain in time" if culls else "gain 0.1 over 360 pairs" if under_way else "",
                )
            )
        return packet(
            epoch,
            *layers,
            val_loss=self.losses[epoch],
            num_epochs=len(self.losses),
            options=self.options,
            budget=self.budget,
            embargoed=tuple(site for site, until in self.free_at.items() if epoch < until),
        )

    def run(self):
        state = initial_state(self.config, self.seed)
        for epoch in range(len(self.losses)):
            for site, until in self.free_at.items():
                if epoch >= until and self.stages[site] is SeedStage.CULLED:
                    self._move(site, SeedStage.DORMANT)
            state, signal = step(state, self.packet(epoch), self.config)
            self.signals.append(signal)
            for command in signal.commands:
                self._obey(command, epoch)
            self.most_active = max(self.most_active, sum(stage.is_active for stage in self.stages.values()))
            assert self._is_affordable()
        return state

    def _obey(self, command, epoch):
        site = command.site
        if command.action is Action.GERMINATE:
            self._move(site, SeedStage.GERMINATED)
            self.kernels[site] = next(o for o in self.options if o.kernel_id == command.kernel_id)
            self.germinated.append((epoch, site, command.blueprint))
        elif command.action is Action.ADVANCE:
            self._move(site, NEXT[self.stages[site]])
            if self.stages[site] is SeedStage.GRAFTING:
                self._charge(self.kernels[site])
        else:
            if self.stages[site].is_blended:
                self._charge(self.kernels[site], sign=-1)
            self._move(site, SeedStage.CULLED)
            self.free_at[site] = epoch + 1 + self.embargo_epochs

    def _move(self, site, stage):
        # raises on an illegal transition, which is what many tests are about
        self.stages[site] = advance(self.stages[site], stage)
        if stage is SeedStage.DORMANT:
            self.kernels.pop(site)

    def _charge(self, kernel, sign=1):
        self.budget = self.budget.model_copy(
            update={
                "params_used": self.budget.params_used + sign * kernel.num_parameters,
                "flops_used": self.budget.flops_used + sign * kernel.flops_per_sample,
            }
        )

    def _is_affordable(self):
        """Whether the live path, and everything that may still join it, fits the limits."""
        joining = [self.kernels[s] for s, stage in self.stages.items() if stage.is_active and not stage.is_blended]
        params = self.budget.params_used + sum(kernel.num_parameters for kernel in joining)
        flops = self.budget.flops_used + sum(kernel.flops_per_sample for kernel in joining)
        return (self.budget.params_limit is None or params <= self.budget.params_limit) and (
            self.budget.flops_limit is None or flops <= self.budget.flops_limit
        )
