"""The encoder: attention between neighbours of several kinds, then what the whole graph comes to.

A layer is GATv2 (Brody, Alon, Yahav 2022, "How Attentive are Graph Attention Networks?") on a graph with kinds of
nodes and edges: each relation has a map of its sources and an attention vector of its own, and one softmax runs over
all edges that reach a node, whatever their kind. With a softmax for each kind (`HeteroConv`) attention would mean
nothing here: most nodes have one neighbour of a kind. On a graph of one kind of edges it gives the numbers of
`torch_geometric.nn.GATv2Conv` (a test compares them). Written on torch alone: torch_geometric takes two seconds to
import and its scatters are no faster here.

Knows nothing of what is decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.tamiyo.batch import Batch, Edges
from esper.tamiyo.features import SEED_FEATURES
from esper.tamiyo.observation import KERNEL_FEATURES, RUN_FEATURES, SITE_FEATURES
from esper.tamiyo.shape import NetShape

RELATIONS = {
    "layer_forward": ("site", "site"),
    "rev_layer_forward": ("site", "site"),
    "holds": ("seed", "site"),
    "rev_holds": ("site", "seed"),
    "sequential": ("seed", "seed"),
    "rev_sequential": ("seed", "seed"),
}
"""Kinds of the source and the target of each relation, beside each node's own to itself."""

HIDDEN_SCORE = -1e9
"""What stands for the score of what a mask forbids: finite, so that gradients are."""


def segment_softmax(scores: Tensor, owner: Tensor, size: int) -> Tensor:
    """Softmax within segments. Shapes: scores (E, ...), owner (E,), returns (E, ...)."""
    wide = owner.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.new_full((size, *scores.shape[1:]), HIDDEN_SCORE)
    highest = highest.scatter_reduce(0, wide, scores.detach(), "amax")
    raised = torch.exp(scores - highest[owner])
    total = raised.new_zeros((size, *scores.shape[1:])).index_add(0, owner, raised)
    return raised / total[owner].clamp_min(1e-30)


def segment_log_softmax(scores: Tensor, owner: Tensor, size: int) -> Tensor:
    """Log of the softmax within segments; shapes as in `segment_softmax`."""
    wide = owner.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.new_full((size, *scores.shape[1:]), HIDDEN_SCORE)
    lowered = scores - highest.scatter_reduce(0, wide, scores.detach(), "amax")[owner]
    total = scores.new_zeros((size, *scores.shape[1:])).index_add(0, owner, torch.exp(lowered))
    return lowered - torch.log(total.clamp_min(1e-30))[owner]


