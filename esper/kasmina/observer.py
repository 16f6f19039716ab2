"""Watches a site on sampled steps, in streams that need one pass and little memory.

An `Observer` sees h and dL/dh of a step and changes neither. A sampled step takes little: the extremes of each channel
and the norms of the gradient from all of h, and for variance and correlation `HEALTH_ROWS` rows, spread evenly over
samples and positions, other ones at each step. Further arithmetic waits until several steps are there, and nothing
waits for the device before. Means and squared deviations are merged by the update of Chan, Golub and LeVeque (1979) in
float64, so that a large mean does not eat the variance. What it keeps lies on the model's device, and the device is
waited for only when the steps that wait are worked in.

The growth potential is the norm of the gradient that the zero-initialised last layer of a kernel would receive here
(the idea of GradMax, Evci et al. 2022): with phi(h) = relu(h U) for a fixed random U, it is the norm of the mean over
the sampled steps of G = sum over samples and positions of dL/dh phi(h)^T, divided by sqrt(number of probe features).
U is scaled such that a probe feature is as large as a channel of h, and depends on nothing but the site's name. It
is taken on every `PROBE_EVERY`th sampled step and then from all rows: from a share of them the noise of the choice
outweighs the mean (8 times too large on a map of 32 x 32, measured).

Suffixes: b samples, n rows (samples times positions), c channels, w watched channels, k chunks, p probe features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.kasmina.health import chunks_of, watched_channels
from esper.kasmina.sums import Sums
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


@dataclass(slots=True)
class _Sample:
    """What one sampled step left.

    Attributes:
        rows_nc: some rows of h.
        low_c, high_c: extremes of all of h.
        norm_bk: norm of each sample's slice of dL/dh, once the backward has come: of all channels, then of each chunk.
        pull_cp: G of the step, if it is taken.
    """

    num_samples: int
    rows_nc: torch.Tensor
    low_c: torch.Tensor
    high_c: torch.Tensor
    norm_bk: torch.Tensor | None = None
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


_NUMBERS = ("turn", "samples", "skipped", "rows", "gradients", "pulls")
_TENSORS = ("mean_c", "deviation_c", "peak_c", "comoment_ww", "norms_k", "pull_cp")
"""What an observer keeps of an interval."""


class Observer:
    """Watches one site on sampled steps; see the module's docstring.

    Args:
        site: its name, which the probe depends on.
        signature: of the site.
        num_chunks: into how many runs of channels it is cut.

    Attributes:
        chunks: the channels of each.
        watched: numbers of the channels whose correlations are taken.
    """

    def __init__(self, site: str, signature: SiteSignature, *, num_chunks: int = 1) -> None:
        self._kind = signature.kind
        self._channels = signature.channels
        self.chunks = chunks_of(signature.channels, num_chunks)
        self.watched = watched_channels(signature.channels, HEALTH_CHANNELS)
        digest = hashlib.sha256(site.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        probe = torch.randn(signature.channels, PROBE_FEATURES, generator=generator, dtype=torch.float32)
        self._probe_cp = probe * math.sqrt(2.0 / signature.channels)
        self._device = torch.device("cpu")
        self.reset()

    def to(self, device: torch.device) -> None:
        """Goes to where the model lies, with all that it keeps."""
        self._settle()
        self._device = device
        self.watched = self.watched.to(device)
        self._probe_cp = self._probe_cp.to(device)
        for name in _TENSORS:
            setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))

    def reset(self) -> None:
        """Begins a new interval."""
        self._pending: list[_Sample] = []
        self._turn = 0
        self._samples = self._skipped = self._rows = self._gradients = self._pulls = 0
        self._mean_c = self._zeros(self._channels)
        self._deviation_c = self._zeros(self._channels)
        self._peak_c = self._zeros(self._channels)
        self._comoment_ww = self._zeros(len(self.watched), len(self.watched))
        self._norms_k = self._zeros(1 + len(self.chunks) if len(self.chunks) > 1 else 1)
        self._pull_cp = self._zeros(self._channels, PROBE_FEATURES)

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
            h.register_hook(lambda gradient: self._take_gradient(gradient, phi, sample))
        self._turn += 1

    def sums(self) -> Sums:
        """What the sampled steps since the last reset add up to."""
        self._settle()
        return Sums(
            samples=self._samples,
            skipped=self._skipped,
            rows=self._rows,
            gradients=self._gradients,
            pulls=self._pulls,
            mean_c=self._mean_c,
            deviation_c=self._deviation_c,
            comoment_ww=self._comoment_ww,
            alive_c=(self._peak_c > DEAD_BELOW).double(),
            norms_k=self._norms_k,
            pull_cp=self._pull_cp,
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def _features(self, h: torch.Tensor) -> torch.Tensor:
        """phi(h): [B, P, L] of a map, else [N, P]."""
        probe_cp = self._probe_cp.to(h.device, h.dtype)
        if self._kind is SiteKind.FEATURE_MAP:
            return torch.matmul(probe_cp.T, h.flatten(2)).relu_()
        return torch.mm(h.reshape(-1, self._channels), probe_cp).relu_()

    @torch.no_grad()
    def _take_gradient(self, gradient: torch.Tensor, phi: torch.Tensor | None, sample: _Sample) -> None:
        sample.norm_bk = self._norms(gradient)
        if phi is None:
            return
        if phi.dim() == 3:  # of a map
            sample.pull_cp = torch.bmm(gradient.flatten(2), phi.transpose(1, 2)).sum(0, dtype=torch.float32)
        else:
            sample.pull_cp = torch.mm(gradient.reshape(phi.shape[0], -1).T, phi).float()

    def _norms(self, gradient: torch.Tensor) -> torch.Tensor:
        """Of each sample, over all channels and over each chunk: [B, 1] or [B, 1 + K], float32."""
        if len(self.chunks) == 1:
            wide = torch.promote_types(gradient.dtype, torch.float32)  # narrower than the input it may not be
            return torch.linalg.vector_norm(gradient.flatten(1), dim=1, keepdim=True, dtype=wide).float()
        is_map = self._kind is SiteKind.FEATURE_MAP
        positions = tuple(range(2, gradient.dim())) if is_map else tuple(range(1, gradient.dim() - 1))
        # of each channel first: the channels of a chunk do not lie together in a sequence
        square_bc = gradient.float().square()
        square_bc = square_bc.sum(positions) if positions else square_bc
        parts = square_bc.split([len(chunk) for chunk in self.chunks], dim=1)
        square_bk = torch.stack([part.sum(1) for part in parts], 1)
        return torch.cat([square_bk.sum(1, keepdim=True), square_bk], 1).sqrt()

    @torch.no_grad()
    def _settle(self) -> None:
        """Works the steps that wait into the sums; the first place that waits for the device."""
        if not self._pending:
            return
        waiting, self._pending = self._pending, []
        peaks = torch.stack([torch.maximum(-s.low_c, s.high_c) for s in waiting]).to(self._device).double()
        is_sound = peaks.isfinite().all(1).tolist()  # extremes hand on what is not finite
        self._skipped += is_sound.count(False)
        sound = [place for place, good in enumerate(is_sound) if good]
        if not sound:
            return
        whole = [waiting[place] for place in sound]
        self._samples += sum(sample.num_samples for sample in whole)
        self._peak_c = torch.maximum(self._peak_c, (peaks if len(sound) == len(waiting) else peaks[sound]).amax(0))
        self._add_rows(torch.cat([sample.rows_nc for sample in whole]).to(self._device).double())
        self._add_gradients(whole)

    def _add_rows(self, rows_nc: torch.Tensor) -> None:
        num = rows_nc.shape[0]
        total = self._rows + num
        weight = self._rows * num / total
        mean_c = rows_nc.mean(0)
        centred_nc = rows_nc - mean_c
        delta_c = mean_c - self._mean_c
        self._deviation_c = self._deviation_c + centred_nc.square().sum(0) + delta_c.square() * weight
        self._mean_c = self._mean_c + delta_c * (num / total)
        self._rows = total
        if len(self.watched) < self._channels:
            delta_c, centred_nc = delta_c[self.watched], centred_nc[:, self.watched]
        own_ww = centred_nc.T @ centred_nc
        self._comoment_ww = self._comoment_ww + own_ww + weight * torch.outer(delta_c, delta_c)

    def _add_gradients(self, samples: list[_Sample]) -> None:
        # a sample without a gradient comes from a forward that was thrown away
        came = [(sample, sample.norm_bk) for sample in samples if sample.norm_bk is not None]
        if not came:
            return
        norms = torch.stack([norm_bk.sum(0, dtype=torch.float64) for _, norm_bk in came]).to(self._device)
        is_whole = norms.isfinite().all(1).tolist()
        self._skipped += is_whole.count(False)
        places = [place for place, good in enumerate(is_whole) if good]
        self._norms_k = self._norms_k + (norms if len(places) == len(came) else norms[places]).sum(0)
        whole = [came[place][0] for place in places]
        self._gradients += sum(sample.num_samples for sample in whole)
        pulls = [sample.pull_cp for sample in whole if sample.pull_cp is not None]
        if pulls:
            self._pull_cp = self._pull_cp + torch.stack(pulls).to(self._device).sum(0, dtype=torch.float64)
            self._pulls += len(pulls)

    # ---- for checkpoints

    def state(self) -> dict[str, Any]:
        """Everything since the last reset: numbers and tensors."""
        self._settle()
        numbers = {name: getattr(self, f"_{name}") for name in _NUMBERS}
        return numbers | {name: getattr(self, f"_{name}").clone() for name in _TENSORS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned. Of a state in the form of the first checkpoints, or with another number of
        chunks, the interval begins anew.

        Raises:
            ConflictError: if it comes from a site of another width.
        """
        width = len(state["mean_c"]) if "mean_c" in state else self._channels
        if width != self._channels:
            raise ConflictError(f"observations of {width} channels at a site of {self._channels}")
        self.reset()
        if "mean_c" not in state or len(state["norms_k"]) != len(self._norms_k):
            return
        for name in _NUMBERS:
            setattr(self, f"_{name}", state[name])
        for name in _TENSORS:
            setattr(self, f"_{name}", state[name].to(self._device, copy=True))
