"""What a learned policy sees of a run at one decision: numbers, names and masks, and nothing else.

Made of what `graph` and `features` say of the packet, what Tamiyo remembers (`MEMORY_FEATURES`, and the windows of
`windows`), the kernels that may be used (`KERNEL_FEATURES`), and masks. A mask is true exactly where the gates that
every policy has (`candidates`, `safety`, `tending`) would let the order pass; to wait is always allowed. Experience is
stored in this form, so what changes its meaning changes `OBSERVATION_VERSION`.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from esper.config import TamiyoConfig
from esper.leyline import (
    NEXT,
    Action,
    BlendStrategy,
    KernelOption,
    SeedStage,
    SystemStatePacket,
    TamperedError,
)
from esper.tamiyo.actions import STRATEGIES, ActionChoice, Operation
from esper.tamiyo.candidates import find_candidates, reason_to_wait
from esper.tamiyo.features import RUN_FEATURES as PACKET_FEATURES
from esper.tamiyo.features import SEED_FEATURES, run_features, seed_features, share, site_features
from esper.tamiyo.features import SITE_FEATURES as HEALTH_FEATURES
from esper.tamiyo.graph import wiring_of
from esper.tamiyo.heuristic import worth
from esper.tamiyo.memory import TamiyoState, observe, read_state
from esper.tamiyo.orders import Order
from esper.tamiyo.plateau import fit
from esper.tamiyo.safety import Room, judge, last_growth_epoch
from esper.tamiyo.table import Table, layers_of, table_of, tabled
from esper.tamiyo.tending import Care, removal, tend
from esper.tamiyo.windows import TREND_FEATURES, trend_features

OBSERVATION_VERSION = 1
"""Grows when a network trained on the old form would misread the new one."""

MEMORY_FEATURES = (
    "improvement", "noise", "of_progress", "has_trend", "adaptations_left", "time_left", "may_grow", "failed",
)  # fmt: skip
"""Of the run, from Tamiyo's memory: the fall of the validation loss over the plateau window, its noise, and what it is
of all progress (share, half at 5%; negative where it rose), whether these are known; adaptations left (share, half at
2); share of the epochs in which growth may still begin; whether it may begin now; adaptations that failed (share, half
at 4)."""

SITE_FEATURES = (*HEALTH_FEATURES, *TREND_FEATURES)
RUN_FEATURES = (*PACKET_FEATURES, *MEMORY_FEATURES)

TAGS = ("conv", "mlp", "attention", "norm", "gate", "stack", "replace")
KERNEL_FEATURES = (
    "parameters", "flops", "parameters_left", "flops_left", "mixing", "zero_at_birth", "risk", "has_risk",
    "record", "record_error", "record_num", *(f"is_{tag}" for tag in TAGS),
)  # fmt: skip
"""Of each kernel that may be used: its cost beside the live path's (share) and over what is left of the budget (0
without a limit); `mixing` is log2(1 + n / C^2) / 8, n its parameters and C the site's channels; what its design came to
(its mean gain and that one's error, ten times, cut to [-1, 1], and how often it was tried, half at 4); its tags."""

_DIGEST = hashlib.sha256().digest_size

TENDED = (Operation.ADVANCE, Operation.CULL, Operation.FOSSILIZE)
"""What `Observation.can` has a column for."""


@dataclass(frozen=True)
class Observation:
    """One observation. S sites, N seeds, K kernels, O pairs of site and kernel.

    Attributes:
        site, seed, run, kernel: (S, SITE_FEATURES), (N, SEED_FEATURES), (RUN_FEATURES,), (K, KERNEL_FEATURES) float32.
        forward, stacked: edges from site to site and from seed to seed, (2, edges) int64.
        seed_site: (N,) int64, the site of each seed.
        option_site, option_kernel: (O,) int64, sorted by site: what may be germinated where.
        strategies: (K, STRATEGIES) bool, how each kernel may enter the live path.
        can: (N, TENDED) bool.
        by_rule_mask: (N,) bool, seeds that go whatever a policy says.
        resting: (S,) int64, the seed that a germination there is for; -1 where nothing may be germinated.
        site_names, seed_names, kernel_names: site; (site, seed id); (kernel id, blueprint).
    """

    site: np.ndarray
    seed: np.ndarray
    run: np.ndarray
    kernel: np.ndarray
    forward: np.ndarray
    stacked: np.ndarray
    seed_site: np.ndarray
    option_site: np.ndarray
    option_kernel: np.ndarray
    strategies: np.ndarray
    can: np.ndarray
    by_rule_mask: np.ndarray
    resting: np.ndarray
    site_names: tuple[str, ...]
    seed_names: Sequence[tuple[str, str]]
    kernel_names: tuple[tuple[str, str], ...]

    @cached_property
    def operations(self) -> np.ndarray:
        """(Operation,) bool: what may be done at all."""
        allowed = np.zeros(len(Operation), dtype=bool)
        allowed[Operation.WAIT] = True
        allowed[Operation.GERMINATE] = len(self.option_site) > 0
        allowed[list(TENDED)] = self.can.any(axis=0)
        return allowed

    @cached_property
    def by_rule(self) -> frozenset[tuple[str, str]]:
        """(site, seed id) of the seeds that go whatever a policy says."""
        return frozenset(self.seed_names[place] for place in np.flatnonzero(self.by_rule_mask).tolist())

    def allows(self, choice: ActionChoice) -> bool:
        """Whether the masks hold this choice."""
        if choice.operation is Operation.WAIT:
            return True
        if choice.operation is not Operation.GERMINATE:
            column = TENDED.index(choice.operation)
            return 0 <= choice.seed < len(self.can) and bool(self.can[choice.seed, column])
        if not (0 <= choice.option < len(self.option_site) and 0 <= choice.strategy < len(STRATEGIES)):
            return False
        kernel = self.option_kernel[choice.option]
        return bool(self.option_site[choice.option] == choice.site and self.strategies[kernel, choice.strategy])

    def to_bytes(self) -> bytes:
        """Returns the observation: a compressed npz archive without pickles, behind its own SHA-256."""
        into = io.BytesIO()
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_names")}
        np.savez_compressed(
            into,
            version=np.array(OBSERVATION_VERSION),
            **numbers,
            site_names=_names(self.site_names),
            seed_names=_names(self.seed_names),
            kernel_names=_names(self.kernel_names),
        )
        archive = into.getvalue()
        return hashlib.sha256(archive).digest() + archive

    @classmethod
    def from_bytes(cls, data: bytes) -> Observation:
        """Reads what `to_bytes` wrote.

        Raises:
            TamperedError: if the bytes are torn or changed, or hold what no observation can.
            ValueError: if they are of another version.
        """
        digest, packed = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(packed).digest() != digest:
            raise TamperedError("the bytes of an observation are torn: their hash does not match")
        try:
            with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
                found: dict[str, Any] = {name: archive[name] for name in archive.files}
            version = int(found.pop("version"))
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, AttributeError) as error:
            raise TamperedError(f"the bytes hold no observation: {error}") from error
        if version != OBSERVATION_VERSION:
            raise ValueError(f"an observation of version {version}; this is version {OBSERVATION_VERSION}")
        try:
            found["site_names"] = tuple(found["site_names"].tolist())
            for name in ("seed_names", "kernel_names"):
                found[name] = tuple((first, second) for first, second in found[name].reshape(-1, 2).tolist())
            read = cls(**found)
            _check(read)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TamperedError(f"the bytes hold no observation: {error}") from error
        return read


