"""Prometheus metrics: every name that the platform exposes, in one place, so that rules and dashboards have one source."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

# A second series of the same size beside every counter and histogram, which nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
# Memory, open files and CPU of the process itself, read when asked; nothing on systems without /proc.
ProcessCollector(registry=REGISTRY)
CONTENT_TYPE = CONTENT_TYPE_LATEST

# From a cached check (1 ms) to a slow write; the API's promises sit at 0.1, 0.2, 0.5 and 1 s.
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# Waiting and running: from an idle laptop to the longest evaluation (3600 s).
_LIFE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)

HTTP_REQUESTS = Counter(
    "http_requests_total", "HTTP requests answered", ["service", "route", "method", "code"], registry=REGISTRY
)
HTTP_SECONDS = Histogram(
    "http_request_duration_seconds",
    "Time to answer an HTTP request",
    ["service", "route", "code"],
    buckets=_REQUEST_BUCKETS,
    registry=REGISTRY,
)
SUBMITTED = Counter("evaluation_submitted_total", "Evaluations accepted", ["priority"], registry=REGISTRY)
REJECTED = Counter("evaluation_rejected_total", "Submissions refused", ["problem"], registry=REGISTRY)
TERMINAL = Counter("evaluation_terminal_total", "Evaluations that ended", ["status", "reason"], registry=REGISTRY)
REQUEUED = Counter(
    "evaluation_requeued_total", "Attempts that were void and queued again", ["reason"], registry=REGISTRY
)
QUEUE_WAIT = Histogram(
    "evaluation_queue_wait_seconds", "From queued to claimed", ["priority"], buckets=_LIFE_BUCKETS, registry=REGISTRY
)
SCHEDULE_SECONDS = Histogram(
    "evaluation_schedule_seconds", "From claimed to running", buckets=_LIFE_BUCKETS, registry=REGISTRY
)
RUN_SECONDS = Histogram("evaluation_run_seconds", "From running to ended", buckets=_LIFE_BUCKETS, registry=REGISTRY)
RESULT_VISIBLE = Histogram(
    "evaluation_result_visible_seconds",
    "From the sandbox's end to a readable result",
    buckets=_LIFE_BUCKETS,
    registry=REGISTRY,
)
SANDBOXES = Counter("dispatcher_jobs_created_total", "Sandboxes created", ["result"], registry=REGISTRY)
SANDBOXES_LIVE = Gauge("dispatcher_sandboxes", "Sandboxes that exist now", registry=REGISTRY)
SANDBOXES_STARTING = Gauge(
    "dispatcher_sandboxes_starting", "Sandboxes asked for that have not begun to run", registry=REGISTRY
)
STORAGE_SECONDS = Histogram(
    "storage_op_duration_seconds",
    "Time of a storage operation",
    ["backend", "op"],
    buckets=_REQUEST_BUCKETS,
    registry=REGISTRY,
)
OBJECT_BYTES = Counter(
    "storage_object_bytes_total", "Bytes moved to and from the object store", ["backend", "op"], registry=REGISTRY
)
OUTBOX_LAG = Gauge("storage_outbox_oldest_seconds", "Age of the oldest event not yet published", registry=REGISTRY)
EVENTS_PUBLISHED = Counter("event_published_total", "Events handed to the bus", ["type"], registry=REGISTRY)
EVENT_STREAM_UP = Gauge(
    "event_stream_up", "1 while Redis serves events to a part (relay, bus or consumer)", ["part"], registry=REGISTRY
)
EVENT_STREAM_APPENDED = Counter("event_stream_appended_total", "Events added to the stream", registry=REGISTRY)
EVENT_STREAM_REBUILT = Counter(
    "event_stream_rebuilt_total",
    "Times that Redis had lost events and was told again from the table",
    registry=REGISTRY,
)
EVENT_STREAM_ENTRIES = Gauge("event_stream_entries", "Events in the stream", registry=REGISTRY)
EVENT_STREAM_LAG = Gauge(
    "event_stream_lag", "Events that no consumer of a group has been given yet", ["group"], registry=REGISTRY
)
EVENT_STREAM_PENDING = Gauge(
    "event_stream_pending", "Events given to a consumer and not acknowledged yet", ["group"], registry=REGISTRY
)
EVENT_REDELIVERED = Counter(
    "event_redelivered_total", "Events that came to a consumer group more than once", ["group"], registry=REGISTRY
)
EVENT_OUT_OF_ORDER = Counter(
    "event_out_of_order_total",
    "Events that came after a later one of the same evaluation",
    ["group"],
    registry=REGISTRY,
)
EVENT_DEAD = Counter(
    "event_dead_total", "Events that a consumer group could not handle and gave up", ["group"], registry=REGISTRY
)
QUEUE_DEPTH = Gauge(
    "evaluation_queue_depth",
    "Evaluations that wait, by effective priority",
    ["size_class", "priority"],
    registry=REGISTRY,
)
QUEUE_OLDEST = Gauge(
    "evaluation_queue_oldest_seconds",
    "Longest present wait, by effective priority",
    ["size_class", "priority"],
    registry=REGISTRY,
)
DLQ_SIZE = Gauge("dlq_size", "Dead letters not yet replayed or deleted", registry=REGISTRY)
DLQ_ADDITIONS = Counter(
    "dlq_additions_total", "Evaluations that became dead letters, by their last cause", ["reason"], registry=REGISTRY
)
DLQ_RETRIES = Counter("dlq_retries_total", "Dead letters that were replayed", registry=REGISTRY)
BROKER_UP = Gauge("broker_up", "1 while the broker takes hints", ["broker"], registry=REGISTRY)
BROKER_PUBLISHED = Counter(
    "broker_published_total",
    "Hints sent to the broker, by what became of them",
    ["broker", "result"],
    registry=REGISTRY,
)
BROKER_CONFIRM_SECONDS = Histogram(
    "broker_publish_confirm_seconds",
    "From sending a batch of hints to its last confirm",
    ["broker"],
    buckets=_REQUEST_BUCKETS,
    registry=REGISTRY,
)
BROKER_QUEUE_MESSAGES = Gauge(
    "broker_queue_messages", "Messages that no consumer holds", ["broker", "queue"], registry=REGISTRY
)
BROKER_CONSUMERS = Gauge("broker_consumers", "Consumers of a queue", ["broker", "queue"], registry=REGISTRY)
BROKER_RETURNED = Counter(
    "broker_returned_total", "Messages that the broker gave up, by its reason", ["broker", "reason"], registry=REGISTRY
)
HINT_BACKLOG = Gauge("hint_backlog", "Waiting evaluations of which no broker has been told", registry=REGISTRY)
HINT_OLDEST = Gauge("hint_oldest_seconds", "Longest present wait for the first hint", registry=REGISTRY)
HINTS_REPAIRED = Counter(
    "hints_repaired_total", "Hints that are published again, by why they had to be", ["why"], registry=REGISTRY
)
MONITOR_LEADER = Gauge(
    "monitor_is_leader", "1 while this replica compares what storage and the cluster believe", registry=REGISTRY
)
MONITOR_WATCH_LAG = Gauge(
    "monitor_watch_lag_seconds",
    "Since the API server was last heard on a watch; a healthy one is heard every 10 s",
    ["resource"],
    registry=REGISTRY,
)
MONITOR_SANDBOXES = Gauge("monitor_sandboxes", "Sandboxes that this replica follows", registry=REGISTRY)
MONITOR_SHIPPED = Counter(
    "monitor_shipped_bytes_total", "Output read from the logs of sandboxes and shipped to storage", registry=REGISTRY
)
MONITOR_LOG_RESTARTS = Counter(
    "monitor_log_restarts_total", "Logs of sandboxes that broke off and were read again", registry=REGISTRY
)
MONITOR_FINISH_SECONDS = Histogram(
    "monitor_finish_seconds",
    "From learning that a sandbox is over to its recorded end",
    buckets=_LIFE_BUCKETS,
    registry=REGISTRY,
)
MONITOR_SUSTAINED = Counter(
    "monitor_sustained_total",
    "Leases that this replica kept since no worker did; grows while evaluations run whose workers are gone",
    registry=REGISTRY,
)
MONITOR_RECONCILED = Counter(
    "monitor_reconciled_total",
    "What the leader found to differ between storage and the cluster",
    ["what"],
    registry=REGISTRY,
)
SLOTS = Gauge("worker_slots", "Worker slots", ["size_class", "state"], registry=REGISTRY)
WORKER_HINTS = Counter("worker_hints_total", "What became of messages from the broker", ["verdict"], registry=REGISTRY)
WORKER_CONNECTIONS = Counter(
    "worker_broker_connections_total", "Connections to the broker that a worker opened", registry=REGISTRY
)
BROKER_REDELIVERED = Counter(
    "broker_redelivered_total", "Messages that the broker handed out again", ["size_class"], registry=REGISTRY
)
BREAKER_OPEN = Gauge(
    "circuit_breaker_open", "1 while calls to a service are being refused", ["target"], registry=REGISTRY
)
CALL_RETRIES = Counter(
    "service_call_retries_total", "Calls between services that were tried again", ["target"], registry=REGISTRY
)
KUBERNETES_SECONDS = Histogram(
    "kubernetes_api_seconds",
    "Time until the Kubernetes API server began to answer (code `none`: it did not)",
    ["verb", "resource", "code"],
    buckets=_REQUEST_BUCKETS,
    registry=REGISTRY,
)
WATCH_RESTARTS = Counter(
    "monitor_watch_restarts_total",
    "Watches of the cluster that broke off and were taken up again",
    ["resource"],
    registry=REGISTRY,
)
CLEANUP_OBJECTS = Gauge(
    "cleanup_objects", "Objects of evaluations that are in the cluster", ["kind"], registry=REGISTRY
)
CLEANUP_STUCK = Gauge("cleanup_stuck_objects", "Objects that should be gone and cannot be removed", registry=REGISTRY)
CLEANUP_REMOVED = Counter(
    "cleanup_removed_total",
    "Attempts of which nothing is left in the cluster, by why they went",
    ["why"],
    registry=REGISTRY,
)
CLEANUP_SECONDS = Histogram(
    "cleanup_removal_seconds",
    "From the first step of an attempt's removal until nothing of it is left",
    buckets=_LIFE_BUCKETS,
    registry=REGISTRY,
)


def exposition() -> bytes:
    """Return all metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
