"""Kernels in memory, with what was learned of each, and the indexes by which they are found. Pure.

Indexes keep their kernels oldest first, but for a kernel that gets another tag later. A query starts from the smallest
index that applies, looks the others up, and sorts what it found, of which most is in order already.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from esper.leyline import (
    Blueprint,
    CompiledKernelArtifact,
    FieldReport,
    KernelStatus,
    NotFoundError,
    Outcome,
    Pipeline,
    SiteKind,
    SiteSignature,
)
from esper.leyline.catalogue import (
    BenchmarkResult,
    KernelBrief,
    KernelEntry,
    KernelOrder,
    KernelPage,
    KernelQuery,
    KernelStatistics,
)
from esper.leyline.kernels import check_kernel_transition, merged_tags
from esper.leyline.track import TrackRecord

KEPT_BENCHMARKS = 8
"""The last so many of a kernel are kept at hand; the log keeps all."""

_Ids = dict[str, None]  # a set that keeps its order


class KernelIndex:
    """All kernels of a catalogue."""

    def __init__(self) -> None:
        self._kernels: dict[str, CompiledKernelArtifact] = {}
        self._places: dict[str, int] = {}
        self._by_compile_key: dict[str, str] = {}
        self._reasons: dict[str, str] = {}  # of those that are not validated any more
        self._by_signature: dict[str, _Ids] = {}
        self._by_tag: dict[str, _Ids] = {}
        self._by_status: dict[KernelStatus, _Ids] = {status: {} for status in KernelStatus}
        self._briefs: dict[str, KernelBrief] = {}
        self._statistics: dict[str, KernelStatistics] = {}
        self._benchmarks: dict[str, tuple[BenchmarkResult, ...]] = {}
        self._counted: _Ids = {}  # reports and benchmarks
        self._records: dict[tuple[SiteKind, str], TrackRecord] = {}  # by blueprint

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._kernels

    def copy(self) -> KernelIndex:
        """One that goes its own way from here on."""
        other = KernelIndex()
        for flat in (
            "_kernels",
            "_briefs",
            "_places",
            "_by_compile_key",
            "_reasons",
            "_statistics",
            "_benchmarks",
            "_counted",
            "_records",
        ):
            setattr(other, flat, dict(getattr(self, flat)))
        for nested in ("_by_signature", "_by_tag", "_by_status"):
            setattr(other, nested, {key: dict(ids) for key, ids in getattr(self, nested).items()})
        return other

    # ------------------------------------------------------------ changes

    def put(self, kernel: CompiledKernelArtifact) -> None:
        """Takes a kernel in; one that is known already stays as it is."""
        id_ = kernel.kernel_id
        if id_ in self._kernels:
            return
        self._kernels[id_] = kernel
        self._briefs[id_] = KernelBrief.of(kernel)
        self._places[id_] = len(self._places)
        self._by_compile_key.setdefault(kernel.compile_key, id_)
        self._by_signature.setdefault(kernel.signature.key, {})[id_] = None
        self._by_status[kernel.status][id_] = None
        for tag in kernel.tags:
            self._by_tag.setdefault(tag, {})[id_] = None

    def share(self, kernel_id: str, blueprint: Blueprint) -> None:
        """Notes that a blueprint has this kernel: found by its name and tags from here on, those kept for Urabrask not.

        See `KernelBrief` for what that means to those who choose.
        """
        brief = self._briefs[self.get(kernel_id).kernel_id]
        if blueprint.name in (brief.blueprint, *brief.aliases) and all(tag in brief.tags for tag in blueprint.tags):
            return  # as of nearly all: the design that it was built for
        names = dict.fromkeys((brief.blueprint, *brief.aliases, blueprint.name))
        tags = tuple(dict.fromkeys((*brief.tags, *merged_tags(blueprint.tags, ()))))
        if (len(names), len(tags)) == (1 + len(brief.aliases), len(brief.tags)):
            return
        self._briefs[kernel_id] = brief._replace(aliases=tuple(names)[1:], tags=tags)
        for tag in tags[len(brief.tags) :]:
            # at the end, though it may be older than others there: a page is sorted, and this happens at every kernel
            self._by_tag.setdefault(tag, {})[kernel_id] = None

    def mark(self, kernel_id: str, status: KernelStatus, reason: str) -> None:
        """Changes a status, for a reason; raises `ConflictError` if the status table forbids it."""
        kernel = self.get(kernel_id)
        check_kernel_transition(kernel.status, status)
        self._reasons[kernel_id] = reason
        self._kernels[kernel_id] = kernel.model_copy(update={"status": status})
        del self._by_status[kernel.status][kernel_id]
        self._by_status[status][kernel_id] = None

    def count_report(self, report: FieldReport) -> None:
        """Adds what became of a kernel."""
        self._counted[report.report_id] = None
        old = self.statistics(report.kernel_id)
        changes: dict[str, Any] = {
            "outcomes": old.outcomes | {report.outcome: old.outcomes.get(report.outcome, 0) + 1},
            "seconds": old.seconds + report.seconds,
        }
        if report.evidence is not None and report.evidence.num_pairs:
            number = old.num_gains + 1
            before = old.mean_gain or 0.0
            changes |= {"num_gains": number, "mean_gain": before + (report.evidence.gain - before) / number}
        self._statistics[report.kernel_id] = old.model_copy(update=changes)
        if report.value is not None and report.kernel_id in self._briefs:
            design = (self._kernels[report.kernel_id].signature.kind, self._briefs[report.kernel_id].blueprint)
            self._records[design] = self._records.get(design, TrackRecord()).count(report.value)

    def count_uses(self, counts: Mapping[str, int]) -> None:
        """Adds fetches by kernel."""
        for kernel_id, number in counts.items():
            old = self.statistics(kernel_id)
            self._statistics[kernel_id] = old.model_copy(update={"num_fetches": old.num_fetches + number})

    def add_benchmark(self, result: BenchmarkResult) -> None:
        """Adds a measurement."""
        self._counted[result.benchmark_id] = None
        kept = (*self._benchmarks.get(result.kernel_id, ()), result)
        self._benchmarks[result.kernel_id] = kept[-KEPT_BENCHMARKS:]

    # ------------------------------------------------------------ queries

    def get(self, kernel_id: str) -> CompiledKernelArtifact:
        """Raises `NotFoundError` for an unknown id."""
        if kernel_id not in self._kernels:
            raise NotFoundError(f"no kernel {kernel_id}")
        return self._kernels[kernel_id]

    def by_compile_key(self, key: str) -> CompiledKernelArtifact | None:
        """The kernel that this work gave, if it was done."""
        kernel_id = self._by_compile_key.get(key)
        return None if kernel_id is None else self._kernels[kernel_id]

    def reason(self, kernel_id: str) -> str:
        """Why a kernel was rejected or retired; empty for one that was not."""
        return self._reasons.get(kernel_id, "")

    def by_signature(self, signature: SiteSignature) -> Iterable[str]:
        """The ids of a signature's kernels, oldest first."""
        return self._by_signature.get(signature.key, ())

    def briefs(self, signature: SiteSignature, pipeline: Pipeline | None) -> list[KernelBrief]:
        """Of a signature's validated kernels, by one pipeline or by any, oldest first."""
        validated = self._by_status[KernelStatus.VALIDATED]
        found = [self._briefs[id_] for id_ in self.by_signature(signature) if id_ in validated]
        if any(kind is signature.kind for kind, _ in self._records):
            records = [self._records.get((signature.kind, brief.blueprint)) for brief in found]
            found = [b if r is None else b._replace(record=r) for b, r in zip(found, records, strict=True)]
        return found if pipeline is None else [brief for brief in found if brief.pipeline is pipeline]

    def ids(self) -> Iterable[str]:
        """All, oldest first."""
        return self._kernels

    def num_with(self, status: KernelStatus) -> int:
        """How many have this status."""
        return len(self._by_status[status])

    def has_counted(self, id_: str) -> bool:
        """Whether this report or benchmark was counted."""
        return id_ in self._counted

    def statistics(self, kernel_id: str) -> KernelStatistics:
        """Raises `NotFoundError` for an unknown id."""
        return self._statistics.get(self.get(kernel_id).kernel_id, KernelStatistics())

    def outcomes(self, kernel_id: str) -> Counter[Outcome]:
        """How the adaptations with this kernel ended."""
        return Counter(self._statistics.get(kernel_id, KernelStatistics()).outcomes)

    def performance(self, kernel_id: str) -> float | None:
        """See `KernelEntry`."""
        if measured := self._benchmarks.get(kernel_id):
            return measured[-1].speed
        return 1.0 if self._kernels[kernel_id].optimization_level == 0 else None

    def entry(self, kernel_id: str) -> KernelEntry:
        """A kernel with all that is known of it; raises `NotFoundError` for an unknown id."""
        kernel = self.get(kernel_id)
        return KernelEntry(
            kernel=kernel,
            performance=self.performance(kernel_id),
            statistics=self.statistics(kernel_id),
            benchmarks=self._benchmarks.get(kernel_id, ()),
            aliases=self._briefs[kernel_id].aliases,
            reason=self.reason(kernel_id),
        )

    def search(self, query: KernelQuery, of_blueprint: Iterable[str] | None = None) -> KernelPage:
        """Answers a query.

        Args:
            query: all of it holds but `blueprint_id`, which the caller has resolved.
            of_blueprint: the ids of that blueprint's kernels; None does not restrict.
        """
        indexes: list[_Ids] = [self._by_tag.get(tag, {}) for tag in query.tags_all]
        if of_blueprint is not None:
            indexes.append(dict.fromkeys(of_blueprint))
        if query.signature is not None:
            indexes.append(self._by_signature.get(query.signature.key, {}))
        if query.tags_any:
            indexes.append({id_: None for tag in query.tags_any for id_ in self._by_tag.get(tag, ())})
        if query.status is not None:
            indexes.append(self._by_status[query.status])
        first, *rest = sorted(indexes, key=len) or [dict.fromkeys(self._kernels)]
        found = [id_ for id_ in first if all(id_ in index for index in rest)]
        if query.pipeline is not None:
            found = [id_ for id_ in found if self._kernels[id_].pipeline is query.pipeline]
        least = query.min_performance
        if least is not None:
            found = [id_ for id_ in found if (speed := self.performance(id_)) is not None and speed >= least]
        most = query.max_risk
        if most is not None:
            found = [id_ for id_ in found if (risk := self._kernels[id_].risk_score) is not None and risk <= most]
        page = self._page(found, query)
        return KernelPage(total=len(found), kernels=tuple(map(self.entry, page)))

    def _page(self, found: list[str], query: KernelQuery) -> list[str]:
        key = self._sort_key(query)
        last = query.offset + query.limit
        # sorting all for the sake of the first page would be most of a large query's time
        chosen = heapq.nsmallest(last, found, key=key) if last * 8 < len(found) else sorted(found, key=key)
        return list(islice(chosen, query.offset, last))

    def _sort_key(self, query: KernelQuery) -> Callable[[str], Any]:
        places = self._places
        sign = -1 if query.descending else 1
        if query.order is KernelOrder.CREATED:
            return lambda id_: sign * places[id_]
        value = self._values(query.order)

        def key(id_: str) -> tuple[bool, float, int]:
            known = value(id_)
            return known is None, 0.0 if known is None else sign * known, places[id_]

        return key

    def _values(self, order: KernelOrder) -> Callable[[str], float | None]:
        fields = {
            KernelOrder.PARAMETERS: "num_parameters",
            KernelOrder.FLOPS: "flops_per_sample",
            KernelOrder.MEMORY: "memory_bytes",
            KernelOrder.SIZE: "size_bytes",
        }
        if order in fields:
            return lambda id_: getattr(self._kernels[id_], fields[order])
        if order is KernelOrder.PERFORMANCE:
            return self.performance
        if order is KernelOrder.RISK:
            return lambda id_: self._kernels[id_].risk_score
        if order is KernelOrder.GAIN:
            return lambda id_: self.statistics(id_).mean_gain
        return lambda id_: self.statistics(id_).num_fetches
