"""The network's decision about one observation, and the slopes behind its explanation: what `net` does, without torch's
record of it.

A decision is a thousand small steps on little data, so what each costs beside its arithmetic counts. Here a step is
one of numpy, nothing is kept for a gradient that is not asked for, and the way back is written out. That the numbers
and slopes are those of `net` is tested; training knows nothing of this module. An observation is decided about by
itself: what a caller gets does not hang on who asked beside him.

Shapes: D the width, S sites, N seeds, K kernels, P options of the chosen site. Nodes are columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from esper.tamiyo.actions import WAIT, ActionChoice, Operation
from esper.tamiyo.attending import Nodes, Stack, Trace, Wiring, by_head, numbers, product, weighted, wire
from esper.tamiyo.encoder import HIDDEN_SCORE
from esper.tamiyo.net import Decided, Drawn, PolicyNet, pick
from esper.tamiyo.observation import TENDED, Observation

_TENDED = list(TENDED)


@dataclass(frozen=True, slots=True)
class Linear:
    """A map of columns."""

    weight: np.ndarray  # (out, in)
    bias: np.ndarray  # (out,)

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        """Copies a layer."""
        named = dict(module.named_parameters())
        bias = named.get("bias")
        rows = len(named["weight"])
        return cls(numbers(named["weight"]), np.zeros(rows, np.float32) if bias is None else numbers(bias))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """(in, n) to (out, n)."""
        out = product(self.weight, columns)
        out += self.bias[:, None]
        return out


class Head:
    """Scores of things, each of which is seen beside what is the same for all of them."""

    def __init__(self, module: nn.Module) -> None:
        first, _, last = module.children()
        self._first, self._last = Linear.of(first), Linear.of(last)

    def __call__(self, columns: np.ndarray, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores (out, n) of columns (in - D', n) beside `shared` (D',), and what `back` needs."""
        num = len(columns)
        hidden = product(np.ascontiguousarray(self._first.weight[:, :num]), columns)
        hidden += (self._first.weight[:, num:] @ shared + self._first.bias)[:, None]
        np.tanh(hidden, out=hidden)
        return self._last(hidden), hidden

    def back(self, hidden: np.ndarray, slope: np.ndarray, num_columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the slopes of the columns and of what is shared, from those of the scores."""
        bent = product(np.ascontiguousarray(self._last.weight.T), slope)
        bent *= 1.0 - np.square(hidden)
        columns = product(np.ascontiguousarray(self._first.weight[:, :num_columns].T), bent)
        return columns, self._first.weight[:, num_columns:].T @ bent.sum(axis=1)


@dataclass(frozen=True)
class Encoded:
    """A pass of the encoder.

    Attributes:
        nodes: behind the last layer.
        attention: (S,) shares in the pooling.
        The others are kept for the way back.
    """

    stretches: tuple[Wiring, ...]
    features: Nodes
    run: np.ndarray
    entered: Nodes
    traces: list[list[Trace]]
    nodes: Nodes
    kernel_hidden: np.ndarray
    kernel: np.ndarray
    query: np.ndarray
    weights: np.ndarray  # (H, S)
    pools: np.ndarray  # (7 D,)
    pool_hidden: np.ndarray
    graph: np.ndarray
    can_grow: np.ndarray
    tended: np.ndarray

    @property
    def attention(self) -> np.ndarray:
        """(S,) over the heads' mean."""
        return self.weights.mean(axis=0)


@dataclass(frozen=True)
class Chances:
    """Log-probabilities over what the masks allow, and `HIDDEN_SCORE` for the rest; `p` without the floor's share."""

    log_p: np.ndarray
    p: np.ndarray

    def slope(self, chosen: int, floor: float) -> np.ndarray:
        """Of the chosen one's log-probability, to every score."""
        # the floor's share does not move with the scores
        kept = (1.0 - floor) * float(self.p[chosen]) / math.exp(float(self.log_p[chosen])) if floor else 1.0
        one = np.zeros_like(self.p)
        one[chosen] = 1.0
        return np.float32(kept) * (one - self.p)

    @property
    def entropy(self) -> float:
        """Natural logarithm."""
        there = self.log_p[self.log_p > HIDDEN_SCORE / 2]
        return float(-(np.exp(there) * there).sum())


@dataclass(frozen=True)
class Judged:
    """What does not depend on a choice: operation (5,), sites that may grow (G,), and for each operation of `TENDED`
    the seeds that may be tended (T,).
    """

    encoded: Encoded
    operation: Chances
    operation_hidden: np.ndarray
    growing: np.ndarray
    site: Chances
    site_hidden: np.ndarray
    tended: np.ndarray
    seed: tuple[Chances, ...]
    seed_hidden: np.ndarray
    value: float


@dataclass(frozen=True)
class Chosen:
    """A choice, and what the way back needs of the kernel's and the strategy's part."""

    decided: Decided
    option: tuple[Chances, np.ndarray, int] | None = None
    strategy: tuple[Chances, np.ndarray, int] | None = None


class Inference:
    """A network that decides. It copies the weights, and does not see later changes of them.

    Args:
        net: whose.
    """

    def __init__(self, net: PolicyNet) -> None:
        encoder = net.encoder
        self._heads, self._floor = net.shape.heads, net.shape.floor
        self._enter = {kind: Linear.of(module) for kind, module in encoder.enter.items()}
        self._kernel = [Linear.of(encoder.kernel[0]), Linear.of(encoder.kernel[2])]
        self._stack = Stack(encoder.layers, encoder.norms, net.shape.heads)
        self._query = Linear.of(encoder.query)
        self._pool = [Linear.of(encoder.pool[0]), Linear.of(encoder.pool[2])]
        names = ("operation", "site", "option", "strategy", "seed", "value")
        self._head = {name: Head(net.get_submodule(name)) for name in names}
        self.outcomes = net.outcomes

    # ------------------------------------------------------------ forward

    def encode(self, view: Observation) -> Encoded:
        """Encodes an observation."""
        stretches = wire(view, self._stack.reach)
        features = {"site": np.ascontiguousarray(view.site.T), "seed": np.ascontiguousarray(view.seed.T)}
        run = np.maximum(self._enter["run"].weight @ view.run + self._enter["run"].bias, 0.0)
        entered: Nodes = {}
        for kind, columns in features.items():
            entered[kind] = self._enter[kind](columns)
            entered[kind] += run[:, None]
            np.maximum(entered[kind], 0.0, out=entered[kind])
        nodes, traces = self._stack.forward(entered, stretches)
        kernel_hidden = np.maximum(self._kernel[0](np.ascontiguousarray(view.kernel.T)), 0.0)
        kernel = self._kernel[1](kernel_hidden)
        site, seed, each = nodes["site"], nodes["seed"], len(run) // self._heads
        query = self._query.weight @ run + self._query.bias
        scores = by_head(site * query[:, None], self._heads) / np.float32(math.sqrt(each))
        weights = np.exp(scores - scores.max(axis=1, initial=HIDDEN_SCORE)[:, None])
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
        can_grow = np.zeros(len(view.site), dtype=bool)
        can_grow[view.option_site] = True
        tended = np.logical_or.reduce(view.can, axis=1)
        pools = np.concatenate(
            [
                weighted(site, weights).sum(axis=1),
                site.max(axis=1, initial=0.0),
                _of(site, can_grow).max(axis=1, initial=0.0),
                _mean(seed),
                _mean(_of(seed, tended)),
                _mean(kernel),
                run,
            ]
        )
        pool_hidden = np.maximum(self._pool[0].weight @ pools + self._pool[0].bias, 0.0)
        graph = np.maximum(self._pool[1].weight @ pool_hidden + self._pool[1].bias, 0.0)
        return Encoded(stretches, features, run, entered, traces, nodes, kernel_hidden, kernel, query, weights, pools,
                       pool_hidden, graph, can_grow, tended)  # fmt: skip

    def judge(self, view: Observation) -> Judged:
        """Encodes an observation, and returns what does not depend on a choice."""
        encoded = self.encode(view)
        nothing = np.zeros((0, 1), dtype=np.float32)
        scores, operation_hidden = self._head["operation"](nothing, encoded.graph)
        operation = self._chances(scores[:, 0], view.operations)
        growing = np.flatnonzero(encoded.can_grow)
        scores, site_hidden = self._head["site"](_of(encoded.nodes["site"], encoded.can_grow), encoded.graph)
        site = self._chances(scores[0], np.ones(len(growing), dtype=bool))
        tended = np.flatnonzero(encoded.tended)
        scores, seed_hidden = self._head["seed"](_of(encoded.nodes["seed"], encoded.tended), encoded.graph)
        can = view.can[tended]
        seed = tuple(self._chances(scores[column], can[:, column]) for column in range(len(TENDED)))
        value = float(self._head["value"](nothing, encoded.graph)[0][0, 0])
        return Judged(
            encoded, operation, operation_hidden, growing, site, site_hidden, tended, seed, seed_hidden, value
        )

    def decide(self, view: Observation, judged: Judged, generator: torch.Generator | None, chance: Drawn) -> Chosen:
        """Chooses; see `PolicyNet.decide`.

        Raises:
            FloatingPointError: if a probability is not finite.
        """
        probabilities: dict[str, np.ndarray] = {}

        def drawn(chances: Chances, part: str) -> int:
            probabilities[part] = np.exp(chances.log_p.astype(np.float64))
            return pick(probabilities[part], part, generator, chance, floor=self._floor)

        operation = Operation(drawn(judged.operation, "operation"))
        log_prob = float(judged.operation.log_p[operation])
        chances = np.exp(judged.operation.log_p) * view.operations
        entropy = judged.operation.entropy + float(chances[Operation.GERMINATE]) * judged.site.entropy
        entropy += sum(float(chances[one]) * seed.entropy for one, seed in zip(_TENDED, judged.seed, strict=True))

        def told(choice: ActionChoice) -> Decided:
            return Decided(choice, log_prob, entropy, judged.value, probabilities)

        if operation is Operation.WAIT:
            return Chosen(told(WAIT))
        if operation is not Operation.GERMINATE:
            column = TENDED.index(operation)
            place = self._among(judged.tended, judged.seed[column], len(view.seed))
            seed = drawn(place, "seed")
            log_prob += float(place.log_p[seed])
            return Chosen(told(ActionChoice(operation, seed=seed)))
        place = self._among(judged.growing, judged.site, len(view.site))
        site = drawn(place, "site")
        log_prob += float(place.log_p[site])
        first, end = np.searchsorted(view.option_site, [site, site + 1])
        encoded = judged.encoded
        here = encoded.nodes["site"][:, [site]]
        kernels = encoded.kernel[:, view.option_kernel[first:end]]
        columns = np.concatenate([np.broadcast_to(here, kernels.shape), kernels])
        scores, option_hidden = self._head["option"](columns, encoded.graph)
        options = self._chances(scores[0], np.ones(end - first, dtype=bool))
        nth = drawn(options, "option")
        log_prob += float(options.log_p[nth])
        kernel = view.option_kernel[first + nth]
        columns = np.concatenate([here, encoded.kernel[:, [kernel]]])
        scores, strategy_hidden = self._head["strategy"](columns, encoded.graph)
        strategies = self._chances(scores[:, 0], view.strategies[kernel])
        strategy = drawn(strategies, "strategy")
        log_prob += float(strategies.log_p[strategy])
        entropy += options.entropy + strategies.entropy
        choice = ActionChoice(operation, site=site, option=int(first) + nth, strategy=strategy)
        return Chosen(told(choice), (options, option_hidden, nth), (strategies, strategy_hidden, strategy))

    def forecasts(self, view: Observation, judged: Judged, choice: ActionChoice) -> torch.Tensor:
        """What each member of the ensemble expects of a choice: (1, members)."""
        encoded = judged.encoded
        target, kernel = np.zeros_like(encoded.graph), np.zeros_like(encoded.graph)
        if choice.operation is Operation.GERMINATE:
            target = encoded.nodes["site"][:, choice.site]
            kernel = encoded.kernel[:, view.option_kernel[choice.option]]
        elif choice.seed >= 0:
            target = encoded.nodes["seed"][:, choice.seed]
        operation = np.zeros(len(Operation), dtype=np.float32)
        operation[choice.operation] = 1.0
        return self.outcomes(torch.from_numpy(np.concatenate([encoded.graph, target, kernel, operation]))[None])

    # ------------------------------------------------------------ back

    def effects(self, view: Observation, judged: Judged, chosen: Chosen) -> dict[str, np.ndarray]:
        """Gradient times input of the choice's log-probability, by kind of node: (nodes, features)."""
        choice, encoded = chosen.decided.choice, judged.encoded
        site, seed, kernel = (np.zeros_like(x) for x in (*encoded.nodes.values(), encoded.kernel))
        slope = judged.operation.slope(choice.operation, self._floor)[:, None]
        _, graph = self._head["operation"].back(judged.operation_hidden, slope, 0)
        if choice.operation is Operation.GERMINATE:
            place = int(np.searchsorted(judged.growing, choice.site))
            slope = judged.site.slope(place, self._floor)[None]
            columns, more = self._head["site"].back(judged.site_hidden, slope, len(site))
            site[:, judged.growing] += columns
            graph = graph + more + self._back_of_kernel(view, chosen, site, kernel)
        elif choice.seed >= 0:
            place = int(np.searchsorted(judged.tended, choice.seed))
            column = TENDED.index(choice.operation)
            slope = np.zeros((len(TENDED), len(judged.tended)), dtype=np.float32)
            slope[column] = judged.seed[column].slope(place, self._floor)
            columns, more = self._head["seed"].back(judged.seed_hidden, slope, len(seed))
            seed[:, judged.tended] += columns
            graph = graph + more
        return self._back(view, encoded, {"site": site, "seed": seed}, kernel, graph)

    def _back_of_kernel(self, view: Observation, chosen: Chosen, site: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Adds the slopes of the kernel's and the strategy's part; returns that of the graph."""
        choice, width = chosen.decided.choice, len(site)
        assert chosen.option is not None
        assert chosen.strategy is not None
        options, hidden, nth = chosen.option
        slope = options.slope(nth, self._floor)[None]
        columns, graph = self._head["option"].back(hidden, slope, 2 * width)
        first = choice.option - nth
        here = view.option_kernel[first : first + len(options.p)]
        np.add.at(kernel.T, here, columns[width:].T)
        site[:, choice.site] += columns[:width].sum(axis=1)
        strategies, hidden, strategy = chosen.strategy
        slope = strategies.slope(strategy, self._floor)[:, None]
        columns, more = self._head["strategy"].back(hidden, slope, 2 * width)
        kernel[:, view.option_kernel[choice.option]] += columns[width:, 0]
        site[:, choice.site] += columns[:width, 0]
        return graph + more

    def _back(
        self, view: Observation, encoded: Encoded, slopes: Nodes, kernel: np.ndarray, graph: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Effects of the features, from the slopes behind the encoder."""
        hidden = self._pool[1].weight.T @ (graph * (encoded.graph > 0.0))
        pools = np.split(self._pool[0].weight.T @ (hidden * (encoded.pool_hidden > 0.0)), 7)
        run = pools[6] + self._back_of_pools(encoded, slopes, kernel, pools)
        slopes = self._stack.back(slopes, encoded.stretches, encoded.traces)
        effects: dict[str, np.ndarray] = {}
        for kind in slopes:
            slope = slopes[kind] * (encoded.entered[kind] > 0.0)
            run = run + slope.sum(axis=1)
            effects[kind] = (
                product(np.ascontiguousarray(self._enter[kind].weight.T), slope) * encoded.features[kind]
            ).T
        bent = self._kernel[1].weight.T @ kernel * (encoded.kernel_hidden > 0.0)
        effects["kernel"] = (self._kernel[0].weight.T @ bent).T * view.kernel
        effects["run"] = (self._enter["run"].weight.T @ (run * (encoded.run > 0.0)) * view.run)[None]
        return effects

    def _back_of_pools(
        self, encoded: Encoded, slopes: Nodes, kernel: np.ndarray, pools: list[np.ndarray]
    ) -> np.ndarray:
        """Adds the slopes of nodes and kernels from those of the pools; returns that of the run, by the query."""
        site, seed = encoded.nodes["site"], encoded.nodes["seed"]
        attended = by_head(site * pools[0][:, None], self._heads)
        mean = (attended * encoded.weights).sum(axis=1, keepdims=True)
        scores = encoded.weights * (attended - mean) / np.float32(math.sqrt(len(site) // self._heads))
        ones = np.ones((len(site), 1), dtype=np.float32)
        slopes["site"] += weighted(np.broadcast_to(pools[0][:, None], site.shape), encoded.weights)
        slopes["site"] += weighted(np.broadcast_to(encoded.query[:, None] * ones, site.shape), scores)
        query = weighted(site, scores).sum(axis=1)
        slopes["site"] += _back_of_largest(site, pools[1], np.ones(site.shape[1], dtype=bool))
        slopes["site"] += _back_of_largest(site, pools[2], encoded.can_grow)
        slopes["seed"] += pools[3][:, None] / max(1, seed.shape[1])
        slopes["seed"][:, encoded.tended] += pools[4][:, None] / max(1, int(encoded.tended.sum()))
        kernel += pools[5][:, None] / max(1, kernel.shape[1])
        return self._query.weight.T @ query

    # ------------------------------------------------------------ parts

    def _chances(self, scores: np.ndarray, mask: np.ndarray) -> Chances:
        """The distribution over what the mask allows."""
        if not mask.any():
            return Chances(np.full(len(mask), HIDDEN_SCORE, dtype=np.float32), np.zeros(len(mask), dtype=np.float32))
        hidden = np.where(mask, scores, np.float32(HIDDEN_SCORE))
        lowered = hidden - hidden.max()
        raised = np.where(mask, np.exp(lowered), np.float32(0.0))
        whole = raised.sum()
        log_p = lowered - np.log(whole)
        if self._floor:
            even = np.float32(math.log(self._floor) - math.log(int(mask.sum())))
            log_p = np.logaddexp(log_p + np.float32(math.log1p(-self._floor)), even)
        return Chances(np.where(mask, log_p, np.float32(HIDDEN_SCORE)), raised / whole)

    @staticmethod
    def _among(places: np.ndarray, found: Chances, size: int) -> Chances:
        """A distribution over some as one over all."""
        log_p, p = np.full(size, HIDDEN_SCORE, dtype=np.float32), np.zeros(size, dtype=np.float32)
        log_p[places], p[places] = found.log_p, found.p
        return Chances(log_p, p)


def _of(columns: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return columns if mask.all() else np.ascontiguousarray(columns[:, mask])


def _mean(columns: np.ndarray) -> np.ndarray:
    """0 of none."""
    return columns.sum(axis=1) / np.float32(max(1, columns.shape[1]))


def _back_of_largest(columns: np.ndarray, slope: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Slopes of columns from that of their largest, and 0, where the mask is true; as torch shares it among equals."""
    found = np.where(mask, columns, np.float32(-np.inf))
    largest = found.max(axis=1, initial=0.0)
    is_largest = found == largest[:, None]
    num = is_largest.sum(axis=1) + (largest == 0.0)
    return is_largest * (slope / np.maximum(1, num)).astype(np.float32)[:, None]
