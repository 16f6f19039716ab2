"""The canonical hash: what it must ignore, and what it must never ignore."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.leyline import INPUT, BlueprintError, BlueprintIR, Node, SiteKind
from esper.leyline.canonical import canonical_hash
from esper.leyline.optable import OPS, ParamSpec

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
DIMS = ["C", "2*C", "C//4", "max(1,C//16)", 8]


def values_of(spec: ParamSpec) -> st.SearchStrategy:
    """Legal values of a parameter, no two of which mean the same."""
    if spec.kind == "dim":
        return st.sampled_from(DIMS)
    if spec.kind == "int":
        return st.sampled_from([1, 3, 5, 7])
    if spec.kind == "bool":
        return st.booleans()
    if spec.kind == "float":
        return st.sampled_from([1e-5, 1e-3, 0.5, 1.0])
    return st.sampled_from(spec.choices)


@st.composite
def graphs(draw, max_nodes: int = 7) -> BlueprintIR:
    """Well-formed graphs, every node used; they need not fit any site."""
    nodes: list[Node] = []
    unused: list[str] = []
    for index in range(draw(st.integers(1, max_nodes))):
        name = draw(st.sampled_from(sorted(OPS)))
        op = OPS[name]
        arity = draw(st.integers(op.min_inputs, op.max_inputs))
        inputs = tuple(draw(st.sampled_from([INPUT, *(n.id for n in nodes)])) for _ in range(arity))
        params = {p: draw(values_of(s)) for p, s in op.params.items() if draw(st.booleans())}
        nodes.append(Node(id=f"n{index}", op=name, inputs=inputs, params=params))
        unused = [u for u in unused if u not in inputs] + [nodes[-1].id]
    while len(unused) > 1:
        left, right, *unused = unused
        nodes.append(Node(id=f"n{len(nodes)}", op="sub", inputs=(left, right)))
        unused.append(nodes[-1].id)
    return BlueprintIR(
        fit=tuple(draw(st.lists(st.sampled_from(SiteKind), min_size=1, max_size=3, unique=True))),
        nodes=tuple(nodes),
        output=unused[0],
        zero_at_birth=draw(st.booleans()),
    )


def replaced(ir: BlueprintIR, index: int, **changes) -> BlueprintIR:
    nodes = list(ir.nodes)
    nodes[index] = nodes[index].model_copy(update=changes)
    return ir.model_copy(update={"nodes": tuple(nodes)})


@FEW
@given(ir=graphs(), seed=st.integers(0, 1 << 16))
def test_names_order_and_key_order_do_not_matter(ir: BlueprintIR, seed: int):
    rng = random.Random(seed)
    labels = [f"x{i}" for i in range(len(ir.nodes))]
    rng.shuffle(labels)
    new = {INPUT: INPUT, **{node.id: label for node, label in zip(ir.nodes, labels, strict=True)}}
    nodes = [
        Node(
            id=new[node.id],
            op=node.op,
            inputs=tuple(new[i] for i in node.inputs),
            params=dict(rng.sample(sorted(node.params.items()), len(node.params))),
        )
        for node in ir.nodes
    ]
    rng.shuffle(nodes)
    fit = rng.sample(ir.fit, len(ir.fit))
    other = ir.model_copy(update={"nodes": tuple(nodes), "output": new[ir.output], "fit": tuple(fit)})
    assert canonical_hash(other) == canonical_hash(ir)
    assert canonical_hash(BlueprintIR.model_validate_json(ir.model_dump_json())) == canonical_hash(ir)


@FEW
@given(ir=graphs())
def test_an_explicit_default_is_the_same_as_none(ir: BlueprintIR):
    for index, node in enumerate(ir.nodes):
        defaults = {name: spec.default for name, spec in OPS[node.op].params.items()}
        assert canonical_hash(replaced(ir, index, params={**defaults, **node.params})) == canonical_hash(ir)


@FEW
@given(ir=graphs(), data=st.data())
def test_every_parameter_matters(ir: BlueprintIR, data: st.DataObject):
    for index, node in enumerate(ir.nodes):
        for name, spec in OPS[node.op].params.items():
            current = node.params.get(name, spec.default)
            other = data.draw(values_of(spec).filter(lambda value, now=current: value != now))
            changed = replaced(ir, index, params={**node.params, name: other})
            assert canonical_hash(changed) != canonical_hash(ir), (node.op, name)


def subgraph(ir: BlueprintIR, name: str) -> str:
    """The hash of what lies behind an input; of `h`, its name."""
    by_id = {node.id: node for node in ir.nodes}
    if name == INPUT:
        return INPUT
    wanted, queue = set(), [name]
    while queue:
        node = queue.pop()
        if node != INPUT and node not in wanted:
            wanted.add(node)
            queue += by_id[node].inputs
    nodes = tuple(node for node in ir.nodes if node.id in wanted)
    return canonical_hash(ir.model_copy(update={"nodes": nodes, "output": name}))


@FEW
@given(ir=graphs())
def test_input_order_matters(ir: BlueprintIR):
    for index, node in enumerate(ir.nodes):
        behind = [subgraph(ir, name) for name in node.inputs]
        if behind != behind[::-1]:  # else it is twins that change places, which is a renaming
            assert canonical_hash(replaced(ir, index, inputs=node.inputs[::-1])) != canonical_hash(ir)


def test_sub_is_not_symmetric():
    act = Node(id="act", op="relu")
    one, other = (
        BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(act, Node(id="s", op="sub", inputs=inputs)), output="s")
        for inputs in (("act", "h"), ("h", "act"))
    )
    assert canonical_hash(one) != canonical_hash(other)


def test_a_shared_node_is_not_two_equal_ones():
    a, b = Node(id="a", op="linear"), Node(id="b", op="linear")
    shared = BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(a, Node(id="s", op="add", inputs=("a", "a"))), output="s")
    twice = BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(a, b, Node(id="s", op="add", inputs=("a", "b"))), output="s")
    assert canonical_hash(shared) != canonical_hash(twice)


def test_declarations_and_output_matter():
    ir = BlueprintIR(
        fit=(SiteKind.VECTOR,), nodes=(Node(id="a", op="relu"), Node(id="b", op="relu", inputs=("a",))), output="b"
    )
    others = [
        ir.model_copy(update={"zero_at_birth": True}),
        ir.model_copy(update={"replaces": True}),
        ir.model_copy(update={"fit": (SiteKind.VECTOR, SiteKind.SEQUENCE)}),
        ir.model_copy(update={"nodes": ir.nodes[:1], "output": "a"}),
    ]
    assert len({canonical_hash(one) for one in [ir, *others]}) == 5


def test_spelling_of_a_dim_does_not_matter():
    def with_out(out) -> BlueprintIR:
        return BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(Node(id="a", op="linear", params={"out": out}),), output="a")

    assert canonical_hash(with_out("C // 4")) == canonical_hash(with_out("(C//4)"))
    assert canonical_hash(with_out(8)) == canonical_hash(with_out("8"))
    assert canonical_hash(with_out("C//4")) != canonical_hash(with_out("C//5"))


def test_the_hash_is_stable_across_versions():
    """A changed value here would orphan every kernel in every store: raise the form's version on purpose only."""
    ir = BlueprintIR(
        fit=(SiteKind.VECTOR,), nodes=(Node(id="a", op="linear", params={"out": "C"}),), output="a", zero_at_birth=False
    )
    assert canonical_hash(ir) == "142e3e1a25084d2bab2d581ae0e77fcb498b868ae4041dc6edb2e814e8d2a246"


def test_a_malformed_ir_has_no_hash():
    with pytest.raises(BlueprintError):
        canonical_hash(BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(Node(id="a", op="nothing"),), output="a"))
