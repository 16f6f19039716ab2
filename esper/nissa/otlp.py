"""Spans to an OpenTelemetry collector, by OTLP over HTTP. The exporter is the extra `otel`; headers, certificates and
compression are its own settings, in the environment (`OTEL_EXPORTER_OTLP_HEADERS`, ...).
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from esper.leyline.errors import ConfigError, ConflictError, UnavailableError
from esper.nissa.spans import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator

FIELD = "nissa.otlp_endpoint"
SERVICE = "esper"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PATH = "/v1/traces"
_REFUSED = re.compile(r"\bcode: (400|413|415|422)\b")
"""In the exporter's words: what a collector says of spans that it will never take."""


def check(endpoint: str | None) -> None:
    """Says at once what would go wrong later.

    Raises:
        ConfigError: if an endpoint is given and the exporter is not installed here.
    """
    if endpoint is None:
        return
    try:
        importlib.import_module(_EXPORTER)
    except ImportError as error:
        raise ConfigError(
            "the OpenTelemetry exporter is not installed",
            field=FIELD,
            remedy="pip install 'esper-morphogen[otel]', or set it to null",
        ) from error


class Collector:
    """A collector from afar.

    Args:
        endpoint: such as `http://127.0.0.1:4318`; without a path the standard `/v1/traces` is added.
        timeout_s: how long a `send` may take, with what the exporter repeats.

    Raises:
        ConfigError: if the exporter is not installed here.
    """

    def __init__(self, endpoint: str, *, timeout_s: float) -> None:
        check(endpoint)
        self.address = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + _PATH
        exporter = importlib.import_module(_EXPORTER)
        self._done = importlib.import_module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS
        self._exporter = exporter.OTLPSpanExporter(endpoint=self.address, timeout=timeout_s)
        self._ids = _Ids()
        self._provider = self._provided()
        self._tracer = self._provider.get_tracer("esper.nissa")
        self._words = _LastWords()
        self._log = logging.getLogger(_EXPORTER)
        self._log.addHandler(self._words)
        self._log.propagate = False  # it would complain at every try

    def send(self, spans: Sequence[Span]) -> None:
        """Hands spans over.

        Raises:
            UnavailableError: if the collector did not take them, and may later.
            ConflictError: if it refused them for good: it will refuse them again.
        """
        made = [self._made(span) for span in spans]
        try:
            is_done = self._exporter.export(made) is self._done
        except Exception as error:  # some versions of the exporter let a lost connection through
            raise UnavailableError(f"{self.address} did not take them: {error}") from error
        if is_done:
            return
        if _REFUSED.search(self._words.last):
            raise ConflictError(f"{self.address} refused them: {self._words.last}")
        raise UnavailableError(f"{self.address} did not take them: {self._words.last}")

    def close(self) -> None:
        """Ends what it may be repeating."""
        self._exporter.shutdown()
        self._log.removeHandler(self._words)
        self._log.propagate = True

    def _provided(self) -> TracerProvider:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        # of its own: what else in this process is traced, by whom and how, is not ours
        resource = Resource.create({"service.name": SERVICE})
        limits = SpanLimits(max_events=1024)
        return TracerProvider(
            sampler=ALWAYS_ON,
            resource=resource,
            id_generator=cast("IdGenerator", self._ids),
            span_limits=limits,
            shutdown_on_exit=False,
        )

    def _made(self, span: Span) -> Any:
        """As the exporter wants it; ids and times are the span's own."""
        from opentelemetry.context import Context
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            Status,
            StatusCode,
            TraceFlags,
            set_span_in_context,
        )

        self._ids.trace, self._ids.span = int(span.trace_id, 16), int(span.span_id, 16)
        context = Context()
        if span.parent_id is not None:
            parent = SpanContext(self._ids.trace, int(span.parent_id, 16), False, TraceFlags(TraceFlags.SAMPLED))
            context = set_span_in_context(NonRecordingSpan(parent), context)
        made = self._tracer.start_span(
            span.name, context=context, attributes=dict(span.attributes), start_time=_ns(span.start)
        )
        for event in span.events:
            made.add_event(event.name, dict(event.attributes), _ns(event.at))
        if span.error is not None:
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(_ns(span.end))
        return made


class _Ids:
    """The SDK's generator of ids: gives those that were set."""

    trace = span = 0

    def generate_trace_id(self) -> int:
        return self.trace

    def generate_span_id(self) -> int:
        return self.span

    def is_trace_id_random(self) -> bool:
        return False


class _LastWords(logging.Handler):
    """Keeps what the exporter said last."""

    last = "no answer"

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
