"""Blueprints without torch: dims, validation, fit, costs by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline import BlueprintError, BlueprintIR, Node, SiteKind, SiteSignature, dims, ops
from esper.leyline.flops import ELEMENTWISE
from esper.leyline.optable import OPS, WEIGHTED

ALL_KINDS = tuple(SiteKind)
VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MAP = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(5, 4))
SEQUENCE = SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(6,))
CAUSAL = SEQUENCE.model_copy(update={"causal": True})


def graph(*nodes: Node, output: str | None = None, **changes) -> BlueprintIR:
    return BlueprintIR(fit=ALL_KINDS, nodes=nodes, output=output or nodes[-1].id, **changes)


def chain(*steps: tuple[str, dict]) -> BlueprintIR:
    nodes, above = [], "h"
    for index, (op, params) in enumerate(steps):
        nodes.append(Node(id=f"n{index}", op=op, inputs=(above,), params=params))
        above = f"n{index}"
    return graph(*nodes)


# ---------------------------------------------------------------- dims

SYMBOLS = {"C": 12, "H": 5, "W": 4, "T": 7}


@st.composite
def expressions(draw, depth: int = 3) -> str:
    """Strings that Python reads the same way, so that it can be the oracle."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.one_of(st.integers(0, 99).map(str), st.sampled_from(list(SYMBOLS))))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    form = draw(st.sampled_from(["({}+{})", "{} - {}", "({})*({})", "({})//({})", "max({},{})", "gcd( {} , {} )"]))
    return form.format(left, right)


@settings(max_examples=60)
@given(text=expressions())
def test_dims_agree_with_python(text: str):
    try:
        expected = eval(text, {"__builtins__": {}}, {**SYMBOLS, "max": max, "gcd": math.gcd})
    except ZeroDivisionError:
        expected = None
    reason = ""
    try:
        found = dims.evaluate(text, SYMBOLS)
    except BlueprintError as error:
        found = None
        reason = str(error)
    if found is None and expected is not None:  # refused by a limit, then, and by nothing else
        assert len(text) > dims.MAX_LENGTH or "above the limit" in reason or "nested" in reason
    else:
        assert found == expected


MALFORMED = """C// (C C) 4C C**2 C/2 x max(C) C.real __import__('os') -C 1e3 C%2 gcd(,C) C,4 9999999999 C;C c"""


@pytest.mark.parametrize(
    "text",
    [*MALFORMED.split(), "", " ", "C 4", "max C", "(" * 9 + "C" + ")" * 9, "C+" * 40 + "C", "C\u0662", "\u0661", "C\n"],
)
def test_malformed_dims_are_refused(text: str):
    with pytest.raises(BlueprintError):
        dims.parse(text)


def test_dims_at_a_site():
    assert dims.evaluate("max(1, C//16)", {"C": 8}) == 1
    assert dims.evaluate(7, {}) == 7
    assert dims.canonical(" C // 4 ") == dims.canonical("(C//4)") != dims.canonical("4//C")
    assert dims.canonical(4) == dims.canonical("4")
    assert dims.evaluate("8-4-2", {}) == 2
    with pytest.raises(BlueprintError, match="names H"):
        dims.evaluate("H", {"C": 8})
    with pytest.raises(BlueprintError, match="divides by zero"):
        dims.evaluate("C//(C-C)", {"C": 8})
    with pytest.raises(BlueprintError, match="limit"):
        dims.evaluate("C*C*C", {"C": 1 << 20})


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("ir", "field", "words"),
    [
        (graph(Node(id="a", op="exec")), "a", "no op 'exec'"),
        (graph(Node(id="a", op="linear", params={"depth": 3})), "a", "no parameter 'depth'"),
        (graph(Node(id="a", op="linear", params={"bias": 1})), "a", "no bool"),
        (graph(Node(id="a", op="linear", params={"out": True})), "a", "no dim"),
        (graph(Node(id="a", op="linear", params={"out": 0})), "a", "out of bounds"),
        (graph(Node(id="a", op="linear", params={"out": 1 << 30})), "a", "too large"),
        (graph(Node(id="a", op="linear", params={"out": "C//"})), "a", "ends too early"),
        (graph(Node(id="a", op="linear", params={"init": "ones"})), "a", "no choice"),
        (graph(Node(id="a", op="conv2d", params={"kernel": 17})), "a", "out of bounds"),
        (graph(Node(id="a", op="conv2d", params={"kernel": "C"})), "a", "no int"),
        (graph(Node(id="a", op="scale", params={"value": math.nan})), "a", "out of bounds"),
        (graph(Node(id="a", op="scale", params={"value": "1"})), "a", "no float"),
        (graph(Node(id="a", op="add")), "a", "takes 2 inputs, not 1"),
        (graph(Node(id="a", op="relu", inputs=())), "a", "takes 1 inputs, not 0"),
        (graph(Node(id="a", op="concat")), "a", "takes 2 to 4 inputs"),
        (graph(Node(id="a", op="relu", inputs=("b",))), "a", "'b' is no node"),
        (graph(Node(id="a", op="relu", inputs=("a",))), "a", "depends on itself"),
        (graph(Node(id="a", op="relu", inputs=("b",)), Node(id="b", op="relu", inputs=("a",))), "b", "itself"),
        (graph(Node(id="a", op="relu"), Node(id="a", op="tanh")), "a", "two nodes"),
        (graph(Node(id="a", op="relu"), Node(id="b", op="relu")), "a", "does not depend on it"),
        (graph(Node(id="a", op="relu"), output="b"), "output", "no node is called 'b'"),
        (graph(Node(id="a", op="relu"), output="h"), "output", "no node is called 'h'"),
        (graph(Node(id="h", op="relu")), "h", "reserved"),
        (graph(Node(id="train", op="relu")), "train", "reserved"),
        (graph(Node(id="lambda", op="relu")), "lambda", "reserved"),
        (graph(Node(id="a", op="relu"), replaces=True, zero_at_birth=True), "replaces", "zero at birth"),
        (chain(*[("relu", {})] * (ops.MAX_DEPTH + 1)), f"n{ops.MAX_DEPTH}", "deeper"),
    ],
)
def test_a_malformed_ir_is_refused_with_its_node(ir: BlueprintIR, field: str, words: str):
    with pytest.raises(BlueprintError) as caught:
        ops.validate(ir)
    assert caught.value.field == field
    assert words in str(caught.value)
    with pytest.raises(BlueprintError):
        ops.fits(ir, VECTOR)