def observation_of(state: Mapping[str, Any], packet: SystemStatePacket, config: TamiyoConfig) -> Observation:
    """Returns what a learned policy would see where `step` is given these; see there."""
    return observe_graph(observe(read_state(state), packet, config), packet, config)


def observe_graph(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, care: Care | None = None
) -> Observation:
    """Returns the observation of one decision.

    Args:
        state: after it has seen `packet`.
        packet: the current one.
        config: limits, and what the policy may choose from.
        care: what `tend` says, where that is known already.

    Raises:
        ValueError: if two sites or two seeds of a site have the same name.
    """
    packet = tabled(packet)
    care = tend(state, packet, config) if care is None else care
    sites, seeds, pairs = wiring_of(packet)
    may_grow = reason_to_wait(state, packet, config) is None
    kernels = _Kernels(packet, config)
    resting = np.full(len(sites), -1, dtype=np.int64)
    # which strategies a kernel suits is asked apart
    found = find_candidates(state, packet, config.model_copy(update={"strategy": "ramp"})) if may_grow else None
    if found is not None:
        table = table_of(packet)
        is_free = np.ones(len(table), dtype=bool)
        is_free[table.places_of(tuple(attempt.site for attempt in state.under_way))] = False
        free = np.flatnonzero(is_free[found.places])
        kernels.add(found.places[free], [found.options[number] for number in free.tolist()], table, found.room)
        resting[found.places[free]] = found.first[free]
    return Observation(
        site=np.concatenate([site_features(packet), trend_features(state.windows, packet)], axis=1),
        seed=seed_features(packet),
        run=np.concatenate([run_features(packet)[0], _memory_features(state, packet, config, may_grow=may_grow)]),
        kernel=kernels.features(),
        forward=pairs["site", "layer_forward", "site"],
        stacked=pairs["seed", "sequential", "seed"],
        seed_site=pairs["site", "contains", "seed"][0],
        option_site=kernels.option_site,
        option_kernel=kernels.option_kernel,
        strategies=kernels.strategies(),
        can=_tended(state, packet, config, care),
        by_rule_mask=_by_rule(packet, care),
        resting=resting,
        site_names=sites,
        seed_names=seeds,
        kernel_names=kernels.names(),
    )


