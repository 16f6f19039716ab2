"""Nissa's traces at a real collector's end: an HTTP server that decodes the protobuf of OTLP."""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from actors.nissa import NissaActor
from actors.traces import SpanSender
from esper.config import load_config
from esper.leyline.errors import ConfigError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.native import Rung, RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import LifecycleEvent
from esper.nissa import otlp
from esper.nissa.otlp import Collector
from esper.oona.memory import MemoryBus

RUN, TRACE = "run-1", "0123456789abcdef" * 2
S = SeedStage
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Receiver:
    """Takes traces on a port; `is_up` false refuses them with `status`."""

    def __init__(self) -> None:
        self.resources, self.headers, self.num_refused = [], [], 0
        self.status = 401  # which may be over soon, and which the exporter does not repeat by itself
        self.is_up, self.came, self.refused = True, threading.Condition(), threading.Event()
        outer = self

        class Door(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                is_ours = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                status = 404 if not is_ours else 200 if outer.is_up else outer.status
                if status == 200:
                    request = ExportTraceServiceRequest.FromString(body)
                    with outer.came:
                        outer.resources += request.resource_spans
                        outer.came.notify_all()
                else:
                    outer.num_refused += 1
                    outer.refused.set()
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def spans(self):
        return [s for resource in self.resources for scope in resource.scope_spans for s in scope.spans]

    def wait_for(self, number):
        with self.came:
            assert self.came.wait_for(lambda: len(self.spans) >= number, 30), self.spans
            return list(self.spans)

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


class Watched:
    """Nissa without Ray, on a bus of this process, with its traces on."""

    def __init__(self, endpoint: str) -> None:
        self.bus = MemoryBus()
        self.sender = SpanSender(Collector(endpoint, timeout_s=1.0), every_s=0.02)
        self.nissa = NissaActor(lambda: self.bus, self.sender.add)

    def tell(self, topic, *bodies):
        self.bus.publish([OonaMessage.of(topic, body, sender_id="trainer", key=RUN) for body in bodies])
        self.bus.flush()
        self.nissa.drain(RUN, timeout_s=30)

    def close(self):
        self.nissa.stop()
        self.sender.stop()


@pytest.fixture
def watch():
    watched = []

    def opened(endpoint):
        watched.append(Watched(endpoint))
        return watched[-1]

    yield opened
    for one in watched:
        one.close()


def moved(before, after, at, **changes):
    return LifecycleEvent(**{
        "run_id": RUN, "step": 7, "epoch": 1, "site": "stages.0", "seed": "s0", "blueprint": "se", "from_stage": before,
        "to_stage": after, "reason": f"to {after.value}", "trace_id": TRACE, "timestamp": at, **changes,
    })  # fmt: skip


def text(attributes, name):
    return next(pair.value.string_value for pair in attributes if pair.key == name)


def test_an_adaptation_arrives_as_a_trace(receiver, watch):
    now = round(time.time(), 3)
    nissa = watch(receiver.address)
    nissa.tell(
        Topic.LIFECYCLE, moved(S.DORMANT, S.GERMINATED, now), moved(S.GERMINATED, S.TRAINING, now + 1),
        moved(S.TRAINING, S.GRAFTING, now + 1.5, refused=True, reason="no proven gain"),
        moved(S.TRAINING, S.GRAFTING, now + 2),
    )  # fmt: skip
    assert [span.name for span in receiver.wait_for(2)] == ["germinated", "training"]  # as they end
    native = RungChange(
        run_id=RUN, step=8, epoch=1, site="stages.0", seed="s0", rung=Rung.NATIVE, reason="faster", trace_id=TRACE,
        timestamp=now + 2.5,
    )  # fmt: skip
    nissa.tell(Topic.RUNGS, native)
    nissa.tell(Topic.LIFECYCLE, moved(S.GRAFTING, S.ROLLED_BACK, now + 3, reason="norms x 12"))
    *children, root = receiver.wait_for(4)
    assert root.name == "adaptation"
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id == b""
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (int(now * 1e9), int((now + 3) * 1e9))
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert root.status.message == "norms x 12"
    assert [c.name for c in children] == ["germinated", "training", "grafting"]
    assert {c.trace_id.hex() for c in children} == {TRACE}
    assert {c.parent_span_id for c in children} == {root.span_id}
    assert text(root.attributes, "esper.site") == "stages.0"
    # the alert that Nissa raises of this very event is in the trace that it ends
    assert [event.name for event in root.events] == ["refused", "native_code", "alert.rollbacks", "rolled_back"]
    assert text(root.events[0].attributes, "esper.reason") == "no proven gain"
    assert "esper" in text(root.events[2].attributes, "esper.command")
    assert text(receiver.resources[0].resource.attributes, "service.name") == "esper"
    assert nissa.sender.missing() == ""


def test_without_its_collector_nissa_goes_on_says_so_once_and_delivers_when_it_is_back(receiver, watch, caplog):
    now = time.time()
    receiver.is_up = False
    nissa = watch(receiver.address)
    nissa.tell(Topic.LIFECYCLE, moved(S.DORMANT, S.GERMINATED, now), moved(S.GERMINATED, S.TRAINING, now + 1))
    for _ in range(3):
        receiver.refused.clear()
        assert receiver.refused.wait(30)
    assert nissa.nissa.snapshot(RUN).num_notes == 2  # it follows the run all the same
    assert "1 spans were not delivered" in nissa.sender.missing()
    assert f"{receiver.address}/v1/traces did not take them" in nissa.sender.missing()
    assert caplog.text.count("traces.undelivered") == 1
    assert "Failed to export" not in caplog.text  # the exporter would say it at every try
    receiver.is_up = True
    assert [span.name for span in receiver.wait_for(1)] == ["germinated"]
    assert nissa.sender.missing() == ""


def test_spans_that_the_collector_will_never_take_do_not_hold_up_those_behind_them(receiver, watch):
    now = time.time()
    receiver.is_up, receiver.status = False, 413
    nissa = watch(receiver.address)
    nissa.tell(Topic.LIFECYCLE, moved(S.DORMANT, S.GERMINATED, now), moved(S.GERMINATED, S.TRAINING, now + 1))
    assert receiver.refused.wait(30)
    assert "1 spans were not delivered" in nissa.sender.missing()
    receiver.is_up = True
    nissa.tell(Topic.LIFECYCLE, moved(S.TRAINING, S.GRAFTING, now + 2))
    assert [span.name for span in receiver.wait_for(1)] == ["training"]
    assert nissa.sender.missing() == "", "it was told"


def test_a_collector_that_is_not_there_holds_nothing_up(receiver, watch):
    receiver.server.server_close()  # nobody listens at its port any more
    nissa = watch(receiver.address)
    nissa.tell(
        Topic.LIFECYCLE, moved(S.DORMANT, S.GERMINATED, time.time()), moved(S.GERMINATED, S.TRAINING, time.time())
    )
    assert nissa.nissa.snapshot(RUN).num_notes == 2
    assert "not delivered" in nissa.sender.missing()


def test_traces_of_runs_that_were_over_long_ago_are_left_out(receiver, watch):
    nissa, now = watch(receiver.address), time.time()
    old = {"trace_id": "f" * 32, "run_id": "old"}
    nissa.tell(
        Topic.LIFECYCLE,
        moved(S.DORMANT, S.GERMINATED, now - 900, **old), moved(S.GERMINATED, S.CANCELLED, now - 800, **old),
        moved(S.DORMANT, S.GERMINATED, now - 900), moved(S.GERMINATED, S.CANCELLED, now),
    )  # fmt: skip
    spans = receiver.wait_for(2)
    assert {span.trace_id.hex() for span in spans} == {TRACE}


def test_an_endpoint_without_the_exporter_is_refused_at_the_start_by_its_field(monkeypatch, tmp_path):
    from actors.launch import run

    config = load_config("configs/digits.yaml", [f"storage={tmp_path}", "nissa.otlp_endpoint=http://127.0.0.1:4318"])
    otlp.check(config.nissa.otlp_endpoint)  # it is installed here
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(ConfigError, match=r"nissa\.otlp_endpoint: .* not installed .*esper-morphogen\[otel\]"):
        run(lambda: None, config)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="not installed"):
        Collector("http://127.0.0.1:4318", timeout_s=1.0)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://there:4318", "http://there:4318/v1/traces"),
        ("http://there:4318/", "http://there:4318/v1/traces"),
        ("https://there/otlp/v1/traces", "https://there/otlp/v1/traces"),
    ],
)
def test_the_standard_path_is_added_where_there_is_none(given, asked):
    collector = Collector(given, timeout_s=1.0)
    assert collector.address == asked
    collector.close()


@pytest.mark.parametrize(
    "bad", ["127.0.0.1:4318", "ftp://there", "http://", "http://there?x=1", "http://me:secret@there"]
)
def test_what_is_no_address_is_refused_by_the_configuration(bad):
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load_config("configs/digits.yaml", [f"nissa.otlp_endpoint={bad}"])
