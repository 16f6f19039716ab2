"""A packet as bytes, in columns: what a trainer sends to Tamiyo's replica. People and other programs send JSON.

A header of JSON holds what is told once; the columns of health follow it, each as its array's bytes, or, where all
entries are the same, as one entry in the header. Kernels that are ready for the same sites name them once. Nothing is
taken for granted on the way in: sizes, kinds and bounds are checked a column at a time, and what is told once is
checked as any contract is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from esper.leyline import KernelOption, PermanentError, SiteSignature, SystemStatePacket
from esper.tamiyo.columns import FORMS, Choice, Columns, Count, Field, Flag, Number, Values, Word
from esper.tamiyo.table import Layers, Table, table_of, with_layers

MARK = b"esper packet 1\n"
"""What packed packets begin with; the number grows with every change of their form."""

_LENGTH = 8
_LONGEST = 1 << 24
_SIGNATURES = TypeAdapter(tuple[SiteSignature, ...])
_OPTIONS = TypeAdapter(tuple[KernelOption, ...])
_TYPES: dict[type, str] = {Number: "<f8", Count: "<i8", Choice: "<i8", Flag: "|b1"}


class _Out:
    """Arrays one after the other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def put(self, array: np.ndarray, kind: str) -> Any:
        """Returns what stands for an array in the header."""
        array = np.ascontiguousarray(array, dtype=kind)
        if len(array) and array.tobytes() == array[:1].tobytes() * len(array):
            return {"all": None if kind == "<f8" and np.isnan(array[0]) else array[0].item(), "size": len(array)}
        self.parts.append(array.tobytes())
        return {"size": len(array)}

    def words(self, words: list[Any]) -> Any:
        """Returns what stands for words in the header: those that occur, and which is where."""
        different = dict.fromkeys(words)
        if len(different) == len(words):
            return {"words": words}
        number = {word: place for place, word in enumerate(different)}
        places = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        return {"words": list(different), "places": self.put(places, "<i4")}


def _one(entry: Any, kind: str) -> np.ndarray:
    """The entry that a whole column repeats."""
    if kind == "<f8" and entry is None:
        return np.array(np.nan)
    kinds = {"<f8": (int, float), "|b1": (bool,)}.get(kind, (int,))
    if not isinstance(entry, kinds) or (isinstance(entry, bool) and kind != "|b1"):
        raise ValueError(f"{entry!r} is no entry of a column of {kind}")
    return np.array(entry, dtype=kind)


class _In:
    """Reads what `_Out` wrote, in its order; raises `ValueError` at what does not fit."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def array(self, told: Any, kind: str) -> np.ndarray:
        """Returns an array."""
        size = told["size"]
        if "all" in told:
            if not 0 <= size <= _LONGEST:
                raise ValueError("a column is too long")
            return np.full(size, _one(told["all"], kind))
        end = self._at + size * np.dtype(kind).itemsize
        if not self._at <= end <= len(self._data):
            raise ValueError("it is torn")
        found = np.frombuffer(self._data[self._at : end], dtype=kind)
        self._at = end
        if kind == "|b1" and (found.view(np.uint8) > 1).any():
            raise ValueError("a flag is neither true nor false")
        return found

    def words(self, told: Any) -> list[Any]:
        """Returns words."""
        different = told["words"]
        if "places" not in told:
            return list(different)
        places = self.array(told["places"], "<i4")
        _require_places(places, len(different))
        return list(map(different.__getitem__, places.tolist()))

    def end(self) -> None:
        """Raises `ValueError` if something is left."""
        if self._at != len(self._data):
            raise ValueError("it holds more than it tells of")


def pack(packet: SystemStatePacket) -> bytes:
    """Returns a packet's bytes."""
    table, out = table_of(packet), _Out()
    sites: dict[tuple[str, ...], int] = {}
    options = [
        {**option.model_dump(mode="json", exclude={"others"}), "others": sites.setdefault(option.others, len(sites))}
        for option in packet.options
    ]
    head = {
        "packet": packet.model_dump(mode="json", exclude={"layers", "options"}),
        "signatures": [one.model_dump(mode="json") for one in table.signatures],
        "signature_of": out.put(table.signature_of, "<i4"),
        "first": out.put(table.first, "<i8"),
        "evidence_of": out.put(table.evidence_of, "<i8"),
        "chunk_of": out.put(table.chunk_of, "<i8"),
        "columns": {
            columns.form: {
                name: _put(out, field, columns.values[name]) for name, field in FORMS[columns.form][1].items()
            }
            for columns in (table.site, table.seed, table.evidence, table.chunks)
        },
        "options": options,
        "others": [
            out.put(np.array(_numbers(names, table)), "<i4") if _known(names, table) else list(names) for names in sites
        ],
    }
    written = to_json(head)
    return b"".join([MARK, len(written).to_bytes(_LENGTH, "little"), written, *out.parts])


