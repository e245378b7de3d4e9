"""Metrics: the names and labels that rules, dashboards and alerts are written against."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from crucible import metrics
from crucible.health import Health
from crucible.service import make_app

pytestmark = pytest.mark.unit

# The platform's list (name: labels at least). What needs a cluster (watch lag, leadership, gVisor nodes) comes with the parts that have it.
PROMISED = {
    "http_requests_total": {"service", "route", "code"},
    "http_request_duration_seconds": {"service", "route", "code"},
    "evaluation_submitted_total": {"priority"},
    "evaluation_terminal_total": {"status", "reason"},
    "evaluation_queue_wait_seconds": {"priority"},
    "evaluation_schedule_seconds": set(),
    "evaluation_run_seconds": set(),
    "evaluation_result_visible_seconds": set(),
    "dispatcher_jobs_created_total": {"result"},
    "storage_op_duration_seconds": {"backend", "op"},
    "dlq_size": set(),
    "dlq_additions_total": {"reason"},
    "dlq_retries_total": set(),
    "broker_up": {"broker"},
    "broker_published_total": {"broker", "result"},
    "broker_publish_confirm_seconds": {"broker"},
    "broker_queue_messages": {"broker", "queue"},
    "broker_consumers": {"broker", "queue"},
    "event_published_total": {"type"},
    "event_redelivered_total": {"group"},
    "event_out_of_order_total": {"group"},
    "event_dead_total": {"group"},
    "event_stream_up": {"part"},
    "event_stream_lag": {"group"},
    "event_stream_pending": {"group"},
    "event_stream_entries": set(),
    "event_stream_appended_total": set(),
    "event_stream_rebuilt_total": set(),
    "hint_backlog": set(),
    "hint_oldest_seconds": set(),
    "hints_repaired_total": {"why"},
    "evaluation_queue_depth": {"size_class", "priority"},
    "evaluation_queue_oldest_seconds": {"size_class", "priority"},
}


def defined() -> dict[str, MetricWrapperBase]:
    """Return our metrics by the name under which Prometheus finds them."""
    found = {}
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            found[value._name + ("_total" if value._type == "counter" else "")] = value
    return found


@pytest.mark.parametrize(("name", "labels"), PROMISED.items())
def test_a_promised_metric_exists_with_its_labels(name: str, labels: set[str]) -> None:
    assert labels <= set(defined()[name]._labelnames)


def test_every_metric_is_explained_and_in_the_one_registry() -> None:
    families = {family.name: family for family in metrics.REGISTRY.collect()}
    for name in defined():
        assert families[name.removesuffix("_total")].documentation, name


def test_the_api_promises_have_a_bucket_each() -> None:
    assert {0.1, 0.2, 0.5, 1.0} <= set(metrics.HTTP_SECONDS._upper_bounds)


def test_waits_and_runs_have_buckets_up_to_the_longest_evaluation() -> None:
    for histogram in (metrics.QUEUE_WAIT, metrics.RUN_SECONDS):
        assert 3600 in histogram._kwargs["buckets"]


def test_the_exposition_is_what_prometheus_reads_with_the_process_own_memory() -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert families["dlq_size"].type == "gauge"
    assert [name for name in families if name.endswith("_created")] == ["dispatcher_jobs_created"]
    # Where there is a /proc to read it from.
    assert ("process_resident_memory_bytes" in families) == Path("/proc/self/stat").exists()


async def test_requests_are_counted_by_route_and_never_by_what_callers_make_up() -> None:
    app = make_app("counted", Health("counted", "1"), title="t", description="d")

    @app.get("/things/{name}")
    async def thing(name: str) -> str:
        return name

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        for number in range(5):
            await http.get(f"/things/{number}")
            await http.get(f"/made-up/{number}")
            await http.request(f"VERB{number}", "/things/1")
        text = (await http.get("/metrics")).text
    [requests] = [family for family in text_string_to_metric_families(text) if family.name == "http_requests"]
    ours = {
        (sample.labels["route"], sample.labels["method"], sample.labels["code"]): sample.value
        for sample in requests.samples
        if sample.labels["service"] == "counted" and sample.name == "http_requests_total"
    }
    assert ours[("/things/{name}", "GET", "200")] == 5
    assert ours[("unmatched", "GET", "404")] == 5
    assert {method for _, method, _ in ours} == {"GET", "other"}
    assert len(ours) == 3
