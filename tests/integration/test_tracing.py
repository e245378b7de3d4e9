"""Tracing on the wire: spans reach an OTLP/HTTP collector as protobuf, and a collector that is away costs nobody anything."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import perf_counter

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from crucible.settings import TracingSettings
from crucible.tracing import Tracing
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.platform import running_platform

pytestmark = pytest.mark.integration


class Collector:
    """What an OpenTelemetry collector does with traces, as far as a test needs it: it takes them in and keeps them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, path: str, request: ExportTraceServiceRequest) -> None:
        self.paths.add(path)
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def is_sampled(traceparent: str) -> bool:
    """Read the flag of W3C Trace Context, section 3.2.2.5.1."""
    return bool(int(traceparent.rpartition("-")[2], 16) & 1)


def test_spans_reach_the_collector_at_the_latest_on_shutdown(collector: Collector) -> None:
    tracing = Tracing(TracingSettings(otlp_endpoint=collector.url + "/"), "crucible")
    with tracing.span("evaluation.run", evaluation_id="ev-1", attempt=1):
        traceparent = tracing.traceparent()
    tracing.shutdown()
    [span] = collector.spans
    assert traceparent is not None
    assert traceparent.rpartition("-")[0] == f"00-{span.trace_id.hex()}-{span.span_id.hex()}"
    assert is_sampled(traceparent)
    assert span.name == "evaluation.run"
    assert {item.key for item in span.attributes} == {"evaluation_id", "attempt"}
    assert (collector.services, collector.paths) == ({"crucible"}, {"/v1/traces"})


def test_what_is_not_sampled_is_not_sent_but_still_handed_on(collector: Collector) -> None:
    tracing = Tracing(TracingSettings(otlp_endpoint=collector.url, sample_ratio=0.0), "crucible")
    with tracing.span("evaluation.run"):
        traceparent = tracing.traceparent()
    tracing.shutdown()
    assert traceparent is not None
    assert not is_sampled(traceparent)
    assert collector.spans == []


def test_a_collector_that_is_away_delays_neither_the_work_nor_the_shutdown_for_long(collector: Collector) -> None:
    collector.close()
    tracing = Tracing(TracingSettings(otlp_endpoint=collector.url), "crucible")
    started = perf_counter()
    for _ in range(100):
        with tracing.span("evaluation.run"):
            pass
    assert perf_counter() - started < 1.0
    started = perf_counter()
    tracing.shutdown()
    assert perf_counter() - started < 10.0


@needs("postgres", "sandbox")
async def test_one_trace_follows_an_evaluation_from_its_submission_to_its_end(collector: Collector) -> None:
    for folder in scratch_dir():
        async with running_platform(folder, tracing={"otlp_endpoint": collector.url}) as (_, client):
            await client.run("print('hello')")
    by_id = {span.span_id: span for span in collector.spans}
    [submission] = [span for span in collector.spans if span.name == "POST /v1/evaluations"]
    ours = [span for span in collector.spans if span.trace_id == submission.trace_id]
    names = {span.name for span in ours}
    # api -> storage, then, from the stored context, worker -> dispatcher -> storage
    assert {"submit", "evaluation.run", "sandbox.run"} <= names
    assert {"POST /internal/evaluations", "PUT /internal/sandboxes/{evaluation_id}"} <= names
    assert "POST /internal/evaluations/{evaluation_id}/finish" in names
    for span in ours:
        assert span is submission or by_id[span.parent_span_id].trace_id == submission.trace_id
