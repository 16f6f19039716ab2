"""Nissa as an actor: follows the bus in a thread of its own and answers with small pictures of runs.

It may be slow, die or be missing: nothing waits for it. After a restart it reads the log again from its start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from actors.alerts import AlertSender
from actors.logs import log_as
from actors.metrics import Reporter
from actors.page import Keeper, open_page
from actors.settings import Settings
from actors.traces import TIMEOUT_S, SpanSender
from esper.config import PageConfig
from esper.leyline.alerts import Alert
from esper.leyline.bus import BusStats
from esper.leyline.contract import Contract
from esper.leyline.errors import EsperError, UnavailableError
from esper.leyline.kernels import Pipeline
from esper.leyline.messages import OonaMessage
from esper.leyline.ports import AssetHub, Bus, Subscription
from esper.nissa.anomalies import Watch
from esper.nissa.anomalies.outgoing import Outgoing, message_of
from esper.nissa.live import TOPICS, Compiled, Live
from esper.nissa.otlp import Collector
from esper.nissa.spans import Span, Spans
from esper.nissa.viewmodel import LiveView, Note
from esper.storage import Storage

log = logging.getLogger("esper.nissa")

NAMESPACE = "esper"
NAME = "nissa"
NUM_CPUS = 0.05
POLL_S = 0.1
MAX_BACKOFF_S = 5.0
METRICS_EVERY_S = 5.0


class NissaActor:
    """Folds what is on the bus; made remote by `spawn`.

    Args:
        bus_factory: connects to the bus; called in the consumer's thread, again after the bus was lost.
        trace: takes the spans of adaptations as they end; None makes none.
    """

    _state = "starting"  # Ray asks for the name of an actor whose construction failed, too
    _page_at = ""

    def __init__(self, bus_factory: Callable[[], Bus], trace: Callable[[Sequence[Span]], None] | None = None) -> None:
        self._bus_factory = bus_factory
        self._trace, self._spans = trace, Spans()
        self._live = Live()
        self._watch = Watch()
        self._outgoing = Outgoing()
        self._is_caught_up = False  # alerts that follow from the log may stand in it, further on
        self._changed = threading.Condition()
        self._num_requests = 0  # drains asked for so far
        self._num_answered = 0  # drains whose messages are all folded
        self._state = "connecting"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._consume, name="nissa-consumer", daemon=True)
        self._thread.start()

    def snapshot(self, run_id: str) -> LiveView | None:
        """The run as last heard of; None if nothing was."""
        with self._changed:
            return self._shown(run_id)

    def with_story(self, run_id: str) -> tuple[LiveView, Sequence[Note]] | None:
        """The run with its whole story; None if nothing was heard of it."""
        with self._changed:
            view = self._live.view(run_id)
            return None if view is None else (view, self._live.story(run_id))

    def drain(self, run_id: str, timeout_s: float = 5.0) -> LiveView | None:
        """Waits until all that the broker had acknowledged before this call is folded; then as `snapshot`.

        Raises:
            UnavailableError: if that takes longer than `timeout_s`.
        """
        with self._changed:
            self._num_requests += 1
            mine = self._num_requests
            if not self._changed.wait_for(lambda: self._num_answered >= mine, timeout_s):
                raise UnavailableError(f"Nissa did not catch up within {timeout_s:g} s; it is {self._state}")
            return self._shown(run_id)

    def runs(self) -> tuple[str, ...]:
        """The runs it remembers, the most recently heard of last."""
        with self._changed:
            return self._live.run_ids()

    def views(self) -> list[LiveView]:
        """All of them."""
        with self._changed:
            return [view for run_id in self._live.run_ids() if (view := self._live.view(run_id)) is not None]

    def platform_alerts(self) -> tuple[Alert, ...]:
        """The alerts of no run: those that last, and the last that ended."""
        with self._changed:
            return self._live.platform_alerts()

    def compiled(self) -> Mapping[Pipeline, Compiled]:
        """What came from the compilers, by pipeline."""
        with self._changed:
            return self._live.compiled()

    def looked(self, stats: BusStats) -> None:
        """See `Teller`."""
        now = time.time()
        with self._changed:
            self._note(self._watch.look(stats, now))
            self._note(self._watch.tick(now))

    def to_tell(self) -> Sequence[OonaMessage]:
        """See `Teller`."""
        with self._changed:
            return self._outgoing.waiting() if self._is_caught_up else []

    def told(self, messages: Sequence[OonaMessage]) -> None:
        """See `Teller`."""
        with self._changed:
            for message in messages:
                self._outgoing.seen(message.event_id)

    def state(self) -> str:
        """What it is doing: `connecting`, `following`, `stopped`, or `reconnecting` with the reason."""
        return self._state

    def stop(self) -> None:
        """Leaves the bus and ends the consumer."""
        self._stopped.set()
        self._thread.join(timeout=5.0)

    def _shown(self, run_id: str) -> LiveView | None:
        """The run as views get it: with the address of its page."""
        view = self._live.view(run_id)
        return replace(view, page=f"{self._page_at}/runs/{run_id}") if view is not None and self._page_at else view

    def __repr__(self) -> str:
        return f"Nissa({self._state})"

    def _consume(self) -> None:
        backoff_s = 0.1
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                self._follow()
            except Exception as error:  # the actor's loop edge: logged, a state, and tried again
                self._state = f"reconnecting: {error}"
                log.warning("bus.lost", exc_info=True)
                if time.monotonic() - started > 10 * MAX_BACKOFF_S:
                    backoff_s = 0.1
                self._stopped.wait(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
        self._state = "stopped"

    def _follow(self) -> None:
        """One life on the bus. It listens anew in each, so that it starts at the start of the log; messages seen before
        change nothing.
        """
        bus = self._bus_factory()
        try:
            subscription = bus.listen(TOPICS, from_start=True, name="nissa")
            try:
                self._state, self._is_caught_up = "following", False
                while not self._stopped.is_set():
                    self._take(subscription)
            finally:
                subscription.close()
        finally:
            bus.close()

    def _take(self, subscription: Subscription) -> None:
        with self._changed:
            requests = self._num_requests
        deliveries = subscription.poll(max_messages=512, timeout_s=POLL_S)
        with self._changed:
            for delivery in deliveries:
                try:
                    self._fold(delivery.message)
                except ValidationError as error:
                    # it would fail again: told and left out
                    fields = {"topic": delivery.message.topic.value, "sender": delivery.message.sender_id}
                    log.warning("message.refused", extra={**fields, "error": str(error)[:500]})
            if not deliveries:
                # nothing was left by a poll that began after these drains were asked for
                self._num_answered = max(self._num_answered, requests)
                self._is_caught_up = True
                self._changed.notify_all()
        if deliveries:
            subscription.ack(deliveries)

    def _fold(self, message: OonaMessage) -> None:
        body = self._live.take(message)
        if body is None:
            self._outgoing.seen(message.event_id)
        else:
            # first what is out of the ordinary about it: it may end a trace, in which that has its place
            self._note(self._watch.apply(body, message.timestamp))
            self._span(body, message.timestamp)

    def _note(self, alerts: Sequence[Alert]) -> None:
        """Shows alerts at once, and has them wait for the bus: what is on it already comes back from there."""
        for alert, message in zip(alerts, map(message_of, alerts), strict=True):
            if self._live.apply(message):
                self._outgoing.add(message)
                self._span(alert, alert.updated_at)

    def _span(self, body: Contract, at: float) -> None:
        if self._trace is not None and (ended := self._spans.take(body, at)):
            self._trace(ended)


class Nissa(NissaActor):
    """NissaActor in a process of its own, with logging set up for it, and the metrics it exports.

    Args:
        bus_factory: see `NissaActor`.
        hub_factory: connects to Urza, whose compile queue is among the metrics; None leaves it out.
        metrics_every_s: from one export of the metrics to the next; None exports none.
        otlp_endpoint: the collector that gets each adaptation as a trace; None sends none.
        storage: where runs lie: each gets its last picture there, and the page shows those that are over.
        page: settings of the live page; None serves none.
    """

    def __init__(
        self,
        bus_factory: Callable[[], Bus],
        hub_factory: Callable[[], AssetHub] | None = None,
        metrics_every_s: float | None = METRICS_EVERY_S,
        storage: Storage | None = None,
        page: PageConfig | None = None,
        otlp_endpoint: str | None = None,
    ) -> None:
        log_as(NAME)
        self._settings = Settings(metrics_every_s, page, otlp_endpoint)
        self._traces, self._no_traces = None, ""
        if otlp_endpoint is not None:
            self._send_traces(otlp_endpoint)
        super().__init__(bus_factory, None if self._traces is None else self._traces.add)
        self._reporter = (
            Reporter(
                self.views,
                bus=bus_factory,
                hub=hub_factory,
                every_s=metrics_every_s,
                alerts=self.platform_alerts,
                compiled=self.compiled,
            )
            if metrics_every_s
            else None
        )
        self._sender = AlertSender(self, bus_factory)
        self._keeper = Keeper(self.views, storage) if storage is not None else None
        self._page, self._no_page = None, ""
        if storage is not None and page is not None and page.enabled:
            self._serve(page, storage, bus_factory, hub_factory)

    def _serve(
        self,
        page: PageConfig,
        storage: Storage,
        bus_factory: Callable[[], Bus],
        hub_factory: Callable[[], AssetHub] | None,
    ) -> None:
        """Opens the page; a run goes on without it."""
        try:
            self._page = open_page(self.with_story, storage, page, bus_factory, hub_factory)
        except EsperError as error:
            self._no_page = f"Nissa: no live page: {error}"
            log.warning("page.unavailable", extra={"reason": str(error)})
        else:
            self._page_at = self._page.address

    def _send_traces(self, endpoint: str) -> None:
        """Opens the way to the collector; a run goes on without it. Its driver has looked for the exporter on its own
        node, which need not be this one.
        """
        try:
            self._traces = SpanSender(Collector(endpoint, timeout_s=TIMEOUT_S))
        except EsperError as error:
            self._no_traces = f"OpenTelemetry: {error}"
            log.warning("traces.unavailable", extra={"reason": str(error)})

    def settings(self) -> Settings:
        """What it was started with."""
        return self._settings

    def missing(self) -> tuple[str, ...]:
        """What it went without, in words."""
        lost = self._no_traces if self._traces is None else self._traces.missing()
        return tuple(words for words in (self._no_page, lost) if words)

    def stop(self) -> None:
        """Leaves the bus, ends the consumer, the alerts, the page, the traces and the metrics."""
        super().stop()
        self._sender.stop()
        # what stays and what people look at before what another server may hold up: the end of a run waits 10 s for all
        if self._keeper is not None:
            self._keeper.stop()
        if self._page is not None:
            self._page.close()
        if self._traces is not None:
            self._traces.stop()
        if self._reporter is not None:
            self._reporter.stop()


class NissaHandle:
    """Nissa from afar, with deadlines.

    Args:
        actor: the remote actor.
        deadline_s: how long a `snapshot` may take.
    """

    def __init__(self, actor: Any, *, deadline_s: float = 2.0) -> None:
        self.actor = actor
        self._deadline_s = deadline_s

    def snapshot(self, run_id: str) -> LiveView | None:
        """The run as last heard of; raises `UnavailableError` without an answer in time."""
        return self._call(self.actor.snapshot.remote(run_id), self._deadline_s)

    def drain(self, run_id: str, *, timeout_s: float = 5.0) -> LiveView | None:
        """Waits until what the broker has acknowledged is folded; raises `UnavailableError` if it takes longer."""
        return self._call(self.actor.drain.remote(run_id, timeout_s), timeout_s + self._deadline_s)

    def runs(self) -> tuple[str, ...]:
        """The runs it remembers, the most recently heard of last."""
        return self._call(self.actor.runs.remote(), self._deadline_s)

    def missing(self) -> tuple[str, ...]:
        """What it went without so far, in words; raises `UnavailableError` without an answer in time."""
        return self._call(self.actor.missing.remote(), 2 * TIMEOUT_S + self._deadline_s)

    def settings(self) -> Settings:
        """What it was started with; raises `UnavailableError` without an answer in time, or one that cannot say."""
        if not hasattr(self.actor, "settings"):
            raise UnavailableError("this Nissa is of an older version, and does not say what it was started with")
        return self._call(self.actor.settings.remote(), self._deadline_s)

    def state(self) -> str:
        """What it is doing, in words."""
        return self._call(self.actor.state.remote(), self._deadline_s)

    def fetch(self, run_id: str) -> Callable[[], LiveView | None]:
        """What `esper.nissa.Follower` asks for pictures of this run."""
        return lambda: self.snapshot(run_id)

    def __repr__(self) -> str:
        return f"NissaHandle({self.actor!r})"

    def _call(self, ref: Any, deadline_s: float) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return ray.get(ref, timeout=deadline_s)
        except GetTimeoutError as error:
            ray.cancel(ref, recursive=False)
            raise UnavailableError(f"Nissa did not answer within {deadline_s:g} s") from error
        except RayActorError as error:
            raise UnavailableError("Nissa is not there at present") from error
        except RayTaskError as error:
            if isinstance(error.cause, UnavailableError):
                raise error.cause from error
            raise


def spawn(
    bus_factory: Callable[[], Bus],
    hub_factory: Callable[[], AssetHub] | None = None,
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    detached: bool = False,
    metrics_every_s: float | None = METRICS_EVERY_S,
    storage: Storage | None = None,
    page: PageConfig | None = None,
    otlp_endpoint: str | None = None,
) -> NissaHandle:
    """Starts Nissa, or joins the one of this name. Returns at once; it may take seconds until it answers.

    The first two, `metrics_every_s`, `storage`, `page` and `otlp_endpoint` are as for `Nissa`. It is placed
    on this node where that is possible: the page's link is printed here, and on loopback it leads nowhere else.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()

    actor = (
        ray.remote(Nissa)
        .options(
            name=name,
            namespace=namespace,
            get_if_exists=True,
            lifetime="detached" if detached else None,
            num_cpus=NUM_CPUS,
            max_restarts=-1,
            max_concurrency=8,
            enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=here, soft=True),
        )
        .remote(bus_factory, hub_factory, metrics_every_s, storage, page, otlp_endpoint)
    )
    return NissaHandle(actor)


def connect(*, name: str = NAME, namespace: str = NAMESPACE) -> NissaHandle:
    """Finds a running Nissa; raises `UnavailableError` if there is none of this name."""
    import ray

    try:
        return NissaHandle(ray.get_actor(name, namespace=namespace))
    except ValueError as error:
        raise UnavailableError(f"there is no Nissa named {name}", remedy="start one: esper platform up") from error