class _Kernels:
    """The kernels that may be used, each once for a number of channels, and where."""

    def __init__(self, packet: SystemStatePacket, config: TamiyoConfig) -> None:
        self._packet = packet
        self._top_k = config.gnn.top_k
        self._allowed = [strategy.value in {*config.gnn.strategies, config.strategy} for strategy in STRATEGIES]
        self._rows: dict[tuple[str, int], int] = {}
        self._kept: list[KernelOption] = []
        self._figures: list[list[float]] = []
        self.option_site = self.option_kernel = np.zeros(0, dtype=np.int64)

    def add(self, sites: np.ndarray, options: Sequence[tuple[KernelOption, ...]], table: Table, room: Room) -> None:
        """Adds the best of its options for each site; the sites in their order."""
        channels = np.array([one.channels for one in table.signatures])[table.signature_of[sites]].tolist()
        # sites that have the same options have them in one tuple: thousands of sites are ranked once
        best: dict[tuple[int, int], np.ndarray] = {}
        rows: list[np.ndarray] = []
        for here, width in zip(options, channels, strict=True):
            key = (id(here), width)
            if key not in best:
                best[key] = self._best(here, width, room)
            rows.append(best[key])
        self.option_site = np.repeat(sites, [len(kernels) for kernels in rows])
        self.option_kernel = np.concatenate([self.option_kernel, *rows])

    def _best(self, options: tuple[KernelOption, ...], channels: int, room: Room) -> np.ndarray:
        ranked = sorted(options, key=lambda option: worth(option, channels, room), reverse=True)
        suited = [option for option in ranked if any(self._suits(option))]
        return np.array([self._row(option, channels, room) for option in suited[: self._top_k]], dtype=np.int64)

    def _suits(self, option: KernelOption) -> list[bool]:
        return [
            allowed and (option.zero_at_birth or strategy is not BlendStrategy.DIRECT)
            for strategy, allowed in zip(STRATEGIES, self._allowed, strict=True)
        ]

    def _row(self, option: KernelOption, channels: int, room: Room) -> int:
        key = (option.kernel_id, channels)
        if key not in self._rows:
            self._rows[key] = len(self._kept)
            self._kept.append(option)
            self._figures.append(_kernel_figures(option, channels, room, self._packet))
        return self._rows[key]

    def features(self) -> np.ndarray:
        """(K, KERNEL_FEATURES) float32."""
        return np.array(self._figures, dtype=np.float32).reshape(-1, len(KERNEL_FEATURES))

    def strategies(self) -> np.ndarray:
        """(K, STRATEGIES) bool."""
        return np.array([self._suits(option) for option in self._kept], dtype=bool).reshape(-1, len(STRATEGIES))

    def names(self) -> tuple[tuple[str, str], ...]:
        """Kernel id and blueprint."""
        return tuple((option.kernel_id, option.blueprint) for option in self._kept)


def _kernel_figures(option: KernelOption, channels: int, room: Room, packet: SystemStatePacket) -> list[float]:
    size, flops, record = option.num_parameters, option.flops_per_sample, option.record
    num = record.num if record else 0
    error = math.sqrt(record.squares / (num - 1) / num) if record and num > 1 else 0.0
    return [
        share(size, max(1, packet.budget.params_used)),
        share(flops, max(1, packet.budget.flops_used)),
        min(1.0, size / max(1, room.params)) if room.params is not None else 0.0,
        min(1.0, flops / max(1, room.flops)) if room.flops is not None else 0.0,
        min(1.0, math.log2(1.0 + size / channels**2) / 8),
        float(option.zero_at_birth),
        option.risk or 0.0,
        float(option.risk is not None),
        min(1.0, max(-1.0, 10.0 * record.mean)) if record else 0.0,
        min(1.0, 10.0 * error),
        share(num, 4),
        *(float(tag in option.tags) for tag in TAGS),
    ]


def _memory_features(
    state: TamiyoState, packet: SystemStatePacket, config: TamiyoConfig, *, may_grow: bool
) -> np.ndarray:
    epoch = packet.epoch.epoch
    losses = [entry for entry in state.val_losses if entry[0] >= epoch - config.plateau_window]
    trend = fit(losses, highest=state.highest_val_loss) if len(losses) > 1 else None
    moved = (trend.improvement, trend.noise, trend.of_progress) if trend else (0.0, 0.0, 0.0)
    last = last_growth_epoch(packet.epoch.num_epochs, config.last_epoch_fraction)
    figures = (
        *(math.copysign(share(abs(figure), 0.05), figure) for figure in moved),
        trend is not None,
        share(max(0, config.max_adaptations - state.num_adaptations), 2),
        max(0, last - epoch) / packet.epoch.num_epochs,
        may_grow,
        share(len(state.failed), 4),
    )
    return np.array(figures, dtype=np.float32)


