"""A layer of the encoder for one observation, forward and back, for those who decide and do not train.

The same function as `encoder.GraphAttention` and the norm behind it (a test compares numbers and slopes), arranged for
one graph: arrays are (width, nodes), so that every step runs along the nodes, and edges come in slots: in a slot no two
edges share a node, so nothing is scattered. Seeds stand in the order of their place in their site: the first of
every site, then the second, and so on. On hosts whose sites hold equally many, all slots are then plain ranges.

Shapes: D the width, H heads, n nodes of a kind, m of them in a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from esper.tamiyo.encoder import RELATIONS, GraphAttention
from esper.tamiyo.observation import Observation

KINDS = ("site", "seed")
_STRETCH = 1536
_SLOPE = 0.2
_EPS = 1e-5  # of nn.LayerNorm

Places = slice | np.ndarray
Nodes = dict[str, np.ndarray]
"""By kind, (D, n)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Edges of one relation, of which no two share their source or their target."""

    relation: str
    origin: str
    source: Places
    target: Places


@dataclass(frozen=True)
class Wiring:
    """The edges of a graph, or of a stretch of it.

    Attributes:
        sites: where they stand among all.
        seeds: the seed that stands in each place.
        own_sites, own_seeds: places of those whose neighbours are all here; the others stand at the ends, for them.
        slots: by kind of the target; the first is each node's own.
    """

    sites: slice
    seeds: np.ndarray
    own_sites: slice
    own_seeds: np.ndarray
    slots: dict[str, tuple[Slot, ...]]


def wire(view: Observation, reach: int) -> tuple[Wiring, ...]:
    """Arranges the edges of an observation, in stretches of so many nodes as the processor's cache holds.

    Args:
        view: the observation.
        reach: how many sites away what is seen of may stand: those at the ends of a stretch are there for that.
    """
    edges = (view.forward, view.stacked, view.seed_site)
    return _wire(len(view.site), reach, *(np.ascontiguousarray(array).tobytes() for array in edges))


@lru_cache(maxsize=32)
def _wire(num_sites: int, reach: int, forward: bytes, stacked: bytes, seed_site: bytes) -> tuple[Wiring, ...]:
    """Kept: edges change after a fossil alone."""
    ahead, up = (np.frombuffer(data, dtype=np.int64).reshape(2, -1) for data in (forward, stacked))
    owner = np.frombuffer(seed_site, dtype=np.int64)
    in_order = bool((np.diff(owner) >= 0).all() and (np.abs(np.diff(ahead, axis=0)) <= 1).all())
    if not in_order or not (owner[up[0]] == owner[up[1]]).all():
        return (_stretch(slice(0, num_sites), slice(0, num_sites), ahead, up, owner),)
    nodes = np.cumsum(1 + np.bincount(owner, minlength=num_sites))
    bounds = [0, *(1 + np.flatnonzero(np.diff(nodes // _STRETCH))).tolist(), num_sites]
    return tuple(
        _stretch(slice(start, end), slice(max(0, start - reach), min(num_sites, end + reach)), ahead, up, owner)
        for start, end in pairwise(bounds)
        if start < end or not num_sites
    )


def _stretch(own: slice, sites: slice, forward: np.ndarray, stacked: np.ndarray, owner: np.ndarray) -> Wiring:
    """The edges among some sites and their seeds."""
    seeds = np.flatnonzero((owner >= sites.start) & (owner < sites.stop))
    seeds = seeds[np.argsort(_ranks(owner[seeds]), kind="stable")]
    here = owner[seeds]
    place = np.full(len(owner), -1)
    place[seeds] = np.arange(len(seeds))
    within = ((forward >= sites.start) & (forward < sites.stop)).all(axis=0)
    forward = forward[:, within] - sites.start
    stacked = place[stacked]
    stacked = stacked[:, (stacked >= 0).all(axis=0)]
    place, at = np.arange(len(seeds)), here - sites.start
    pairs = {
        "layer_forward": (forward[0], forward[1]),
        "rev_layer_forward": (forward[1], forward[0]),
        "holds": (place, at),
        "rev_holds": (at, place),
        "sequential": (stacked[0], stacked[1]),
        "rev_sequential": (stacked[1], stacked[0]),
    }
    everyone = slice(None)
    slots = {kind: [Slot(f"{kind}_self", kind, everyone, everyone)] for kind in KINDS}
    for name, (origin, to) in RELATIONS.items():
        slots[to] += [Slot(name, origin, *ends) for ends in _slots(*pairs[name])]
    return Wiring(
        sites,
        seeds,
        slice(own.start - sites.start, own.stop - sites.start),
        np.flatnonzero((here >= own.start) & (here < own.stop)),
        {kind: tuple(found) for kind, found in slots.items()},
    )


def _ranks(owner: np.ndarray) -> np.ndarray:
    """Of each entry, how many before it have the same owner."""
    order = np.argsort(owner, kind="stable")
    ordered = owner[order]
    here = np.arange(len(owner))
    begins = np.ones(len(owner), dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    ranks = np.empty_like(here)
    ranks[order] = here - np.maximum.accumulate(np.where(begins, here, 0))
    return ranks


def _slots(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[Places, Places]]:
    """Parts of the edges in which no node stands twice, as source or as target."""
    if not len(source):
        return
    of_target, of_source = _ranks(target), _ranks(source)
    part = of_target * (1 + of_source.max()) + of_source
    order = np.lexsort((target, part))
    ends = [*(1 + np.flatnonzero(np.diff(part[order]))), len(order)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        chosen = order[start:end]
        yield _places(source[chosen]), _places(target[chosen])


def _places(places: np.ndarray) -> Places:
    """As a range where they are one: that is a view of an array, and no copy."""
    is_range = places[-1] - places[0] == len(places) - 1 and bool((np.diff(places) == 1).all())
    return slice(int(places[0]), int(places[-1]) + 1) if is_range else places


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A matrix product by torch: one thread or many is decided in one place, and numpy's own library has its own."""
    return torch.mm(torch.from_numpy(left), torch.from_numpy(right)).numpy()


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What a kind of nodes gathered, and what the way back needs of it: by slot what was sent (D, m) and its weight
    (H, m).
    """

    sent: list[np.ndarray]
    weights: list[np.ndarray]
    total: np.ndarray  # (D, n)


@dataclass(frozen=True, slots=True)
class Trace:
    """One pass through a layer; what `Attending.back` needs of it."""

    mapped: dict[str, dict[str, np.ndarray]]
    gathered: dict[str, _Gathered]
    normed: Nodes
    scale: Nodes  # (1, n), one over the deviation
    out: Nodes


Module = TypeVar("Module", bound=torch.nn.Module)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a parameter's values."""
    return tensor.detach().numpy().copy()


