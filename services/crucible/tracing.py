"""OpenTelemetry traces across api -> storage -> worker -> dispatcher; nothing is imported or sent unless an endpoint is configured.

The trace context of a submission is stored with the evaluation (W3C `traceparent`), so that the worker that claims it hours
later continues the same trace.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from crucible.settings import TracingSettings

# Probes and scrapes would be most of all traces, and say nothing about an evaluation.
_UNTRACED = "/healthz$,/readyz$,/health$,/metrics$"
# Spans are worth less than a prompt shutdown: a collector that does not answer is waited for this long.
_EXPORT_TIMEOUT_S = 2.0


class TracingUnavailableError(RuntimeError):
    """Tracing is configured, but the packages that do it are not installed."""


class Tracing:
    """The tracer of this process, or nothing at all.

    Raises:
        TracingUnavailableError: an endpoint is configured, and the extra `crucible[otel]` is not installed.
    """

    def __init__(self, settings: TracingSettings, service: str) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if settings.otlp_endpoint is None:
            return
        try:
            self._start(settings.otlp_endpoint, settings.sample_ratio, service)
        except ImportError as error:
            raise TracingUnavailableError(
                "CRUCIBLE_TRACING__OTLP_ENDPOINT is set, but OpenTelemetry is not installed; install crucible[otel]"
            ) from error

    def _start(self, endpoint: str, sample_ratio: float, service: str) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra that is absent unless tracing is wanted
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), sampler=ParentBasedTraceIdRatio(sample_ratio)
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = trace.get_tracer("crucible", tracer_provider=self._provider)

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._tracer is not None

    def wrap_app(self, app: Any) -> Any:
        """Return the ASGI app with a server span around each request, whose trace id is in every log line of the request."""
        if not self.enabled:
            return app
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415

        return OpenTelemetryMiddleware(
            self._inside_span(app),
            excluded_urls=_UNTRACED,
            tracer_provider=self._provider,
            # One span a request; every chunk that is read or written is not news.
            exclude_spans=["receive", "send"],
        )

    def _inside_span(self, app: ASGIApp) -> ASGIApp:
        from opentelemetry import trace  # noqa: PLC0415

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            span = trace.get_current_span()

            async def send_named(message: Message) -> None:
                # Known only now, and the span ends with the last message. Ids in names would make each span a kind of its own.
                route = getattr(scope.get("route"), "path", None)
                if route is not None and message["type"] == "http.response.start":
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.route", route)
                await send(message)

            with self._trace_id_in_logs():
                await app(scope, receive, send_named)

        return traced

    @contextmanager
    def _trace_id_in_logs(self) -> Iterator[None]:
        from opentelemetry import trace  # noqa: PLC0415

        context = trace.get_current_span().get_span_context()
        with ExitStack() as stack:
            if context.is_valid:
                trace_id = trace.format_trace_id(context.trace_id)
                stack.enter_context(structlog.contextvars.bound_contextvars(trace_id=trace_id))
            yield

    def watch_client(self, client: httpx.AsyncClient) -> None:
        """Give each request of a client a span, and pass the context on in its headers."""
        if self.enabled:
            from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor  # noqa: PLC0415

            HTTPXClientInstrumentor.instrument_client(client, tracer_provider=self._provider)

    @contextmanager
    def span(self, name: str, *, traceparent: str | None = None, **attributes: str | int) -> Iterator[None]:
        """Record a span, continuing a stored trace if one is given."""
        if not self.enabled:
            yield
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None
        with (
            self._tracer.start_as_current_span(name, context=context, attributes=attributes),
            self._trace_id_in_logs(),
        ):
            yield

    def traceparent(self) -> str | None:
        """Return the current context as a W3C `traceparent`, for storing."""
        if not self.enabled:
            return None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier.get("traceparent")

    def shutdown(self) -> None:
        """Send what is still held; a collector that does not answer is not waited for long. Blocks meanwhile."""
        if self._provider is not None:
            self._provider.shutdown()