def _tended(
    state: TamiyoState,
    packet: SystemStatePacket,
    config: TamiyoConfig,
    care: Care,
) -> np.ndarray:
    """(N, TENDED) bool: what may be done with each seed."""
    advances = [order for order, *_ in care.advances]
    gone = {(order.site, order.seed_id) for order in care.removals}
    gone |= {(attempt.site, attempt.seed_id) for attempt in state.under_way if attempt.retiring}
    epoch = packet.epoch.epoch
    culls: list[Order] = []
    last: set[tuple[str, str]] = set()
    places = _active_places(packet)
    for layer, seed in layers_of(packet).active():
        if min(layer.epoch, seed.epoch) == epoch:
            key = (layer.layer_id, seed.seed_id)
            culls += [] if key in gone else [removal(seed, "/".join(key))]
            last |= {key} if NEXT[seed.stage] is SeedStage.FOSSILIZED else set()
    can = np.zeros((table_of(packet).seed.size, len(TENDED)), dtype=bool)
    for order in (*judge(state, packet, config, advances).accepted, *judge(state, packet, config, culls).accepted):
        key = (order.site, order.seed_id)
        operation = Operation.CULL
        if order.action is Action.ADVANCE:
            operation = Operation.FOSSILIZE if key in last else Operation.ADVANCE
        can[places[key], TENDED.index(operation)] = True
    return can


def _by_rule(packet: SystemStatePacket, care: Care) -> np.ndarray:
    """(N,) bool: the seeds that are removed by rule."""
    places, mask = _active_places(packet), np.zeros(table_of(packet).seed.size, dtype=bool)
    mask[[places[order.site, order.seed_id] for order in care.removals]] = True
    return mask


def _active_places(packet: SystemStatePacket) -> dict[tuple[str, str], int]:
    """Where each seed under way stands among all, by site and id."""
    table = table_of(packet)
    ids = table.seed.words("seed_id")
    return {
        (table.sites[table.seed_site[place]], ids[place]): place for place in np.flatnonzero(table.is_active).tolist()
    }


def _names(names: Sequence[Any]) -> np.ndarray:
    return np.array(list(names), dtype=np.str_) if names else np.zeros((0,), dtype="<U1")


_TYPES = {
    "site": np.float32, "seed": np.float32, "run": np.float32, "kernel": np.float32, "forward": np.int64,
    "stacked": np.int64, "seed_site": np.int64, "option_site": np.int64, "option_kernel": np.int64,
    "strategies": np.bool_, "can": np.bool_, "by_rule_mask": np.bool_, "resting": np.int64,
}  # fmt: skip


def _check(read: Observation) -> None:
    """Raises ValueError for what no observation can hold."""
    num_sites, num_seeds, num_kernels = len(read.site_names), len(read.seed_names), len(read.kernel_names)
    num_options = len(read.option_site)
    shapes = {
        "site": (num_sites, len(SITE_FEATURES)),
        "seed": (num_seeds, len(SEED_FEATURES)),
        "run": (len(RUN_FEATURES),),
        "kernel": (num_kernels, len(KERNEL_FEATURES)),
        "forward": (2, read.forward.shape[-1]),
        "stacked": (2, read.stacked.shape[-1]),
        "seed_site": (num_seeds,),
        "option_site": (num_options,),
        "option_kernel": (num_options,),
        "strategies": (num_kernels, len(STRATEGIES)),
        "can": (num_seeds, len(TENDED)),
        "by_rule_mask": (num_seeds,),
        "resting": (num_sites,),
    }
    for name, shape in shapes.items():
        array = getattr(read, name)
        if array.shape != shape or array.dtype != _TYPES[name]:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {_TYPES[name].__name__} {shape}")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ValueError(f"{name} holds a value that is not finite")
    below = {
        "forward": num_sites, "stacked": num_seeds, "seed_site": num_sites, "option_site": num_sites,
        "option_kernel": num_kernels, "resting": num_seeds,
    }  # fmt: skip
    for name, end in below.items():
        array = getattr(read, name)
        least = -1 if name == "resting" else 0
        if array.size and not (least <= array.min() and array.max() < end):
            raise ValueError(f"{name} names what is not there")
    if (np.diff(read.option_site) < 0).any():
        raise ValueError("options are not sorted by site")
