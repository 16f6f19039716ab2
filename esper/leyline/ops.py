"""What can be said of a blueprint without torch: is it well formed, does it fit a site, what does it cost.

The ops themselves are in `optable`, the FLOPs of one operation in `flops`. All figures are for one sample and the
forward pass.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping

from esper.leyline import dims
from esper.leyline.blueprints import INPUT, BlueprintIR, Node, Param
from esper.leyline.errors import BlueprintError, excerpt
from esper.leyline.kernels import SiteSignature
from esper.leyline.optable import OPS, WEIGHTED, Op, ParamSpec, Shape, Values

__all__ = [
    "MAX_DEPTH",
    "MAX_PARAMETERS",
    "OPS",
    "WEIGHTED",
    "activation_bytes",
    "canonical_order",
    "count_flops",
    "count_parameters",
    "depth",
    "fits",
    "infer",
    "memory_bytes",
    "needs_neighbour",
    "neighbour_nodes",
    "node_flops",
    "resolve",
    "validate",
]

MAX_DEPTH = 48
"""Longest path from `h` to the output, in nodes."""

MAX_PARAMETERS = 1 << 28
"""Largest kernel at a site, in trainable values."""

MAX_ACTIVATION = 1 << 26
"""Largest intermediate tensor of one sample, in values."""

RESERVED = frozenset(
    {
        # attributes of torch.fx.GraphModule and torch.nn.Module that match a node id; a test compares with torch
        "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "code", "compile", "cpu", "cuda",
        "delete_all_unused_submodules", "delete_submodule", "double", "dump_patches", "eval", "extra_repr", "float",
        "forward", "get_buffer", "get_extra_state", "get_parameter", "get_submodule", "graph", "half", "ipu",
        "load_state_dict", "meta", "modules", "mtia", "named_buffers", "named_children", "named_modules",
        "named_parameters", "parameters", "print_readable", "recompile", "register_backward_hook", "register_buffer",
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook", "register_module", "register_parameter",
        "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_", "set_extra_state",
        "set_submodule", "shape_env", "share_memory", "state_dict", "to", "to_empty", "to_folder", "train", "training",
        "type", "xpu", "zero_grad", "add_submodule", "self",
    }
)  # fmt: skip
"""Names that a node cannot have, because the lowered module already has them."""

_ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def validate(ir: BlueprintIR) -> None:
    """Checks everything that does not depend on a site.

    Raises:
        BlueprintError: with the node at fault in `field`, for a bad or repeated id, an unknown op or parameter, a
            missing or mistyped one, a wrong number of inputs, an unknown input, a cycle, a node without use, a
            missing output, or a graph that is too deep.
    """
    by_id: dict[str, Node] = {}
    for node in ir.nodes:
        _check_id(node, by_id)
        by_id[node.id] = node
    for node in ir.nodes:
        _check_node(node, by_id)
    if ir.output not in by_id:
        raise BlueprintError(f"no node is called {excerpt(ir.output)}", field="output", remedy="name one of the nodes")
    if ir.replaces and ir.zero_at_birth:
        raise BlueprintError(
            "a kernel that replaces h cannot be zero at birth: the site would fade to nothing",
            field="replaces",
            remedy="drop one of the two",
        )
    used = {node.id for node in _walk(ir.output, by_id)}
    for node in ir.nodes:
        if node.id not in used:
            raise BlueprintError("the output does not depend on it", field=node.id, remedy="use it or remove it")


def canonical_order(ir: BlueprintIR) -> tuple[Node, ...]:
    """The nodes in an order that depends on the graph alone, not on names or listing; inputs come first.

    Raises:
        BlueprintError: for a cycle or a missing node.
    """
    return _walk(ir.output, {node.id: node for node in ir.nodes})


def resolve(node: Node, signature: SiteSignature) -> Values:
    """The node's parameters at this site: defaults filled in, dim expressions evaluated.

    Raises:
        BlueprintError: for an unknown op or a value out of bounds.
    """
    values = {}
    for name, spec in _op(node).params.items():
        value = node.params.get(name, spec.default)
        if spec.kind == "dim":
            value = dims.evaluate(_dim_text(value), signature.dims())
            if value < spec.low:
                raise BlueprintError(f"{name} = {node.params.get(name, spec.default)} is {value} here", field=node.id)
        elif spec.kind == "float":
            value = float(_number(value))
        values[name] = value
    return values


def infer(ir: BlueprintIR, signature: SiteSignature) -> dict[str, Shape]:
    """Shapes of all nodes for one sample, `h` included; validates the IR first.

    Raises:
        BlueprintError: if the IR is malformed, or "does not fit" with the reason and the node.
    """
    validate(ir)
    if signature.kind not in ir.fit:
        declared = ", ".join(kind.value for kind in ir.fit)
        raise BlueprintError(f"does not fit {signature.key}: it is declared for {declared}", field="fit")
    home = signature.shape(1)[1:]
    shapes: dict[str, Shape] = {INPUT: home}
    total = 0
    for node in canonical_order(ir):
        inputs = tuple(shapes[name] for name in node.inputs)
        try:
            values = resolve(node, signature)
            shapes[node.id] = _op(node).shape(inputs, values, signature)
        except BlueprintError as error:
            raise _misfit(signature, error.message, node.id, error.remedy) from error
        total += _op(node).count(inputs, values)
        if math.prod(shapes[node.id]) > MAX_ACTIVATION:
            raise _misfit(signature, f"an output of {shapes[node.id]} is too large", node.id)
        if total > MAX_PARAMETERS:
            raise _misfit(signature, f"it has more than {MAX_PARAMETERS} parameters", node.id)
    if shapes[ir.output] != home:
        raise _misfit(signature, f"its output is {shapes[ir.output]} and h is {home}", ir.output)
    return shapes


def fits(ir: BlueprintIR, signature: SiteSignature) -> str | None:
    """Why the blueprint does not fit the site, in words; None if it does.

    Raises:
        BlueprintError: if the IR is malformed, which no site can mend.
    """
    validate(ir)
    try:
        infer(ir, signature)
    except BlueprintError as error:
        return str(error)
    return None


def count_parameters(ir: BlueprintIR, signature: SiteSignature) -> int:
    """Trainable values of the kernel; raises `BlueprintError` if it does not fit."""
    shapes = infer(ir, signature)
    return sum(_op(node).count(_inputs(node, shapes), resolve(node, signature)) for node in ir.nodes)


def node_flops(ir: BlueprintIR, signature: SiteSignature) -> dict[str, int]:
    """Forward FLOPs of one sample, node by node; raises `BlueprintError` if it does not fit."""
    shapes = infer(ir, signature)
    return {
        node.id: _op(node).flops(_inputs(node, shapes), shapes[node.id], resolve(node, signature)) for node in ir.nodes
    }


def count_flops(ir: BlueprintIR, signature: SiteSignature) -> int:
    """Forward FLOPs of the kernel for one sample; raises `BlueprintError` if it does not fit."""
    return sum(node_flops(ir, signature).values())


def memory_bytes(ir: BlueprintIR, signature: SiteSignature) -> int:
    """Bytes of the parameters and of every node's output for one sample; raises `BlueprintError` if it does not fit."""
    return _ITEM_SIZE[signature.dtype] * count_parameters(ir, signature) + activation_bytes(ir, signature)


