"""Hosts as hypothesis draws them: any stages, kernels, budgets and epochs, legal or not."""

from __future__ import annotations

import functools

from hypothesis import strategies as st
from tamiyo_story import SHADOW, layer, option, packet

from esper.config import GnnConfig, TamiyoConfig
from esper.leyline import BudgetState, SeedStage
from esper.tamiyo.memory import TamiyoState, observe

DESIGNS = ("conv", "norm", "wide")

# Strategies are made once: made anew for each example and looked over they took as long as what is drawn from them.
YES_NO = st.booleans()
AGES = st.sampled_from([0, 0, 0, 1])
SEED = st.fixed_dictionaries(
    {
        "stage": st.sampled_from(SeedStage),
        "alpha": st.sampled_from([0.0, 0.5, 1.0]),
        "is_ready_for_transition": YES_NO,
        "should_cull": YES_NO,
        "evidence": st.sampled_from([None, SHADOW]),
        "grow_potential": st.none() | st.floats(0, 10),
        "gradient_norm": st.none() | st.floats(0, 1e6),
        "age": AGES,
    }
)
SITE = st.tuples(AGES, st.lists(SEED, max_size=3))
OPTIONS = st.lists(
    st.tuples(st.sampled_from(DESIGNS), st.sampled_from([100, 3000, 9000]), YES_NO, st.sampled_from([None, 0.1, 0.9])),
    max_size=3,
    unique_by=lambda entry: entry[0],
)
CONFIG = st.fixed_dictionaries(
    {
        "warmup_epochs": st.integers(0, 2),
        "max_concurrent": st.integers(1, 3),
        "max_adaptations": st.integers(0, 6),
        "max_risk": st.none() | st.just(0.5),
        "ask_before_graft": st.sampled_from([False, False, True]),
        "strategy": st.sampled_from(["ramp", "direct"]),
        "gnn": st.builds(
            GnnConfig, top_k=st.integers(1, 3), strategies=st.sampled_from([("ramp",), ("ramp", "direct")])
        ),
    }
).map(lambda settings: TamiyoConfig(**settings))
SEEN = st.fixed_dictionaries(
    {
        "val_loss": st.none() | st.floats(0.1, 2.0),
        "params_limit": st.none() | st.just(5000),
        "governor": st.sampled_from(["ok", "ok", "ok", "watching", "critical: loss"]),
        "embargoed": st.lists(st.sampled_from(["site0", "site1:conv"]), max_size=2, unique=True).map(tuple),
    }
)
BEFORE = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "num_adaptations": st.integers(0, 2),
        "cools_down": st.sampled_from([False, False, True]),
        "failed": st.lists(st.sampled_from(["site0:conv", "site2:norm"]), max_size=1).map(tuple),
    }
)
EPOCHS = st.integers(0, 12)


def seed_of(drawn, epoch):
    stage, ready = drawn["stage"], drawn["is_ready_for_transition"]
    return {
        **{name: value for name, value in drawn.items() if name != "age"},
        "epoch": max(0, epoch - drawn["age"]),
        "should_cull": not ready and drawn["should_cull"],
        "kernel_id": "k" if stage.is_active else None,
        "gate": "said so",
    }


@st.composite
def situations(draw, max_sites=4):
    """(state that has seen the packet, packet, config)."""
    epoch, config = draw(EPOCHS), draw(CONFIG)
    layers = []
    for site, (age, drawn) in enumerate(draw(sites_up_to(max_sites))):
        name = f"site{site}"
        base = layer(name, max(0, epoch - age))
        signals = tuple(
            base.seeds[0].model_copy(update={"seed_id": f"s{site}.{place}", "layer_id": name, **seed_of(one, epoch)})
            for place, one in enumerate(drawn)
        )
        layers.append(base.model_copy(update={"seeds": signals}))
    options = [
        option(f"site{site}", name, params, zero=zero, risk=risk)
        for site in range(len(layers) + 1)  # of a site that nobody reported too
        for name, params, zero, risk in draw(OPTIONS)
    ]
    figures, past = draw(SEEN), draw(BEFORE)
    seen = packet(
        epoch,
        *layers,
        num_epochs=15,
        options=options,
        budget=BudgetState(params_used=1000, params_limit=figures.pop("params_limit"), flops_used=0),
        **figures,
    )
    cooldown = epoch + 1 if past.pop("cools_down") else 0
    return observe(TamiyoState(cooldown_until=cooldown, **past), seen, config), seen, config


@functools.cache
def sites_up_to(num):
    return st.lists(SITE, max_size=num)
