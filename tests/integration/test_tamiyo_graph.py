"""Graphs of `torch_geometric` from packets, whose import takes seconds, and the benchmark that times them."""

from __future__ import annotations

import subprocess
import sys

from esper.leyline import SeedStage
from esper.tamiyo.features import RUN_FEATURES, SEED_FEATURES, SITE_FEATURES
from esper.tamiyo.graph import GraphBuilder
from jobs.bench.tamiyo_latency import main, packet_of


def staged(packet, stage):
    """The packet with the first site's topmost seed in this stage."""
    first, *others = packet.layers
    seeds = (*first.seeds[:-1], first.seeds[-1].model_copy(update={"stage": stage}))
    return packet.model_copy(update={"layers": (first.model_copy(update={"seeds": seeds}), *others)})


def test_a_graph_is_whole_and_its_edges_are_kept_until_a_fossil():
    packet = packet_of(20, 3, epoch=9)
    builder = GraphBuilder()
    graph = builder.build(packet)
    assert graph.validate()
    assert graph["site"].x.shape == (10, len(SITE_FEATURES))
    assert graph["seed"].x.shape == (20, len(SEED_FEATURES))
    assert graph.run.shape == (1, len(RUN_FEATURES))
    assert graph["seed"].name[1] == ("stages.0", "s0-DORMANT")
    later = builder.build(staged(packet, SeedStage.GRAFTING))
    assert builder.num_topologies == 1
    assert later["site", "contains", "seed"].edge_index is graph["site", "contains", "seed"].edge_index
    assert not later["seed"].x.equal(graph["seed"].x)
    builder.build(staged(packet, SeedStage.FOSSILIZED))
    assert builder.num_topologies == 2


def test_edges_of_the_runs_seen_last_are_kept():
    builder = GraphBuilder(num_kept=2)
    for run in ("a", "b", "a", "c", "a", "b"):
        builder.build(packet_of(4, 1, epoch=9).model_copy(update={"run_id": run}))
    assert builder.num_topologies == 4  # a, b, c, and b again, which gave way to c


def test_an_ordinary_decision_does_not_import_it():
    code = (
        "import sys; import esper.tamiyo, actors.tamiyo;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'torch_geometric', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_benchmark_times_each_kind():
    result = main(["--seeds", "20", "--calls", "3", "--kernels", "2"], lambda _line: None)
    kinds = [row["what"] for row in result.rows]
    assert "graph on kept edges" in kinds
    assert {"step of heuristic", "step of bandit"} <= set(kinds)
    assert all(0.0 < row["p50_ms"] <= row["p99_ms"] for row in result.rows)
