"""The edges of a run's graph, and that they are made anew after a fossil and not before."""

from __future__ import annotations

import pytest
from tamiyo_story import layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import SeedStage
from esper.tamiyo.graph import form_of, topology_of


def site(name, *seeds, **health):
    """A site whose seeds are (id, stage)."""
    one = layer(name, 3, **health)
    (signal,) = one.seeds
    return one.model_copy(
        update={"seeds": tuple(signal.model_copy(update={"seed_id": id_, "stage": stage}) for id_, stage in seeds)}
    )


DORMANT, TRAINING, FOSSIL = SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.FOSSILIZED
GROWN = packet(
    3,
    site("a", ("s0", FOSSIL), ("s2", FOSSIL), ("s3", DORMANT), ("s4", TRAINING)),
    site("b", ("s1", DORMANT)),
    site("c"),
)


def pairs(topology, *kind):
    return topology.edges[kind].T.tolist()


def test_edges_lead_forward_down_into_seeds_and_up_the_stack():
    topology = topology_of(GROWN)
    assert topology.sites == ("a", "b", "c")
    assert topology.seeds == (("a", "s0"), ("a", "s2"), ("a", "s3"), ("a", "s4"), ("b", "s1"))
    assert pairs(topology, "site", "layer_forward", "site") == [[0, 1], [1, 2]]
    assert pairs(topology, "site", "contains", "seed") == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 4]]
    # both that stand on the second fossil are fed by it, and by no other
    assert pairs(topology, "seed", "sequential", "seed") == [[0, 1], [1, 2], [1, 3]]


def test_every_edge_has_its_reverse():
    edges = topology_of(GROWN).edges
    assert len(edges) == 6
    for source, edge, target in [kind for kind in edges if not kind[1].startswith("rev_")]:
        assert edges[target, f"rev_{edge}", source].tolist() == edges[source, edge, target].flip(0).tolist()


def test_the_form_changes_with_a_fossil_and_with_nothing_else_of_a_seed():
    def form(stage, **health):
        return form_of(packet(3, site("a", ("s0", stage), **health)))

    before_the_fossil = [stage for stage in SeedStage if stage is not FOSSIL]
    assert len({form(stage, potential=0.1 * i) for i, stage in enumerate(before_the_fossil)}) == 1
    assert form(FOSSIL) != form(DORMANT)


def test_two_sites_of_one_name_are_refused():
    with pytest.raises(ValueError, match="twice"):
        topology_of(packet(3, layer("a", 3), layer("a", 3)))


def test_a_network_of_one_site_or_none_has_edges_all_the_same():
    assert pairs(topology_of(packet(3, layer("a", 3))), "site", "layer_forward", "site") == []
    assert topology_of(packet(3)).seeds == ()


def test_options_are_gone_through_once_however_many_sites():
    """The candidates of a large host, whose options were gone through for each site again."""
    from esper.tamiyo.candidates import find_candidates
    from esper.tamiyo.memory import initial_state, read_state

    looks = 0

    class Counted(tuple):
        __slots__ = ()

        def __iter__(self):
            nonlocal looks
            looks += 1
            return super().__iter__()

    names = [f"a{i}" for i in range(50)]
    many = packet(3, *(layer(name, 3) for name in names), options=[option(name, "conv") for name in names])
    many = many.model_copy(update={"options": Counted(many.options)})
    config = TamiyoConfig()
    found = find_candidates(read_state(initial_state(config, 0)), many, config)
    assert (len(found.candidates), looks) == (50, 1)
