"""What a layer tells at the end of an interval: the health of its site and its chunks, and each seed with its gate."""

from __future__ import annotations

from collections.abc import Callable

from esper.kasmina.gates import Gate
from esper.kasmina.health import Health, health_of_chunks, health_of_site
from esper.kasmina.layer import Layer
from esper.kasmina.lifecycle import Moment
from esper.kasmina.seed import Seed
from esper.kasmina.sums import Sums
from esper.leyline.signals import ChunkHealth, HealthSignal, LayerHealthReport


def layer_report(layer: Layer, sums: Sums, moment: Moment, gate_of: Callable[[Layer, Seed], Gate]) -> LayerHealthReport:
    """The report of one layer; the figures of health are the site's, and so the same for all its seeds.

    Args:
        layer: whose report.
        sums: of its site's sampled steps, over all ranks.
        moment: the end of the interval.
        gate_of: the gate of each seed.
    """
    health = health_of_site(sums)
    chunks = _chunks(layer, sums)
    neediest = max(chunks, key=lambda chunk: chunk.grow_potential or 0.0).chunk_id if chunks else 0
    return LayerHealthReport(
        run_id=moment.run_id,
        layer_id=layer.site,
        signature=layer.signature,
        epoch=moment.epoch,
        step=moment.step,
        num_samples=health.num_samples,
        chunks=chunks,
        seeds=tuple(
            _signal(layer, seed, health, gate_of(layer, seed), epoch=moment.epoch, chunk_id=neediest)
            for seed in layer.seeds
        ),
    )


def _chunks(layer: Layer, sums: Sums) -> tuple[ChunkHealth, ...]:
    observer = layer.observer
    found = health_of_chunks(sums, observer.chunks, observer.watched)
    return tuple(
        ChunkHealth(
            chunk_id=number,
            first_channel=channels.start,
            num_channels=len(channels),
            activation_variance=health.activation_variance,
            dead_neuron_ratio=health.dead_neuron_ratio,
            avg_correlation=health.avg_correlation,
            gradient_norm=health.gradient_norm,
            grow_potential=health.grow_potential,
            health_score=health.score,
        )
        for number, (channels, health) in enumerate(zip(observer.chunks, found, strict=bool(found)))
    )


def _signal(layer: Layer, seed: Seed, health: Health, gate: Gate, *, epoch: int, chunk_id: int) -> HealthSignal:
    view, runs = seed.view(layer.signature), layer.meter.runs(seed.seed_id)
    skipped = f" ({health.num_skipped} samples of health were not finite)" if health.num_skipped else ""
    return HealthSignal(
        layer_id=layer.site,
        seed_id=seed.seed_id,
        chunk_id=chunk_id,
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
        runs=runs.num,
        latency_ms=runs.latency_ms,
        evidence=seed.harm if seed.harm is not None else seed.evidence,
        train_loss=seed.mean_loss(),
        is_ready_for_transition=gate.open,
        should_cull=gate.cull,
        gate=gate.words + skipped,
        trace_id=view.trace_id,
    )