class Attending:
    """One layer's weights.

    Args:
        layer: whose.
        norms: behind it, by kind.
        heads: of attention.
    """

    def __init__(self, layer: GraphAttention, norms: torch.nn.ModuleDict, heads: int) -> None:
        named = dict(layer.named_parameters())
        self._heads = heads
        self._names: dict[str, list[str]] = {}
        self._weight: Nodes = {}
        self._back: Nodes = {}
        self._bias: Nodes = {}
        for kind in KINDS:
            names = [f"{kind}_self", *(name for name, (origin, _) in RELATIONS.items() if origin == kind)]
            maps = [f"target.{kind}", *(f"source.{name}" for name in names)]
            self._names[kind] = ["target", *names]
            self._weight[kind] = np.concatenate([numbers(named[f"{one}.weight"]) for one in maps])
            self._back[kind] = np.ascontiguousarray(self._weight[kind].T)
            self._bias[kind] = np.concatenate([numbers(named[f"{one}.bias"]) for one in maps])[:, None]
        self._attention = {
            name.removeprefix("attention."): _apart(numbers(vector))
            for name, vector in named.items()
            if name.startswith("attention.")
        }
        named_norms = dict(norms.named_parameters())
        self._gain = {kind: numbers(named_norms[f"{kind}.weight"])[:, None] for kind in KINDS}
        self._shift = {kind: numbers(named_norms[f"{kind}.bias"])[:, None] for kind in KINDS}

    def forward(self, nodes: Nodes, wiring: Wiring) -> Trace:
        """Returns the pass; its `out` are the nodes behind the layer."""
        mapped = {kind: self._mapped(kind, values) for kind, values in nodes.items()}
        gathered = {kind: self._gather(mapped, kind, wiring.slots[kind]) for kind in KINDS}
        normed, scale, out = {}, {}, {}
        for kind, values in nodes.items():
            added = np.maximum(gathered[kind].total, 0.0)
            added += values
            added -= added.mean(axis=0, keepdims=True)
            scale[kind] = 1.0 / np.sqrt(np.square(added).mean(axis=0, keepdims=True) + np.float32(_EPS))
            added *= scale[kind]
            normed[kind] = added
            out[kind] = added * self._gain[kind] + self._shift[kind]
        return Trace(mapped, gathered, normed, scale, out)

    def _mapped(self, kind: str, values: np.ndarray) -> dict[str, np.ndarray]:
        maps = product(self._weight[kind], values)
        maps += self._bias[kind]
        return dict(zip(self._names[kind], np.split(maps, len(self._names[kind])), strict=True))

    def _gather(self, mapped: dict[str, dict[str, np.ndarray]], kind: str, slots: tuple[Slot, ...]) -> _Gathered:
        asked = mapped[kind]["target"]
        sent = [mapped[slot.origin][slot.relation][:, slot.source] for slot in slots]
        scores: list[np.ndarray] = []
        for slot, values in zip(slots, sent, strict=True):
            seen = values + asked[:, slot.target]
            np.maximum(seen, seen * np.float32(_SLOPE), out=seen)
            scores.append(product(self._attention[slot.relation], seen))
        highest = scores[0].copy()
        for slot, score in zip(slots[1:], scores[1:], strict=True):
            highest[:, slot.target] = np.maximum(highest[:, slot.target], score)
        weights = [np.exp(score - highest[:, slot.target]) for slot, score in zip(slots, scores, strict=True)]
        whole = weights[0].copy()
        for slot, weight in zip(slots[1:], weights[1:], strict=True):
            whole[:, slot.target] += weight
        for slot, weight in zip(slots, weights, strict=True):
            np.divide(weight, whole[:, slot.target], out=weight)
        total = weighted(sent[0], weights[0])
        for slot, values, weight in zip(slots[1:], sent[1:], weights[1:], strict=True):
            total[:, slot.target] += weighted(values, weight)
        return _Gathered(sent, weights, total)

    def back(self, trace: Trace, slopes: Nodes, wiring: Wiring) -> Nodes:
        """Returns the slopes before the layer from those behind it."""
        before: Nodes = {}
        mapped = {
            kind: np.zeros((self._weight[kind].shape[0], slopes[kind].shape[1]), dtype=np.float32) for kind in KINDS
        }
        parts = {
            kind: dict(zip(self._names[kind], np.split(rows, len(self._names[kind])), strict=True))
            for kind, rows in mapped.items()
        }
        for kind in KINDS:
            normed = trace.normed[kind]
            slope = slopes[kind] * self._gain[kind]
            along = (slope * normed).mean(axis=0, keepdims=True)
            slope -= slope.mean(axis=0, keepdims=True)
            slope -= normed * along
            slope *= trace.scale[kind]
            before[kind] = slope
            gathered = slope * (trace.gathered[kind].total > 0.0)
            self._ungather(trace, kind, gathered, wiring.slots[kind], parts)
        for kind in KINDS:
            before[kind] += product(self._back[kind], mapped[kind])
        return before

    def _ungather(
        self,
        trace: Trace,
        kind: str,
        slope: np.ndarray,
        slots: tuple[Slot, ...],
        into: dict[str, dict[str, np.ndarray]],
    ) -> None:
        """Adds the slopes of what was mapped, from the slope (D, n) of what was gathered."""
        gathered, asked = trace.gathered[kind], trace.mapped[kind]["target"]
        mean = by_head(slope * gathered.total, self._heads)
        for slot, sent, weight in zip(slots, gathered.sent, gathered.weights, strict=True):
            here = slope[:, slot.target]
            score = weight * (by_head(here * sent, self._heads) - mean[:, slot.target])
            bent = product(np.ascontiguousarray(self._attention[slot.relation].T), score)
            # arithmetic on the flags: numpy's `where` takes ten times as long
            bent *= np.float32(1.0) - np.float32(1.0 - _SLOPE) * (sent + asked[:, slot.target] <= 0.0)
            into[kind]["target"][:, slot.target] += bent
            bent += weighted(here, weight)
            into[slot.origin][slot.relation][:, slot.source] += bent


def weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D, m) by (H, m): each head's rows by its weights."""
    heads, num = weights.shape
    return (values.reshape(heads, len(values) // heads, num) * weights[:, None]).reshape(values.shape)


def by_head(values: np.ndarray, heads: int) -> np.ndarray:
    """Sums (D, m) within each head: (H, m)."""
    return values.reshape(heads, len(values) // heads, values.shape[1]).sum(axis=1)


class Stack:
    """All layers of an encoder, over stretches of a graph.

    Args:
        layers: of the encoder.
        norms: behind each.
        heads: of attention.
    """

    def __init__(self, layers: torch.nn.ModuleList, norms: torch.nn.ModuleList, heads: int) -> None:
        self._layers = [
            Attending(layer, norm, heads)  # type: ignore[arg-type]
            for layer, norm in zip(layers, norms, strict=True)
        ]

    @property
    def reach(self) -> int:
        """How many sites away a node may stand from what it sees."""
        return len(self._layers)

    def forward(self, nodes: Nodes, stretches: tuple[Wiring, ...]) -> tuple[Nodes, list[list[Trace]]]:
        """Returns the nodes behind the last layer, and what the way back needs."""
        out: Nodes = {kind: np.empty_like(values) for kind, values in nodes.items()}
        passes: list[list[Trace]] = []
        for wiring in stretches:
            here = {
                "site": np.ascontiguousarray(nodes["site"][:, wiring.sites]),
                "seed": nodes["seed"][:, wiring.seeds],
            }
            passes.append([])
            for layer in self._layers:
                passes[-1].append(layer.forward(here, wiring))
                here = passes[-1][-1].out
            out["site"][:, wiring.sites][:, wiring.own_sites] = here["site"][:, wiring.own_sites]
            out["seed"][:, wiring.seeds[wiring.own_seeds]] = here["seed"][:, wiring.own_seeds]
        return out, passes

    def back(self, slopes: Nodes, stretches: tuple[Wiring, ...], passes: list[list[Trace]]) -> Nodes:
        """Returns the slopes before the first layer from those behind the last."""
        before: Nodes = {kind: np.zeros_like(values) for kind, values in slopes.items()}
        for wiring, traces in zip(stretches, passes, strict=True):
            width, size = len(slopes["site"]), wiring.sites.stop - wiring.sites.start
            here: Nodes = {
                "site": np.zeros((width, size), dtype=np.float32),
                "seed": np.zeros((width, len(wiring.seeds)), dtype=np.float32),
            }
            # what stands at the ends is another stretch's: its slope is told there
            here["site"][:, wiring.own_sites] = slopes["site"][:, wiring.sites][:, wiring.own_sites]
            here["seed"][:, wiring.own_seeds] = slopes["seed"][:, wiring.seeds[wiring.own_seeds]]
            for layer, trace in zip(reversed(self._layers), reversed(traces), strict=True):
                here = layer.back(trace, here, wiring)
            before["site"][:, wiring.sites] += here["site"]
            before["seed"][:, wiring.seeds] += here["seed"]
        return before


def _apart(vectors: np.ndarray) -> np.ndarray:
    """Vectors (H, D / H) as a matrix (H, D): one product scores all heads."""
    heads, each = vectors.shape
    matrix = np.zeros((heads, heads * each), dtype=np.float32)
    for head, vector in enumerate(vectors):
        matrix[head, head * each : (head + 1) * each] = vector
    return matrix
