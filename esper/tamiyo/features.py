"""What a graph's nodes are described by: every figure between -1 and 1, and beside each that may be missing, whether it
is there. A figure that was not measured is 0 with its flag 0: unmeasured is not healthy, and not sick either.

Three squashings are used. `share(x, k) = x / (x + k)` for counts and sizes, k being what counts as half;
`relative(a, b) = (a - b) / (|a| + |b|)` for a figure beside another of the same unit; and
`decades(x) = (8 + log10 x) / 16`, cut to [0, 1], for positive figures without a scale of their own.

Sites (`SITE_FEATURES`), one row each, in forward order:

| feature | from |
|---|---|
| is_vector, is_feature_map, is_sequence, is_causal | the signature's kind |
| channels, positions | log2 of the signature's channels, and of the product of its extent, over 20 |
| depth | its place in forward order, 0 the first, 1 the last |
| is_fresh | whether its report is of this epoch and of at least one sample |
| variance, has_variance | decades of `activation_variance` |
| dead, has_dead | `dead_neuron_ratio` |
| correlation, has_correlation | `avg_correlation` |
| gradient, gradient_share, has_gradient | decades of `gradient_norm`, and it over the largest of all sites |
| potential, potential_share, has_potential | `grow_potential` in the same way |
| health, has_health | `health_score` |
| is_embargoed | whether the whole site is under embargo |
| options | share of the kernels that are ready for it, k = 8 |
| lightest, heaviest | parameters of the smallest and largest, over what is left of the budget; 1 where none is |
| fossils, under_way | shares of its fossils (k = 2), and of the seeds that have begun and not ended (k = 1) |

Seeds (`SEED_FEATURES`), in the order of the sites, and in a site from the first fossil up:

| feature | from |
|---|---|
| is_dormant ... is_rolled_back | its stage, one of eleven |
| alpha | how far it is blended in |
| epochs_in_stage | share, k = 5 |
| is_ready, should_cull | what its gate says |
| gain, has_gain | of paired evidence: how far the candidate's loss lies below the baseline's, relative |
| certainty | likewise: share of gain / stderr, k = 2 |
| harm, has_harm | of evidence of harm: loss above the level before the graft, relative |
| train_loss, has_train_loss | its loss behind the host, relative to the host's |
| parameters, flops, has_kernel | of its kernel, where it is among the options: share beside the live path's own |
| risk, has_risk | likewise: Urabrask's score |

The run (`RUN_FEATURES`), one row:

| feature | from |
|---|---|
| progress | epochs done over epochs planned |
| params, has_params_limit, flops, has_flops_limit | budget used over its limit |
| is_governed | whether the governor reports anything but ok |
| missing, pending | shares of the systems it goes without (k = 1) and of kernels on their way (k = 8) |
| overfit, has_val_loss | validation loss relative to training loss |
| metric, has_metric | the headline metric, where it lies in [0, 1] |
| learning_rate | decades |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from esper.leyline import PAIRED, EvidenceKind, SeedStage, SiteKind, SystemStatePacket
from esper.tamiyo.table import Table, table_of

GOVERNOR_OK = "ok"

SITE_FEATURES = (
    "is_vector", "is_feature_map", "is_sequence", "is_causal", "channels", "positions", "depth", "is_fresh",
    "variance", "has_variance", "dead", "has_dead", "correlation", "has_correlation",
    "gradient", "gradient_share", "has_gradient", "potential", "potential_share", "has_potential",
    "health", "has_health", "is_embargoed", "options", "lightest", "heaviest", "fossils", "under_way",
)  # fmt: skip
SEED_FEATURES = (
    *(f"is_{stage.value.lower()}" for stage in SeedStage),
    "alpha", "epochs_in_stage", "is_ready", "should_cull", "gain", "certainty", "has_gain", "harm", "has_harm",
    "train_loss", "has_train_loss", "parameters", "flops", "risk", "has_kernel", "has_risk",
)  # fmt: skip
RUN_FEATURES = (
    "progress", "params", "has_params_limit", "flops", "has_flops_limit", "is_governed", "missing", "pending",
    "overfit", "has_val_loss", "metric", "has_metric", "learning_rate",
)  # fmt: skip

Column = np.ndarray

_LARGEST = 1e150
"""What lies beyond is cut to it: sums and differences stay finite."""


def site_features(packet: SystemStatePacket) -> np.ndarray:
    """Returns (sites, SITE_FEATURES) float32."""
    table = table_of(packet)
    signatures = table.signatures
    health = {name: _cut(table.figure(name)) for name in _FIGURES}
    has = {name: ~np.isnan(column) for name, column in health.items()}
    whole = {name: np.nan_to_num(column) for name, column in health.items()}
    num, lightest, heaviest = _options(packet, table)
    is_fresh = (table.site.numbers("epoch") == packet.epoch.epoch) & (table.site.numbers("num_samples") > 0)
    embargoed = np.zeros(len(table))
    embargoed[table.places_of(packet.embargoed)] = 1.0
    columns = {
        "is_vector": table.of_signatures([one.kind is SiteKind.VECTOR for one in signatures]),
        "is_feature_map": table.of_signatures([one.kind is SiteKind.FEATURE_MAP for one in signatures]),
        "is_sequence": table.of_signatures([one.kind is SiteKind.SEQUENCE for one in signatures]),
        "is_causal": table.of_signatures([one.causal for one in signatures]),
        "channels": np.log2(table.of_signatures([one.channels for one in signatures])) / 20,
        "positions": np.minimum(np.log2(table.of_signatures([math.prod(one.extent) for one in signatures])) / 20, 1.0),
        "depth": np.arange(len(table)) / max(1, len(table) - 1),
        "is_fresh": is_fresh,
        "variance": decades(whole["activation_variance"]),
        "has_variance": has["activation_variance"],
        "dead": whole["dead_neuron_ratio"],
        "has_dead": has["dead_neuron_ratio"],
        "correlation": whole["avg_correlation"],
        "has_correlation": has["avg_correlation"],
        "gradient": decades(whole["gradient_norm"]),
        "gradient_share": _of_largest(whole["gradient_norm"]),
        "has_gradient": has["gradient_norm"],
        "potential": decades(whole["grow_potential"]),
        "potential_share": _of_largest(whole["grow_potential"]),
        "has_potential": has["grow_potential"],
        "health": whole["health_score"],
        "has_health": has["health_score"],
        "is_embargoed": embargoed,
        "options": share(num, 8),
        "lightest": lightest,
        "heaviest": heaviest,
        "fossils": share(table.count(table.stage == SeedStage.FOSSILIZED.code).astype(np.float64), 2),
        "under_way": share(table.count(table.is_active).astype(np.float64), 1),
    }
    return _table(columns, SITE_FEATURES)


def seed_features(packet: SystemStatePacket) -> np.ndarray:
    """Returns (seeds, SEED_FEATURES) float32."""
    table = table_of(packet)
    seed, stages = table.seed, table.stage
    gain, baseline, error = (_evidence(table, name, PAIRED) for name in ("gain", "baseline", "stderr"))
    harm, level = (_evidence(table, name, {EvidenceKind.HARM}) for name in ("gain", "baseline"))
    train_loss = _cut(seed.numbers("train_loss"))
    sizes, flops, risk, has_kernel = _kernels(packet, seed.words("kernel_id"))
    columns = {
        **{f"is_{stage.value.lower()}": stages == stage.code for stage in SeedStage},
        "alpha": seed.numbers("alpha"),
        "epochs_in_stage": share(seed.numbers("epochs_in_stage").astype(np.float64), 5),
        "is_ready": seed.numbers("is_ready_for_transition"),
        "should_cull": seed.numbers("should_cull"),
        "gain": np.nan_to_num(relative(baseline, baseline - gain)),
        "certainty": np.nan_to_num(_certainty(gain, error)),
        "has_gain": ~np.isnan(gain),
        "harm": np.nan_to_num(relative(level - harm, level)),
        "has_harm": ~np.isnan(harm),
        "train_loss": np.nan_to_num(relative(train_loss, packet.epoch.train_loss)),
        "has_train_loss": ~np.isnan(train_loss),
        "parameters": share(sizes, max(1, packet.budget.params_used)),
        "flops": share(flops, max(1, packet.budget.flops_used)),
        "risk": np.nan_to_num(risk),
        "has_kernel": has_kernel,
        "has_risk": ~np.isnan(risk),
    }
    return _table(columns, SEED_FEATURES)


def run_features(packet: SystemStatePacket) -> np.ndarray:
    """Returns (1, RUN_FEATURES) float32."""
    epoch, budget = packet.epoch, packet.budget
    val_loss = np.nan if epoch.val_loss is None else epoch.val_loss
    metric = epoch.val_metric if epoch.val_metric is not None and 0.0 <= epoch.val_metric <= 1.0 else None
    columns: dict[str, Any] = {
        "progress": min(1.0, (epoch.epoch + 1) / epoch.num_epochs),
        "params": _of_limit(budget.params_used, budget.params_limit),
        "has_params_limit": budget.params_limit is not None,
        "flops": _of_limit(budget.flops_used, budget.flops_limit),
        "has_flops_limit": budget.flops_limit is not None,
        "is_governed": packet.governor != GOVERNOR_OK,
        "missing": share(len(packet.missing), 1),
        "pending": share(epoch.pending, 8),
        "overfit": np.nan_to_num(relative(val_loss, epoch.train_loss)),
        "has_val_loss": epoch.val_loss is not None,
        "metric": metric or 0.0,
        "has_metric": metric is not None,
        "learning_rate": decades(epoch.learning_rate),
    }
    return _table({name: np.atleast_1d(value) for name, value in columns.items()}, RUN_FEATURES)


def share(value: Any, half: float) -> Any:
    """A count or size, 0 or more, as a figure below 1; `half` gives 0.5."""
    return value / (value + half)


def relative(value: Any, to: Any) -> Any:
    """How far `value` lies above `to`, between -1 and 1; 0 where both are 0."""
    value, to = np.clip(value, -_LARGEST, _LARGEST), np.clip(to, -_LARGEST, _LARGEST)
    size = np.abs(value) + np.abs(to)
    return np.where(size == 0.0, 0.0, (value - to) / np.where(size == 0.0, 1.0, size))


def decades(value: Any) -> Any:
    """A positive figure by its order of magnitude, from 1e-8 to 1e8; 0 for 0 and below."""
    return np.clip((8.0 + np.log10(np.maximum(value, 1e-300))) / 16.0, 0.0, 1.0)


_FIGURES = (
    "activation_variance", "dead_neuron_ratio", "avg_correlation", "gradient_norm", "grow_potential", "health_score",
)  # fmt: skip


def _kernels(packet: SystemStatePacket, ids: list[str | None]) -> tuple[Column, Column, Column, Column]:
    """Of each seed's kernel, where it is among the options: parameters and FLOPs (0 of others), its risk, and whether
    it is one of them.
    """
    sizes, flops, has_kernel = np.zeros(len(ids)), np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
    risk = np.full(len(ids), np.nan)
    wanted = set(ids)
    kernels = {option.kernel_id: option for option in packet.options if option.kernel_id in wanted}
    for place in [place for place, kernel_id in enumerate(ids) if kernel_id in kernels] if kernels else ():
        kernel = kernels[ids[place] or ""]
        sizes[place], flops[place], has_kernel[place] = kernel.num_parameters, kernel.flops_per_sample, True
        risk[place] = np.nan if kernel.risk is None else kernel.risk
    return sizes, flops, _cut(risk), has_kernel


def _options(packet: SystemStatePacket, table: Table) -> tuple[Column, Column, Column]:
    """How many kernels are ready for each site, and the smallest and largest over the budget that is left."""
    known = [table.places_of(option.sites) for option in packet.options]
    at = np.concatenate([np.zeros(0, dtype=np.int64), *known])
    sizes = np.repeat(_array(option.num_parameters for option in packet.options), [len(here) for here in known])
    num = np.bincount(at, minlength=len(table))
    lightest, heaviest = np.full(len(table), np.inf), np.zeros(len(table))
    np.minimum.at(lightest, at, sizes)
    np.maximum.at(heaviest, at, sizes)
    limit = packet.budget.params_limit
    left = np.inf if limit is None else max(0, limit - packet.budget.params_used)

    def over(size: Column) -> Column:
        fits = (num > 0) & (size < left)
        return np.where(fits, np.where(fits, size, 0.0) / max(1, left), 1.0)

    return num.astype(np.float64), over(lightest), over(heaviest)


def _evidence(table: Table, name: str, kinds: Iterable[EvidenceKind]) -> Column:
    """A figure of each seed's evidence; NaN where there is none of these kinds."""
    found = np.full(table.seed.size, np.nan)
    if not table.evidence.size:
        return found
    codes = [place for place, kind in enumerate(EvidenceKind) if kind in kinds]
    there = np.isin(table.evidence.numbers("kind"), codes) & (table.evidence.numbers("num_pairs") > 0)
    found[table.evidence_of[there]] = table.evidence.numbers(name)[there]
    return _cut(found)


def _certainty(gain: Column, error: Column) -> Column:
    """The gain in standard errors, between -1 and 1; without an error it is as certain as can be."""
    size = np.abs(gain)
    return np.where(size == 0.0, 0.0, gain / np.where(size == 0.0, 1.0, size + 2.0 * error))


def _of_largest(values: Column) -> Column:
    largest = values.max(initial=0.0)
    return values / largest if largest > 0.0 else np.zeros_like(values)


def _of_limit(used: int, limit: int | None) -> float:
    return 0.0 if limit is None else min(1.0, used / limit) if limit else 1.0


def _cut(column: Column) -> Column:
    """Figures of which some may be missing, as NaN."""
    return np.clip(column, -_LARGEST, _LARGEST)


def _array(values: Iterable[float]) -> Column:
    return np.array(list(values), dtype=np.float64)


def _table(columns: dict[str, Any], names: tuple[str, ...]) -> np.ndarray:
    assert set(columns) == set(names)
    return np.stack([np.asarray(columns[name], dtype=np.float32) for name in names], axis=1)
