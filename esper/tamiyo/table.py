"""The health of all sites of a packet in columns, and a packet whose reports are made of them when they are asked for.

Whoever decides reads columns, and looks at records of the few seeds that are under way or chosen. Where a packet came
with its records, `tabled` makes the columns; where it came packed (see `packing`), there are nothing but columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast, overload

import numpy as np

from esper.leyline import HealthSignal, LayerHealthReport, SeedStage, SiteSignature, SystemStatePacket
from esper.tamiyo.columns import Columns, apart

STAGES = tuple(SeedStage)
"""In the order of `Table.stage`."""

_IS_ACTIVE = np.array([stage.is_active for stage in STAGES])


class Table:
    """The health of S sites with N seeds.

    Attributes:
        site, seed: see `columns`.
        first: (S + 1,), where each site's seeds begin; a site's stand together, in its order.
        signatures: those that occur; `signature_of` (S,) says which is whose.
        evidence, chunks: of the seeds `evidence_of` and the sites `chunk_of`, both ascending.
    """

    def __init__(
        self,
        site: Columns,
        seed: Columns,
        first: np.ndarray,
        signatures: tuple[SiteSignature, ...],
        signature_of: np.ndarray,
        evidence: tuple[np.ndarray, Columns],
        chunks: tuple[np.ndarray, Columns],
    ) -> None:
        self.site, self.seed, self.first = site, seed, first
        self.signatures, self.signature_of = signatures, signature_of
        self.evidence_of, self.evidence = evidence
        self.chunk_of, self.chunks = chunks

    @classmethod
    def of(cls, layers: Sequence[LayerHealthReport]) -> Table:
        """Returns the columns of reports."""
        seeds = [seed for layer in layers for seed in layer.seeds]
        counts = np.array([len(layer.seeds) for layer in layers], dtype=np.int64)
        signatures, signature_of = _signatures(layers)
        evidence_of, evidence = apart([(place, s.evidence) for place, s in enumerate(seeds) if s.evidence is not None])
        chunk_of, chunks = apart([(place, chunk) for place, layer in enumerate(layers) for chunk in layer.chunks])
        return cls(
            Columns.of("site", layers),
            Columns.of("seed", seeds),
            np.concatenate([[0], np.cumsum(counts)]),
            signatures,
            signature_of,
            (evidence_of, Columns.of("evidence", evidence)),
            (chunk_of, Columns.of("chunk", chunks)),
        )

    def __len__(self) -> int:
        return self.site.size

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites' names."""
        return tuple(self.site.words("layer_id"))

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each site, of the first where two have one name."""
        return dict(zip(reversed(self.sites), range(len(self) - 1, -1, -1), strict=True))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that say which sites there are, in which order."""
        return hashlib.sha256("\0".join(self.sites).encode()).hexdigest()[:16]

    @cached_property
    def seed_site(self) -> np.ndarray:
        """(N,), the site of each seed."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @property
    def stage(self) -> np.ndarray:
        """(N,), places in `STAGES`."""
        return self.seed.numbers("stage")

    @cached_property
    def is_active(self) -> np.ndarray:
        """(N,) bool."""
        return _IS_ACTIVE[self.stage]

    def count(self, seeds: np.ndarray) -> np.ndarray:
        """(S,), how many of each site's seeds are in a mask (N,)."""
        return np.bincount(self.seed_site[seeds], minlength=len(self))

    def figure(self, name: str) -> np.ndarray:
        """(S,), a figure that all seeds of a site share; NaN where there is none."""
        found = np.full(len(self), np.nan)
        there = self.first[:-1] < self.first[1:]
        found[there] = self.seed.numbers(name)[self.first[:-1][there]]
        return found

    def of_signatures(self, values: Sequence[float]) -> np.ndarray:
        """(S,) from a value for each signature."""
        return np.array(values, dtype=np.float64)[self.signature_of]

    @cached_property
    def _sites_of(self) -> dict[tuple[str, ...], np.ndarray]:
        return {}

    def places_of(self, names: tuple[str, ...]) -> np.ndarray:
        """The places of sites, without those that sent no report; kept, since many kernels are for the same sites."""
        found = self._sites_of.get(names)
        if found is None:
            places = self.places
            found = np.array([places[name] for name in names if name in places], dtype=np.int64)
            self._sites_of[names] = found
        return found

    # ------------------------------------------------------------ records

    def signal(self, place: int) -> HealthSignal:
        """Makes the record of a seed."""
        at = int(np.searchsorted(self.evidence_of, place))
        there = at < len(self.evidence_of) and self.evidence_of[at] == place
        return cast("HealthSignal", self.seed.record(place, evidence=self.evidence.record(at) if there else None))

    def report(self, place: int) -> LayerHealthReport:
        """Makes the report of a site."""
        chunks = range(*np.searchsorted(self.chunk_of, [place, place + 1]).tolist())
        seeds = range(*self.first[place : place + 2].tolist())
        report = self.site.record(
            place,
            signature=self.signatures[self.signature_of[place]],
            chunks=tuple(self.chunks.record(at) for at in chunks),
            seeds=tuple(self.signal(at) for at in seeds),
        )
        return cast("LayerHealthReport", report)


