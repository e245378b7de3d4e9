"""What an operator is told to watch is there to be watched: RabbitMQ's own metrics by their names, and ours for the same queues."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from crucible import metrics
from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import queue_name
from crucible.broker.urls import BrokerUrl
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings
from tests.support.capabilities import needs
from tests.support.storage import new_id
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from tests.servers.rabbitmq import RabbitCluster

pytestmark = [pytest.mark.integration, needs("rabbitmq")]

GUIDE = Path(__file__).parents[2] / "docs" / "broker.md"


SAMPLE = re.compile(r"^([a-z_]+)(\{.*\})? (\S+)$", re.MULTILINE)


def scrape(url: str) -> dict[str, dict[str, float]]:
    """Read an exposition: the samples by their name, then by their labels as they are written."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in SAMPLE.findall(httpx.get(url, timeout=10).text):
        found.setdefault(name, {})[labels] = float(value)
    return found


def test_the_metrics_that_the_guide_names_are_what_rabbitmq_tells(rabbitmq: RabbitCluster, rabbit_vhost: str) -> None:
    with Publisher(BrokerUrl.parse(rabbitmq.url(vhost=rabbit_vhost)), BrokerSettings()) as publisher:
        publisher.declare()
        publisher.publish([Hint(new_id(), SizeClass.SMALL, 5, None)], 10)
    url = rabbitmq.leader_of(queue_name(SizeClass.SMALL), rabbit_vhost).prometheus_url
    families = ("ra_metrics", "queue_coarse_metrics", "queue_consumer_count")
    told = scrape(url) | scrape(f"{url}/detailed?{'&'.join(f'family={name}' for name in families)}")
    named = set(re.findall(r"`(rabbitmq_(?!prometheus`)[a-z_]+)`", GUIDE.read_text()))
    assert len(named) > 5
    assert named - set(told) == set()


def test_every_queue_tells_its_own_depth_at_the_node_that_leads_it(rabbitmq: RabbitCluster, rabbit_vhost: str) -> None:
    with Publisher(BrokerUrl.parse(rabbitmq.url(vhost=rabbit_vhost)), BrokerSettings()) as publisher:
        publisher.declare()
        assert all(publisher.publish([Hint(new_id(), SizeClass.MEDIUM, 5, None) for _ in range(7)], 10))
    queue = queue_name(SizeClass.MEDIUM)
    leader = rabbitmq.leader_of(queue, rabbit_vhost)
    query = f"vhost={rabbit_vhost}&family=queue_coarse_metrics&family=queue_consumer_count"

    def depth() -> float | None:
        told = scrape(f"{leader.prometheus_url}/detailed?{query}")
        samples = told.get("rabbitmq_detailed_queue_messages_ready", {})
        return next((value for labels, value in samples.items() if f'queue="{queue}"' in labels), None)

    wait_until(lambda: depth() == 7, timeout=20, describe="the leader to tell of seven messages")


def test_our_own_metrics_that_the_guide_names_exist() -> None:
    text = metrics.exposition().decode()
    named = set(re.findall(r"`((?:broker|hint|hints|dlq|worker|evaluation|storage)_[a-z_]+)`", GUIDE.read_text()))
    assert len(named) > 10
    assert {
        name for name in named if f"# TYPE {name}" not in text and f"# TYPE {name.removesuffix('_total')}" not in text
    } == set()