def test_the_deepest_graph_is_accepted():
    ops.validate(chain(*[("relu", {})] * ops.MAX_DEPTH))


@pytest.mark.parametrize(
    ("ir", "site", "words"),
    [
        (chain(("linear", {"out": "C//8"})), VECTOR, "out = C//8 is 0"),
        (chain(("linear", {"out": "2*C"})), VECTOR, "its output is (12,) and h is (6,)"),
        (chain(("linear", {"out": "T"})), VECTOR, "names T"),
        (chain(("linear", {})), MAP, "takes a vector or a sequence, not a feature map"),
        (chain(("conv2d", {})), SEQUENCE, "takes a feature map"),
        (chain(("conv2d", {"kernel": 2})), MAP, "cannot keep the size"),
        (chain(("conv2d", {"groups": 3})), MAP, "3 groups do not divide"),
        (chain(("groupnorm", {"groups": 4})), VECTOR, "4 groups do not divide 6"),
        (chain(("groupnorm", {"groups": 6})), VECTOR, "no variance"),
        (chain(("layernorm", {})), MAP, "takes a vector or a sequence"),
        (chain(("attention", {"heads": 3})), SEQUENCE, "3 heads do not divide"),
        (chain(("attention", {})), VECTOR, "takes a sequence"),
        (chain(("pool", {}), ("broadcast", {})), CAUSAL, "later ones"),
        (chain(("flatten", {}), ("unflatten", {})), CAUSAL, "later ones"),
        (chain(("softmax", {"over": "positions"})), CAUSAL, "later ones"),
        (chain(("softmax", {"over": "positions"})), VECTOR, "takes a sequence"),
        (chain(("to_map", {})), SEQUENCE, "do not fill the site's extent"),
        (chain(("pool", {}), ("unflatten", {})), MAP, "do not fill the site's shape"),
        (graph(Node(id="a", op="matmul", inputs=("h", "h"))), SEQUENCE, "cannot multiply"),
        (graph(Node(id="a", op="pool"), Node(id="b", op="add", inputs=("h", "a"))), MAP, "use gate"),
        (graph(Node(id="a", op="gate", inputs=("h", "h"))), MAP, "takes a vector"),
        (
            graph(
                Node(id="p", op="pool"),
                Node(id="a", op="linear", inputs=("p",), params={"out": 3}),
                Node(id="b", op="gate", inputs=("h", "a")),
            ),
            MAP,
            "a gate of 3 values",
        ),
        (graph(Node(id="p", op="pool"), Node(id="a", op="concat", inputs=("h", "p"))), MAP, "joins channels"),
        (chain(("linear", {"out": 1 << 23}), ("linear", {"out": 1 << 10})), VECTOR, "parameters"),
        (chain(("linear", {"out": 1 << 24}), ("linear", {})), SEQUENCE, "too large"),
        (graph(Node(id="a", op="relu")).model_copy(update={"fit": (SiteKind.VECTOR,)}), MAP, "declared for vector"),
    ],
)
def test_a_misfit_says_why(ir: BlueprintIR, site: SiteSignature, words: str):
    reason = ops.fits(ir, site)
    assert reason is not None
    assert words in reason
    assert "does not fit" in reason
    with pytest.raises(BlueprintError, match="does not fit"):
        ops.count_flops(ir, site)


