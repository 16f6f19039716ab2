"""How long Tamiyo takes, in its own process: packets in and out of JSON, graphs, and decisions.

The hosts are made up: at each site a fossil with a resting seed above it, all health measured, and so many kernels
ready for each site. The validation loss stands still, so that the heuristic goes the whole way to a germination. The
network of `gnn` has its initial weights, a liking for germination, and no gates of its own: how long it takes depends
on none of them. Times are of the wall clock; the first call of each kind is not counted. What Ray Serve and HTTP add is
not in them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from esper.config import GnnConfig, TamiyoConfig
from esper.leyline import (
    BudgetState,
    EpochRecord,
    HealthSignal,
    KernelOption,
    LayerHealthReport,
    PolicyCard,
    SeedStage,
    SiteKind,
    SiteSignature,
    SystemStatePacket,
)
from esper.tamiyo import initial_state, step
from esper.tamiyo.actions import Operation
from esper.tamiyo.gnn import Policies, load
from esper.tamiyo.graph import GraphBuilder
from esper.tamiyo.observation import OBSERVATION_VERSION, observe_graph
from esper.tamiyo.shape import NetShape
from esper.tamiyo.step import case_of
from jobs.bench.harness import BenchResult, machine

SEEDS = (20, 200, 2_000, 10_000)
POLICIES = ("heuristic", "bandit", "gnn")
_RUN = "paper"


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="esper bench tamiyo-latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of a host, an even number")
    parser.add_argument("--kernels", type=int, default=12, help="ready for each site")
    parser.add_argument("--calls", type=int, default=200, help="of each kind, fewer where they take 5 s together")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for num_seeds in options.seeds:
        for what, call in _kinds(num_seeds, options.kernels).items():
            say(f"{num_seeds} seeds: {what}")
            rows.append({"seeds": num_seeds, "what": what, **_timed(call, options.calls)})
    verdict = "in process, without Ray Serve and HTTP; a graph's first build in a process also imports torch_geometric"
    return BenchResult(name="tamiyo-latency", machine=machine(), rows=tuple(rows), verdict=verdict)


def _kinds(num_seeds: int, num_kernels: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    packet = packet_of(num_seeds, num_kernels, epoch=9)
    text, builder = packet.model_dump_json(), GraphBuilder()
    kinds: dict[str, Callable[[], Any]] = {
        f"packet to JSON ({len(text) / 1e6:.2f} MB)": packet.model_dump_json,
        "packet from JSON": lambda: SystemStatePacket.model_validate_json(text),
        "graph with its edges": lambda: GraphBuilder().build(packet),
        "graph on kept edges": lambda: builder.build(packet),
    }
    gnn, policies = learned()
    for policy in POLICIES:
        config = TamiyoConfig(policy=policy, gnn=gnn)
        state = initial_state(config, 0)
        for epoch in range(9 - config.plateau_window, 9):
            record = packet.epoch.model_copy(update={"epoch": epoch})
            state, _ = step(state, packet.model_copy(update={"epoch": record, "options": ()}), config, policies)
        _, signal = step(state, packet, config, policies)
        assert signal.commands, signal.reason
        kinds[f"step of {policy}"] = lambda state=state, config=config: step(state, packet, config, policies)
    return kinds | _parts(packet, TamiyoConfig(policy="gnn", gnn=gnn), policies)


def learned() -> tuple[GnnConfig, Policies]:
    """A network that wants to grow, and who holds it."""
    import torch

    from esper.tamiyo.net import PolicyNet

    shape = NetShape()
    net = PolicyNet(shape)
    with torch.no_grad():
        dict(net.operation.named_parameters())["2.bias"][Operation.GERMINATE] += 8.0
    weights = net.to_bytes()
    observation = {"shape": shape.model_dump(), "observation_version": OBSERVATION_VERSION}
    card = PolicyCard.of(weights, name="paper", **observation)
    return GnnConfig(version=card.version, max_uncertainty=None, min_confidence=0.0), lambda _: (card, weights)


def _parts(packet: SystemStatePacket, config: TamiyoConfig, policies: Policies) -> dict[str, Callable[[], Any]]:
    """What a step of `gnn` is made of."""
    from esper.tamiyo.considering import Draw, consider

    state = initial_state(config, 0)
    case, loaded = case_of(state, packet, config), load(config.gnn.version, policies)
    view = observe_graph(case.state, packet, config, case.care)
    return {
        "gnn: memory and tending": lambda: case_of(state, packet, config),
        "gnn: observation": lambda: observe_graph(case.state, packet, config, case.care),
        "gnn: network and explanation": lambda: consider(loaded.inference, [view], [Draw(None)]),
    }


def packet_of(num_seeds: int, num_kernels: int, *, epoch: int) -> SystemStatePacket:
    """A packet of a host with so many seeds, half of them fossils."""
    signature = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=64, extent=(16, 16))
    sites = [f"stages.{place}" for place in range(num_seeds // 2)]

    def seed(site: str, place: int, stage: SeedStage) -> HealthSignal:
        figure = 1.0 / (2 + place)
        return HealthSignal(
            layer_id=site, seed_id=f"s{place}-{stage.value}", epoch=epoch, stage=stage,
            activation_variance=1.0 + figure, dead_neuron_ratio=figure,
            avg_correlation=figure, gradient_norm=figure, grow_potential=figure, health_score=1.0 - figure,
        )  # fmt: skip

    layers = tuple(
        LayerHealthReport(
            run_id=_RUN, layer_id=site, signature=signature, epoch=epoch, step=100 * epoch, num_samples=320,
            seeds=(seed(site, place, SeedStage.FOSSILIZED), seed(site, place, SeedStage.DORMANT)),
        )
        for place, site in enumerate(sites)
    )  # fmt: skip
    options = tuple(
        KernelOption(
            site=sites[0], others=tuple(sites[1:]),
            kernel_id=f"{number:064x}", blueprint_id=f"{number:032x}", blueprint=f"design_{number}",
            num_parameters=1_000 * (1 + number), flops_per_sample=100_000 * (1 + number), zero_at_birth=True, risk=0.1,
        )
        for number in range(num_kernels)
    )  # fmt: skip
    record = EpochRecord(
        run_id=_RUN, epoch=epoch, num_epochs=30, step=100 * epoch, train_loss=1.0, val_loss=1.0, learning_rate=0.01
    )
    budget = BudgetState(params_used=10**6, params_limit=10**7, flops_used=10**8, flops_limit=10**9)
    return SystemStatePacket(run_id=_RUN, epoch=record, layers=layers, options=options, budget=budget)


def _timed(call: Callable[[], Any], num_calls: int, *, longest_s: float = 5.0) -> dict[str, Any]:
    call()
    took: list[float] = []
    while len(took) < num_calls and (sum(took) < longest_s or len(took) < 3):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    p50, p99 = np.percentile(took, [50, 99])
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99), "calls": len(took)}
