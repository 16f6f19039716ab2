"""What a layer tells at the end of an interval: the health of its site, and each seed with its gate."""

from __future__ import annotations

from collections.abc import Callable

from esper.kasmina.gates import Gate
from esper.kasmina.health import Health
from esper.kasmina.layer import Layer
from esper.kasmina.lifecycle import Moment
from esper.kasmina.seed import Seed
from esper.leyline.signals import HealthSignal, LayerHealthReport


def layer_report(layer: Layer, moment: Moment, gate_of: Callable[[Layer, Seed], Gate]) -> LayerHealthReport:
    """The report of one layer; the figures of health are the site's, and so the same for all its seeds."""
    health = layer.observer.health()
    return LayerHealthReport(
        run_id=moment.run_id,
        layer_id=layer.site,
        signature=layer.signature,
        epoch=moment.epoch,
        step=moment.step,
        num_samples=health.num_samples,
        seeds=tuple(_signal(layer, seed, health, gate_of(layer, seed), moment.epoch) for seed in layer.seeds),
    )


def _signal(layer: Layer, seed: Seed, health: Health, gate: Gate, epoch: int) -> HealthSignal:
    view = seed.view(layer.signature)
    skipped = f" ({health.num_skipped} samples of health were not finite)" if health.num_skipped else ""
    return HealthSignal(
        layer_id=layer.site,
        seed_id=seed.seed_id,
        epoch=epoch,
        stage=view.stage,
        activation_variance=health.activation_variance,
        dead_neuron_ratio=health.dead_neuron_ratio,
        avg_correlation=health.avg_correlation,
        gradient_norm=health.gradient_norm,
        grow_potential=health.grow_potential,
        health_score=health.score,
        alpha=view.alpha,
        epochs_in_stage=view.epochs_in_stage,
        blueprint=view.blueprint,
        kernel_id=view.kernel_id,
        evidence=seed.harm if seed.harm is not None else seed.evidence,
        train_loss=seed.mean_loss(),
        is_ready_for_transition=gate.open,
        should_cull=gate.cull,
        gate=gate.words + skipped,
        trace_id=view.trace_id,
    )
