"""A packet in columns says what the packet says, and nothing that no packet may say comes in."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_hosts import situations
from tamiyo_story import SHADOW, layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import ChunkHealth, PermanentError, SeedStage, SystemStatePacket
from esper.tamiyo import initial_state, packing, step
from esper.tamiyo.columns import FORMS
from esper.tamiyo.observation import observe_graph
from esper.tamiyo.packing import MARK, pack, unpack
from esper.tamiyo.table import Layers, Table, layers_of, table_of, with_layers

ELSEWHERE = {"site": {"signature", "chunks", "seeds"}, "seed": {"evidence"}}
CHUNK = ChunkHealth(chunk_id=1, first_channel=8, num_channels=8, dead_neuron_ratio=0.25, grow_potential=0.5)
RICH = packet(
    5,
    layer("a", 5, potential=0.4).model_copy(update={"chunks": (CHUNK, CHUNK.model_copy(update={"chunk_id": 2}))}),
    layer("b", 5, stage=SeedStage.TRAINING, kernel_id="k", evidence=SHADOW, gate="gain", trace_id="t", latency_ms=2.0),
    layer("c", 4, potential=None).model_copy(update={"seeds": ()}),
    options=(
        option("a", "conv"),
        option("b", "conv").model_copy(update={"others": ("a", "nowhere")}),
        option("a", "x", 3),
    ),
)


def whole(seen):
    """The packet with plain records."""
    return seen.model_copy(update={"layers": tuple(seen.layers)})


def changed(form, name, value, seen=RICH):
    """The packed packet with the first entry of a column changed."""
    table = Table.of(seen.layers)
    columns = {"site": table.site, "seed": table.seed, "evidence": table.evidence, "chunk": table.chunks}[form]
    column = columns.values[name].copy()
    column[0] = value
    cast("dict", columns.values)[name] = column
    return pack(with_layers(seen, Layers(table)))


def test_every_field_of_a_report_has_its_column():
    for form, (kind, fields) in FORMS.items():
        assert set(kind.model_fields) == fields.keys() | ELSEWHERE.get(form, set())


@settings(max_examples=200, deadline=None)
@given(situations())
def test_a_packed_packet_is_the_packet(situation):
    _, seen, _ = situation
    assert whole(unpack(pack(seen))) == seen
    assert whole(unpack(pack(unpack(pack(seen))))) == seen


def test_chunks_evidence_and_kernels_for_many_sites_come_through():
    assert whole(unpack(pack(RICH))) == RICH
    assert whole(unpack(pack(packet(0)))) == packet(0)


@settings(max_examples=150, deadline=None)
@given(situations(), st.sampled_from(["heuristic", "bandit", "random", "none"]))
def test_whoever_decides_decides_the_same_about_it(situation, policy):
    state, seen, config = situation
    config = config.model_copy(update={"policy": policy})
    assert step(state.to_json(), unpack(pack(seen)), config) == step(state.to_json(), seen, config)
    first, second = (observe_graph(state, view, config) for view in (seen, unpack(pack(seen))))
    assert first.to_bytes() == second.to_bytes()


def test_records_are_made_of_what_is_asked_for_alone(monkeypatch):
    many = packet(9, *(layer(f"s{i}", 9, potential=0.1 * i) for i in range(50)), options=[option("s7", "conv")])
    config, made = TamiyoConfig(warmup_epochs=0, plateau_window=1), []
    report = Table.report
    monkeypatch.setattr(Table, "report", lambda table, place: made.append(place) or report(table, place))
    state = initial_state(config, 0)
    state, _ = step(state, many.model_copy(update={"epoch": many.epoch.model_copy(update={"epoch": 8})}), config)
    _, signal = step(state, unpack(pack(many)), config)
    assert [command.site for command in signal.commands] == ["s7"]
    assert set(made) == {7}


@pytest.mark.parametrize("figure", [np.nan, np.inf, -np.inf])
def test_a_figure_that_is_no_number_was_not_measured_as_in_json(figure):
    (signal,) = layer("a", 5, potential=0.4).seeds
    sick = layer("a", 5).model_copy(update={"seeds": (signal.model_copy(update={"grow_potential": figure}),)})
    seen = packet(5, sick, layer("b", 5, potential=0.1))
    read = whole(unpack(pack(seen)))
    assert read.layers[0].seeds[0].grow_potential is None
    assert read == SystemStatePacket.model_validate_json(seen.model_dump_json())
    harmed = signal.model_copy(update={"alpha": figure})
    with pytest.raises(PermanentError, match=r"seed\.alpha"):
        unpack(pack(packet(5, sick.model_copy(update={"seeds": (harmed,)}))))


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        ("seed", "alpha", 1.5),
        ("seed", "alpha", np.nan),
        ("seed", "activation_variance", np.inf),
        ("seed", "dead_neuron_ratio", -0.1),
        ("seed", "latency_ms", -1.0),
        ("seed", "stage", 11),
        ("seed", "stage", -1),
        ("seed", "epoch", -1),
        ("seed", "gate", None),
        ("seed", "seed_id", 7),
        ("site", "num_samples", -3),
        ("site", "layer_id", None),
        ("evidence", "gain", np.nan),
        ("evidence", "kind", 9),
        ("chunk", "num_channels", 0),
    ],
)
def test_what_no_packet_may_hold_is_refused_by_name(form, name, value):
    with pytest.raises(PermanentError, match=rf"{form}\.{name}"):
        unpack(changed(form, name, value))


def test_torn_and_changed_bytes_are_refused_or_read_as_a_packet():
    data = pack(RICH)
    for end in range(len(data)):
        with pytest.raises(PermanentError):
            unpack(data[:end])
    with pytest.raises(PermanentError, match="more than it tells of"):
        unpack(data + b"\0")
    with pytest.raises(PermanentError, match="form"):
        unpack(data.replace(MARK, b"esper packet 9\n"))
    chance = random.Random(0)
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(MARK), len(data))] = chance.randrange(256)
        try:
            read = unpack(bytes(broken))
        except PermanentError:
            continue
        SystemStatePacket.model_validate(whole(read).model_dump())  # what comes through is a packet


@pytest.mark.parametrize("place", [-1, 3, 2**20])
def test_places_that_are_not_there_are_refused(place):
    table = table_of(RICH)
    for name in ("signature_of", "evidence_of", "chunk_of", "first"):
        torn = Table.of(RICH.layers)
        column = getattr(torn, name).copy()
        column[-1] = place if name != "first" else column[-1] + place
        setattr(torn, name, column)
        with pytest.raises(PermanentError):
            unpack(pack(with_layers(RICH, Layers(torn))))
    assert len(table) == 3


def test_a_report_is_made_once_and_looks_like_a_sequence():
    layers = layers_of(unpack(pack(RICH)))
    assert layers[0] is layers[0]
    assert layers[-1].layer_id == "c"
    assert layers[:2] == RICH.layers[:2]
    assert layers.named("nowhere") is None
    assert [seed.seed_id for _, seed in layers.active()] == [RICH.layers[1].seeds[0].seed_id]
    with pytest.raises(IndexError):
        layers[3]
    assert packing.MARK.endswith(b"\n")
