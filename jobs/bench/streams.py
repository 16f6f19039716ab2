"""Made-up telemetry of runs, with faults that are known: what the anomaly detectors are measured on.

The shapes follow recorded runs of configs/digits.yaml and digits_mlp.yaml (docs/log.md): the noise of a logarithmic
loss grows from 0.02 to 0.5 while a network learns, single steps take up to 40 times the median on a busy machine,
variances drift by a factor of 60 within twenty epochs, and a graft moves loss, step times and health. None of that is a
fault. A fault begins once the network has been the same for six epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from esper.leyline.alerts import AlertKind
from esper.leyline.bus import BusStats, GroupStats
from esper.leyline.contract import Contract
from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import EpochRecord, HealthSignal, LayerHealthReport, LifecycleEvent, StepBatch

RUN = "made-up"
LOOK_S = 5.0
BATCH = 20
SIGNATURE = SiteSignature(kind=SiteKind.VECTOR, channels=32)
_K = AlertKind


@dataclass(frozen=True)
class Fault:
    """What was done to a run.

    Attributes:
        name: of the script.
        kinds: alerts that name it rightly.
        place: the site or group they must name; the run where empty.
        begin, end: when, seconds since the run began.
    """

    name: str
    kinds: frozenset[AlertKind]
    place: str
    begin: float
    end: float


FAULTS: dict[str, frozenset[AlertKind]] = {
    "loss spike": frozenset({_K.LOSS_SPIKE, _K.LOSS_RISE}),
    "no finite loss": frozenset({_K.LOSS_SPIKE}),
    "divergence": frozenset({_K.LOSS_SPIKE, _K.LOSS_RISE}),
    "plateau jump": frozenset({_K.LOSS_SPIKE, _K.LOSS_RISE}),
    "slow steps": frozenset({_K.SLOW_STEPS}),
    "dying layer": frozenset({_K.DEAD_CHANNELS, _K.ODD_HEALTH}),
    "correlation collapse": frozenset({_K.CORRELATED_CHANNELS, _K.ODD_HEALTH}),
    "odd layer": frozenset({_K.ODD_HEALTH}),
    "cache misses": frozenset({_K.CACHE_MISSES}),
    "bus lag": frozenset({_K.BUS_LAG}),
    "stalled consumer": frozenset({_K.BUS_LAG}),
}
"""Every scripted fault, with the alerts that name it."""
SITE_FAULTS = frozenset({"dying layer", "correlation collapse", "odd layer"})
GROUP_FAULTS = frozenset({"bus lag", "stalled consumer"})


@dataclass
class Plan:
    """The arrays of one run before they become messages. Steps [S], epochs [E], sites [E, sites], looks [L]."""

    loss: np.ndarray
    milliseconds: np.ndarray
    steps_per_epoch: int
    pause_s: float
    health: dict[str, np.ndarray]
    lookups: np.ndarray
    hit_share: np.ndarray
    lag: dict[str, np.ndarray]
    delivered: dict[str, np.ndarray]
    moves: dict[int, list[tuple[SeedStage, SeedStage]]] = field(default_factory=dict)
    marks: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)

    @property
    def step_at(self) -> np.ndarray:
        """When each step ends, in seconds."""
        pauses = np.repeat(np.arange(self.num_epochs) * self.pause_s, self.steps_per_epoch)
        return np.cumsum(self.milliseconds) / 1e3 + pauses

    @property
    def num_epochs(self) -> int:
        return len(self.lookups)


@dataclass(frozen=True)
class Episode:
    """One run as it is told: (seconds, message body or figures of the bus), in order."""

    signals: Sequence[tuple[float, Contract]]
    fault: Fault | None
    hours: float


def episode(seed: int, *, hours: float, fault: str | None = None) -> Episode:
    """Makes one run up.

    Args:
        seed: of all that is drawn.
        hours: about how long it lasts.
        fault: one of `FAULTS`; None is a clean run.
    """
    rng = np.random.default_rng([seed, list(FAULTS).index(fault) + 1 if fault else 0])
    plan = _clean(rng, hours, rests=fault is not None)
    done = None if fault is None else _SCRIPTS[fault](plan, rng)
    seconds = float(plan.step_at[-1])
    return Episode(tuple(_told(plan)), done, seconds / 3600)


# ---------------------------------------------------------------- a clean run


def _clean(rng: np.random.Generator, hours: float, *, rests: bool) -> Plan:
    median_ms = math.exp(rng.uniform(math.log(60), math.log(240)))
    total = int(hours * 3.6e6 / (1.25 * median_ms))
    num_epochs = int(rng.integers(30, 61))
    per_epoch = max(total // num_epochs, 24)
    num_epochs = max(total // per_epoch, 30)
    total = num_epochs * per_epoch
    sites = [f"stages.{i}" for i in range(int(rng.integers(2, 9)))]
    plan = Plan(
        loss=_loss(rng, total, per_epoch),
        milliseconds=_milliseconds(rng, total, per_epoch, median_ms),
        steps_per_epoch=per_epoch,
        pause_s=rng.uniform(0.5, 0.25 * per_epoch * median_ms / 1e3 + 0.6),
        health=_health(rng, num_epochs, sites),
        lookups=rng.poisson(rng.uniform(1.0, 5.0), num_epochs),
        hit_share=np.full(num_epochs, rng.uniform(0.5, 0.9)),
        lag={},
        delivered={},
    )
    _grow(plan, rng, until=plan.num_epochs // 3 if rests else plan.num_epochs - 4)
    looks = int(plan.step_at[-1] / LOOK_S)
    for group in ["nissa-1", "tezzeret", "people"][: int(rng.integers(2, 4))]:
        plan.lag[group], plan.delivered[group] = _lag(rng, looks, joins_late=group == "people")
    return plan


def _loss(rng: np.random.Generator, total: int, per_epoch: int) -> np.ndarray:
    """Falls along an S or an exponential, or with a schedule's last decay; its noise grows while it does."""
    done = np.arange(total) / total
    start, end = rng.uniform(0.7, 4.0), math.exp(rng.uniform(math.log(0.03), math.log(1.0)))
    if rng.random() < 0.5:
        course = np.exp(-done / rng.uniform(0.05, 0.4))
    else:  # flat, then falling, then flat
        course = 1 / (1 + np.exp((done - rng.uniform(0.1, 0.4)) / rng.uniform(0.03, 0.12)))
    level = np.log(end) + (np.log(start) - np.log(end)) * course
    schedule = rng.choice(["constant", "cosine", "wsd", "onecycle"])
    if schedule == "wsd":
        level = level - rng.uniform(0.05, 0.4) * np.clip((done - 0.8) / 0.2, 0, 1)
    if schedule == "onecycle":  # a high rate in the middle keeps the loss up
        level = level + rng.uniform(0.0, 0.12) * np.exp(-(((done - 0.3) / 0.15) ** 2))
    noise = rng.uniform(0.02, 0.06) + rng.uniform(0.0, 0.45) * (1 - course)
    draws = np.where(rng.random(total) < 0.03, 1.6, 1.0) * rng.standard_normal(total)
    slow = np.convolve(rng.standard_normal(total + 199), np.ones(200) / 200**0.5, "valid")
    starts = np.arange(total) % per_epoch == 0
    return np.exp(level + noise * draws + 0.02 * slow + 0.1 * starts * rng.random(total))