def _signatures(layers: Sequence[LayerHealthReport]) -> tuple[tuple[SiteSignature, ...], np.ndarray]:
    """The signatures that occur, and which is whose."""
    number: dict[tuple[Any, ...], int] = {}
    found: list[SiteSignature] = []
    of: list[int] = []
    for layer in layers:
        # by their fields: the hash of a record of pydantic takes ten times as long. No key is kept beyond its turn,
        # since thousands of them would call the garbage collector
        place = number.setdefault(tuple(layer.signature.__dict__.values()), len(found))
        if place == len(found):
            found.append(layer.signature)
        of.append(place)
    return tuple(found), np.array(of, dtype=np.int64)


class Layers(Sequence[LayerHealthReport]):
    """What stands in `SystemStatePacket.layers` of a packet that is decided about: reports that are made when they are
    asked for, and their columns.

    Args:
        table: the columns.
        reports: where they are there already.
    """

    def __init__(self, table: Table, reports: Sequence[LayerHealthReport] | None = None) -> None:
        self.table = table
        self._reports = reports
        self._made: dict[int, LayerHealthReport] = {}

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> LayerHealthReport: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[LayerHealthReport, ...]: ...
    def __getitem__(self, place: int | slice) -> LayerHealthReport | tuple[LayerHealthReport, ...]:
        if isinstance(place, slice):
            return tuple(self[at] for at in range(*place.indices(len(self))))
        at = range(len(self))[place]
        if self._reports is not None:
            return self._reports[at]
        if at not in self._made:
            self._made[at] = self.table.report(at)
        return self._made[at]

    def named(self, site: str) -> LayerHealthReport | None:
        """The report of a site; None if it sent none."""
        place = self.table.places.get(site)
        return None if place is None else self[place]

    def signal(self, place: int) -> HealthSignal:
        """The record of a seed, by its place among all."""
        site = int(self.table.seed_site[place])
        return self[site].seeds[place - int(self.table.first[site])]

    def active(self) -> Iterator[tuple[LayerHealthReport, HealthSignal]]:
        """Every seed that has begun and not ended, with its site's report."""
        for place in np.flatnonzero(self.table.is_active).tolist():
            yield self[int(self.table.seed_site[place])], self.signal(place)


class Named(Sequence[tuple[str, str]]):
    """(site, seed id) of every seed; the pairs are made when they are asked for.

    Args:
        sites: names.
        seed_site: (N,), the site of each.
        ids: of each.
    """

    def __init__(self, sites: Sequence[str], seed_site: np.ndarray, ids: Sequence[str]) -> None:
        self._sites, self._seed_site, self._ids = sites, seed_site, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    @overload
    def __getitem__(self, place: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[str, str], ...]: ...
    def __getitem__(self, place: int | slice) -> tuple[str, str] | tuple[tuple[str, str], ...]:
        if isinstance(place, slice):
            return tuple(self[at] for at in range(*place.indices(len(self))))
        return self._sites[int(self._seed_site[place])], self._ids[place]


def tabled(packet: SystemStatePacket) -> SystemStatePacket:
    """Returns the packet with `Layers` for its reports, as it is where it has them."""
    if isinstance(packet.layers, Layers):
        return packet
    return with_layers(packet, Layers(Table.of(packet.layers), packet.layers))


def with_layers(packet: SystemStatePacket, layers: Layers) -> SystemStatePacket:
    """Returns the packet with other reports."""
    return packet.model_copy(update={"layers": cast("Any", layers)})


def layers_of(packet: SystemStatePacket) -> Layers:
    """Returns the packet's reports with their columns; see `tabled`."""
    return cast("Layers", tabled(packet).layers)


def table_of(packet: SystemStatePacket) -> Table:
    """Returns the columns of a packet's reports; see `tabled`."""
    return layers_of(packet).table