def activation_bytes(ir: BlueprintIR, signature: SiteSignature) -> int:
    """Bytes of every node's output for one sample; raises `BlueprintError` if it does not fit."""
    shapes = infer(ir, signature)
    return _ITEM_SIZE[signature.dtype] * sum(math.prod(shapes[node.id]) for node in ir.nodes)


def depth(ir: BlueprintIR) -> int:
    """Nodes on the longest path from h to the output; raises `BlueprintError` for a cycle or a missing node."""
    levels = {INPUT: 0}
    for node in canonical_order(ir):
        levels[node.id] = 1 + max(levels[source] for source in node.inputs)
    return levels[ir.output]


def neighbour_nodes(ir: BlueprintIR) -> tuple[str, ...]:
    """Ids of the nodes whose weights are copied from the neighbouring block at graft, inputs first."""
    return tuple(node.id for node in canonical_order(ir) if node.params.get("init") == "neighbour")


def needs_neighbour(ir: BlueprintIR) -> bool:
    """Whether any weights come from the neighbouring block."""
    return bool(neighbour_nodes(ir))


def filled_params(node: Node) -> dict[str, Param]:
    """The node's parameters in one spelling: defaults filled in, dims canonical, numbers of the declared type."""
    filled: dict[str, Param] = {}
    for name, spec in _op(node).params.items():
        value = node.params.get(name, spec.default)
        if spec.kind == "dim":
            filled[name] = dims.canonical(_dim_text(value))
        elif spec.kind == "float":
            filled[name] = float(_number(value))
        else:
            assert value is not None  # validated: a required parameter is there
            filled[name] = value
    return filled


def _inputs(node: Node, shapes: Mapping[str, Shape]) -> tuple[Shape, ...]:
    return tuple(shapes[name] for name in node.inputs)


def _op(node: Node) -> Op:
    op = OPS.get(node.op)
    if op is None:
        raise BlueprintError(
            f"there is no op {node.op!r}", field=node.id, remedy=f"use one of {', '.join(sorted(OPS))}"
        )
    return op


