"""Celery's whole configuration. Storage builds messages with it and the worker consumes with it; nothing declares with it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from celery import Celery
from kombu.entity import Exchange, Queue

from crucible.broker import topology
from crucible.broker.connection import connection_options
from crucible.broker.transports import for_kombu
from crucible.limits import SizeClass

if TYPE_CHECKING:
    from crucible.broker.urls import BrokerUrl
    from crucible.settings import BrokerSettings


def make_app(url: BrokerUrl, settings: BrokerSettings) -> Celery:
    """Return a Celery application for this broker, without tasks. Nothing is connected yet."""
    app = Celery("crucible", set_as_current=False, fixups=[])
    app.conf.update(_configuration(url, settings))
    return app


def _configuration(url: BrokerUrl, settings: BrokerSettings) -> dict[str, Any]:
    options = connection_options(url, settings)
    return {
        # --- connection ---
        # One after the other from a random one on, and a pause only when all were tried.
        "broker_url": ";".join(map(for_kombu, random.sample(url.nodes, len(url.nodes)))),
        "broker_transport_options": options["transport_options"],
        "broker_use_ssl": options["ssl"],
        "broker_heartbeat": options["heartbeat"],
        "broker_connection_timeout": options["connect_timeout"],
        "broker_failover_strategy": "round-robin",
        # For ever, since a worker is of no use without a broker; Celery waits one more second each time, up to 30.
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # --- messages ---
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_protocol": 2,
        "task_queues": [_queue(size_class, url, settings) for size_class in SizeClass],
        "task_create_missing_queues": False,
        "task_default_queue": topology.queue_name(SizeClass.SMALL),
        # --- deliveries: held for as long as the evaluation runs, one per slot ---
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # An exception in our task is a mistake of ours: the broker must not take the message for done.
        "task_acks_on_failure_or_timeout": False,
        "worker_prefetch_multiplier": 1,
        # RabbitMQ 4 has no prefetch count per channel; each consumer has its own.
        "worker_detect_quorum_queues": True,
        # A lost connection returns what was held to the broker, and the table decides who runs it: the run goes on.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_prefetch_count_reduction": False,
        # --- what is not used, so that no queue, exchange or channel exists for it ---
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "result_backend": "disabled://",
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
        "broker_pool_limit": None,
        # --- a service logs and signals in its own way ---
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "timezone": "UTC",
        "enable_utc": True,
    }


def _queue(size_class: SizeClass, url: BrokerUrl, settings: BrokerSettings) -> Queue:
    """Return the queue as it must exist. Services may not declare: `crucible broker apply` does."""
    if url.kind == "redis":
        # Straight into the list: kombu's exchanges on Redis are tables that would have to be kept.
        return Queue(topology.queue_name(size_class), Exchange(""), topology.queue_name(size_class), no_declare=True)
    found = topology.evaluation_queue(size_class, settings)
    return Queue(
        found.name,
        Exchange(topology.EXCHANGE, type="topic", durable=True, no_declare=True),
        topology.routing_key(size_class),
        durable=True,
        queue_arguments=dict(found.arguments),
        no_declare=True,
    )
