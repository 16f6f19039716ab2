"""A kernel that is ready for several sites travels once: it means what it meant told for each site."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from tamiyo_hosts import situations
from tamiyo_story import layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import SystemStatePacket
from esper.tamiyo import initial_state, step
from esper.tamiyo.candidates import find_candidates
from esper.tamiyo.features import site_features
from esper.tamiyo.observation import observe_graph

SITES = ("a", "b", "c")
EACH = tuple(
    option(site, name, size).model_copy(update={"kernel_id": name})
    for site in SITES
    for name, size in (("conv", 600), ("norm", 16))
)
ONCE = tuple(one.model_copy(update={"others": SITES[1:]}) for one in EACH if one.site == "a")


def told_apart(seen):
    """The packet with each option told for each of its sites alone."""
    apart = tuple(
        one.model_copy(update={"site": site, "others": ()}) for site in seen_sites(seen) for one in seen.options
        if site in one.sites
    )  # fmt: skip
    return seen.model_copy(update={"options": apart})


def seen_sites(seen):
    return list(dict.fromkeys(site for one in seen.options for site in one.sites))


def together(seen):
    """The packet with every design of one cost offered once for all sites that have it."""
    merged = {}
    for one in seen.options:
        alike = one.model_copy(update={"site": "", "kernel_id": one.blueprint})
        merged.setdefault(alike.model_dump_json(), []).append((alike, one.site))
    options = tuple(
        entries[0][0].model_copy(update={"site": entries[0][1], "others": tuple(site for _, site in entries[1:])})
        for entries in merged.values()
    )
    return seen.model_copy(update={"options": options})


@settings(max_examples=150, deadline=None)
@given(situations())
def test_candidates_and_figures_are_the_same_either_way(situation):
    state, seen, config = situation
    once = together(seen)
    apart = told_apart(once)
    assert sum(len(one.sites) for one in once.options) == len(apart.options) == len(seen.options)

    def found(view):
        of = find_candidates(state, view, config)
        return {c.site: [o.kernel_id for o in c.options] for c in of.candidates}, of.excluded

    assert found(once) == found(apart)
    assert site_features(once).tolist() == site_features(apart).tolist()
    first, second = (observe_graph(state, view, config) for view in (once, apart))
    for name in ("site", "seed", "run", "option_site", "resting"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    kernels = [[view.kernel_names[place] for place in view.option_kernel] for view in (first, second)]
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize("policy", ["heuristic", "bandit", "random"])
def test_policies_decide_the_same_either_way(policy):
    config = TamiyoConfig(policy=policy, warmup_epochs=0, plateau_window=1, max_adaptations=20)
    sites = [layer(site, 5, potential=0.1 * place) for place, site in enumerate(SITES, 1)]
    commands = []
    for options in (EACH, ONCE):
        state, given = initial_state(config, 3), []
        for epoch in range(3, 6):
            at = [one.model_copy(update={"epoch": epoch}) for one in sites]
            state, signal = step(state, packet(epoch, *at, options=options), config)
            given += [(epoch, c.site, c.kernel_id, c.seed_id) for c in signal.commands]
        commands.append(given)
    assert commands[0] == commands[1]
    assert commands[0]


def test_a_packet_of_before_is_read_and_one_of_now_is_small():
    sites = [layer(f"stages.{i}", 5) for i in range(100)]
    names = [site.layer_id for site in sites]
    once = packet(5, *sites, options=[option(names[0], "conv").model_copy(update={"others": tuple(names[1:])})])
    before = once.model_dump(mode="json")
    before["options"] = [{**before["options"][0], "site": name} for name in names]
    for entry in before["options"]:
        entry.pop("others")
    read = SystemStatePacket.model_validate(before)
    assert [one.sites for one in read.options] == [(name,) for name in names]
    sizes = [len(p.model_copy(update={"layers": ()}).model_dump_json()) for p in (read, once)]
    assert sizes[1] < sizes[0] / 8
