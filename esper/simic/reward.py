"""What a run's growth was worth, decision by decision: paired evidence, minus rent.

A gain is a share of the loss (`FieldReport.value`), and is paid when the adaptation ends. All else is a price:

    reward = gain - params_rent * parameters / host's - flops_rent * extra FLOPs / run's - start_cost * begun

What each part of it guards against (facts 8 to 12), and what shows it in tests/unit/simic/test_simic_reward.py:

- Paired evidence alone pays (`PAIRED`): what the host gains by itself is nobody's, and how much a host leans on a part
  of it (`HARM`, leave-one-out) is no worth. Unmeasured pays nothing. Only what stays pays: a fossil.
- Of a fossil that had won a trial its fork speaks: it ran on beside one that did not grow, with the kernel live, which
  no shadow does. A fork is short, so the next guard holds for it too.
- `_drift_free`: an early kernel runs ahead of a host that would have got there by itself. Of its gain counts what
  exceeds that which the host gained by itself since the adaptation began. Growth that pays early is paid in full by a
  twin only.
- `window` and `z`: the gain is the mean of the last measurements behind the host less its error, not the last of them:
  who waits for a lucky one gets little.
- `start_cost`, and rents on what was spent whatever came of it: beginning, culling and beginning again costs each time;
  many kernels of no use cost more than they bring. Nothing is paid for an operation, a stage or an alpha.
- Waiting costs nothing, a dip while a kernel blends in costs nothing: a policy is not taught to wait for ever. No rent
  is divided by the length of an episode.
- With a `Twin`, the same run without growth, the whole is settled at the end: the gains that were paid on the way are
  advances on the difference to it. Their sum is then the difference, whatever was paid when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.config import RewardConfig
from esper.leyline import PAIRED, EpochRecord, Evidence, EvidenceKind, FieldReport, Outcome, SystemStatePacket
from esper.simic.moments import Episode

REWARD_VERSION = 2
"""Grows when the same episode would be paid otherwise."""


@dataclass(frozen=True, slots=True)
class Twin:
    """The same run (seed, data order, epochs) without growth.

    Attributes:
        val_losses: by epoch; not measured ones are left out.
        total_flops: of all of it.
    """

    val_losses: tuple[float, ...]
    total_flops: int = 0


@dataclass(slots=True)
class _Trail:
    """What was seen of one adaptation: the host's loss when it began, and its paired measurements."""

    loss_before: float | None
    measured: list[Evidence]


