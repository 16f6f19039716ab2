"""Hosts as hypothesis draws them: any stages, kernels, budgets and epochs, legal or not."""

from __future__ import annotations

from hypothesis import strategies as st
from tamiyo_story import SHADOW, layer, option, packet

from esper.config import GnnConfig, TamiyoConfig
from esper.leyline import BudgetState, SeedStage
from esper.tamiyo.memory import TamiyoState, observe

DESIGNS = ("conv", "norm", "wide")


@st.composite
def seeds(draw, epoch):
    stage = draw(st.sampled_from(SeedStage))
    ready = draw(st.booleans())
    return {
        "stage": stage,
        "epoch": draw(st.sampled_from([epoch, epoch, epoch, max(0, epoch - 1)])),
        "alpha": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "is_ready_for_transition": ready,
        "should_cull": not ready and draw(st.booleans()),
        "evidence": draw(st.sampled_from([None, SHADOW])),
        "kernel_id": "k" if stage.is_active else None,
        "gate": "said so",
        "grow_potential": draw(st.none() | st.floats(0, 10)),
        "gradient_norm": draw(st.none() | st.floats(0, 1e6)),
    }


@st.composite
def situations(draw, max_sites=4):
    """(state that has seen the packet, packet, config)."""
    epoch = draw(st.integers(0, 12))
    config = TamiyoConfig(
        warmup_epochs=draw(st.integers(0, 2)),
        max_concurrent=draw(st.integers(1, 3)),
        max_adaptations=draw(st.integers(0, 6)),
        max_risk=draw(st.none() | st.just(0.5)),
        ask_before_graft=draw(st.sampled_from([False, False, True])),
        strategy=draw(st.sampled_from(["ramp", "direct"])),
        gnn=GnnConfig(top_k=draw(st.integers(1, 3)), strategies=draw(st.sampled_from([("ramp",), ("ramp", "direct")]))),
    )
    layers = []
    for site in range(draw(st.integers(0, max_sites))):
        name = f"site{site}"
        drawn = draw(st.lists(seeds(epoch), min_size=0, max_size=3))
        base = layer(name, draw(st.sampled_from([epoch, epoch, epoch, max(0, epoch - 1)])))
        signals = tuple(
            base.seeds[0].model_copy(update={"seed_id": f"s{site}.{place}", "layer_id": name, **figures})
            for place, figures in enumerate(drawn)
        )
        layers.append(base.model_copy(update={"seeds": signals}))
    options = [
        option(f"site{site}", name, params, zero=zero, risk=risk)
        for site in range(len(layers) + 1)  # of a site that nobody reported too
        for name, params, zero, risk in draw(
            st.lists(
                st.tuples(
                    st.sampled_from(DESIGNS),
                    st.sampled_from([100, 3000, 9000]),
                    st.booleans(),
                    st.sampled_from([None, 0.1, 0.9]),
                ),
                max_size=3,
                unique_by=lambda entry: entry[0],
            )
        )
    ]
    seen = packet(
        epoch,
        *layers,
        num_epochs=15,
        options=options,
        val_loss=draw(st.none() | st.floats(0.1, 2.0)),
        budget=BudgetState(params_used=1000, params_limit=draw(st.none() | st.just(5000)), flops_used=0),
        governor=draw(st.sampled_from(["ok", "ok", "ok", "watching", "critical: loss"])),
        embargoed=tuple(draw(st.lists(st.sampled_from(["site0", "site1:conv"]), max_size=2, unique=True))),
    )
    before = TamiyoState(
        seed=draw(st.integers(0, 3)),
        num_adaptations=draw(st.integers(0, 2)),
        cooldown_until=draw(st.sampled_from([0, 0, epoch + 1])),
        failed=tuple(draw(st.lists(st.sampled_from(["site0:conv", "site2:norm"]), max_size=1))),
    )
    return observe(before, seen, config), seen, config
