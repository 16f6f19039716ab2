"""Every contract: its JSON form reads back as itself, and what does not belong is refused."""

from __future__ import annotations

import json
import math
import pickle
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from esper import leyline
from esper.leyline import (
    PAYLOADS,
    AdaptationSignal,
    BlueprintStatus,
    ConflictError,
    Contract,
    EsperError,
    KernelStatus,
    OonaMessage,
    Pipeline,
    SiteKind,
    SiteSignature,
    Topic,
    compile_key,
    errors,
)
from esper.leyline.container import KernelManifest, Member
from esper.leyline.kernels import (
    BLUEPRINT_TRANSITIONS,
    KERNEL_TRANSITIONS,
    check_blueprint_transition,
    check_kernel_transition,
)
from esper.leyline.messages import decode, encode, topics

CONTRACTS: list[type[Contract]] = sorted(
    {
        value
        for value in [*vars(leyline).values(), KernelManifest, Member]
        if isinstance(value, type) and issubclass(value, Contract) and value is not Contract
    },
    key=lambda contract: contract.__name__,
)
contracts = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUM_EXTENTS = {SiteKind.VECTOR: 0, SiteKind.FEATURE_MAP: 2, SiteKind.SEQUENCE: 1}


@st.composite
def signatures(draw: st.DrawFn) -> SiteSignature:
    kind = draw(st.sampled_from(SiteKind))
    count = NUM_EXTENTS[kind]
    return SiteSignature(
        kind=kind,
        channels=draw(st.integers(1, 1 << 20)),
        extent=tuple(draw(st.lists(st.integers(1, 1 << 20), min_size=count, max_size=count))),
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16", "float16"])),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        causal=kind is SiteKind.SEQUENCE and draw(st.booleans()),
    )


def limits(metadata: list[Any]) -> dict[str, Any]:
    """The constraints of a field by name: ge, gt, le, lt, pattern, min_length, max_length."""
    found: dict[str, Any] = {}
    for entry in metadata:
        inner = entry.metadata if isinstance(entry, FieldInfo) else [entry]
        for constraint in inner:
            names = ("ge", "gt", "le", "lt", "pattern", "min_length", "max_length")
            values = {name: getattr(constraint, name, None) for name in names}
            found |= {name: value for name, value in values.items() if value is not None}
    return found


