"""What sampled steps of one site add up to, and how the sums of several ranks become those of the whole batch.

Tensors are float64 and lie on the model's device. Suffixes: c channels, w watched channels, k chunks, p probe features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one site and one interval.

    Attributes:
        samples: that were seen.
        skipped: sampled steps left out for values that were not finite.
        rows: whose variance and correlation were taken.
        gradients: samples whose gradient came.
        pulls: steps that `pull_cp` sums over.
        mean_c, deviation_c: of the rows: mean, and sum of squared deviations from it.
        comoment_ww: sums of products of deviations.
        alive_c: 1 for a channel that was ever above the threshold, else 0.
        norms_k: sums over samples of the gradient's norm: of all channels, then of each chunk if there are several.
        pull_cp: sum of the gradients at the probe's last layer.
    """

    samples: int
    skipped: int
    rows: int
    gradients: int
    pulls: int
    mean_c: torch.Tensor
    deviation_c: torch.Tensor
    comoment_ww: torch.Tensor
    alive_c: torch.Tensor
    norms_k: torch.Tensor
    pull_cp: torch.Tensor


def merged(
    sites: Sequence[Sums],
    watched: Sequence[torch.Tensor],
    mean: Callable[[Sequence[torch.Tensor]], None],
    world: int,
) -> list[Sums]:
    """The sums over all ranks, equal on each of them: two all-reduces for all sites together. Collective.

    Each rank's loss is the mean over its own share, so its gradients are `world` times those of the whole batch.

    Args:
        sites: of this rank; every rank gives the same sites in the same order.
        watched: numbers of each site's watched channels.
        mean: averages tensors over ranks, in place.
        world: number of ranks.
    """
    firsts = [_first_round(sums) for sums in sites]
    mean([tensor for first in firsts for tensor in first])
    found: list[Sums] = []
    for own, (counts, mean_c, alive_c, norms_k, pull_cp) in zip(sites, firsts, strict=True):
        samples, skipped, rows, gradients, pulls = (round(n * world) for n in counts.tolist())
        common_c = mean_c * world / rows if rows else torch.zeros_like(mean_c)
        found.append(
            replace(
                own,
                samples=samples,
                skipped=skipped,
                rows=rows,
                gradients=gradients,
                pulls=pulls,
                mean_c=common_c,
                alive_c=(alive_c > 0).double(),
                norms_k=norms_k,  # the mean: `world` sums, of gradients that are `world` times too large
                pull_cp=pull_cp * world,
            )
        )
    # in a second round, around the common mean: sums of squares would cancel
    seconds = [
        _second_round(own, total.mean_c, channels) for own, total, channels in zip(sites, found, watched, strict=True)
    ]
    mean([tensor for second in seconds for tensor in second])
    return [
        replace(sums, deviation_c=deviation_c * world, comoment_ww=comoment_ww * world)
        for sums, (deviation_c, comoment_ww) in zip(found, seconds, strict=True)
    ]


def _first_round(sums: Sums) -> list[torch.Tensor]:
    counts = [sums.samples, sums.skipped, sums.rows, sums.gradients, sums.pulls]
    return [
        torch.tensor(counts, dtype=torch.float64, device=sums.mean_c.device),
        sums.mean_c * sums.rows,
        sums.alive_c.clone(),
        sums.norms_k.clone(),
        sums.pull_cp.clone(),
    ]


def _second_round(own: Sums, common_c: torch.Tensor, watched: torch.Tensor) -> list[torch.Tensor]:
    delta_c = own.mean_c - common_c
    delta_w = delta_c[watched]
    return [
        own.deviation_c + own.rows * delta_c.square(),
        own.comoment_ww + own.rows * torch.outer(delta_w, delta_w),
    ]