def test_shapes_through_every_layout():
    ir = graph(
        Node(id="seq", op="to_sequence"),
        Node(id="scores", op="matmul", inputs=("seq", "seq"), params={"transpose": True}),
        Node(id="weights", op="softmax", inputs=("scores",)),
        Node(id="mixed", op="matmul", inputs=("weights", "seq")),
        Node(id="back", op="to_map", inputs=("mixed",)),
        Node(id="both", op="concat", inputs=("back", "h")),
        Node(id="out", op="conv2d", inputs=("both",), params={"kernel": 1}),
    )
    assert ops.infer(ir, MAP) == {
        "h": (8, 5, 4),
        "seq": (20, 8),
        "scores": (20, 20),
        "weights": (20, 20),
        "mixed": (20, 8),
        "back": (8, 5, 4),
        "both": (16, 5, 4),
        "out": (8, 5, 4),
    }


# ---------------------------------------------------------------- costs, by hand


@pytest.mark.parametrize(
    ("ir", "site", "flops", "parameters"),
    [
        # a multiply-add is 2; the bias is the first addend
        (chain(("linear", {"out": 10}), ("linear", {"bias": False})), VECTOR, 2 * (60 + 60), 70 + 60),
        (chain(("linear", {})), SEQUENCE, 6 * 2 * 64, 72),
        (chain(("conv2d", {})), MAP, 20 * 2 * 8 * 8 * 9, 8 * 8 * 9 + 8),
        (chain(("conv2d", {"groups": 2, "kernel": 1, "bias": False})), MAP, 20 * 2 * 8 * 4, 32),
        (chain(("depthwise", {"kernel": 5})), MAP, 20 * 2 * 8 * 25, 8 * 26),
        (chain(("groupnorm", {"groups": 2})), MAP, 8 * 160, 16),
        (chain(("layernorm", {})), SEQUENCE, 8 * 48, 16),
        (chain(("rmsnorm", {})), VECTOR, 4 * 6, 6),
        (chain(("scale", {})), MAP, 160, 8),
        (chain(("relu", {}), ("sigmoid", {})), MAP, 160 * (1 + 4), 0),
        (chain(("pool", {}), ("broadcast", {})), MAP, 160, 0),
        (chain(("softmax", {})), SEQUENCE, 5 * 48, 0),
        # projections; then scores, their scaling, softmax, and the mixing
        (
            chain(("attention", {"width": 4, "heads": 2})),
            SEQUENCE,
            6 * 2 * 8 * 12 + 6 * 2 * 4 * 8 + 2 * 6 * 4 * 6 + 72 + 5 * 72 + 2 * 6 * 6 * 4,
            9 * 12 + 5 * 8,
        ),
    ],
)
def test_costs_by_hand(ir: BlueprintIR, site: SiteSignature, flops: int, parameters: int):
    assert ops.count_flops(ir, site) == flops
    assert ops.count_parameters(ir, site) == parameters
    assert sum(ops.node_flops(ir, site).values()) == flops


def test_memory_by_hand():
    ir = chain(("linear", {"out": 10}), ("linear", {}))
    assert ops.memory_bytes(ir, VECTOR) == 4 * (70 + 66 + 10 + 6)
    assert ops.memory_bytes(ir, VECTOR.model_copy(update={"dtype": "bfloat16"})) == 2 * (70 + 66 + 10 + 6)


def test_neighbours():
    ir = chain(("linear", {"init": "neighbour"}), ("relu", {}), ("linear", {"init": "zeros"}))
    assert ops.neighbour_nodes(ir) == ("n0",)
    assert ops.needs_neighbour(ir)
    assert not ops.needs_neighbour(chain(("linear", {})))


def test_the_table_is_coherent():
    assert {"linear", "conv2d", "depthwise", "attention"} == WEIGHTED
    assert ELEMENTWISE.keys() <= OPS.keys()
    for name, op in OPS.items():
        assert op.min_inputs <= op.max_inputs, name
        for spec in op.params.values():
            assert spec.default is not None, name
            assert spec.kind != "choice" or spec.default in spec.choices, name
