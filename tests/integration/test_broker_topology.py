"""The topology in a real cluster: made, made again, compared; who may do what in it; and what its queues promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from amqp.exceptions import AccessRefused
from kombu.entity import Exchange, Queue

from crucible.broker.celery_app import make_app
from crucible.broker.definitions import definitions
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import DEAD_EXCHANGE, DEAD_QUEUE, EXCHANGE, USERS, queue_name, routing_key
from crucible.broker.urls import BrokerUrl
from crucible.limits import PRIORITY_MAX, SizeClass
from crucible.settings import BrokerSettings
from tests.servers.rabbitmq import RabbitCluster
from tests.servers.redis import RedisServer
from tests.support.broker import Installation, take
from tests.support.capabilities import needs
from tests.support.waits import wait_until

pytestmark = [pytest.mark.integration, needs("rabbitmq")]

SMALL = queue_name(SizeClass.SMALL)
PRIORITIES = PRIORITY_MAX + 1


@pytest.fixture
def empty(rabbitmq: RabbitCluster, rabbit_vhost: str) -> Iterator[Installation]:
    """A virtual host without anything."""
    found = Installation(rabbitmq, rabbit_vhost)
    wait_until(found.statistics_are_there, timeout=30, describe="every node to have told the others about itself")
    yield found
    found.forget()


@pytest.fixture
def ready(empty: Installation) -> Installation:
    """A virtual host with the whole topology."""
    assert empty.apply().remaining == []
    return empty


def hints(count: int, size_class: SizeClass = SizeClass.SMALL) -> list[Hint]:
    return [Hint(f"evaluation-{number}", size_class, number % PRIORITIES) for number in range(count)]


# --- made, and compared -------------------------------------------------------------------------------------------------------


def test_apply_makes_everything_and_a_second_time_changes_nothing(empty: Installation) -> None:
    made = empty.apply()
    assert made.remaining == []
    assert {f"queue {queue_name(size_class)}: made" for size_class in SizeClass} <= set(made.done)
    assert empty.apply().done == []
    assert empty.differences() == []


def test_apply_resolves_what_it_can_without_destroying_anything_and_names_the_rest(ready: Installation) -> None:
    with ready.publisher() as publisher:
        assert all(publisher.publish(hints(3), 10))
    manage = ready.cluster.manage
    manage("PUT", f"permissions/{ready.vhost}/crucible-worker", {"configure": "", "write": ".*", "read": ".*"})
    manage("PUT", f"queues/{ready.vhost}/evaluations.stray", {"durable": True})
    ready.options = {"queue_length_max": 7}
    applied = ready.apply()
    assert applied.done == ["user crucible-worker: set as the code says"]
    assert {(found.where, found.what) for found in applied.remaining} == {
        *((f"queue {queue_name(size_class)}", "argument x-max-length") for size_class in SizeClass),
        ("queue evaluations.stray", "the queue"),
    }
    with ready.publisher() as publisher:
        assert publisher.depths()[SizeClass.SMALL].ready == 3


def test_the_definitions_file_makes_the_same_and_may_be_imported_again(empty: Installation) -> None:
    document = definitions(empty.settings, empty.vhost, empty.passwords)
    assert not any(password in json.dumps(document) for password in empty.passwords.values())
    for _ in range(2):
        empty.cluster.manage("POST", "definitions", document)
        assert empty.differences() == []
    with empty.publisher("crucible-storage") as publisher:
        assert publisher.publish(hints(1), 10) == [True]


def broken_queue(installation: Installation, name: str, **arguments: Any) -> None:
    """Make one of our queues otherwise than the code says."""
    installation.cluster.manage("DELETE", f"queues/{installation.vhost}/{name}")
    installation.cluster.manage("PUT", f"queues/{installation.vhost}/{name}", {"durable": True, "arguments": arguments})


def test_verify_names_each_of_many_differences(ready: Installation) -> None:
    vhost, manage = ready.vhost, ready.cluster.manage
    medium, large = queue_name(SizeClass.MEDIUM), queue_name(SizeClass.LARGE)
    broken_queue(ready, medium, **{"x-queue-type": "classic", "x-max-length": 5})
    broken_queue(ready, large, **{"x-queue-type": "quorum", "x-quorum-initial-group-size": 1, "x-delivery-limit": 3})
    manage("DELETE", f"exchanges/{vhost}/{DEAD_EXCHANGE}")
    manage("PUT", f"exchanges/{vhost}/{DEAD_EXCHANGE}", {"type": "fanout", "durable": True})
    manage("PUT", f"exchanges/{vhost}/crucible.old", {"type": "direct", "durable": True})
    manage("PUT", f"queues/{vhost}/tap", {"durable": True})
    manage("POST", f"bindings/{vhost}/e/{EXCHANGE}/q/tap", {"routing_key": "#"})
    manage("PUT", f"permissions/{vhost}/crucible-worker", {"configure": "^$", "write": ".*", "read": "^x$"})
    manage("PUT", f"topic-permissions/{vhost}/crucible-storage", {"exchange": EXCHANGE, "write": "^a$", "read": ".*"})
    user = manage("GET", "users/crucible-monitor")
    manage("PUT", "users/crucible-monitor", {"password_hash": user["password_hash"], "tags": ["administrator"]})
    manage("DELETE", "users/crucible-storage")
    manage(
        "PUT", f"policies/{vhost}/shorter", {"pattern": "small", "definition": {"max-length": 9}, "apply-to": "queues"}
    )
    manage("PUT", "users/crucible-guest", {"password": "x", "tags": []})
    manage("PUT", f"permissions/{vhost}/crucible-guest", {"configure": "", "write": "", "read": ".*"})
    expected = {
        (f"queue {medium}", "argument x-queue-type"),
        (f"queue {medium}", "argument x-max-length"),
        (f"queue {medium}", "argument x-dead-letter-exchange"),
        (f"queue {medium}", "type"),
        (f"queue {medium}", "members"),
        (f"queue {large}", "argument x-delivery-limit"),
        (f"queue {large}", "argument x-overflow"),
        (f"queue {large}", "argument x-quorum-initial-group-size"),
        (f"queue {large}", "argument x-consumer-timeout"),
        (f"queue {large}", "members"),
        (f"queue {SMALL}", "policy"),
        (f"exchange {DEAD_EXCHANGE}", "type"),
        ("exchange crucible.old", "the exchange"),
        (f"binding {DEAD_EXCHANGE} -> {DEAD_QUEUE} (#)", "the binding"),
        (f"binding {EXCHANGE} -> {medium} ({routing_key(SizeClass.MEDIUM)})", "the binding"),
        (f"binding {EXCHANGE} -> tap (#)", "the binding"),
        ("user crucible-worker", "may write"),
        ("user crucible-worker", "may read"),
        ("user crucible-monitor", "tags"),
        ("user crucible-storage", "the user"),
        ("user crucible-guest", "permissions"),
    }
    try:
        found = ready.differences()
        assert expected <= {(difference.where, difference.what) for difference in found}
        # Nothing is said of what is as it should be.
        assert not [difference for difference in found if difference.where == f"queue {DEAD_QUEUE}"]
        assert all(difference.remedy for difference in found)
    finally:
        manage("DELETE", "users/crucible-guest")


def test_an_alarm_is_a_difference_for_exactly_as_long_as_it_is_on(ready: Installation) -> None:
    ready.cluster.set_alarm("disk")
    # What `GET /api/nodes` says is a sample, some seconds old at times: the alarm must be over although the sample has it.
    sampled = "disk_free_alarm"
    wait_until(
        lambda: any(node.get(sampled) for node in ready.cluster.manage("GET", "nodes")),
        timeout=20,
        describe="the alarm to be sampled",
    )
    (found,) = ready.differences()
    assert (found.what, found.wanted, found.found) == ("disk space alarm", "off", "on")
    assert "free disk space there" in str(found)
    ready.cluster.clear_alarms()
    assert ready.differences() == []


def run_command(installation: Installation, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CRUCIBLE_")}
    environment |= {
        "CRUCIBLE_BROKER_URL": installation.cluster.url(vhost=installation.vhost),
        "CRUCIBLE_BROKER__MANAGEMENT_URL": installation.cluster.management_url,
        **{
            f"CRUCIBLE_BROKER_PASSWORD_{name.removeprefix('crucible-').upper()}": password
            for name, password in installation.passwords.items()
        },
    }
    command = [sys.executable, "-m", "crucible.cli.main", "broker", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_commands_leave_with_a_code_that_says_how_it_went_and_never_show_a_password(empty: Installation) -> None:
    before = run_command(empty, "verify", "--json")
    assert before.returncode == 1
    assert {found["where"] for found in json.loads(before.stdout)["differences"]} >= {
        f"queue {SMALL}",
        "user crucible-worker",
    }
    applied = run_command(empty, "apply")
    assert applied.returncode == 0, applied.stdout + applied.stderr
    after = run_command(empty, "verify", "--json")
    assert (after.returncode, json.loads(after.stdout)) == (0, {"differences": []})
    said = "".join(done.stdout + done.stderr for done in (before, applied, after))
    assert not [secret for secret in (*empty.passwords.values(), empty.cluster.password) if secret in said]


# --- users ----------------------------------------------------------------------------------------------------------------------


def publish(channel: Any, exchange: str, key: str) -> None:
    import amqp

    channel.confirm_select()
    channel.basic_publish(amqp.Message("x"), exchange, key)
    # Refusals come after the fact: the next answer waits for them.
    channel.queue_declare(SMALL, passive=True)


ATTEMPTS: dict[str, Callable[[Any], Any]] = {
    "publish": lambda channel: publish(channel, EXCHANGE, routing_key(SizeClass.SMALL)),
    "publish past the exchange": lambda channel: publish(channel, "", SMALL),
    "publish dead letters": lambda channel: publish(channel, DEAD_EXCHANGE, "x"),
    "count": lambda channel: channel.queue_declare(SMALL, passive=True),
    "consume": lambda channel: channel.basic_consume(SMALL, callback=lambda _: None),
    "consume dead letters": lambda channel: channel.basic_consume(DEAD_QUEUE, callback=lambda _: None),
    "purge": lambda channel: channel.queue_purge(SMALL),
    "purge dead letters": lambda channel: channel.queue_purge(DEAD_QUEUE),
    "delete": lambda channel: channel.queue_delete(SMALL),
    "declare": lambda channel: channel.queue_declare("evaluations.mine", durable=True),
    "bind": lambda channel: channel.queue_bind(DEAD_QUEUE, EXCHANGE, "#"),
}
ALLOWED = {
    "crucible-storage": {"publish", "count", "consume dead letters", "purge dead letters"},
    "crucible-worker": {"count", "consume", "purge"},
    "crucible-monitor": set(),
}


@pytest.mark.parametrize("user", [user.name for user in USERS])
def test_each_service_may_do_what_it_does_and_nothing_else(ready: Installation, user: str) -> None:
    allowed = set()
    with ready.channel(user) as opened:
        for name, attempt in ATTEMPTS.items():
            channel = opened.connection.channel()
            try:
                attempt(channel)
            except AccessRefused:
                continue
            channel.close()
            allowed.add(name)
    assert allowed == ALLOWED[user]


# --- what the queues promise ------------------------------------------------------------------------------------------------------


def test_what_waits_is_handed_out_in_strict_order_of_priority_and_first_come_first_served_within_one(
    ready: Installation,
) -> None:
    sent = hints(220)
    with ready.publisher("crucible-storage") as publisher:
        assert publisher.publish(sent, 20) == [True] * 220
        assert publisher.depths()[SizeClass.SMALL].ready == 220
    with ready.channel("crucible-worker") as channel:
        got = [message.headers["id"] for message in take(channel, SMALL, 220)]
    # Python's sort keeps the order of equals.
    assert got == [hint.evaluation_id for hint in sorted(sent, key=lambda hint: -hint.priority)]


def test_a_hint_is_a_task_message_that_any_celery_worker_reads(ready: Installation) -> None:
    hint = Hint(
        "evaluation-1", SizeClass.LARGE, 10, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    )
    with ready.publisher("crucible-storage") as publisher:
        publisher.publish([hint], 10)
    with ready.channel("crucible-worker") as channel:
        (message,) = take(channel, queue_name(SizeClass.LARGE), 1)
    assert json.loads(message.body)[:2] == [["evaluation-1"], {}]
    assert (message.headers["task"], message.headers["id"]) == ("crucible.evaluate", "evaluation-1")
    assert message.headers["traceparent"] == hint.traceparent
    wanted = {"priority": 10, "delivery_mode": 2, "content_type": "application/json", "correlation_id": "evaluation-1"}
    assert message.properties.items() >= wanted.items()


def test_each_size_class_waits_in_a_queue_of_its_own(ready: Installation) -> None:
    with ready.publisher("crucible-storage") as publisher:
        publisher.publish([*hints(1), *hints(2, SizeClass.MEDIUM), *hints(3, SizeClass.LARGE)], 10)
        depths = publisher.depths()
    assert [depths[size_class].ready for size_class in SizeClass] == [1, 2, 3]


def publish_until_refused(publisher: Publisher) -> tuple[int, BrokerError]:
    """Publish one at a time; return how many were taken, and how the end was told."""
    for taken in range(50):
        try:
            publisher.publish(hints(1), 10)
        except BrokerError as error:
            return taken, error
    raise AssertionError("a queue with room for five took fifty")


def test_a_full_queue_refuses_more_and_keeps_what_it_has(empty: Installation) -> None:
    empty.options = {"queue_length_max": 5}
    empty.apply()
    with empty.publisher("crucible-storage") as publisher:
        taken, error = publish_until_refused(publisher)
        assert (error.reason, error.passing) == (BrokerReason.FULL, True)
        assert "CRUCIBLE_BROKER__QUEUE_LENGTH_MAX" in error.hint
        # RabbitMQ counts after it has taken one more.
        assert 5 <= taken <= 7
        assert publisher.publish([*hints(2), *hints(1, SizeClass.LARGE)], 10) == [False, False, True]
        assert publisher.depths()[SizeClass.SMALL].ready == taken
    # A refusal is an answer: what comes after it in the first batch of a connection is published all the same.
    with empty.publisher("crucible-storage") as publisher:
        assert publisher.publish([*hints(2), *hints(2, SizeClass.LARGE)], 10) == [False, False, True, True]
    with empty.channel("crucible-worker") as channel:
        assert len(take(channel, SMALL, taken)) == taken
    with empty.publisher("crucible-storage") as publisher:
        assert publisher.publish(hints(1), 10) == [True]


def test_what_a_worker_rejects_and_what_was_delivered_too_often_is_kept_among_the_dead(empty: Installation) -> None:
    empty.options = {"delivery_limit": 2}
    empty.apply()
    with empty.publisher("crucible-storage") as publisher:
        publisher.publish(hints(2), 10)
    with empty.channel("crucible-worker") as channel:
        (rejected,) = take(channel, SMALL, 1, then=lambda message: channel.basic_reject(message.delivery_tag, False))
        returned = take(channel, SMALL, 3, then=lambda message: channel.basic_reject(message.delivery_tag, True))
    assert {message.headers["id"] for message in returned} == {"evaluation-0"}
    with empty.channel("crucible-storage") as channel:
        dead = take(channel, DEAD_QUEUE, 2)
    why = {message.headers["id"]: message.headers["x-death"][0]["reason"] for message in dead}
    assert why == {rejected.headers["id"]: "rejected", "evaluation-0": "delivery_limit"}
    assert {message.delivery_info["routing_key"] for message in dead} == {routing_key(SizeClass.SMALL)}


@needs("redis")
def test_redis_as_we_use_it_keeps_the_same_eleven_priorities_apart(redis_server: RedisServer) -> None:
    url, settings = BrokerUrl.parse(f"{redis_server.url}/0"), BrokerSettings()
    sent = hints(44)
    with Publisher(url, settings) as publisher:
        publisher.purge()
        assert publisher.publish(sent, 20) == [True] * 44
        assert publisher.depths()[SizeClass.SMALL].ready == 44
    got: list[str] = []

    def received(_: object, message: Any) -> None:
        got.append(message.headers["id"])
        message.ack()

    with make_app(url, settings).connection_for_read() as connection:
        queue = Queue(SMALL, Exchange(""), SMALL, no_declare=True)
        with connection.Consumer([queue], callbacks=[received], prefetch_count=1, accept=["json"]):
            while len(got) < 44:
                connection.drain_events(timeout=5)
    assert got == [hint.evaluation_id for hint in sorted(sent, key=lambda hint: -hint.priority)]
