"""The shipped designs: each built, run, differentiated and checked; and a user's own files."""

from __future__ import annotations

import pytest
import torch

from esper.leyline import BlueprintError, SiteKind, SiteSignature
from esper.leyline.canonical import canonical_hash
from esper.leyline.lower import initialise, lower
from esper.leyline.ops import count_flops, count_parameters, fits, needs_neighbour
from esper.urabrask.gauntlet import examine
from esper.urza.library import designs_for, load_designs, load_library, parse_design

SITES = (
    SiteSignature(kind=SiteKind.VECTOR, channels=12),
    SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(5, 4)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(6,)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(6,), causal=True),
)
PAIRS = [
    pytest.param(design, site, id=f"{design.name}-{site.key}")
    for site in SITES
    for design in load_library().values()
    if fits(design.ir, site) is None
]
NAMED_BY_THE_DESIGN_DOCUMENT = {
    "residual_conv",
    "bottleneck",
    "depthwise_se",
    "conv_small",
    "conv_light",
    "conv_heavy",
    "norm_scale",
    "se",
    "mlp_adapter",
    "low_rank_adapter",
    "mlp_2x",
    "mlp_4x",
    "attention_head",
    "gated_mlp",
    "conv_stack",
    "linear_stack",
}
GOOD = """
name: mine
description: A test.
tags: [test]
fit: [vector]
nodes:
  - {id: down, op: linear, out: "C//2"}
  - {id: up, op: linear, init: zeros}
zero_at_birth: true
"""


@pytest.mark.parametrize(("design", "site"), PAIRS)
def test_design_passes_the_gauntlet(design, site):
    module = lower(design.ir, site)
    initialise(module, design.ir, seed=7)
    report = examine(module, design.ir, site)
    assert report.passed, report.reason
    assert count_flops(design.ir, site) > 0
    assert count_parameters(design.ir, site) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("design", load_library().values(), ids=lambda design: design.name)
def test_design_learns(design):
    """After two steps of descent r(h) has moved: no design is dead at birth."""
    site = next(site for site in SITES if fits(design.ir, site) is None)
    module = lower(design.ir, site)
    h = torch.randn(site.shape(4), generator=torch.Generator().manual_seed(0))
    target = torch.randn(site.shape(4), generator=torch.Generator().manual_seed(1))
    first = module(h).detach()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(h) - target).square().mean().backward()
        optimizer.step()
    assert (module(h).detach() - first).abs().max() > 1e-4
    # the second step already reaches behind the zeroed layer
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters())


def test_the_library_is_complete_and_has_no_twins():
    library = load_library()
    assert library.keys() >= NAMED_BY_THE_DESIGN_DOCUMENT
    assert len({canonical_hash(design.ir) for design in library.values()}) == len(library)
    assert {name for name, d in library.items() if d.ir.replaces} == {"conv_replace", "norm_replace"}
    assert all(d.ir.zero_at_birth != d.ir.replaces for d in library.values())
    assert {name for name, d in library.items() if needs_neighbour(d.ir)} == {"conv_stack", "linear_stack"}


def test_designs_for_a_site_are_those_that_fit():
    names = {site.key: {design.name for design in designs_for(site)} for site in SITES}
    assert "bottleneck" in names[SITES[1].key]
    assert "se" in names[SITES[2].key]
    assert "se" not in names[SITES[3].key]  # it pools over positions
    narrow = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(4, 4))
    assert "bottleneck" not in {design.name for design in designs_for(narrow)}


def test_one_file_adds_a_design(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not a design")
    designs = load_designs(tmp_path)
    assert list(designs) == ["mine"]
    nodes = designs["mine"].ir.nodes
    assert [node.inputs for node in nodes] == [("h",), ("down",)]
    assert designs["mine"].ir.output == "up"
    assert [design.name for design in designs_for(SITES[0], designs)] == ["mine"]


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ("op: linear, init", "op: lineal, init", "mine.yaml: up", "no op 'lineal'"),
        ("init: zeros", "inti: zeros", "mine.yaml: up", "no parameter 'inti'"),
        ("init: zeros", "init: null", "mine.yaml: up", "init"),
        ("C//2", "__import__('os')", "mine.yaml: down", "unexpected character"),
        ("id: up", "id: Up", "mine.yaml: Up", "pattern"),
        ("id: up, op: linear", "id: up, op: linear, inputs: [left]", "mine.yaml: up", "'left'"),
        ("fit: [vector]", "fit: [circle]", "mine.yaml: fit.0", "feature_map"),
        ("zero_at_birth", "zero", "mine.yaml: zero", "not permitted"),
        ("name: mine", "name: yours", "mine.yaml", "'yours'"),
        ("name: mine", "name: [mine", "mine.yaml", "no YAML"),
        ("zero_at_birth: true", "output: nobody", "mine.yaml: output", "nobody"),
        ("description: A test.", f"description: {'x' * 201}", "mine.yaml: description", "200"),
    ],
)
def test_a_bad_file_names_the_file_and_the_node(tmp_path, old: str, new: str, field: str, words: str):
    assert old in GOOD
    (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(BlueprintError) as caught:
        load_designs(tmp_path)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_design_at_all(tmp_path):
    for text in ("", "[]", "nodes: 3", "nodes: []\nname: mine\ndescription: x\nfit: [vector]"):
        with pytest.raises(BlueprintError):
            parse_design(text, source="mine.yaml")
    with pytest.raises(BlueprintError, match="larger"):
        parse_design("#" * (1 << 17), source="mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(BlueprintError, match="cannot be read"):
        load_designs(tmp_path)
    with pytest.raises(BlueprintError, match="no folder"):
        load_designs(tmp_path / "none")
