"""IRs that are nearly right: library designs with a few faults. For tests and fuzzers, which bring their own chance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from esper.leyline import SiteKind, SiteSignature
from esper.leyline.ops import OPS
from esper.urza.library import load_library

T = TypeVar("T")


class Chance(Protocol):
    """The part of `random.Random` that is used."""

    def choice(self, seq: Sequence[T], /) -> T: ...

    def randrange(self, stop: int, /) -> int: ...


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 24, 1 << 31, 1 << 63, 1 << 200, -(1 << 200), 0.0, -0.0, 1e-320, 0.5,
    1e308, float("nan"), float("inf"), float("-inf"), "", " ", "h", "self", "forward", "__class__", "__import__('os')",
    "C", "T", "H*W", "C//0", "C//(C-C)", "-C", "C-C", "C*C*C*C*C", "((((((((((C))))))))))", "gcd(C)", "min(1,C",
    "9999999999", "C//16", "2*C", "max(1, C//4)", "C" * 1000, "x" * 70_000, "\0", "\u202e", "zeros", "neighbour",
    "positions", [], {}, [[]], ["h"], ["h", "h"], ["h"] * 5, {"a": {"b": {}}},
)  # fmt: skip

NAMES = (
    "h",
    "a",
    "out",
    "n0",
    "self",
    "forward",
    "lambda",
    "code",
    "weight",
    "training",
    "__init__",
    "a.b",
    "A",
    "x" * 40,
)

CHANNELS = (1, 2, 3, 4, 6, 8, 12, 16, 64, 257, 1 << 20)
EXTENTS = (1, 2, 3, 4, 5, 8, 16, 1 << 20)


def near_valid(chance: Chance) -> dict[str, Any]:
    """A library design as JSON values, changed up to three times."""
    design = chance.choice(sorted(load_library()))
    ir = load_library()[design].ir.model_dump(mode="json")
    for _ in range(chance.randrange(4)):
        chance.choice(MUTATIONS)(chance, ir)
    return ir


def any_signature(chance: Chance, ir: dict[str, Any]) -> SiteSignature:
    """A valid site, small or absurd, of a kind that the IR declares where it declares any."""
    fit = ir.get("fit")
    declared = [kind for kind in SiteKind if isinstance(fit, list) and kind.value in fit]
    kind = chance.choice(declared or list(SiteKind))
    extent = tuple(
        chance.choice(EXTENTS) for _ in range({SiteKind.VECTOR: 0, SiteKind.FEATURE_MAP: 2, SiteKind.SEQUENCE: 1}[kind])
    )
    return SiteSignature(
        kind=kind,
        channels=chance.choice(CHANNELS),
        extent=extent,
        dtype=chance.choice(("float32", "float64", "bfloat16", "float16")),
        causal=kind is SiteKind.SEQUENCE and chance.choice((True, False)),
    )


def _nodes(ir: dict[str, Any]) -> list[Any]:
    nodes = ir.get("nodes")
    return nodes if isinstance(nodes, list) else []


def _a_node(chance: Chance, ir: dict[str, Any]) -> dict[str, Any]:
    nodes = [node for node in _nodes(ir) if isinstance(node, dict)]
    return chance.choice(nodes) if nodes else {}


def _ids(ir: dict[str, Any]) -> list[Any]:
    return ["h", *(node.get("id") for node in _nodes(ir) if isinstance(node, dict))]


def drop_node(chance: Chance, ir: dict[str, Any]) -> None:
    if nodes := _nodes(ir):
        del nodes[chance.randrange(len(nodes))]


def repeat_node(chance: Chance, ir: dict[str, Any]) -> None:
    if nodes := _nodes(ir):
        nodes.insert(chance.randrange(len(nodes)), copy.deepcopy(chance.choice(nodes)))


def rename_node(chance: Chance, ir: dict[str, Any]) -> None:
    _a_node(chance, ir)["id"] = chance.choice(NAMES)


def change_op(chance: Chance, ir: dict[str, Any]) -> None:
    node = _a_node(chance, ir)
    node["op"] = chance.choice((*sorted(OPS), "eval", "os_system"))
    if chance.choice((True, False)):
        node["params"] = {}


def rewire(chance: Chance, ir: dict[str, Any]) -> None:
    """Also to itself, in a circle, or to nothing."""
    ids = _ids(ir)
    _a_node(chance, ir)["inputs"] = [chance.choice((*ids, "nobody")) for _ in range(chance.randrange(4))]


def change_param(chance: Chance, ir: dict[str, Any]) -> None:
    node = _a_node(chance, ir)
    spec = OPS.get(str(node.get("op")))
    names = [*(spec.params if spec else ()), "out", "bias", "weird"]
    params = node.get("params")
    if not isinstance(params, dict):
        params = node["params"] = {}
    params[chance.choice(names)] = chance.choice(ODD)


def change_output(chance: Chance, ir: dict[str, Any]) -> None:
    ir["output"] = chance.choice((*_ids(ir), "nobody"))


def change_flags(chance: Chance, ir: dict[str, Any]) -> None:
    ir["fit"] = [chance.choice(list(SiteKind)).value for _ in range(chance.randrange(4))]
    ir["replaces"] = chance.choice((True, False))
    ir["zero_at_birth"] = chance.choice((True, False))


def grow_chain(chance: Chance, ir: dict[str, Any]) -> None:
    """A tail of up to a hundred nodes, each of which reads the last twice: 2 to the 100 paths."""
    last = ir.get("output", "h")
    op = chance.choice(("add", "mul", "concat", "matmul", "sub"))
    for n in range(chance.randrange(100)):
        _nodes(ir).append({"id": f"t{n}", "op": op, "inputs": [last, last], "params": {}})
        last = f"t{n}"
    ir["output"] = last


def add_key(chance: Chance, ir: dict[str, Any]) -> None:
    chance.choice((ir, _a_node(chance, ir)))[chance.choice(("code", "__reduce__", "x" * 5_000, "id", ""))] = (
        chance.choice(ODD)
    )


def replace_anywhere(chance: Chance, ir: dict[str, Any]) -> None:
    """Any value of the tree by an odd one."""
    here: Any = ir
    while True:
        keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and chance.randrange(4):
            here = here[key]
        else:
            here[key] = chance.choice(ODD)
            return


MUTATIONS: tuple[Callable[[Chance, dict[str, Any]], None], ...] = (
    drop_node, repeat_node, rename_node, change_op, rewire, change_param, change_param, change_output, change_flags,
    grow_chain, add_key, replace_anywhere,
)  # fmt: skip
