"""One decision an epoch: rank 0 asks Tamiyo, or replays what was logged, and all ranks hear."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from esper.leyline.errors import UnavailableError
from esper.leyline.kernels import Pipeline, SiteSignature
from esper.leyline.ports import AssetHub
from esper.leyline.signals import AdaptationSignal, EpochRecord, FieldReport, LayerHealthReport, SystemStatePacket
from esper.leyline.trials import TrialState
from esper.tolaria.alarms import Alarms
from esper.tolaria.commands import CommandLog, LoggedDecision
from esper.tolaria.consulting import Answer, Consulting
from esper.tolaria.course import Course
from esper.tolaria.packet import HostSize, budget_state, kernel_options
from esper.tolaria.reach import Reach
from esper.tolaria.steering import Steering

_SETTLE_PAUSE_S = 0.1
_SILENCES = 3


class Deciding:
    """Tamiyo's place in one run.

    Args:
        course: the run.
        reach: to Tamiyo and Urza.
        commands: the durable log, in deterministic mode on rank 0.
        steering: what people said, on rank 0.
        trials: how trials by fork stand; asked on rank 0.
        alarms: Nissa's alerts, on rank 0 outside deterministic mode, where nothing may hang on when one comes.

    Attributes:
        memory: Tamiyo's state, opaque.
    """

    def __init__(
        self,
        course: Course,
        *,
        reach: Reach,
        commands: CommandLog | None,
        steering: Steering | None = None,
        trials: Callable[[], TrialState | None] = lambda: None,
        alarms: Alarms | None = None,
    ) -> None:
        self._trials = trials
        self._alarms = alarms
        self._steering = steering
        self._course = course
        self._reach = reach
        self._consulting = Consulting(course, reach)
        self._commands = commands
        self.memory: dict[str, Any] = {}
        self._request: threading.Thread | None = None
        self._refusal: Exception | None = None  # why that thread ended without a word
        self._has_requested = False
        self._has_settled = False
        self._neighbours: dict[tuple[str, str], bool] = {}

    def begin(self) -> None:
        """Asks for the kernels that the sites may need. They are built beside the training."""
        course = self._course
        if self._alarms is not None:
            self._alarms.begin()
        if course.ports.request_kernels is None or not course.is_first:
            return
        self._request = threading.Thread(target=self._request_beside, name="request-kernels", daemon=True)
        self._request.start()

    def close(self) -> None:
        """Hears no more alerts."""
        if self._alarms is not None:
            self._alarms.close()

    def _request_beside(self) -> None:
        """The thread: what goes wrong in it is raised where the run waits for it."""
        try:
            self._request_kernels()
        except Exception as error:  # noqa: BLE001 - handed over to the caller's thread as it is
            self._refusal = error

    def _await_request(self, timeout_s: float | None = None) -> None:
        if self._request is not None:
            self._request.join(timeout_s)
        if self._refusal is not None:
            raise self._refusal

    def _request_kernels(self) -> None:
        """Submits designs; one that was taken once is not built again."""
        request = self._course.ports.request_kernels

        def submit() -> bool:
            assert request is not None
            request()
            return True

        self._has_requested = self._reach.ask("Urza", submit) or False

    def decide(
        self,
        record: EpochRecord,
        reports: Sequence[LayerHealthReport],
        *,
        host: HostSize,
        embargoed: Sequence[str],
        governor: str,
        ended: Sequence[FieldReport],
    ) -> AdaptationSignal | None:
        """Returns the answer on every rank; None if there is no controller, or none that answers. Collective.

        Args:
            record: the epoch's row.
            reports: health of every site.
            host: size of the host before it grew.
            embargoed: `site` or `site:blueprint` that must not grow.
            governor: its words.
            ended: what became of the run's adaptations so far.
        """
        course = self._course
        answer = None
        if course.is_first:
            answer = self._answer(record, reports, host, embargoed, governor, ended)
        answer = course.ports.ranks.broadcast(answer)
        if answer is None:
            return None
        self.memory, signal = answer
        return signal

    def kernels(self) -> tuple[int, int]:
        """How many kernels are ready for the sites, and how many on their way. Zeros on other ranks.

        Native code is no kernel of its own here: nothing waits for it.

        The first call waits for those on their way, `tamiyo.startup_s` at most: a run of seconds would be over before
        the platform is up. What is not built by then is named among what the run went without. In deterministic mode
        every call waits for all, so that what Tamiyo can choose from does not depend on the clock.

        Raises:
            UserError: if a design that the run asks for is refused.
        """
        course = self._course
        hub = course.ports.hub
        if hub is None or not course.is_first:
            return 0, 0
        signatures = list(dict.fromkeys(course.growable.sites.values()))
        if course.config.deterministic:
            self._await_request()
        elif not self._has_settled:
            self._settle(hub, signatures)
        if course.config.deterministic or not self._has_settled or self._reach.lacks("Tezzeret"):
            self._reach.ask("Tezzeret", lambda: _require_compiled(hub, signatures))
        self._has_settled = True
        pending = self._reach.ask("Urza", lambda: hub.pending(signatures, pipeline=Pipeline.FAST))
        ready = self._reach.ask("Urza", lambda: hub.count_kernels(signatures, pipeline=Pipeline.FAST))
        return ready or 0, pending or 0

    def _settle(self, hub: AssetHub, signatures: Sequence[SiteSignature]) -> None:
        """Waits until the first kernels are built; goes on without those that take longer, and without an Urza that
        stays silent longer than its breaker does not ask it, three times over. What it did not take is submitted again.
        """
        course, began = self._course, time.monotonic()
        patience_s = course.config.tamiyo.startup_s
        self._await_request(patience_s)
        pause = threading.Event()  # never set: a wait that a signal handler can interrupt
        while (passed_s := time.monotonic() - began) < patience_s and course.ports.stop() is None:
            pending = self._reach.ask("Urza", lambda: hub.pending(signatures, pipeline=Pipeline.FAST))
            if pending is None and passed_s > _SILENCES * course.config.kasmina.breaker_s:
                return
            if pending is not None and self._request is not None and not self._has_requested:
                self._request_kernels()
            elif pending == 0:
                return
            pause.wait(_SETTLE_PAUSE_S)

    def _replay(self) -> Answer | None:
        logged = None if self._commands is None else self._commands.at(self._course.epoch)
        return None if logged is None else Answer(logged.state, logged.signal)

    def _answer(
        self,
        record: EpochRecord,
        reports: Sequence[LayerHealthReport],
        host: HostSize,
        embargoed: Sequence[str],
        governor: str,
        ended: Sequence[FieldReport],
    ) -> Answer | None:
        course, known = self._course, self._replay()
        if known is None and course.ports.controller is None:
            return None
        budget = budget_state(course.config.budget, host, params_used=record.params, flops_used=record.flops_per_sample)
        packet = SystemStatePacket(
            run_id=course.run_id,
            epoch=record,
            layers=tuple(reports),
            options=self._options(),
            budget=budget,
            embargoed=tuple(embargoed),
            governor=governor,
            missing=self._reach.missing,
            words=() if self._steering is None else self._steering.heard(),
            ended=tuple(ended),
            trials=self._trials(),
            alerts=() if self._alarms is None else self._alarms.standing(record.epoch),
        )
        answer = known or self._consulting.ask(self.memory, packet)
        if answer is not None:  # one that is carried out again, too: who decided it may have died with its row
            course.ports.experience.decided(self.memory, packet, answer.signal)
        if answer is not None and known is None and self._commands is not None:
            self._commands.append(LoggedDecision(course.epoch, course.step, answer.signal, answer.memory))
            course.ports.faults.at("logged", course.epoch)
        return answer

    def _options(self) -> tuple[Any, ...]:
        hub, names = self._course.ports.hub, self._course.config.tezzeret.blueprints
        if hub is None:
            return ()
        allowed = None if names == "library" else names
        sites = self._course.growable.sites
        return self._reach.ask("Urza", lambda: kernel_options(hub, sites, blueprints=allowed, fits=self._fits)) or ()

    def _fits(self, site: str, blueprint_id: str) -> bool:
        """Whether the host has the layers that a design copies; looked up once, as the host's own never change."""
        hub, place = self._course.ports.hub, (site, blueprint_id)
        assert hub is not None
        if place not in self._neighbours:
            ir = hub.blueprint(blueprint_id).ir
            self._neighbours[place] = self._course.growable.has_neighbours(site, ir)
        return self._neighbours[place]


def _require_compiled(hub: AssetHub, signatures: Sequence[SiteSignature]) -> bool:
    pending = hub.pending(signatures, pipeline=Pipeline.FAST)
    if pending:
        raise UnavailableError(f"{pending} of the kernels for these sites were not built yet")
    return True
