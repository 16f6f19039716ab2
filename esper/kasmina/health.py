"""The health of a site from sampled steps, in streams that need one pass and little memory.

An `Observer` sees h and dL/dh of a step and changes neither. Means and squared deviations are merged by the update of
Chan, Golub and LeVeque (1979) in float64, so that a large mean does not eat the variance. A figure without a sample is
None, never 0.

The growth potential is the norm of the gradient that the zero-initialised last layer of a kernel would receive here
(the idea of GradMax, Evci et al. 2022): with phi(h) = relu(h U) for a fixed random U, it is the norm of the mean over
the sampled steps of G = sum over samples and positions of dL/dh phi(h)^T, divided by sqrt(number of probe features).
U is scaled such that a probe feature is as large as a channel of h, and depends on nothing but the site's name.

Suffixes: n rows (samples times positions), c channels, k watched channels, p probe features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.leyline.errors import ConflictError
from esper.leyline.kernels import SiteKind, SiteSignature

DEAD_BELOW = 1e-6
"""A channel whose absolute activation never exceeds this is dead."""
MAX_WATCHED = 64
"""Channels whose correlations are watched; more are sampled evenly."""
PROBE_FEATURES = 32


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


class Moments:
    """Running mean [K] and co-moment [K, K] of rows [N, K]."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.comoment = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows_nk: torch.Tensor) -> None:
        """Merges the moments of a batch of rows."""
        rows = rows_nk.to(torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        num = rows.shape[0]
        total = self.count + num
        delta = mean - self.mean.to(mean.device)
        weight = self.count * num / total
        self.comoment = self.comoment.to(mean.device) + centred.T @ centred + weight * torch.outer(delta, delta)
        self.mean = self.mean.to(mean.device) + delta * (num / total)
        self.count = total

    def correlation(self) -> float | None:
        """Mean absolute correlation over pairs of channels that vary; None with fewer than two."""
        variance = self.comoment.diagonal()
        alive = variance > 0.0
        num = int(alive.sum())
        if num < 2:
            return None
        scale = variance[alive].rsqrt()
        correlation = (self.comoment[alive][:, alive] * scale[:, None] * scale[None, :]).abs()
        off_diagonal = correlation.sum() - correlation.diagonal().sum()
        return min(1.0, max(0.0, float(off_diagonal) / (num * (num - 1))))


class Observer:
    """Watches one site on sampled steps; see the module's docstring."""

    def __init__(self, site: str, signature: SiteSignature) -> None:
        self._kind = signature.kind
        self._channels = signature.channels
        num_watched = min(signature.channels, MAX_WATCHED)
        self._watched = torch.arange(num_watched) * signature.channels // num_watched
        digest = hashlib.sha256(site.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        probe = torch.randn(signature.channels, PROBE_FEATURES, generator=generator, dtype=torch.float32)
        self._probe_cp = probe * math.sqrt(2.0 / signature.channels)
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self._rows = 0
        self._mean = torch.zeros(self._channels, dtype=torch.float64)
        self._deviation = torch.zeros(self._channels, dtype=torch.float64)
        self._peak = torch.zeros(self._channels, dtype=torch.float64)
        self._moments = Moments(len(self._watched))
        self._samples = 0
        self._skipped = 0
        self._gradient = (0.0, 0)
        self._pull_cp = torch.zeros(self._channels, PROBE_FEATURES, dtype=torch.float64)
        self._pulls = 0

    @torch.no_grad()
    def watch(self, h: torch.Tensor) -> None:
        """Takes in h at once (the host may overwrite it later) and asks autograd for dL/dh."""
        rows_nc = self._as_rows(h.detach()).float()
        if not bool(torch.isfinite(rows_nc).all()):
            self._skipped += 1
            return
        self._samples += h.shape[0]
        self._add_channels(rows_nc)
        self._moments.add(rows_nc[:, self._watched.to(h.device)])
        if h.requires_grad:
            phi_np = torch.relu(rows_nc @ self._probe_cp.to(h.device))
            h.register_hook(lambda gradient: self._take_gradient(gradient, phi_np))

    def health(self) -> Health:
        """The figures since the last reset."""
        gradient, num_gradients = self._gradient
        pull = float((self._pull_cp / self._pulls).norm()) if self._pulls else None
        return Health(
            activation_variance=float((self._deviation / self._rows).mean()) if self._rows else None,
            dead_neuron_ratio=float((self._peak <= DEAD_BELOW).double().mean()) if self._rows else None,
            avg_correlation=self._moments.correlation(),
            gradient_norm=gradient / num_gradients if num_gradients else None,
            grow_potential=pull / math.sqrt(PROBE_FEATURES) if pull is not None else None,
            num_samples=self._samples,
            num_skipped=self._skipped,
        )

    def _as_rows(self, h: torch.Tensor) -> torch.Tensor:
        if self._kind is SiteKind.FEATURE_MAP:
            h = h.permute(0, 2, 3, 1)
        return h.reshape(-1, self._channels)

    def _add_channels(self, rows_nc: torch.Tensor) -> None:
        mean = rows_nc.mean(0, dtype=torch.float64)
        num = rows_nc.shape[0]
        total = self._rows + num
        delta = mean - self._mean.to(mean.device)
        # the difference is taken in float64: float32 would lose the deviation of a channel with a large mean
        deviation = (rows_nc - mean).square().sum(0)
        self._deviation = self._deviation.to(mean.device) + deviation + delta.square() * (self._rows * num / total)
        self._mean = self._mean.to(mean.device) + delta * (num / total)
        self._peak = torch.maximum(self._peak.to(mean.device), rows_nc.abs().amax(0).double())
        self._rows = total

    @torch.no_grad()
    def _take_gradient(self, gradient: torch.Tensor, phi_np: torch.Tensor) -> None:
        rows_nc = self._as_rows(gradient).float()
        if not bool(torch.isfinite(rows_nc).all()):
            self._skipped += 1
            return
        total, count = self._gradient
        norms = gradient.float().flatten(1).norm(dim=1)
        self._gradient = (total + float(norms.double().sum()), count + gradient.shape[0])
        self._pull_cp = self._pull_cp.to(gradient.device) + (rows_nc.T @ phi_np).double()
        self._pulls += 1

    # ---- for checkpoints

    def state(self) -> dict[str, Any]:
        """Everything since the last reset: numbers and tensors."""
        return {
            "rows": self._rows,
            "samples": self._samples,
            "skipped": self._skipped,
            "gradient": list(self._gradient),
            "pulls": self._pulls,
            "pull": self._pull_cp.clone(),
            "mean": self._mean.clone(),
            "deviation": self._deviation.clone(),
            "peak": self._peak.clone(),
            "moments": {
                "count": self._moments.count,
                "mean": self._moments.mean.clone(),
                "comoment": self._moments.comoment.clone(),
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned.

        Raises:
            ConflictError: if it comes from a site of another width.
        """
        if state["mean"].shape != (self._channels,):
            raise ConflictError(f"observations of {len(state['mean'])} channels at a site of {self._channels}")
        self._rows, self._samples, self._skipped = state["rows"], state["samples"], state["skipped"]
        self._gradient = (state["gradient"][0], state["gradient"][1])
        self._pulls = state["pulls"]
        self._pull_cp = state["pull"].clone()
        self._mean, self._deviation = state["mean"].clone(), state["deviation"].clone()
        self._peak = state["peak"].clone()
        self._moments.count = state["moments"]["count"]
        self._moments.mean = state["moments"]["mean"].clone()
        self._moments.comoment = state["moments"]["comoment"].clone()
