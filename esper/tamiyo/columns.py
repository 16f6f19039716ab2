"""Records of one kind as columns: one array a field, in place of one object a record.

What ten thousand records of pydantic take to make, check and read is most of a large host's decision; a column is
checked and read in one step. A record is made of the row that somebody asks for. A figure that was not measured is NaN
in its column and None in its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, cast

import numpy as np

from esper.leyline import ChunkHealth, Contract, Evidence, EvidenceKind, HealthSignal, LayerHealthReport, SeedStage

Values = np.ndarray | list[Any]


class Field(Protocol):
    """How a field becomes a column."""

    def column(self, values: list[Any]) -> Values:
        """Returns the column of a field's values."""
        ...

    def check(self, column: Values) -> str | None:
        """What is wrong with a column that came from elsewhere; None if nothing is."""
        ...

    def value(self, entry: Any) -> Any:
        """Returns the field of an entry of the column."""
        ...


@dataclass(frozen=True, slots=True)
class Number:
    """A finite figure between bounds."""

    low: float = -np.inf
    high: float = np.inf
    optional: bool = False

    def column(self, values: list[Any]) -> Values:
        """See `Field`."""
        found = np.array(values, dtype=np.float64)
        # as in JSON: what is no number was not measured
        return np.where(np.isfinite(found), found, np.nan) if self.optional else found

    def check(self, column: Values) -> str | None:
        """See `Field`."""
        column = cast("np.ndarray", column)
        there = column[~np.isnan(column)] if self.optional else column
        if not np.isfinite(there).all():
            return "is not a finite number"
        return None if ((there >= self.low) & (there <= self.high)).all() else f"is not in [{self.low}, {self.high}]"

    def value(self, entry: Any) -> Any:
        """See `Field`."""
        return None if self.optional and np.isnan(entry) else float(entry)


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number from `low` on."""

    low: int = 0

    def column(self, values: list[Any]) -> Values:
        """See `Field`."""
        return np.array(values, dtype=np.int64)

    def check(self, column: Values) -> str | None:
        """See `Field`."""
        return None if (cast("np.ndarray", column) >= self.low).all() else f"is less than {self.low}"

    def value(self, entry: Any) -> Any:
        """See `Field`."""
        return int(entry)


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def column(self, values: list[Any]) -> Values:
        """See `Field`."""
        return np.array(values, dtype=bool)

    def check(self, column: Values) -> str | None:
        """See `Field`."""
        del column
        return None

    def value(self, entry: Any) -> Any:
        """See `Field`."""
        return bool(entry)


@dataclass(frozen=True, slots=True)
class Word:
    """Text, or None where that is allowed."""

    optional: bool = False

    def column(self, values: list[Any]) -> Values:
        """See `Field`."""
        return values

    def check(self, column: Values) -> str | None:
        """See `Field`."""
        allowed = {str, type(None)} if self.optional else {str}
        return None if set(map(type, column)) <= allowed else "is not text"

    def value(self, entry: Any) -> Any:
        """See `Field`."""
        return entry


@dataclass(frozen=True, slots=True)
class Choice:
    """One of an enumeration, by its place there."""

    among: type[StrEnum]

    def column(self, values: list[Any]) -> Values:
        """See `Field`."""
        places = {one: place for place, one in enumerate(self.among)}
        return np.fromiter(map(places.__getitem__, values), np.int64, len(values))

    def check(self, column: Values) -> str | None:
        """See `Field`."""
        column = cast("np.ndarray", column)
        return None if ((column >= 0) & (column < len(self.among))).all() else f"is no {self.among.__name__}"

    def value(self, entry: Any) -> Any:
        """See `Field`."""
        return list(self.among)[entry]


_TOGETHER = 256

_SHARE = Number(0.0, 1.0, optional=True)
_FIGURE = Number(optional=True)
_HEALTH: dict[str, Field] = {
    "activation_variance": _FIGURE,
    "dead_neuron_ratio": _SHARE,
    "avg_correlation": _SHARE,
    "gradient_norm": _FIGURE,
    "grow_potential": _FIGURE,
    "health_score": _SHARE,
}

SITE: dict[str, Field] = {
    "api_version": Count(low=-(2**62)), "run_id": Word(), "layer_id": Word(), "epoch": Count(), "step": Count(),
    "num_samples": Count(),
}  # fmt: skip
"""Of `LayerHealthReport`, without its signature, seeds and chunks."""

SEED: dict[str, Field] = {
    "layer_id": Word(), "seed_id": Word(), "chunk_id": Count(), "epoch": Count(), "stage": Choice(SeedStage), **_HEALTH,
    "alpha": Number(0.0, 1.0), "epochs_in_stage": Count(), "blueprint": Word(optional=True),
    "kernel_id": Word(optional=True), "train_loss": _FIGURE, "runs": Count(), "latency_ms": Number(0.0, optional=True),
    "is_ready_for_transition": Flag(), "should_cull": Flag(), "gate": Word(), "trace_id": Word(),
}  # fmt: skip
"""Of `HealthSignal`, without its evidence."""

CHUNK: dict[str, Field] = {
    "chunk_id": Count(), "first_channel": Count(), "num_channels": Count(low=1), **_HEALTH,
}  # fmt: skip
EVIDENCE: dict[str, Field] = {
    "kind": Choice(EvidenceKind), "gain": Number(), "stderr": Number(0.0), "baseline": Number(), "candidate": Number(),
    "num_pairs": Count(), "reason": Word(),
}  # fmt: skip

FORMS: dict[str, tuple[type[Contract], dict[str, Field]]] = {
    "site": (LayerHealthReport, SITE),
    "seed": (HealthSignal, SEED),
    "chunk": (ChunkHealth, CHUNK),
    "evidence": (Evidence, EVIDENCE),
}


@dataclass(frozen=True)
class Columns:
    """Records of one form.

    Attributes:
        form: a key of `FORMS`.
        size: how many they are.
        values: by field.
    """

    form: str
    size: int
    values: Mapping[str, Values]

    @classmethod
    def of(cls, form: str, records: Sequence[Contract]) -> Columns:
        """Returns the columns of records."""
        # a record's own dictionary: ten thousand looks through a class cost ten times as much
        rows = [record.__dict__ for record in records]
        _, fields = FORMS[form]
        lists: dict[str, list[Any]] = {name: [] for name in fields}
        for start in range(0, len(rows), _TOGETHER):  # so many rows stay in the processor's cache
            part = rows[start : start + _TOGETHER]
            for name, values in lists.items():
                values += [row[name] for row in part]
        return cls(form, len(rows), {name: _column(field, lists[name]) for name, field in fields.items()})

    def check(self) -> None:
        """Raises `ValueError` if a column holds what no record may."""
        for name, field in FORMS[self.form][1].items():
            wrong = field.check(self.values[name])
            if wrong is not None:
                raise ValueError(f"{self.form}.{name}: an entry {wrong}")

    def numbers(self, name: str) -> np.ndarray:
        """Returns a column of numbers."""
        return cast("np.ndarray", self.values[name])

    def words(self, name: str) -> list[Any]:
        """Returns a column of words."""
        return cast("list[Any]", self.values[name])

    def row(self, place: int) -> dict[str, Any]:
        """Returns the fields of one record."""
        return {name: field.value(self.values[name][place]) for name, field in FORMS[self.form][1].items()}

    def record(self, place: int, **more: Any) -> Any:
        """Makes one record; `more` are the fields that have no column."""
        return FORMS[self.form][0](**self.row(place), **more)


def _column(field: Field, values: list[Any]) -> Values:
    # most columns hold one value, and numpy takes long over lists of None
    if isinstance(field, Word) or not values or values[0] != values[-1] or values.count(values[0]) < len(values):
        return field.column(values)
    return np.repeat(cast("np.ndarray", field.column(values[:1])), len(values))


def apart(pairs: Sequence[tuple[int, Contract]]) -> tuple[np.ndarray, list[Contract]]:
    """Splits (owner, record) pairs."""
    return np.array([owner for owner, _ in pairs], dtype=np.int64), [record for _, record in pairs]