def numbers(kind: type, limit: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = limit.get("ge", -1000), limit.get("le", 1000)
    assert "lt" not in limit
    if "gt" in limit:
        assert kind is float
        return st.floats(limit["gt"], high, allow_nan=False, exclude_min=True)
    low = min(low, high)
    return st.integers(low, high) if kind is int else st.floats(low, high, allow_nan=False)


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Legal values of a field, from its annotation: a new field or contract is covered by itself."""
    if get_origin(annotation) is Annotated:
        inner, *outer = get_args(annotation)
        return values_of(inner, [*metadata, *outer])
    limit = limits(metadata)
    if get_origin(annotation) is not None:
        return compounds(get_origin(annotation), get_args(annotation), limit, metadata)
    if annotation is str:
        return strings(limit)
    if annotation in (int, float):
        return numbers(annotation, limit)
    if annotation in PLAIN:
        return PLAIN[annotation]
    return st.sampled_from(annotation) if issubclass(annotation, Enum) else instances(annotation)


PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    Any: st.one_of(st.none(), st.booleans(), st.integers(-9, 9), TEXT),
}


def strings(limit: dict[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" in limit:
        return st.from_regex(limit["pattern"].replace("$", r"\Z"))
    return TEXT.filter(lambda text: len(text) >= limit.get("min_length", 0))


def compounds(origin: Any, args: tuple, limit: dict[str, Any], metadata: list[Any]) -> st.SearchStrategy[Any]:
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(arg, metadata) for arg in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is dict:
        return st.dictionaries(values_of(args[0], []), values_of(args[1], []), max_size=2)
    assert origin is tuple
    if args[-1] is Ellipsis:
        return st.lists(values_of(args[0], []), min_size=limit.get("min_length", 0), max_size=2).map(tuple)
    return st.tuples(*[values_of(arg, []) for arg in args])


@st.composite
def _instances(draw: st.DrawFn, contract: type[Contract]) -> Contract:
    fields = {}
    for name, info in contract.model_fields.items():
        if info.is_required() or draw(st.booleans()):
            fields[name] = draw(values_of(info.annotation, list(info.metadata)))
    return contract.model_validate(fields)


def instances(contract: type) -> st.SearchStrategy[Any]:
    if issubclass(contract, tuple):  # a NamedTuple: its fields by their annotations
        return st.builds(contract, **{name: values_of(kind, []) for name, kind in get_type_hints(contract).items()})
    return signatures() if contract is SiteSignature else _instances(contract)


@contracts
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_json_reads_back_as_itself(contract: type[Contract], data: st.DataObject):
    one = data.draw(instances(contract))
    assert contract.model_validate_json(one.model_dump_json()) == one
    assert contract.model_validate(one.model_dump(mode="json")) == one
    assert pickle.loads(pickle.dumps(one)) == one


@contracts
@settings(max_examples=1, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_unknown_keys_and_changes_are_refused(contract: type[Contract], data: st.DataObject):
    one = data.draw(instances(contract))
    with pytest.raises(ValidationError, match="not permitted"):
        contract.model_validate({**one.model_dump(mode="json"), "surprise": 1})
    field = next(iter(contract.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(one, field, getattr(one, field))


def float_fields() -> list[Any]:
    """(contract, field) of every field that holds one number with a fraction."""
    found = []
    for contract in CONTRACTS:
        for name, info in contract.model_fields.items():
            if float in {info.annotation, *get_args(info.annotation)} or "allow_inf_nan" in str(info):
                found.append(pytest.param(contract, name, id=f"{contract.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("contract", "name"), float_fields())
def test_no_number_is_nan_or_infinite(contract: type[Contract], name: str):
    info = contract.model_fields[name]
    many = get_origin(info.annotation) is tuple
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValidationError) as caught:
            contract.model_validate({name: (bad,) if many else bad})
        assert any(error["loc"][0] == name for error in caught.value.errors()), f"{name} = {bad} was accepted"


def bounded_fields() -> list[Any]:
    """(contract, field, a value just out of range)."""
    found = []
    for contract in CONTRACTS:
        for name, info in contract.model_fields.items():
            limit = limits(list(info.metadata))
            for bound, step in (("ge", -1), ("le", 1)):
                if bound in limit:
                    found.append(
                        pytest.param(contract, name, limit[bound] + step, id=f"{contract.__name__}.{name}.{bound}")
                    )
    return found


@pytest.mark.parametrize(("contract", "name", "bad"), bounded_fields())
def test_no_number_leaves_its_range(contract: type[Contract], name: str, bad: float):
    with pytest.raises(ValidationError) as caught:
        contract.model_validate({name: bad})
    assert any(error["loc"][0] == name and "than" in error["type"] for error in caught.value.errors())


def test_the_sweeps_found_what_they_sweep():
    assert len(CONTRACTS) > 35
    assert len(float_fields()) > 40
    assert len(bounded_fields()) > 40


# ---------------------------------------------------------------- messages


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), topic=st.sampled_from(Topic))
def test_a_message_carries_its_topics_contract(data: st.DataObject, topic: Topic):
    body = data.draw(instances(PAYLOADS[topic]))
    message = OonaMessage.of(topic, body, sender_id="me", key="run")
    assert message.body() == body
    assert decode(encode([message, message])) == [message, message]
    assert decode(memoryview(encode([]))) == []


def test_every_topic_has_a_payload_and_takes_no_other():
    assert PAYLOADS.keys() == set(Topic)
    signature = SiteSignature(kind=SiteKind.VECTOR, channels=3)
    for topic in Topic:
        with pytest.raises(TypeError, match="carries"):
            OonaMessage.of(topic, signature, sender_id="me", key="run")


def test_unknown_topics_are_refused():
    assert topics(["telemetry.seed.health"]) == (Topic.SEED_HEALTH,)
    with pytest.raises(ValueError, match="nothing"):
        topics(["nothing"])


# ---------------------------------------------------------------- signatures and keys


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "vector", "channels": 0},
        {"kind": "vector", "channels": 3, "extent": [4]},
        {"kind": "feature_map", "channels": 3, "extent": [4]},
        {"kind": "sequence", "channels": 3},
        {"kind": "vector", "channels": 3, "causal": True},
        {"kind": "vector", "channels": 3, "dtype": "int8"},
        {"kind": "vector", "channels": 3, "device": "tpu"},
        {"kind": "feature_map", "channels": 3, "extent": [4, 0]},
    ],
)
def test_a_signature_that_names_no_place_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        SiteSignature.model_validate(fields)


def test_shapes_and_dims_of_a_signature():
    image = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(4, 5))
    text = SiteSignature(kind=SiteKind.SEQUENCE, channels=3, extent=(7,), causal=True)
    assert (image.shape(2), image.dims()) == ((2, 3, 4, 5), {"C": 3, "H": 4, "W": 5})
    assert (text.shape(2), text.dims()) == ((2, 7, 3), {"C": 3, "T": 7})
    assert text.key == "sequence-3x7-float32-cpu-causal"


@settings(max_examples=30)
@given(one=signatures(), other=signatures())
def test_keys_tell_signatures_apart(one: SiteSignature, other: SiteSignature):
    assert (one.key == other.key) == (one == other)


@settings(max_examples=30)
@given(
    one=st.tuples(st.sampled_from(["a" * 64, "b" * 64]), signatures(), st.sampled_from(Pipeline), TEXT),
    other=st.tuples(st.sampled_from(["a" * 64, "b" * 64]), signatures(), st.sampled_from(Pipeline), TEXT),
)
def test_a_compile_key_depends_on_each_of_its_parts(one: tuple, other: tuple):
    assert (compile_key(*one) == compile_key(*other)) == (one == other)
    for index, value in enumerate(other):
        changed = (*one[:index], value, *one[index + 1 :])
        assert (compile_key(*changed) == compile_key(*one)) == (changed == one)


# ---------------------------------------------------------------- status tables


@pytest.mark.parametrize(
    ("table", "check"),
    [(BLUEPRINT_TRANSITIONS, check_blueprint_transition), (KERNEL_TRANSITIONS, check_kernel_transition)],
    ids=["blueprint", "kernel"],
)
def test_only_the_tables_arrows_are_allowed(table: dict[Any, frozenset], check: Callable[[Any, Any], None]):
    for old, arrows in table.items():
        for new in table:
            if new in arrows:
                check(old, new)
            else:
                with pytest.raises(ConflictError, match="cannot go"):
                    check(old, new)


def test_retired_is_the_end():
    assert BLUEPRINT_TRANSITIONS.keys() == set(BlueprintStatus)
    assert KERNEL_TRANSITIONS.keys() == set(KernelStatus)
    assert not BLUEPRINT_TRANSITIONS[BlueprintStatus.RETIRED]
    assert not KERNEL_TRANSITIONS[KernelStatus.RETIRED]


# ---------------------------------------------------------------- errors

ERRORS = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, EsperError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_cross_processes_unchanged(kind: type[EsperError]):
    error = kind("it broke", field="tolaria.epochs", remedy="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.message, again.field, again.remedy) == ("it broke", "tolaria.epochs", "mend it")
    assert str(again) == "tolaria.epochs: it broke (mend it)"


def test_the_error_tree_is_drawn_as_it_is():
    assert errors.__doc__ is not None
    for kind in ERRORS:
        assert kind.__name__ in errors.__doc__
        assert kind.__name__ in leyline.__all__
    branches = (errors.UserError, errors.TransientError, errors.PermanentError, errors.SafetyError)
    for kind in ERRORS:
        assert kind is EsperError or sum(issubclass(kind, branch) for branch in branches) == 1


def test_json_without_a_number_is_refused():
    record = leyline.Check(name="shape", passed=True, value=1.0)
    broken = json.loads(record.model_dump_json()) | {"value": "NaN"}
    with pytest.raises(ValidationError, match="finite"):
        leyline.Check.model_validate(broken)


def test_a_signal_from_before_gates_had_names_is_read_without_its_vetoes():
    old = {
        "run_id": "r",
        "epoch": 1,
        "policy": "heuristic",
        "vetoes": ["stages.0: the budget"],
        "reason": "vetoed: ...",
    }
    assert AdaptationSignal.model_validate_json(json.dumps(old)).vetoes == ()