def segment_mean(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Mean of each segment, 0 of an empty one; values (E, D), returns (size, D)."""
    total = values.new_zeros((size, values.shape[1])).index_add(0, owner, values)
    count = values.new_zeros(size).index_add(0, owner, values.new_ones(len(values)))
    return total / count.clamp_min(1.0)[:, None]


def segment_max(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Maximum of each segment and 0; values (E, D), returns (size, D)."""
    wide = owner[:, None].expand_as(values)
    return values.new_zeros((size, values.shape[1])).scatter_reduce(0, wide, values, "amax")


class GraphAttention(nn.Module):
    """One layer: a node attends to itself and to its neighbours along every relation.

    Args:
        width: of the nodes' embeddings, a multiple of `heads`.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        names = [*RELATIONS, "site_self", "seed_self"]
        self.source = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.target = nn.ModuleDict({kind: nn.Linear(width, width) for kind in ("site", "seed")})
        self.attention = nn.ParameterDict({name: nn.Parameter(torch.empty(heads, width // heads)) for name in names})
        for vector in self.attention.values():
            nn.init.xavier_uniform_(vector)

    def forward(self, nodes: dict[str, Tensor], edges: Edges) -> dict[str, Tensor]:
        """Returns what each node gathers; (nodes, width) each."""
        mapped = {kind: self._mapped(kind, values) for kind, values in nodes.items()}
        return {kind: self._gather(kind, mapped, edges) for kind in nodes}

    def _mapped(self, kind: str, values: Tensor) -> dict[str, Tensor]:
        """All maps of one kind of nodes in one product; (nodes, heads, width / heads) each."""
        names = [f"{kind}_self", *(name for name, (origin, _) in RELATIONS.items() if origin == kind)]
        maps = [self.target[kind], *(self.source[name] for name in names)]
        weight = torch.cat([one.weight for one in maps])  # type: ignore[arg-type]
        bias = torch.cat([one.bias for one in maps])  # type: ignore[arg-type]
        each = (len(maps), self._heads, values.shape[1] // self._heads)
        parts = functional.linear(values, weight, bias).unflatten(1, each).unbind(dim=1)
        return dict(zip(["target", *names], parts, strict=True))

    def _gather(self, kind: str, mapped: dict[str, dict[str, Tensor]], edges: Edges) -> Tensor:
        asked, own = mapped[kind]["target"], mapped[kind][f"{kind}_self"]
        size = len(asked)
        names, messages, owners = [f"{kind}_self"], [own], [torch.arange(size)]
        for name, (origin, to) in RELATIONS.items():
            if to == kind and len(edges[name][0]):
                source, target = edges[name]
                names.append(name)
                messages.append(mapped[origin][name][source])
                owners.append(target)
        owner, sent = torch.cat(owners), torch.cat(messages)
        seen = functional.leaky_relu(sent + asked[owner], 0.2).split([len(one) for one in owners])
        scores = [(values * self.attention[name]).sum(-1) for name, values in zip(names, seen, strict=True)]
        weights = segment_softmax(torch.cat(scores), owner, size)
        weighted = (sent * weights[:, :, None]).flatten(1)
        return weighted.new_zeros((size, weighted.shape[1])).index_add(0, owner, weighted)


@dataclass(frozen=True)
class Encoded:
    """A batch as the heads see it.

    Attributes:
        site, seed, kernel: (S, D), (N, D), (K, D).
        graph: (B, D), what each graph comes to.
        attention: (S,), what share of the pooling each site has, over the heads' mean.
    """

    site: Tensor
    seed: Tensor
    kernel: Tensor
    graph: Tensor
    attention: Tensor


class Encoder(nn.Module):
    """Features to embeddings."""

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        width = shape.hidden
        self._heads = shape.heads
        self.enter = nn.ModuleDict(
            {
                "site": nn.Linear(len(SITE_FEATURES), width),
                "seed": nn.Linear(len(SEED_FEATURES), width),
                "run": nn.Linear(len(RUN_FEATURES), width),
            }
        )
        self.kernel = nn.Sequential(nn.Linear(len(KERNEL_FEATURES), width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(GraphAttention(width, shape.heads) for _ in range(shape.layers))
        self.norms = nn.ModuleList(
            nn.ModuleDict({kind: nn.LayerNorm(width) for kind in ("site", "seed")}) for _ in range(shape.layers)
        )
        self.query = nn.Linear(width, width)
        # sites by attention, their largest, those that may grow; seeds' mean and those that may be tended; kernels; run
        self.pool = nn.Sequential(nn.Linear(7 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, batch: Batch) -> Encoded:
        """Encodes a batch."""
        run = functional.relu(self.enter["run"](batch.run))
        nodes = {
            "site": functional.relu(self.enter["site"](batch.site) + run[batch.site_of]),
            "seed": functional.relu(self.enter["seed"](batch.seed) + run[batch.seed_of]),
        }
        for layer, norms in zip(self.layers, self.norms, strict=True):
            gathered = layer(nodes, batch.edges)
            nodes = {kind: norms[kind](x + functional.relu(gathered[kind])) for kind, x in nodes.items()}  # type: ignore[index]
        site, seed, kernel = nodes["site"], nodes["seed"], self.kernel(batch.kernel)
        size = len(batch)
        query = self.query(run)[batch.site_of]
        each = (self._heads, site.shape[1] // self._heads)
        heads = (site * query).unflatten(1, each).sum(-1) / math.sqrt(each[1])
        weights = segment_softmax(heads, batch.site_of, size)
        parts = site.unflatten(1, each) * weights[:, :, None]
        tended = batch.can.any(dim=1)
        pools = (
            site.new_zeros((size, site.shape[1])).index_add(0, batch.site_of, parts.flatten(1)),
            segment_max(site, batch.site_of, size),
            segment_max(site[batch.can_germinate], batch.site_of[batch.can_germinate], size),
            segment_mean(seed, batch.seed_of, size),
            segment_mean(seed[tended], batch.seed_of[tended], size),
            segment_mean(kernel, batch.kernel_of, size),
            run,
        )
        return Encoded(site, seed, kernel, self.pool(torch.cat(pools, dim=1)), weights.detach().mean(dim=1))
