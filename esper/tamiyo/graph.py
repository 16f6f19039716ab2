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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.leyline import SeedStage, SystemStatePacket
from esper.tamiyo.features import run_features, seed_features, site_features
from esper.tamiyo.table import Named, Table, table_of, tabled

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

Form = tuple[tuple[str, ...], tuple[str, ...], bytes, bytes]
"""Names of the sites, ids of the seeds, where each site's begin, and which are fossils: what edges are made from."""


@dataclass(frozen=True)
class Topology:
    """Edges, and which node is what.

    Attributes:
        sites: names, by node.
        seeds: (site, seed id), by node.
        edges: (source type, edge, target type) to (2, edges) int64 tensors.
    """

    sites: tuple[str, ...]
    seeds: Sequence[tuple[str, str]]
    edges: dict[tuple[str, str, str], Any]


def form_of(packet: SystemStatePacket) -> Form:
    """Returns what the edges of a packet's graph depend on."""
    table = table_of(packet)
    fossils = np.flatnonzero(table.stage == SeedStage.FOSSILIZED.code)
    return table.sites, tuple(table.seed.words("seed_id")), table.first.tobytes(), fossils.tobytes()


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


Wiring = tuple[tuple[str, ...], Sequence[tuple[str, str]], dict[tuple[str, str, str], np.ndarray]]
"""Names of the sites, (site, seed id) of the seeds, and the edges that lead forward and down, each (2, edges) int64."""


def wiring_of(packet: SystemStatePacket) -> Wiring:
    """Returns the edges of a packet's graph without their reverses, and without torch.

    Raises:
        ValueError: if two sites or two seeds of a site have the same name.
    """
    table = table_of(packet)
    ids = table.seed.words("seed_id")
    seeds = Named(table.sites, table.seed_site, ids)
    if len(table.places) < len(table) or (len(set(ids)) < len(ids) and len(set(seeds)) < len(seeds)):
        raise ValueError("a site or seed stands in the packet twice")
    here = np.arange(len(table))
    pairs = {
        ("site", "layer_forward", "site"): np.stack([here[:-1], here[1:]]),
        ("site", "contains", "seed"): np.stack([table.seed_site, np.arange(len(seeds))]),
        ("seed", "sequential", "seed"): _stacked(table),
    }
    return table.sites, seeds, pairs


def _stacked(table: Table) -> np.ndarray:
    """The edges from what a seed stands on, site by site, those to fossils first: (2, edges)."""
    is_fossil = table.stage == SeedStage.FOSSILIZED.code
    fossils = np.flatnonzero(is_fossil)
    at = table.seed_site[fossils]
    below = np.full(len(is_fossil), -1)
    below[fossils[1:]] = np.where(at[1:] == at[:-1], fossils[:-1], -1)
    highest = np.full(len(table), -1)
    highest[at] = fossils  # the last of a site's
    below = np.where(is_fossil, below, highest[table.seed_site])
    order = np.lexsort((~is_fossil, table.seed_site))
    order = order[below[order] >= 0]
    return np.stack([below[order], order])


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

        packet = tabled(packet)
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
