"""OpenTelemetry traces across api -> storage -> worker -> dispatcher; nothing is imported or sent unless an endpoint is configured.

The trace context of a submission is stored with the evaluation (W3C `traceparent`), so that the worker that claims it hours
later continues the same trace.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from crucible.settings import TracingSettings


class Tracing:
    """The tracer of this process, or nothing at all."""

    def __init__(self, settings: TracingSettings, service: str) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if settings.otlp_endpoint is None:
            return
        from opentelemetry import trace  # noqa: PLC0415 - an extra that is absent unless tracing is wanted
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), sampler=ParentBasedTraceIdRatio(settings.sample_ratio)
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"))
        )
        self._tracer = trace.get_tracer("crucible", tracer_provider=self._provider)

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._tracer is not None

    def wrap_app(self, app: Any) -> Any:
        """Return the ASGI app with a server span around each request."""
        if not self.enabled:
            return app
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415

        return OpenTelemetryMiddleware(app, tracer_provider=self._provider)

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
        with self._tracer.start_as_current_span(name, context=context, attributes=attributes):
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
        """Send what is still held."""
        if self._provider is not None:
            self._provider.shutdown()
