"""Any number of Urzas over one address, in any order: what one acknowledged never disappears.

Writers start, write, stall and come back; each new one takes over from all before it. A model holds what was
acknowledged; whoever was taken over from must be told so, and must change nothing any more.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from urza_samples import BUILD, VECTOR, WIDE, Clock, artifact_of, design, report_of

from esper.leyline import EsperError, KernelStatus
from esper.storage import Storage
from esper.urza import events
from esper.urza.hub import Hub

PLACES = ("tidying", "compacted", "checkpointed", "listed", "sealed", "vacuumed")
"""Of a round of maintenance: `esper.delta.tidy`."""


class Stalls:
    """A `FaultPlan`: at a place that `next_at` names something else is done, once, while this writer stands still."""

    def __init__(self):
        self.next_at = None

    def at(self, place, step):
        del step
        if self.next_at is not None and self.next_at[0] == place:
            (_, deed), self.next_at = self.next_at, None
            deed()


class Writers(RuleBasedStateMachine):
    """Hubs over one directory. `self.writer` is the one that took over last; the others have stalled."""

    hubs = Bundle("hubs")

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self._storage = Storage.at(self._directory.name)
        self._clock = Clock()
        self._names: set[str] = set()  # acknowledged
        self._kernels: dict[str, tuple[KernelStatus, bytes]] = {}
        self._reports = 0
        self._stalls: dict[Hub, Stalls] = {}
        self.writer: Hub | None = None
        self._width = 0

    def teardown(self) -> None:
        self._directory.cleanup()

    @initialize(target=hubs)
    def first(self):
        return self.take_over()

    @rule(target=hubs)
    def take_over(self):
        """A second Urza by mistake, or one that starts anew while the old one stalls."""
        stalls = Stalls()
        self.writer = Hub.open(self._storage, clock=self._clock, faults=stalls)
        self._stalls[self.writer] = stalls
        return self.writer

    @rule(hub=hubs, signature=st.sampled_from([VECTOR, WIDE]))
    def submit(self, hub, signature):
        self._width += 1
        name = f"design-{self._width}"
        if self._acknowledges(hub, lambda: hub.submit_blueprint(design(self._width), name=name, targets=[signature])):
            self._names.add(name)

    @rule(hub=hubs)
    def compile_one(self, hub):
        done = []

        def work():
            job = hub.claim("worker", fingerprint=BUILD)
            if job is not None:
                record, container = artifact_of(job)
                done.append((hub.complete(job, record, container), container))

        self._acknowledges(hub, work)
        for record, container in done:
            self._kernels[record.kernel_id] = (KernelStatus.VALIDATED, container)

    @precondition(lambda self: self._kernels)
    @rule(hub=hubs, data=st.data())
    def retire(self, hub, data):
        kernel_id = data.draw(st.sampled_from(sorted(self._kernels)))
        status, container = self._kernels[kernel_id]
        if status is KernelStatus.VALIDATED and self._acknowledges(
            hub, lambda: hub.mark_kernel(kernel_id, KernelStatus.RETIRED, "bench")
        ):
            self._kernels[kernel_id] = (KernelStatus.RETIRED, container)

    @precondition(lambda self: self._kernels)
    @rule(hub=hubs, data=st.data())
    def report(self, hub, data):
        kernel_id = data.draw(st.sampled_from(sorted(self._kernels)))
        if self._acknowledges(hub, lambda: hub.report(report_of(self.writer.kernel(kernel_id)))):
            self._reports += 1

    @rule(hub=hubs)
    def tidy(self, hub):
        """Compaction may run in any writer at any time; a stalled one's must not bring it back."""
        if hub.broken is None:
            hub._log._tidy()

    @rule(hub=hubs, kept_hours=st.sampled_from([0.0, 0.5, 24.0]))
    def maintain(self, hub, kept_hours):
        """A round of it, with nothing in its way; of a stalled writer it must change nothing."""
        self._acknowledges(hub, lambda: hub.maintain(kept_hours=kept_hours))

    @rule(
        target=hubs,
        place=st.sampled_from(PLACES),
        kept_hours=st.sampled_from([0.0, 0.5, 24.0]),
        deeds=st.lists(st.sampled_from(["submit", "compile_one", 0.0, 24.0]), min_size=1, max_size=3),
    )
    def stall_in_maintenance(self, place, kept_hours, deeds):
        """The writer stands still in a round, is taken over from, and goes on once its successor is at work.

        A number among the deeds is a round of the successor's that keeps replaced files so many hours.
        """
        stalled, met = self.writer, []

        def succeed():
            met.append(self.take_over())
            for deed in deeds:
                if deed == "submit":
                    self.submit(self.writer, VECTOR)
                elif deed == "compile_one":
                    self.compile_one(self.writer)
                else:
                    self.writer.maintain(kept_hours=deed)

        self._stalls[stalled].next_at = (place, succeed)
        with suppress(EsperError):  # fenced, or it does not know who writes
            stalled.maintain(kept_hours=kept_hours)
        self._stalls[stalled].next_at = None
        if not met:  # there was nothing to remove: it did not come to the place
            assert place == "sealed"
            return self.writer
        assert stalled.broken is not None
        return met[0]

    @rule(seconds=st.floats(1.0, 100.0))
    def time_passes(self, seconds):
        self._clock.time += seconds

    @invariant()
    def what_was_acknowledged_is_there(self):
        if self.writer is not None:
            self._compare(self.writer)

    @rule()
    def restart(self):
        """Nobody who opens the address anew, and no reader of the log, sees anything else."""
        log = events._read(self._storage, events._open(self._storage))
        assert [event.seq for event in log] == list(range(1, len(log) + 1))
        assert sorted(event.epoch for event in log) == [event.epoch for event in log]
        fresh = Hub(_Replayed(log), self.writer._blobs, clock=self._clock)
        self._compare(fresh)

    def _acknowledges(self, hub, request):
        """Whether the request was acknowledged; only the newest writer may do so, and every other has to refuse."""
        if hub is self.writer:
            request()
            return True
        before = events._open(self._storage).version()
        with suppress(EsperError):  # fenced, or refused for what it does not know of
            request()
        assert events._open(self._storage).version() == before
        return False

    def _compare(self, hub):
        assert {blueprint.name for blueprint in hub.blueprints()} == self._names
        found = {kernel.kernel_id: kernel.status for kernel in hub.kernels(status=None)}
        assert found == {kernel_id: status for kernel_id, (status, _) in self._kernels.items()}
        assert sum(hub.outcomes(kernel_id).total() for kernel_id in found) == self._reports
        for kernel_id, (_, container) in self._kernels.items():
            assert bytes(hub.fetch(kernel_id)) == container


class _Replayed:
    """What a reader finds; it writes nothing."""

    epoch = 0

    def __init__(self, log):
        self._log = log

    def replay(self):
        return self._log

    def append(self, events):
        raise AssertionError(f"a reader wrote {events}")


TestWriters = Writers.TestCase
TestWriters.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