class Meter:
    """Follows one run, packet by packet.

    Args:
        config: prices.

    Attributes:
        paid: the gains so far, without prices.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._trails: dict[str, _Trail] = {}
        self._counted: set[str] = set()
        self._losses: dict[int, float] = {}
        self._tried_at: dict[Evidence, int] = {}  # -> the epoch after which the trial began that found it
        self._host_params = 0
        self._epoch_flops = 0.0
        self._last: EpochRecord | None = None
        self._loss: float | None = None
        self.paid = 0.0

    def see(self, packet: SystemStatePacket) -> float:
        """Returns what has come to pass since the packet before."""
        if self._last is None:
            self._host_params = packet.budget.params_used
        reward = self._spent(packet.epoch)
        for layer in packet.layers:
            for seed in layer.seeds:
                if not seed.stage.is_active:
                    continue
                reward -= self._begin(seed.trace_id or seed.seed_id)
                evidence = seed.evidence
                if evidence is not None and evidence.kind in PAIRED and evidence.num_pairs:
                    self._trails[seed.trace_id or seed.seed_id].measured.append(evidence)
        epoch, loss, trials = packet.epoch.epoch, packet.epoch.val_loss, packet.trials
        if loss is not None:
            self._losses[epoch] = loss
        if trials is not None and trials.result is not None:
            found = (outcome.evidence for outcome in trials.result.outcomes if outcome.evidence is not None)
            self._tried_at.update(dict.fromkeys(found, trials.result.epoch))
        reward += self._settle(packet.ended)
        self._loss = packet.epoch.val_loss if packet.epoch.val_loss is not None else self._loss
        return reward

    def end(self, last: EpochRecord | None, ended: Sequence[FieldReport]) -> float:
        """Returns what came to pass after the last packet."""
        return (0.0 if last is None else self._spent(last)) + self._settle(ended)

    def _spent(self, record: EpochRecord) -> float:
        """The price of the FLOPs beyond those of the first epoch, in which nothing could have grown."""
        before, self._last = self._last, record
        if before is None:
            self._epoch_flops = record.total_flops / (record.epoch + 1)
            return 0.0
        host = (record.epoch - before.epoch) * self._epoch_flops
        whole = self._epoch_flops * record.num_epochs
        extra = record.total_flops - before.total_flops - host
        return -self._config.flops_rent * max(0.0, extra) / whole if whole else 0.0

    def _begin(self, trace: str) -> float:
        """The price of an adaptation that is seen for the first time."""
        if trace in self._trails:
            return 0.0
        self._trails[trace] = _Trail(self._loss, [])
        return self._config.start_cost

    def _settle(self, ended: Sequence[FieldReport]) -> float:
        reward = 0.0
        for report in ended:
            if report.outcome is Outcome.TRIED:
                continue  # in a fork alone: its FLOPs are paid for, and the run is what it was
            trace = report.trace_id or report.seed_id
            if (key := report.trace_id or report.report_id) in self._counted:
                continue
            self._counted.add(key)
            reward -= self._begin(trace)  # one that was over before a packet showed it
            gain = self._gain(report, self._trails[trace])
            self.paid += gain
            reward += gain - self._params(report)
        return reward

    def _params(self, report: FieldReport) -> float:
        stays = report.outcome is Outcome.FOSSILIZED or (
            report.outcome is Outcome.UNFINISHED and any(span.stage.is_blended for span in report.stages)
        )
        if not stays or not self._host_params:
            return 0.0
        return self._config.params_rent * report.num_parameters / self._host_params

    def _gain(self, report: FieldReport, trail: _Trail) -> float:
        value = report.value
        if value is None:
            return 0.0
        if report.outcome is not Outcome.FOSSILIZED:
            # behind the host nothing was harmed; what was live and went is worth nothing at best
            return min(0.0, value) if any(span.stage.is_blended for span in report.stages) else 0.0
        worth = report.worth
        assert worth is not None  # else it had no value
        if worth.kind is EvidenceKind.FORK:
            measured, before = [worth], self._losses.get(self._tried_at.get(worth, -1), trail.loss_before)
        else:
            measured, before = trail.measured[-self._config.window :] or [worth], trail.loss_before
        gain = _cautious(measured, self._config.z)
        return gain * _drift_free(measured, before) if gain > 0.0 else gain


def rewards(episode: Episode, config: RewardConfig, twin: Twin | None = None) -> list[float]:
    """Returns the reward of each moment: what came to pass between it and the next, or the end.

    Args:
        episode: with one moment at least.
        config: prices.
        twin: where the run without growth is known.
    """
    meter = Meter(config)
    seen = [meter.see(moment.packet) for moment in episode.moments]
    found = [*seen[1:], meter.end(episode.last, episode.ended)]
    found[0] += seen[0]  # a run that was joined late
    if twin is not None:
        found[-1] += whole_gain(episode, twin, config.window) - meter.paid
    return found


def whole_gain(episode: Episode, twin: Twin, window: int) -> float:
    """Returns the difference to the run without growth at its end, as a share of the larger loss, in [-1, 1].

    Both are means over the last `window` epochs that the two have in common at most: the end, not its best moment.

    Raises:
        ValueError: if the validation loss of either was never measured.
    """
    rows = {moment.epoch: moment.packet.epoch for moment in episode.moments}
    if episode.last is not None:
        rows[episode.last.epoch] = episode.last
    own = [row.val_loss for _, row in sorted(rows.items()) if row.val_loss is not None]
    if not own or not twin.val_losses:
        raise ValueError(f"run {episode.about.run_id} or its twin has no validation loss")
    grown, bare = (math.fsum(losses[-window:]) / len(losses[-window:]) for losses in (own, list(twin.val_losses)))
    size = max(abs(grown), abs(bare))
    return (bare - grown) / size if size else 0.0


def harms(episode: Episode) -> list[float]:
    """Returns the cost of each moment that safety counts: adaptations that were rolled back, and calls for a rollback.

    It is no part of the reward; PPO keeps it under a limit of its own.
    """
    known: set[str] = set()
    packets = [moment.packet for moment in episode.moments]
    found = [float(one.governor.startswith("critical")) + _rolled_back(one.ended, known) for one in packets]
    return [*found[1:], _rolled_back(episode.ended, known)]


def _rolled_back(ended: Sequence[FieldReport], known: set[str]) -> float:
    new = [one for one in ended if one.outcome is Outcome.ROLLED_BACK and one.report_id not in known]
    known.update(one.report_id for one in new)
    return float(len(new))


def _cautious(measured: Sequence[Evidence], z: float) -> float:
    """The mean of gains less z errors of it, as a share of the losses. Measurements share their validation samples, so
    the error of the mean is taken to be that of one.
    """
    sizes = [max(abs(one.baseline), abs(one.candidate), abs(one.gain)) for one in measured]
    shares = [one.gain / size if size else 0.0 for one, size in zip(measured, sizes, strict=True)]
    errors = [one.stderr / size if size else 0.0 for one, size in zip(measured, sizes, strict=True)]
    num = len(measured)
    return max(-1.0, math.fsum(shares) / num - z * math.fsum(errors) / num)


def _drift_free(measured: Sequence[Evidence], loss_before: float | None) -> float:
    """The share of a gain that exceeds what the host gained by itself meanwhile, in [0, 1]."""
    gain = math.fsum(one.gain for one in measured) / len(measured)
    start = measured[0].baseline if loss_before is None else max(loss_before, measured[0].baseline)
    own = max(0.0, start - measured[-1].baseline)
    return max(0.0, gain - own) / gain if gain > 0.0 else 0.0
