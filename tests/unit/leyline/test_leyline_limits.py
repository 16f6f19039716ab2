"""Static limits: each is refused by its own figure, and what is refused is never built."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from esper.leyline import BlueprintError, BlueprintIR, KernelRejectedError, Node, SiteKind, SiteSignature
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits, screen
from esper.leyline.ops import activation_bytes, count_flops, count_parameters, depth
from esper.urza.library import load_library

SITE = SiteSignature(kind=SiteKind.SEQUENCE, channels=6, extent=(5,))
IR = BlueprintIR(
    fit=(SiteKind.SEQUENCE,),
    nodes=(
        Node(id="up", op="linear", params={"out": "2*C"}),
        Node(id="act", op="relu", inputs=("up",)),
        Node(id="down", op="linear", inputs=("act",)),
        Node(id="sum", op="add", inputs=("down", "h")),
    ),
    output="sum",
)
FIGURES = {
    "nodes": 4,
    "depth": 4,
    "parameters": 6 * 12 + 12 + 12 * 6 + 6,
    "flops": 2 * (2 * 5 * 6 * 12) + 5 * 12 + 5 * 6,
    "activation_bytes": 4 * 5 * (12 + 12 + 6 + 6),
}


def test_figures_are_those_of_a_count_by_hand():
    checks = screen(IR, SITE)
    assert {check.name: check.value for check in checks} == {f"limits.{key}": value for key, value in FIGURES.items()}
    assert all(check.passed for check in checks)
    assert (depth(IR), count_parameters(IR, SITE)) == (FIGURES["depth"], FIGURES["parameters"])
    assert (count_flops(IR, SITE), activation_bytes(IR, SITE)) == (FIGURES["flops"], FIGURES["activation_bytes"])


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_each_limit_holds_and_is_named(name: str):
    at = DEFAULT_LIMITS.model_copy(update={name: FIGURES[name]})
    assert len(screen(IR, SITE, at)) == len(FIGURES)
    below = at.model_copy(update={name: FIGURES[name] - 1})
    with pytest.raises(KernelRejectedError, match=f"limits.{name} is ") as caught:
        screen(IR, SITE, below)
    assert caught.value.field == f"limits.{name}"
    assert str(caught.value).count(" is ") == 1


def test_the_depth_is_that_of_the_longest_path():
    nodes = [Node(id="n0", op="relu"), *(Node(id=f"n{i}", op="relu", inputs=(f"n{i - 1}",)) for i in range(1, 9))]
    short = Node(id="out", op="add", inputs=("h", "n8"))
    assert depth(BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(*nodes, short), output="out")) == 10


def test_a_design_that_does_not_fit_is_no_question_of_limits():
    with pytest.raises(BlueprintError, match="does not fit"):
        screen(IR, SiteSignature(kind=SiteKind.VECTOR, channels=6))


def test_limits_stay_within_what_the_format_allows():
    for name in ("nodes", "depth", "parameters"):
        with pytest.raises(ValidationError):
            IRLimits(**{name: 1 << 40})
    with pytest.raises(ValidationError):
        IRLimits(flops=0)


def test_the_library_is_within_the_limits_at_wide_sites():
    sites = (
        SiteSignature(kind=SiteKind.VECTOR, channels=1024),
        SiteSignature(kind=SiteKind.SEQUENCE, channels=1024, extent=(512,)),
        SiteSignature(kind=SiteKind.FEATURE_MAP, channels=256, extent=(28, 28)),
    )
    for site in sites:
        for design in load_library().values():
            if site.kind in design.ir.fit:
                assert screen(design.ir, site)