def _milliseconds(rng: np.random.Generator, total: int, per_epoch: int, median: float) -> np.ndarray:
    """Log-normal, with a heavy tail, slow first steps, telemetry on some steps, and busy moments of up to 1.5 s."""
    times = median * np.exp(rng.uniform(0.04, 0.3) * rng.standard_normal(total))
    tail = rng.random(total) < rng.uniform(0.002, 0.03)
    times = np.where(tail, times * rng.uniform(1.5, 6.0, total), times)
    times[:: int(rng.integers(8, 33))] *= rng.uniform(1.05, 1.4)
    times[::per_epoch] *= rng.uniform(1.0, 3.0)
    for at in np.flatnonzero(rng.random(total) < 2.0 / 36_000 * median):
        times[at : at + max(int(rng.uniform(100, 1500) / median), 1)] *= rng.uniform(1.3, 3.0)
    return times


def _health(rng: np.random.Generator, num_epochs: int, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """[E, 5] a site: variance, share of dead channels, correlation, gradient norm, growth potential."""
    found = {}
    for site in sites:
        time = np.arange(num_epochs)
        settled = 1 - np.exp(-time / rng.uniform(3, 10))
        walk = np.cumsum(0.03 * rng.standard_normal((num_epochs, 2)), axis=0)
        variance = np.exp(rng.uniform(-3, 1) + rng.uniform(-0.5, 4.0) * settled + walk[:, 0])
        dead = (
            np.round(np.clip(rng.uniform(0, 0.15) * settled + 0.01 * rng.standard_normal(num_epochs), 0, 1) * 32) / 32
        )
        correlation = np.clip(
            rng.uniform(0.1, 0.3) + rng.uniform(0, 0.25) * settled + 0.02 * rng.standard_normal(num_epochs), 0, 1
        )
        gradient = np.exp(rng.uniform(-6, -3) - rng.uniform(0, 1.8) * settled + walk[:, 1])
        gradient = gradient * np.exp(rng.uniform(0.05, 0.25) * rng.standard_normal(num_epochs))
        potential = np.exp(rng.uniform(-3, 0) + 0.4 * rng.standard_normal(num_epochs))
        found[site] = np.stack([variance, dead, correlation, gradient, potential], axis=1)
    return found


def _lag(rng: np.random.Generator, looks: int, *, joins_late: bool) -> tuple[np.ndarray, np.ndarray]:
    rate = rng.uniform(5, 200)
    lag = rng.poisson(rng.uniform(0, 30), looks).astype(float)
    bursts = rng.random(looks) < 0.02
    lag += bursts * rng.uniform(100, 1500, looks)
    if joins_late:
        begin = rng.uniform(2_000, 50_000)
        lag = np.maximum(lag, begin * np.exp(-np.arange(looks) / 4.0) - 50)
    return lag, np.cumsum(rng.poisson(rate * LOOK_S, looks) + 1)


def _grow(plan: Plan, rng: np.random.Generator, *, until: int) -> None:
    """Some adaptations before an epoch: a shadow costs time, a graft shakes the loss; a better level, or none."""
    epoch = int(rng.integers(4, 9))
    per = plan.steps_per_epoch
    while epoch + 6 < until and rng.random() < 0.9:
        shadow, stay = int(rng.integers(2, 5)), int(rng.integers(3, 8))
        graft = epoch + shadow
        plan.moves.setdefault(epoch, []).append((SeedStage.GERMINATED, SeedStage.TRAINING))
        plan.milliseconds[(epoch + 1) * per : (graft + 1) * per] *= rng.uniform(1.4, 2.3)
        if rng.random() < 0.3:
            plan.moves.setdefault(graft, []).append((SeedStage.TRAINING, SeedStage.CULLED))
        else:
            first = (graft + 1) * per
            plan.moves.setdefault(graft, []).append((SeedStage.TRAINING, SeedStage.GRAFTING))
            plan.moves.setdefault(graft + 2, []).append((SeedStage.GRAFTING, SeedStage.STABILIZING))
            plan.marks.add(first)
            plan.milliseconds[first:] *= rng.uniform(1.02, 1.35)
            after = np.arange(len(plan.loss) - first)
            jolt = rng.uniform(0.0, 0.5) * np.exp(-after / rng.uniform(5, 12))
            gain = rng.uniform(0.0, 0.3) * (1 - np.exp(-after / (3.0 * per)))
            plan.loss[first:] *= np.exp(jolt - gain)
            for figures in plan.health.values():
                figures[graft + 1 :, 0] *= math.exp(rng.uniform(-0.3, 1.0))
                figures[graft + 1 :, 2] = np.clip(figures[graft + 1 :, 2] + rng.uniform(-0.1, 0.15), 0, 0.8)
        epoch = graft + stay


# ---------------------------------------------------------------- faults


def _when(plan: Plan, rng: np.random.Generator, *, epochs: int = 3) -> int:
    """A step with `epochs` after it, once the network has been the same for a while."""
    epoch = int(rng.integers(plan.num_epochs // 3 + 6, plan.num_epochs - epochs))
    return epoch * plan.steps_per_epoch + int(rng.integers(plan.steps_per_epoch))


def _fault(plan: Plan, name: str, first: int, last: int, place: str = "") -> Fault:
    at = plan.step_at
    return Fault(name, FAULTS[name], place, float(at[first]), float(at[min(last, len(at) - 1)]))


def _spike(plan: Plan, rng: np.random.Generator) -> Fault:
    first, length = _when(plan, rng), int(rng.integers(6, 31))
    plan.loss[first : first + length] *= rng.uniform(8.0, 30.0)
    return _fault(plan, "loss spike", first, first + length)


def _not_finite(plan: Plan, rng: np.random.Generator) -> Fault:
    first = _when(plan, rng)
    plan.missing.update(range(first, first + int(rng.integers(1, 4))))
    return _fault(plan, "no finite loss", first, first + 4)


def _divergence(plan: Plan, rng: np.random.Generator) -> Fault:
    first, doubling = _when(plan, rng), rng.uniform(40, 400)
    length = min(int(8 * doubling), len(plan.loss) - first)
    plan.loss[first : first + length] *= 2.0 ** (np.arange(length) / doubling)
    return _fault(plan, "divergence", first, first + length)


def _plateau(plan: Plan, rng: np.random.Generator) -> Fault:
    first, length = _when(plan, rng), int(rng.integers(150, 800))
    plan.loss[first : first + length] *= rng.uniform(1.6, 4.0)
    return _fault(plan, "plateau jump", first, first + length)


def _slow(plan: Plan, rng: np.random.Generator) -> Fault:
    epochs = 4
    first = _when(plan, rng, epochs=epochs)
    length = min(max(int(rng.uniform(100, 500)), 1), epochs * plan.steps_per_epoch)
    plan.milliseconds[first : first + length] *= rng.uniform(2.0, 4.0)
    return _fault(plan, "slow steps", first, first + length)


def _site(plan: Plan, rng: np.random.Generator, name: str, change: Callable[[np.ndarray, np.ndarray], None]) -> Fault:
    epochs, per = 7, plan.steps_per_epoch
    first = _when(plan, rng, epochs=epochs) // per
    site = str(rng.choice(list(plan.health)))
    figures = plan.health[site][first : first + epochs]
    change(figures, np.minimum((np.arange(len(figures)) + 1) / rng.integers(1, 4), 1.0))
    return _fault(plan, name, first * per, (first + epochs) * per, site)


def _dying(plan: Plan, rng: np.random.Generator) -> Fault:
    worst = rng.uniform(0.55, 1.0)

    def change(figures: np.ndarray, along: np.ndarray) -> None:
        figures[:, 1] = np.maximum(figures[:, 1], worst * along)
        figures[:, 0] *= 1 - 0.95 * worst * along
        figures[:, 3] *= 1 - 0.9 * worst * along

    return _site(plan, rng, "dying layer", change)


def _collapse(plan: Plan, rng: np.random.Generator) -> Fault:
    worst = rng.uniform(0.9, 0.995)

    def change(figures: np.ndarray, along: np.ndarray) -> None:
        figures[:, 2] += (worst - figures[:, 2]) * along

    return _site(plan, rng, "correlation collapse", change)


def _odd(plan: Plan, rng: np.random.Generator) -> Fault:
    factor = rng.uniform(8, 60) ** rng.choice([-1, 1])

    def change(figures: np.ndarray, along: np.ndarray) -> None:
        figures[:, 0] *= factor**along
        figures[:, 3] /= factor ** (0.8 * along)

    return _site(plan, rng, "odd layer", change)


def _misses(plan: Plan, rng: np.random.Generator) -> Fault:
    per = plan.steps_per_epoch
    first = _when(plan, rng, epochs=8) // per
    plan.lookups[first:] = np.maximum(plan.lookups[first:], rng.integers(3, 9))
    plan.hit_share[first:] = rng.uniform(0.0, 0.1)
    return _fault(plan, "cache misses", first * per, len(plan.loss))


def _behind(plan: Plan, rng: np.random.Generator) -> Fault:
    group, first, length = _group(plan, rng)
    plan.lag[group][first : first + length] += np.arange(1, length + 1) * rng.uniform(60, 3_000)
    return Fault("bus lag", FAULTS["bus lag"], group, first * LOOK_S, (first + length) * LOOK_S)


def _stalled(plan: Plan, rng: np.random.Generator) -> Fault:
    group, first, length = _group(plan, rng)
    plan.lag[group][first : first + length] = np.cumsum(rng.poisson(rng.uniform(50, 500), length)) + 10
    plan.delivered[group][first : first + length] = plan.delivered[group][first]
    return Fault("stalled consumer", FAULTS["stalled consumer"], group, first * LOOK_S, (first + length) * LOOK_S)


def _group(plan: Plan, rng: np.random.Generator) -> tuple[str, int, int]:
    group = str(rng.choice(list(plan.lag)))
    looks = len(plan.lag[group])
    return group, int(rng.integers(looks // 3, looks - 26)), int(rng.integers(15, 25))


_SCRIPTS: dict[str, Callable[[Plan, np.random.Generator], Fault]] = dict(
    zip(
        FAULTS,
        (_spike, _not_finite, _divergence, _plateau, _slow, _dying, _collapse, _odd, _misses, _behind, _stalled),
        strict=True,
    )
)


# ---------------------------------------------------------------- as messages


def _told(plan: Plan) -> Iterator[tuple[float, Contract]]:
    per, at = plan.steps_per_epoch, plan.step_at
    hits, misses, look = 0, 0, 0
    rng = np.random.default_rng(0)
    for epoch in range(plan.num_epochs):
        first, last = epoch * per, (epoch + 1) * per
        for body in _batches(plan, first, last):
            yield float(at[min(body.first_step + len(body.losses), last) - 1]), body
        ended = float(at[last - 1]) + plan.pause_s
        yield from ((ended, body) for body in _reports(plan, epoch, last))
        found = int(rng.binomial(plan.lookups[epoch], plan.hit_share[epoch]))
        hits, misses = hits + found, misses + int(plan.lookups[epoch]) - found
        yield ended, EpochRecord(
            run_id=RUN, epoch=epoch, num_epochs=plan.num_epochs + 1, step=last,
            train_loss=float(plan.loss[first:last].mean()), cache_hits=hits, cache_misses=misses,
        )  # fmt: skip
        for old, new in plan.moves.get(epoch, ()):
            yield ended, LifecycleEvent(
                run_id=RUN, step=last, epoch=epoch, site="stages.0", seed="s", from_stage=old, to_stage=new,
                reason="the script", timestamp=ended,
            )  # fmt: skip
        while (look + 1) * LOOK_S <= ended and look < min(map(len, plan.lag.values())):
            yield (look + 1) * LOOK_S, _look(plan, look)
            look += 1


def _batches(plan: Plan, first: int, last: int) -> Iterator[StepBatch]:
    begin = first
    marks = tuple(mark for mark in plan.marks if first <= mark < last)
    while begin < last:
        end = next((s for s in range(begin, min(begin + BATCH, last)) if s in plan.missing), min(begin + BATCH, last))
        if end > begin:
            yield StepBatch(
                run_id=RUN, first_step=begin, losses=tuple(plan.loss[begin:end].tolist()),
                milliseconds=tuple(plan.milliseconds[begin:end].tolist()), steps_per_epoch=plan.steps_per_epoch,
                marks=marks,
            )  # fmt: skip
            marks = ()
        begin = end + 1 if end in plan.missing else end


def _reports(plan: Plan, epoch: int, step: int) -> Iterator[LayerHealthReport]:
    for site, figures in plan.health.items():
        variance, dead, correlation, gradient, potential = figures[epoch].tolist()
        signal = HealthSignal(
            layer_id=site, seed_id="s", epoch=epoch, activation_variance=variance, dead_neuron_ratio=dead,
            avg_correlation=correlation, gradient_norm=gradient, grow_potential=potential,
        )  # fmt: skip
        yield LayerHealthReport(run_id=RUN, layer_id=site, signature=SIGNATURE, epoch=epoch, step=step, seeds=(signal,))


def _look(plan: Plan, look: int) -> BusStats:
    groups = tuple(
        GroupStats(group=name, topics=("t",), pending=max(int(lag[look]), 0), delivered=int(plan.delivered[name][look]))
        for name, lag in plan.lag.items()
    )
    return BusStats(num_shards=1, groups=groups)
