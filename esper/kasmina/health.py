"""The health of a site from sampled steps, in streams that need one pass and little memory.

An `Observer` sees h and dL/dh of a step and changes neither. A sampled step takes little: the extremes of each channel
and the norms of the gradient from all of h, and for variance and correlation `HEALTH_ROWS` rows, spread evenly over
samples and positions, other ones at each step. Further arithmetic waits until several steps are there, and nothing
waits for the device before. Means and squared deviations are merged by the update of Chan, Golub and LeVeque (1979) in
float64, so that a large mean does not eat the variance. A figure without a sample is None, never 0.

The growth potential is the norm of the gradient that the zero-initialised last layer of a kernel would receive here
(the idea of GradMax, Evci et al. 2022): with phi(h) = relu(h U) for a fixed random U, it is the norm of the mean over
the sampled steps of G = sum over samples and positions of dL/dh phi(h)^T, divided by sqrt(number of probe features).
U is scaled such that a probe feature is as large as a channel of h, and depends on nothing but the site's name. It
is taken on every `PROBE_EVERY`th sampled step and then from all rows: from a share of them the noise of the choice
outweighs the mean (8 times too large on a map of 32 x 32, measured).

Suffixes: b samples, n rows (samples times positions), c channels, k watched channels, p probe features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.leyline.errors import ConflictError
from esper.leyline.growth import HEALTH_CHANNELS, HEALTH_ROWS, PROBE_FEATURES
from esper.leyline.kernels import SiteKind, SiteSignature

DEAD_BELOW = 1e-6
"""A channel whose absolute activation never exceeds this is dead."""
PROBE_EVERY = 2
"""Sampled steps to one on which the growth potential is taken; the first is one."""
PENDING_STEPS = 16
"""Sampled steps whose rows wait at most before they are worked into the figures: few large operations are cheap."""
PENDING_VALUES = 1 << 18
"""Numbers that wait at most: 1 MiB a site, in float32."""


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

    def add(self, mean_k: torch.Tensor, centred_nk: torch.Tensor) -> None:
        """Merges the moments of a batch of rows, given as their mean and what each deviates from it."""
        num = centred_nk.shape[0]
        total = self.count + num
        delta = mean_k - self.mean.to(mean_k.device)
        weight = self.count * num / total
        own = centred_nk.T @ centred_nk
        self.comoment = self.comoment.to(own.device) + own + weight * torch.outer(delta, delta)
        self.mean = self.mean.to(own.device) + delta * (num / total)
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


@dataclass(slots=True)
class _Sample:
    """What one sampled step left.

    Attributes:
        rows_nc: some rows of h.
        low_c, high_c: extremes of all of h.
        norm_b: norm of each sample's slice of dL/dh, once the backward has come.
        pull_cp: G of the step, if it is taken.
    """

    num_samples: int
    rows_nc: torch.Tensor
    low_c: torch.Tensor
    high_c: torch.Tensor
    norm_b: torch.Tensor | None = None
    pull_cp: torch.Tensor | None = None


def some_rows(h: torch.Tensor, kind: SiteKind, *, turn: int) -> torch.Tensor:
    """About `HEALTH_ROWS` rows [N, C] of `h`, a copy in float32.

    Args:
        h: of a site.
        kind: of the site.
        turn: number of the sampled step; it moves the first position.
    """
    every_sample = -(-h.shape[0] // HEALTH_ROWS)
    if every_sample > 1:
        turn, first = divmod(turn, every_sample)
        h = h[first::every_sample]
    h_bcl = h.flatten(2) if kind is SiteKind.FEATURE_MAP else h.reshape(h.shape[0], -1, h.shape[-1]).transpose(1, 2)
    positions = h_bcl.shape[2]
    stride = -(-positions // max(1, HEALTH_ROWS // h_bcl.shape[0]))
    while stride > 1 and kind is SiteKind.FEATURE_MAP and math.gcd(stride, h.shape[-1]) > 1:
        stride += 1  # else the same columns of a map would be taken in each of its lines
    rows_bnc = h_bcl[:, :, turn % min(stride, positions) :: stride].transpose(1, 2)
    copied = rows_bnc.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copied.view(-1, h_bcl.shape[1])


class Observer:
    """Watches one site on sampled steps; see the module's docstring."""

    def __init__(self, site: str, signature: SiteSignature) -> None:
        self._kind = signature.kind
        self._channels = signature.channels
        num_watched = min(signature.channels, HEALTH_CHANNELS)
        self._watched = torch.arange(num_watched) * signature.channels // num_watched
        digest = hashlib.sha256(site.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        probe = torch.randn(signature.channels, PROBE_FEATURES, generator=generator, dtype=torch.float32)
        self._probe_cp = probe * math.sqrt(2.0 / signature.channels)
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self._pending: list[_Sample] = []
        self._turn = 0
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
        # now, not at the end of this call: the latest sample still waits for its gradient
        if len(self._pending) >= PENDING_STEPS or sum(s.rows_nc.numel() for s in self._pending) > PENDING_VALUES:
            self._settle()
        values, is_map = h.detach(), self._kind is SiteKind.FEATURE_MAP
        over = (0, *range(2, h.dim())) if is_map else tuple(range(h.dim() - 1))
        rows_nc = some_rows(values, self._kind, turn=self._turn)
        sample = _Sample(h.shape[0], rows_nc, values.amin(over), values.amax(over))
        self._pending.append(sample)
        if h.requires_grad:
            with torch.autocast(h.device.type, enabled=False):  # phi must have the dtype that dL/dh will have
                phi = self._features(values) if self._turn % PROBE_EVERY == 0 else None
            h.register_hook(lambda gradient: _take_gradient(gradient, phi, sample))
        self._turn += 1

    def health(self) -> Health:
        """The figures since the last reset."""
        self._settle()
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

    def _features(self, h: torch.Tensor) -> torch.Tensor:
        """phi(h): [B, P, L] of a map, else [N, P]."""
        probe_cp = self._probe_cp.to(h.device, h.dtype)
        if self._kind is SiteKind.FEATURE_MAP:
            return torch.matmul(probe_cp.T, h.flatten(2)).relu_()
        return torch.mm(h.reshape(-1, self._channels), probe_cp).relu_()

    @torch.no_grad()
    def _settle(self) -> None:
        """Works the steps that wait into the figures; the first place that waits for the device."""
        if not self._pending:
            return
        waiting, self._pending = self._pending, []
        peaks = torch.stack([torch.maximum(-s.low_c, s.high_c) for s in waiting]).double()
        is_sound = peaks.isfinite().all(1).tolist()  # extremes hand on what is not finite
        self._skipped += is_sound.count(False)
        sound = [sample for sample, good in zip(waiting, is_sound, strict=True) if good]
        if not sound:
            return
        self._samples += sum(sample.num_samples for sample in sound)
        self._peak = torch.maximum(self._peak.to(peaks.device), peaks[torch.tensor(is_sound)].amax(0))
        rows_nc = torch.cat([sample.rows_nc for sample in sound]).double()
        mean_c = rows_nc.mean(0)
        centred_nc = rows_nc - mean_c
        self._add_channels(mean_c, centred_nc)
        if len(self._watched) < self._channels:
            watched = self._watched.to(mean_c.device)
            mean_c, centred_nc = mean_c[watched], centred_nc[:, watched]
        self._moments.add(mean_c, centred_nc)
        self._add_gradients(sound)

    def _add_channels(self, mean_c: torch.Tensor, centred_nc: torch.Tensor) -> None:
        num = centred_nc.shape[0]
        total = self._rows + num
        delta = mean_c - self._mean.to(mean_c.device)
        weight = self._rows * num / total
        own = centred_nc.square().sum(0)
        self._deviation = self._deviation.to(own.device) + own + delta.square() * weight
        self._mean = self._mean.to(own.device) + delta * (num / total)
        self._rows = total

    def _add_gradients(self, samples: list[_Sample]) -> None:
        # a sample without a gradient comes from a forward that was thrown away
        came = [(sample, sample.norm_b) for sample in samples if sample.norm_b is not None]
        if not came:
            return
        norms = torch.stack([norm_b.sum(dtype=torch.float64) for _, norm_b in came]).tolist()
        whole = [(sample, norm) for (sample, _), norm in zip(came, norms, strict=True) if math.isfinite(norm)]
        self._skipped += len(came) - len(whole)
        total, count = self._gradient
        count += sum(sample.num_samples for sample, _ in whole)
        self._gradient = (total + sum(norm for _, norm in whole), count)
        pulls = [sample.pull_cp for sample, _ in whole if sample.pull_cp is not None]
        if pulls:
            pull_cp = torch.stack(pulls).sum(0, dtype=torch.float64)
            self._pull_cp = self._pull_cp.to(pull_cp.device) + pull_cp
            self._pulls += len(pulls)

    # ---- for checkpoints

    def state(self) -> dict[str, Any]:
        """Everything since the last reset: numbers and tensors."""
        self._settle()
        return {
            "turn": self._turn,
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
        self._pending = []
        self._turn = state.get("turn", 0)  # younger than the first checkpoints
        self._rows, self._samples, self._skipped = state["rows"], state["samples"], state["skipped"]
        self._gradient = (state["gradient"][0], state["gradient"][1])
        self._pulls = state["pulls"]
        self._pull_cp = state["pull"].clone()
        self._mean, self._deviation = state["mean"].clone(), state["deviation"].clone()
        self._peak = state["peak"].clone()
        self._moments.count = state["moments"]["count"]
        self._moments.mean = state["moments"]["mean"].clone()
        self._moments.comoment = state["moments"]["comoment"].clone()


@torch.no_grad()
def _take_gradient(gradient: torch.Tensor, phi: torch.Tensor | None, sample: _Sample) -> None:
    sample.norm_b = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float32)
    if phi is None:
        return
    if phi.dim() == 3:  # of a map
        sample.pull_cp = torch.bmm(gradient.flatten(2), phi.transpose(1, 2)).sum(0, dtype=torch.float32)
    else:
        sample.pull_cp = torch.mm(gradient.reshape(phi.shape[0], -1).T, phi).float()
