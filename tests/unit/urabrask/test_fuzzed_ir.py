"""Fuzzed IRs and containers: every refusal is an `EsperError`, and nothing of the input is ever executed."""

from __future__ import annotations

import ast
import json
import random
import sys
from collections import Counter

import pytest
import targets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ir_mutations import any_signature, near_valid

from esper.leyline import BlueprintError, EsperError, SiteKind, SiteSignature
from esper.leyline.blueprints import MAX_IR_BYTES, parse_ir
from esper.leyline.limits import screen
from esper.leyline.lower import lower
from esper.urza.library import load_library

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=4)
FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
    "os.remove",
    "os.rename",
    "ctypes.",
)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
any_json = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
shaped = st.fixed_dictionaries(
    {"fit": any_json, "nodes": st.lists(st.fixed_dictionaries({"id": any_json, "op": any_json, "inputs": any_json}))},
    optional={"output": any_json, "replaces": any_json},
)


class _Watch:
    """Sees what the interpreter is asked to do. An audit hook cannot be taken out again, so it is told when to look."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.is_on:
            return
        written = event == "open" and isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
        if written or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r}"[:200])


@pytest.fixture(scope="module")
def watch():
    return _Watch()


@settings(max_examples=100)
@given(any_json | shaped)
def test_no_json_value_is_more_than_refused(value):
    assert targets.way_of(json.dumps(value), VECTOR, examined=False) in {"refused", "parsed"}


@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 10_000)
@example(b'{"nodes":' * 5_000)
@example(b'"\xed\xa0\x80"')
def test_no_bytes_are_more_than_refused(data: bytes):
    assert targets.fuzz_json(data) == "refused"


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_nearly_valid_designs_are_refused_or_examined(chance):
    assert targets.fuzz_ir(chance, examined=True) in {"refused", "parsed", "screened", "passed"}


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_no_damaged_container_is_read(chance):
    targets.fuzz_damage(chance)


def test_the_mutations_reach_every_end_and_execute_nothing(watch):
    """A fuzzer whose inputs all die at the door tests the door."""
    chance = random.Random(0)
    targets.fuzz_ir(random.Random(1), examined=True)  # what is imported late is imported here
    watch.is_on = True
    ends = Counter(targets.fuzz_ir(chance, examined=n % 4 == 0) for n in range(200))
    watch.is_on = False
    assert watch.seen == []
    assert set(ends) == {"refused", "parsed", "screened", "passed"}
    assert ends["screened"] + ends["passed"] >= 20


def test_the_watch_sees_what_it_is_there_for(watch, tmp_path):
    watch.is_on = True
    (tmp_path / "file").write_text("x")
    watch.is_on = False
    assert len(watch.seen) == 1
    watch.seen.clear()


def test_a_lowered_design_calls_nothing_but_torch_and_its_own_layers():
    """The source that fx writes for a graph names what it calls; of the IR's text only node ids are in it."""
    chance = random.Random(0)
    roots: set[str] = set()
    num_built = 0
    for _ in range(150):
        raw = near_valid(chance)
        signature = any_signature(chance, raw)
        try:
            ir = parse_ir(json.dumps(raw))
            screen(ir, signature, targets.LIMITS)
        except EsperError:
            continue
        num_built += 1
        tree = ast.parse(lower(ir, signature).code.strip())
        values = {arg.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for arg in node.args.args}
        values |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        called = {ast.unparse(node.func).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        roots |= called - values  # `self`, and methods of values
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Global)]
    assert num_built >= 15
    assert roots <= {"torch", "getattr", "torch_nn_functional", "wrap"}


def test_an_ir_that_does_not_parse_is_named_by_its_place():
    with pytest.raises(BlueprintError) as caught:
        parse_ir('{"fit": ["vector"], "nodes": [{"id": "a", "op": "Eval"}], "output": "a"}')
    assert caught.value.field == "nodes.0.op"
    with pytest.raises(BlueprintError, match="bytes of JSON"):
        parse_ir(b" " * (MAX_IR_BYTES + 1))
    ir = load_library()["mlp_2x"].ir
    assert parse_ir(ir.model_dump_json()) == ir