def unpack(data: bytes) -> SystemStatePacket:
    """Returns the packet behind its bytes, with `Layers` for its reports.

    Raises:
        PermanentError: if they are torn, of another form, or hold what no packet may.
    """
    if not data.startswith(MARK):
        raise PermanentError("Tamiyo cannot read what it was sent: it is no packet of this version's form")
    try:
        return _unpack(memoryview(data)[len(MARK) :])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PermanentError(f"Tamiyo cannot read what it was sent: {where}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise PermanentError(f"Tamiyo cannot read what it was sent: {error}") from error


def _unpack(data: memoryview) -> SystemStatePacket:
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if start > len(data):
        raise ValueError("it is torn")
    head, source = from_json(bytes(data[_LENGTH:start])), _In(data[start:])
    signatures = _SIGNATURES.validate_json(to_json(head["signatures"]))
    signature_of, first, evidence_of, chunk_of = (
        source.array(head[name], kind)
        for name, kind in (("signature_of", "<i4"), ("first", "<i8"), ("evidence_of", "<i8"), ("chunk_of", "<i8"))
    )
    site, seed, evidence, chunks = (
        _columns(source, form, head["columns"][form]) for form in ("site", "seed", "evidence", "chunk")
    )
    _require_places(signature_of, len(signatures), size=site.size)
    if len(first) != site.size + 1 or first[0] != 0 or first[-1] != seed.size or (np.diff(first) < 0).any():
        raise ValueError("it does not say whose seeds are whose")
    for owners, columns, size in ((evidence_of, evidence, seed.size), (chunk_of, chunks, site.size)):
        _require_places(owners, size, size=columns.size)
    if (np.diff(evidence_of) <= 0).any() or (np.diff(chunk_of) < 0).any():
        raise ValueError("evidence or chunks are out of order")
    table = Table(site, seed, first, signatures, signature_of, (evidence_of, evidence), (chunk_of, chunks))
    bundles = [_others(source, told, table) for told in head["others"]]
    source.end()
    options = _options(head["options"], bundles)
    packet = SystemStatePacket.model_validate_json(to_json({**head["packet"], "layers": ()}))
    return with_layers(packet.model_copy(update={"options": options}), Layers(table))


def _options(told: list[dict[str, Any]], bundles: list[tuple[str, ...]]) -> tuple[KernelOption, ...]:
    alone = _OPTIONS.validate_json(to_json([{**one, "others": ()} for one in told]))
    numbers = np.array([one["others"] for one in told], dtype=np.int64)
    _require_places(numbers, len(bundles))
    # the kernels of a bundle share its names
    return tuple(
        option.model_copy(update={"others": bundles[number]})
        for option, number in zip(alone, numbers.tolist(), strict=True)
    )


def _known(names: tuple[str, ...], table: Table) -> bool:
    return all(name in table.places for name in names)


def _numbers(names: tuple[str, ...], table: Table) -> list[int]:
    return [table.places[name] for name in names]


def _others(source: _In, told: Any, table: Table) -> tuple[str, ...]:
    if isinstance(told, list):  # some of them sent no report
        if not all(isinstance(name, str) for name in told):
            raise ValueError("a site's name is not text")
        return tuple(told)
    places = source.array(told, "<i4")
    _require_places(places, len(table))
    return tuple(map(table.sites.__getitem__, places.tolist()))


def _put(out: _Out, field: Field, values: Values) -> Any:
    if isinstance(values, list):
        return out.words(values)
    return out.put(values, _TYPES[type(field)])


def _columns(source: _In, form: str, told: Any) -> Columns:
    """Reads the columns of a form, and checks them."""
    values: dict[str, Values] = {
        name: source.words(told[name]) if isinstance(field, Word) else source.array(told[name], _TYPES[type(field)])
        for name, field in FORMS[form][1].items()
    }
    sizes = {len(column) for column in values.values()}
    if len(sizes) > 1:
        raise ValueError(f"the columns of {form} are not of one length")
    columns = Columns(form, sizes.pop(), values)
    columns.check()
    return columns


def _require_places(places: np.ndarray, end: int, *, size: int | None = None) -> None:
    if size is not None and len(places) != size:
        raise ValueError("a column is not as long as those beside it")
    if len(places) and not (places.min() >= 0 and places.max() < end):
        raise ValueError("it names what is not there")
