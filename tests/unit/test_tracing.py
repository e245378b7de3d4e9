"""Tracing: absent unless asked for, and then one trace through every call, in spans and in log lines.

The spans are collected in memory; the wire to a collector is shown in tests/integration/test_tracing.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from crucible.settings import TracingSettings
from crucible.tracing import Tracing, TracingUnavailableError

pytestmark = pytest.mark.unit

STORED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Iterator[Tracing]:
    """Tracing as it is when configured, but for the exporter, which keeps the spans here."""
    tracing = Tracing(TracingSettings(), "test")
    tracing._provider = TracerProvider()
    tracing._provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing._tracer = tracing._provider.get_tracer("crucible")
    yield tracing
    tracing.shutdown()


def app_that_tells(seen: list[dict[str, Any]], then: httpx.AsyncClient | None = None) -> FastAPI:
    """An app that notes what is bound for its log lines, and calls the next service if there is one."""
    app = FastAPI()

    @app.get("/work")
    async def work() -> None:
        seen.append(structlog.contextvars.get_contextvars())
        if then:
            await then.get("/work")

    @app.get("/things/{thing_id}")
    async def thing(thing_id: str) -> str:
        return thing_id

    @app.get("/healthz")
    async def healthz() -> None:
        seen.append(structlog.contextvars.get_contextvars())

    return app


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


def test_it_is_off_by_default_and_costs_no_import() -> None:
    script = (
        "import sys; from crucible.settings import TracingSettings; from crucible.tracing import Tracing\n"
        "t = Tracing(TracingSettings(), 'x'); assert not t.enabled\n"
        "app = object(); assert t.wrap_app(app) is app\n"
        "with t.span('work', attempt=1): assert t.traceparent() is None\n"
        "t.watch_client(None); t.shutdown()\n"
        "loaded = [name for name in sys.modules if name.startswith('opentelemetry')]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingUnavailableError, match=r"install crucible\[otel\]"):
        Tracing(TracingSettings(otlp_endpoint="http://localhost:4318"), "x")


async def test_one_trace_goes_through_every_service(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    seen: list[dict[str, Any]] = []
    async with client_of(tracing.wrap_app(app_that_tells(seen))) as to_storage:
        tracing.watch_client(to_storage)
        async with client_of(tracing.wrap_app(app_that_tells(seen, to_storage))) as to_api:
            await to_api.get("/work")
    found = spans.get_finished_spans()
    # Within one process the inner service's span is an internal one, as OpenTelemetry defines it.
    assert [span.kind for span in found] == [SpanKind.INTERNAL, SpanKind.CLIENT, SpanKind.SERVER]
    assert len({span.context.trace_id for span in found}) == 1
    storage, call, api = found
    assert api.name == storage.name == "GET /work"
    assert storage.parent is not None
    assert call.parent is not None
    assert (storage.parent.span_id, call.parent.span_id) == (call.context.span_id, api.context.span_id)


async def test_the_trace_id_is_bound_for_log_lines_and_let_go_after(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    seen: list[dict[str, Any]] = []
    async with client_of(tracing.wrap_app(app_that_tells(seen))) as http:
        await http.get("/work")
    [span] = spans.get_finished_spans()
    assert seen == [{"trace_id": f"{span.context.trace_id:032x}"}]
    assert "trace_id" not in structlog.contextvars.get_contextvars()


async def test_spans_are_named_by_route_and_not_by_what_is_in_the_path(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    async with client_of(tracing.wrap_app(app_that_tells([]))) as http:
        await http.get("/things/ev-1")
        await http.get("/things/ev-2")
    assert {span.name for span in spans.get_finished_spans()} == {"GET /things/{thing_id}"}


async def test_probes_make_no_spans(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    seen: list[dict[str, Any]] = []
    async with client_of(tracing.wrap_app(app_that_tells(seen))) as http:
        await http.get("/healthz")
    assert spans.get_finished_spans() == ()
    assert seen == [{}]


def test_a_stored_trace_is_continued_by_whoever_takes_the_work_up_later(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    with tracing.span("evaluation.run", traceparent=STORED, attempt=2):
        assert structlog.contextvars.get_contextvars()["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        inner = tracing.traceparent()
    [span] = spans.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes == {"attempt": 2}
    assert inner == f"00-0af7651916cd43dd8448eb211c80319c-{span.context.span_id:016x}-01"


@pytest.mark.parametrize("stored", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\ud800"])
def test_a_stored_trace_that_cannot_be_read_begins_a_new_one(
    tracing: Tracing, spans: InMemorySpanExporter, stored: str
) -> None:
    with tracing.span("evaluation.run", traceparent=stored):
        pass
    [span] = spans.get_finished_spans()
    assert span.parent is None


def test_a_failure_is_recorded_and_passed_on(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    with pytest.raises(KeyError), tracing.span("evaluation.run"):
        raise KeyError
    [span] = spans.get_finished_spans()
    assert not span.status.is_ok
    assert "trace_id" not in structlog.contextvars.get_contextvars()
