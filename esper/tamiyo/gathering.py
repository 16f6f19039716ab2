"""What runs tell on the bus, put together: health, an epoch's row and the run's state make one question.

Order holds only within (topic, key), so parts come in any order. A run's next epoch is asked about once all its parts
are there; what comes late, or for a site that the run does not have, is counted and left out.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import ValidationError

from esper.config import TamiyoConfig
from esper.leyline import (
    Contract,
    EpochRecord,
    LayerHealthReport,
    RunStarted,
    RunState,
    SystemStatePacket,
    Topic,
)
from esper.tamiyo.deciders import Question

TOPICS = (Topic.RUN_STARTED, Topic.SEED_HEALTH, Topic.EPOCH, Topic.RUN_STATE)
_NUM_EPOCHS = 4
"""Epochs of a run whose parts are waited for: more than that behind, an epoch is given up."""
_LOG = logging.getLogger(__name__)


@dataclass
class Counts:
    """What came in, and what became of it.

    Attributes:
        health: signals of seeds; a report holds as many as its site has seeds.
        stale: parts of an epoch that was decided about, or given up, before.
        strange: reports of sites that their run does not have.
        unread: states whose configuration cannot be read.
        incomplete: epochs that were given up, since newer ones were complete or too many were open.
    """

    health: int = 0
    questions: int = 0
    stale: int = 0
    strange: int = 0
    unread: int = 0
    incomplete: int = 0


@dataclass
class _Epoch:
    reports: dict[str, LayerHealthReport] = field(default_factory=dict)
    record: EpochRecord | None = None
    state: RunState | None = None


class StrangeHealthError(ValueError):
    """Health of a site that its run does not have."""


@dataclass
class _Run:
    open: dict[int, _Epoch] = field(default_factory=dict)
    last: int = -1
    sites: frozenset[str] = frozenset()  # as the run told at its start; empty if nobody heard
    stale_told: int = -1


class Gathering:
    """Of many runs.

    Args:
        max_runs: that are kept; the one that was silent longest goes first.
    """

    def __init__(self, *, max_runs: int = 1_000) -> None:
        self.counts = Counts()
        self._max_runs = max_runs
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._hands: dict[type[Contract], Callable[[_Epoch, Contract], None]] = {
            LayerHealthReport: _take_report,
            EpochRecord: _take_record,
            RunState: _take_state,
        }

    @property
    def num_runs(self) -> int:
        """Runs that told something, and are not over as far as anybody knows."""
        return len(self._runs)

    def take(self, body: Contract) -> Question | None:
        """Takes in one message's body; returns a question if it was the last part of one.

        Raises:
            StrangeHealthError: if it is of a site that the run did not name when it started.
        """
        if isinstance(body, LayerHealthReport):
            self.counts.health += len(body.seeds)
        if isinstance(body, RunStarted):
            self._runs.pop(body.run_id, None)  # begun, or resumed: it may tell of an epoch again
            self._run(body.run_id).sites = frozenset(body.sites)
            return None
        take = self._hands.get(type(body))
        if take is None:
            return None
        run = self._run(body.run_id)  # pyright: ignore[reportAttributeAccessIssue] - all of `_hands` have it
        epoch: int = body.epoch  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(body, LayerHealthReport) and run.sites and body.layer_id not in run.sites:
            self.counts.strange += 1
            raise StrangeHealthError(f"run {body.run_id} has no site {body.layer_id!r}")
        if epoch <= run.last:
            self.counts.stale += 1
            if run.stale_told < run.last:  # once for each decision, however much of it is delivered again
                run.stale_told = run.last
                told = {"run": body.run_id, "epoch": epoch, "decided": run.last}  # pyright: ignore[reportAttributeAccessIssue]
                _LOG.warning("part.stale", extra=told)
            return None
        take(run.open.setdefault(epoch, _Epoch()), body)
        return self._question(run, epoch) or self._give_up(run)

    def _run(self, run_id: str) -> _Run:
        run = self._runs.setdefault(run_id, _Run())
        self._runs.move_to_end(run_id)
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return run

    def _question(self, run: _Run, epoch: int) -> Question | None:
        parts = run.open[epoch]
        state, record = parts.state, parts.record
        if state is None or record is None or not parts.reports.keys() >= set(state.sites):
            return None
        strange = sorted(parts.reports.keys() - set(state.sites))
        if strange:
            self.counts.strange += len(strange)
            _LOG.warning("health.strange", extra={"run": state.run_id, "epoch": epoch, "sites": strange[:8]})
        self._close(run, epoch)
        try:
            config = TamiyoConfig.model_validate(state.config)
        except ValidationError as error:
            self.counts.unread += 1
            reason = str(error.errors(include_url=False)[0]["msg"])
            _LOG.warning("state.unread", extra={"run": state.run_id, "epoch": epoch, "reason": reason})
            return None
        self.counts.questions += 1
        packet = SystemStatePacket(
            run_id=state.run_id,
            epoch=record,
            layers=tuple(parts.reports[site] for site in state.sites),
            options=state.options,
            budget=state.budget,
            embargoed=state.embargoed,
            governor=state.governor,
            missing=state.missing,
            words=state.words,
            ended=state.ended,
            alerts=state.alerts,
        )
        return Question(state.memory, packet, config)

    def _close(self, run: _Run, epoch: int) -> None:
        """Nothing is asked about this epoch and those before it any more."""
        older = [one for one in run.open if one < epoch]
        # a run that asks tells no state: its epochs are not missed
        self.counts.incomplete += sum(run.open[one].state is not None for one in older)
        for one in (*older, epoch):
            run.open.pop(one, None)
        run.last = epoch

    def _give_up(self, run: _Run) -> None:
        if len(run.open) > _NUM_EPOCHS:
            self._close(run, min(run.open))


def _take_report(parts: _Epoch, body: Contract) -> None:
    assert isinstance(body, LayerHealthReport)
    parts.reports[body.layer_id] = body


def _take_record(parts: _Epoch, body: Contract) -> None:
    assert isinstance(body, EpochRecord)
    parts.record = body


def _take_state(parts: _Epoch, body: Contract) -> None:
    assert isinstance(body, RunState)
    parts.state = body
