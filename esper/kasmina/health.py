"""The health of a site, and of each chunk of its channels, out of what sampled steps added up to.

A chunk is a run of neighbouring channels; `kasmina.chunks` says into how many a site is cut. A figure without a sample
is None, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from esper.kasmina.sums import Sums
from esper.leyline.growth import PROBE_FEATURES


@dataclass(frozen=True, slots=True)
class Health:
    """The figures of one interval; None is not measured. See `HealthSignal` for their meaning.

    Attributes:
        gradient_norm: mean over samples of the norm of that sample's slice of dL/dh.
        num_samples: samples seen.
        num_skipped: sampled steps left out for values that were not finite.
    """

    activation_variance: float | None = None
    dead_neuron_ratio: float | None = None
    avg_correlation: float | None = None
    gradient_norm: float | None = None
    grow_potential: float | None = None
    num_samples: int = 0
    num_skipped: int = 0

    @property
    def score(self) -> float | None:
        """(1 - dead ratio) * sqrt(1 - correlation^2): the share of channels that live, times the share of a channel's
        deviation that another does not foretell. 0 where nothing varies; correlation counts as 0 where there are
        fewer than two live channels to compare.
        """
        if self.dead_neuron_ratio is None or self.activation_variance is None:
            return None
        if self.activation_variance == 0.0:
            return 0.0
        return (1.0 - self.dead_neuron_ratio) * math.sqrt(1.0 - (self.avg_correlation or 0.0) ** 2)


def chunks_of(channels: int, num_chunks: int) -> tuple[range, ...]:
    """The channels of each chunk: as even as can be, and never more chunks than channels."""
    num = min(num_chunks, channels)
    return tuple(range(k * channels // num, (k + 1) * channels // num) for k in range(num))


def watched_channels(channels: int, limit: int) -> torch.Tensor:
    """Numbers of the channels whose correlations are taken: all, or `limit` that are spread evenly."""
    num = min(channels, limit)
    return torch.arange(num) * channels // num


def health_of_site(sums: Sums) -> Health:
    """The figures over all channels."""
    return _health(sums, sums, norm=0)


def health_of_chunks(sums: Sums, chunks: tuple[range, ...], watched: torch.Tensor) -> tuple[Health, ...]:
    """The figures of each chunk; none where the site is one chunk.

    Args:
        sums: of the site.
        chunks: their channels.
        watched: numbers of the channels that `sums.comoment_ww` is of, on its device.
    """
    if len(chunks) == 1:
        return ()
    return tuple(_health(sums, _slice(sums, chunk, watched), norm=1 + k) for k, chunk in enumerate(chunks))


def _slice(sums: Sums, chunk: range, watched: torch.Tensor) -> Sums:
    """The sums of the channels of one chunk."""
    channels = slice(chunk.start, chunk.stop)
    inside = (watched >= chunk.start) & (watched < chunk.stop)
    return Sums(
        samples=sums.samples,
        skipped=sums.skipped,
        rows=sums.rows,
        gradients=sums.gradients,
        pulls=sums.pulls,
        mean_c=sums.mean_c[channels],
        deviation_c=sums.deviation_c[channels],
        comoment_ww=sums.comoment_ww[inside][:, inside],
        alive_c=sums.alive_c[channels],
        norms_k=sums.norms_k,
        pull_cp=sums.pull_cp[channels],
    )


def _health(site: Sums, part: Sums, *, norm: int) -> Health:
    pull = float((part.pull_cp / part.pulls).norm()) if part.pulls else None
    return Health(
        activation_variance=float((part.deviation_c / part.rows).mean()) if part.rows else None,
        dead_neuron_ratio=float(1.0 - part.alive_c.mean()) if part.rows else None,
        avg_correlation=correlation(part.comoment_ww),
        gradient_norm=float(site.norms_k[norm]) / site.gradients if site.gradients else None,
        grow_potential=pull / math.sqrt(PROBE_FEATURES) if pull is not None else None,
        num_samples=site.samples,
        num_skipped=site.skipped,
    )


def correlation(comoment_ww: torch.Tensor) -> float | None:
    """Mean absolute correlation over pairs of channels that vary; None with fewer than two."""
    variance = comoment_ww.diagonal()
    alive = variance > 0.0
    num = int(alive.sum())
    if num < 2:
        return None
    scale = variance[alive].rsqrt()
    found = (comoment_ww[alive][:, alive] * scale[:, None] * scale[None, :]).abs()
    off_diagonal = found.sum() - found.diagonal().sum()
    return min(1.0, max(0.0, float(off_diagonal) / (num * (num - 1))))
