"""Observations side by side as tensors: one graph of many that do not touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.tamiyo.actions import ActionChoice, Operation
from esper.tamiyo.observation import Observation

Edges = dict[str, tuple[Tensor, Tensor]]
"""Of each relation, the source and the target of every edge; each (edges,) int64."""


@dataclass(frozen=True)
class Batch:
    """B observations. S, N, K, O count sites, seeds, kernels and options of all of them together.

    Attributes:
        site, seed, run, kernel: features; `run` is (B, RUN_FEATURES).
        edges: see `encoder.RELATIONS`.
        site_of, seed_of, kernel_of: observation of each node.
        can_germinate, can, operations, strategies: masks, (S,), (N, TENDED), (B, Operation), (K, STRATEGIES).
        option_kernel: (O,) place among the kernels.
        options: (B, S + 1) is not kept; `option_start[s]` to `option_start[s + 1]` are the options of site s.
        first_site, first_seed, first_option: (B + 1,) where each observation's begin, as plain lists.
    """

    observations: tuple[Observation, ...]
    site: Tensor
    seed: Tensor
    run: Tensor
    kernel: Tensor
    edges: Edges
    site_of: Tensor
    seed_of: Tensor
    kernel_of: Tensor
    can_germinate: Tensor
    can: Tensor
    operations: Tensor
    strategies: Tensor
    option_kernel: Tensor
    option_start: np.ndarray
    first_site: list[int]
    first_seed: list[int]
    first_option: list[int]

    def __len__(self) -> int:
        return len(self.observations)


def collate(observations: Sequence[Observation]) -> Batch:
    """Puts observations side by side.

    Raises:
        ValueError: if there is none.
    """
    if not observations:
        raise ValueError("a batch needs one observation at least")
    sites, seeds, kernels, options = (
        _starts([len(getattr(o, name)) for o in observations]) for name in ("site", "seed", "kernel", "option_site")
    )

    def joined(name: str, starts: list[int] | None = None, axis: int = 0) -> np.ndarray:
        arrays = [getattr(o, name) for o in observations]
        shifted = arrays if starts is None else [a + s for a, s in zip(arrays, starts, strict=False)]
        return np.concatenate(shifted, axis=axis)

    forward, stacked = joined("forward", sites, 1), joined("stacked", seeds, 1)
    seed_site = joined("seed_site", sites)
    option_site = joined("option_site", sites)
    here = np.arange(len(seed_site))
    pairs = {
        "layer_forward": forward,
        "rev_layer_forward": forward[::-1],
        "holds": np.stack([here, seed_site]),
        "rev_holds": np.stack([seed_site, here]),
        "sequential": stacked,
        "rev_sequential": stacked[::-1],
    }
    num_options = np.bincount(option_site, minlength=sites[-1])
    return Batch(
        observations=tuple(observations),
        site=_tensor(joined("site")),
        seed=_tensor(joined("seed")),
        run=_tensor(np.stack([o.run for o in observations])),
        kernel=_tensor(joined("kernel")),
        edges={name: (_tensor(pair[0]), _tensor(pair[1])) for name, pair in pairs.items()},
        site_of=_owners(sites),
        seed_of=_owners(seeds),
        kernel_of=_owners(kernels),
        can_germinate=_tensor(num_options > 0),
        can=_tensor(joined("can")),
        operations=_tensor(np.stack([o.operations for o in observations])),
        strategies=_tensor(joined("strategies")),
        option_kernel=_tensor(joined("option_kernel", kernels)),
        option_start=np.concatenate([[0], np.cumsum(num_options)]),
        first_site=sites,
        first_seed=seeds,
        first_option=options,
    )


@dataclass(frozen=True)
class Targets:
    """Where the choices of a batch point, by place in it.

    Attributes:
        operation: (B,) int64.
        germinating, tending: rows of the batch, (G,) and (T,) int64.
        site, option, strategy: of the germinating rows.
        seed: of the tending rows, and `column` their operation's place in `TENDED`.
    """

    operation: Tensor
    germinating: Tensor
    site: Tensor
    option: Tensor
    strategy: Tensor
    tending: Tensor
    seed: Tensor
    column: Tensor


def targets_of(batch: Batch, choices: Sequence[ActionChoice]) -> Targets:
    """Finds the places of choices in a batch.

    Raises:
        ValueError: if there are not as many choices as observations, or the masks of one do not allow its choice.
    """
    rows = list(zip(batch.observations, choices, strict=True))
    for row, (observation, choice) in enumerate(rows):
        if not observation.allows(choice):
            raise ValueError(f"row {row}: the masks do not allow {choice}")
    begun = [(row, c) for row, (_, c) in enumerate(rows) if c.operation is Operation.GERMINATE]
    tended = [(row, c) for row, (_, c) in enumerate(rows) if c.seed >= 0 and c.operation > Operation.GERMINATE]
    return Targets(
        operation=_places(int(c.operation) for _, c in rows),
        germinating=_places(row for row, _ in begun),
        site=_places(batch.first_site[row] + c.site for row, c in begun),
        option=_places(batch.first_option[row] + c.option for row, c in begun),
        strategy=_places(c.strategy for _, c in begun),
        tending=_places(row for row, _ in tended),
        seed=_places(batch.first_seed[row] + c.seed for row, c in tended),
        column=_places(int(c.operation) - int(Operation.ADVANCE) for _, c in tended),
    )


def options_of(batch: Batch, sites: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the options of sites (G,): their places, and for each which of `sites` it belongs to, both (P,)."""
    starts, ends = batch.option_start[:-1][sites.numpy()], batch.option_start[1:][sites.numpy()]
    counts = ends - starts
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
    return torch.from_numpy(place), torch.from_numpy(owner)


def _starts(counts: list[int]) -> list[int]:
    return [0, *np.cumsum(counts).tolist()]


def _owners(starts: list[int]) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(starts) - 1), np.diff(starts)))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _places(values: Sequence[int] | object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)  # type: ignore[call-overload]