def _misfit(signature: SiteSignature, reason: str, node: str, remedy: str | None = None) -> BlueprintError:
    return BlueprintError(f"does not fit {signature.key}: {reason}", field=node, remedy=remedy)


def _dim_text(value: Param | None) -> str | int:
    assert isinstance(value, str | int)  # validated
    return value


def _number(value: Param | None) -> float:
    assert isinstance(value, int | float)  # validated
    return value


def _check_id(node: Node, known: Mapping[str, Node]) -> None:
    if node.id in known:
        raise BlueprintError("two nodes have this id", field=node.id, remedy="rename one")
    if node.id == INPUT or node.id in RESERVED or keyword.iskeyword(node.id):
        raise BlueprintError("this id is reserved", field=node.id, remedy=f"rename it, for example {node.id}_1")


def _check_node(node: Node, known: Mapping[str, Node]) -> None:
    op = _op(node)
    low, high = op.min_inputs, op.max_inputs
    if not low <= len(node.inputs) <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        raise BlueprintError(f"{node.op} takes {wanted} inputs, not {len(node.inputs)}", field=node.id)
    for name in node.inputs:
        if name != INPUT and name not in known:
            raise BlueprintError(
                f"its input {excerpt(name)} is no node", field=node.id, remedy=f"name a node or {INPUT}"
            )
    for name in node.params:
        if name not in op.params:
            known_params = ", ".join(op.params) or "no parameters"
            raise BlueprintError(
                f"{node.op} has no parameter {excerpt(name)}", field=node.id, remedy=f"it has {known_params}"
            )
    for name, spec in op.params.items():
        if name in node.params:
            _check_param(node, name, spec, node.params[name])
        elif spec.default is None:
            raise BlueprintError(f"{node.op} needs {name}", field=node.id, remedy=f"give {name}")


def _check_param(node: Node, name: str, spec: ParamSpec, value: Param) -> None:
    if not _has_type(spec, value):
        raise BlueprintError(f"{name} = {excerpt(value)} is no {spec.kind}", field=node.id, remedy=_expectation(spec))
    if spec.kind == "dim":
        try:
            dims.parse(_dim_text(value))
        except BlueprintError as error:
            raise BlueprintError(f"{name}: {error.message}", field=node.id, remedy=error.remedy) from error
    if isinstance(value, int | float) and not isinstance(value, bool) and not spec.low <= value <= spec.high:
        raise BlueprintError(f"{name} = {excerpt(value)} is out of bounds", field=node.id, remedy=_expectation(spec))
    if isinstance(value, int) and value > dims.MAX_VALUE:
        raise BlueprintError(
            f"{name} = {excerpt(value)} is too large", field=node.id, remedy=f"at most {dims.MAX_VALUE}"
        )


def _has_type(spec: ParamSpec, value: Param) -> bool:
    if spec.kind == "bool" or isinstance(value, bool):
        return spec.kind == "bool" and isinstance(value, bool)
    if spec.kind == "dim":
        return isinstance(value, int | str)
    if spec.kind == "int":
        return isinstance(value, int)
    if spec.kind == "float":
        return isinstance(value, int | float)
    return value in spec.choices


def _expectation(spec: ParamSpec) -> str:
    if spec.kind == "choice":
        return f"one of {', '.join(spec.choices)}"
    if spec.kind == "bool":
        return "true or false"
    bounds = f" from {spec.low:g} to {spec.high:g}" if spec.high < math.inf else f" of at least {spec.low:g}"
    return ("an integer or a dim expression" if spec.kind == "dim" else f"{spec.kind}") + bounds


def _walk(output: str, by_id: Mapping[str, Node]) -> tuple[Node, ...]:
    """Depth first from the output through ordered inputs; each node once, after its inputs."""
    ordered: list[Node] = []
    depth: dict[str, int] = {INPUT: 0}
    open_nodes: set[str] = set()

    def visit(name: str) -> int:
        if name in depth:
            return depth[name]
        if name in open_nodes:
            raise BlueprintError("it depends on itself", field=name, remedy="break the cycle")
        if name not in by_id:
            raise BlueprintError(f"no node is called {excerpt(name)}", field=excerpt(name))
        open_nodes.add(name)
        level = 1 + max(visit(source) for source in by_id[name].inputs)
        if level > MAX_DEPTH:
            raise BlueprintError(f"the graph is deeper than {MAX_DEPTH} nodes", field=name, remedy="make it shallower")
        open_nodes.remove(name)
        depth[name] = level
        ordered.append(by_id[name])
        return level

    visit(output)
    return tuple(ordered)
