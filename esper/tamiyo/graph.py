"""A run's network as a graph: `torch_geometric` HeteroData with nodes for sites and seeds.

Nodes and what describes them: see `features`. Edges, each with its reverse (`rev_...`):

| edge | means |
|---|---|
| (site, layer_forward, site) | the next site in forward order; branches between sites are not known here |
| (site, contains, seed) | the seed stands at the site |
| (seed, sequential, seed) | the one feeds the other: fossils in their order, and the last of them what stands on it |

Seeds that race stand side by side. So edges change when a seed becomes a fossil and the next is planted on it, and
never else: they are kept from one packet to the next and the features alone are put in anew. Knows nothing of policies
and takes no decision.

Importing `torch_geometric` takes about two seconds and brings torch in: it happens with the first graph.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.leyline import LayerHealthReport, SeedStage, SystemStatePacket
from esper.tamiyo.features import run_features, seed_features, site_features

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

Form = tuple[tuple[str, tuple[str, ...], int], ...]
"""Of each site its name, the ids of its seeds, and how many of them are fossils: what edges are made from."""


@dataclass(frozen=True)
class Topology:
    """Edges, and which node is what.

    Attributes:
        sites: names, by node.
        seeds: (site, seed id), by node.
        edges: (source type, edge, target type) to (2, edges) int64 tensors.
    """

    sites: tuple[str, ...]
    seeds: tuple[tuple[str, str], ...]
    edges: dict[tuple[str, str, str], Any]


def form_of(packet: SystemStatePacket) -> Form:
    """Returns what the edges of a packet's graph depend on."""
    return tuple(
        (
            layer.layer_id,
            tuple([seed.seed_id for seed in layer.seeds]),
            sum([seed.stage is SeedStage.FOSSILIZED for seed in layer.seeds]),
        )
        for layer in packet.layers
    )


def topology_of(packet: SystemStatePacket) -> Topology:
    """Returns the edges of a packet's graph.

    Raises:
        ValueError: if two sites or two seeds of a site have the same name.
    """
    import torch

    sites, seeds, pairs = wiring_of(packet)
    edges: dict[tuple[str, str, str], Any] = {}
    for (source, edge, target), pair in pairs.items():
        edges[source, edge, target] = torch.from_numpy(pair.copy())
        edges[target, f"rev_{edge}", source] = torch.from_numpy(pair[::-1].copy())
    return Topology(sites, seeds, edges)


Wiring = tuple[tuple[str, ...], tuple[tuple[str, str], ...], dict[tuple[str, str, str], np.ndarray]]
"""Names of the sites, (site, seed id) of the seeds, and the edges that lead forward and down, each (2, edges) int64."""


def wiring_of(packet: SystemStatePacket) -> Wiring:
    """Returns the edges of a packet's graph without their reverses, and without torch.

    Raises:
        ValueError: if two sites or two seeds of a site have the same name.
    """
    sites = tuple(layer.layer_id for layer in packet.layers)
    seeds = tuple((layer.layer_id, seed.seed_id) for layer in packet.layers for seed in layer.seeds)
    if len(set(sites)) < len(sites) or len(set(seeds)) < len(seeds):
        raise ValueError("a site or seed stands in the packet twice")
    counts = np.array([len(layer.seeds) for layer in packet.layers], dtype=np.int64)
    first = np.cumsum(counts) - counts
    here = np.arange(len(sites))
    pairs = {
        ("site", "layer_forward", "site"): np.stack([here[:-1], here[1:]]),
        ("site", "contains", "seed"): np.stack([np.repeat(here, counts), np.arange(len(seeds))]),
        ("seed", "sequential", "seed"): _stacked(packet.layers, first),
    }
    return sites, seeds, pairs


def _stacked(layers: tuple[LayerHealthReport, ...], first: np.ndarray) -> np.ndarray:
    """The edges from what a seed stands on: (2, edges)."""
    found: list[tuple[int, int]] = []
    for start, layer in zip(first.tolist(), layers, strict=True):
        below = None
        is_fossil = [seed.stage is SeedStage.FOSSILIZED for seed in layer.seeds]
        for place in [start + i for i, fossil in enumerate(is_fossil) if fossil]:
            if below is not None:
                found.append((below, place))
            below = place
        if below is not None:
            found += [(below, start + i) for i, fossil in enumerate(is_fossil) if not fossil]
    return np.array(found, dtype=np.int64).reshape(-1, 2).T


class GraphBuilder:
    """Makes graphs from packets, and keeps the edges of the runs it has seen last.

    Args:
        num_kept: runs whose edges are kept.

    Attributes:
        num_topologies: how often edges were made.
    """

    def __init__(self, num_kept: int = 64) -> None:
        self._num_kept = num_kept
        self._kept: OrderedDict[str, tuple[Form, Topology]] = OrderedDict()
        self.num_topologies = 0

    def build(self, packet: SystemStatePacket) -> HeteroData:
        """Returns the graph of a packet.

        It holds `x` of `site` and `seed` (nodes, features), `run` (1, features), `site.name`, `seed.name` (site and
        seed id), and `edge_index` of each kind of edge, which graphs of the same form share: not to be written to.

        Raises:
            ValueError: if two sites or two seeds of a site have the same name.
        """
        import torch
        from torch_geometric.data import HeteroData

        topology = self._topology(packet)
        graph = HeteroData()
        graph["site"].x = torch.from_numpy(site_features(packet))
        graph["site"].name = topology.sites
        graph["seed"].x = torch.from_numpy(seed_features(packet))
        graph["seed"].name = topology.seeds
        graph.run = torch.from_numpy(run_features(packet))
        for kind, pairs in topology.edges.items():
            graph[kind].edge_index = pairs
        return graph

    def _topology(self, packet: SystemStatePacket) -> Topology:
        form = form_of(packet)
        kept = self._kept.pop(packet.run_id, None)
        if kept is None or kept[0] != form:
            kept = (form, topology_of(packet))
            self.num_topologies += 1
        self._kept[packet.run_id] = kept
        if len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)
        return kept[1]
