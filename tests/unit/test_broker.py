"""What of the broker needs no broker: URLs, the definitions file, and the comparison that `crucible broker verify` makes."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from crucible.broker import definitions, verify
from crucible.broker.errors import BrokerError, BrokerReason
from crucible.broker.topology import USERS, queue_name, topology
from crucible.broker.urls import BrokerUrl
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings

pytestmark = pytest.mark.unit

SECRET = "s3cret"
SETTINGS = BrokerSettings()


@pytest.mark.parametrize(
    ("text", "says", "write"),
    [
        ("", "empty", "amqp://USER:PASSWORD@HOST"),
        ("rabbit-1:5672", "no scheme", "amqp://"),
        (f"http://u:{SECRET}@rabbit-1/crucible", "scheme 'http'", "amqp://"),
        (f"amqp://u:{SECRET}@/crucible", "no host", "amqp://USER"),
        (f"amqp://u:{SECRET}@rabbit-1:port/crucible", "port", "%XX"),
        (f"amqp://u:{SECRET}/x@rabbit-1:5672/crucible", "port", "%XX"),
        (f"amqp://u:{SECRET}@rabbit-1", "no virtual host", "/crucible"),
        (f"amqp://u:{SECRET}@rabbit-1/a/b", "holds a /", "%2F"),
        (f"amqp://u:{SECRET}@rabbit-1/crucible?heartbeat=3", "options", "%3F"),
        ("amqp://rabbit-1/crucible", "no user", "amqp://USER"),
        (f"amqp://u:{SECRET}@a/crucible,amqps://u:{SECRET}@b/crucible", "mix amqp, amqps", "same scheme"),
        (f"amqp://u:{SECRET}@a/crucible,amqp://u:other@b/crucible", "differ", "share"),
        (f"amqp://u:{SECRET}@a/crucible,", "node 2 of 2: it is empty", "amqp://"),
        (f"redis://:{SECRET}@a/0,redis://:{SECRET}@b/0", "several Redis", "name one"),
        (f"redis://:{SECRET}@a/zero", "not a number", "/0"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_is_wrong_and_what_to_write_but_never_the_password(
    text: str, says: str, write: str
) -> None:
    with pytest.raises(BrokerError) as caught:
        BrokerUrl.parse(text)
    error = caught.value
    assert error.reason is BrokerReason.URL
    assert says in error.message
    assert write in error.hint
    assert SECRET not in str(error)


def test_a_url_of_several_nodes_is_read_whole_and_shown_without_its_password() -> None:
    url = BrokerUrl.parse("amqps://ada:p%40ss%2Fw@rabbit-1/crucible, amqps://ada:p%40ss%2Fw@[::1]:5699/crucible")
    assert (url.kind, url.tls, url.user, url.vhost) == ("rabbitmq", True, "ada", "crucible")
    assert [node.address for node in url.members] == ["rabbit-1:5671", "[::1]:5699"]
    assert url.members[0].password == "p@ss/w"
    assert url.safe == "amqps://ada@rabbit-1:5671/crucible,amqps://ada@[::1]:5699/crucible"
    assert "p@ss" not in repr(url)
    # What client libraries are given means the same.
    assert BrokerUrl.parse(",".join(url.nodes)) == url


def test_the_definitions_file_holds_hashes_that_only_the_passwords_fit() -> None:
    document = definitions.definitions(SETTINGS, "crucible", {user.name: SECRET for user in USERS})
    assert SECRET not in json.dumps(document)
    for user in document["users"]:
        stored = base64.b64decode(user["password_hash"])
        assert stored[4:] == hashlib.sha256(stored[:4] + SECRET.encode()).digest()
        assert definitions.password_fits(SECRET, user["password_hash"])
        assert not definitions.password_fits("other", user["password_hash"])
    assert len({user["password_hash"] for user in document["users"]}) == len(USERS)


def test_passwords_come_from_the_environment_or_from_files_and_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    name = "CRUCIBLE_BROKER_PASSWORD_STORAGE"
    assert definitions.read_passwords({f"{name}_FILE": str(file)}) == {"crucible-storage": SECRET}
    with pytest.raises(definitions.PasswordError, match="both set"):
        definitions.read_passwords({name: SECRET, f"{name}_FILE": str(file)})
    with pytest.raises(definitions.PasswordError, match="cannot be read"):
        definitions.read_passwords({f"{name}_FILE": str(tmp_path / "absent")})
    with pytest.raises(definitions.PasswordError, match="_WORKER, CRUCIBLE_BROKER_PASSWORD_MONITOR"):
        definitions.definitions(SETTINGS, "crucible", {"crucible-storage": SECRET})


def observed(**changes: Any) -> verify.Observed:
    """A broker as it should be, but for these."""
    wanted = topology(SETTINGS)
    names = ["rabbit@a", "rabbit@b", "rabbit@c"]
    plugins = ["rabbitmq_management", "rabbitmq_prometheus"]
    there: dict[str, Any] = {
        "version": "4.3.3",
        "vhost": True,
        "nodes": [{"name": name, "running": True, "enabled_plugins": plugins} for name in names],
        "exchanges": {found.name: definitions.exchange_body(found.type) for found in wanted.exchanges},
        "queues": {
            found.name: definitions.queue_body(found.arguments)
            | {"type": "quorum", "exclusive": False, "members": names, "online": names}
            for found in wanted.queues
        },
        "bindings": [
            {"source": found.exchange, "destination": found.queue, "routing_key": found.routing_key}
            for found in wanted.bindings
        ],
        "users": {user.name: {"tags": list(user.tags), "password_hash": "", "hashing_algorithm": ""} for user in USERS},
        "permissions": {user.name: definitions.permission_body(user) for user in USERS},
    }
    return verify.Observed(**there | changes)


def found_in(broker: verify.Observed) -> set[tuple[str, str]]:
    return {(found.where, found.what) for found in verify.differences(broker, SETTINGS, "crucible")}


@pytest.mark.parametrize(
    ("version", "fits"),
    [("4.3.3", True), ("4.3.3+2", True), ("4.10.0", True), ("5.0.0-rc.1", True), ("4.3.2", False), ("3.13.7", False)],
)
def test_versions_are_compared_as_numbers(version: str, fits: bool) -> None:
    assert found_in(observed(version=version)) == (set() if fits else {("broker", "version")})


def test_the_state_of_nodes_and_members_is_told() -> None:
    queue = queue_name(SizeClass.SMALL)
    broker = observed(alarms=[{"node": "rabbit@c", "resource": "disk space"}])
    broker.nodes[0] = {"name": "rabbit@a", "running": False}
    broker.nodes[1]["enabled_plugins"] = ["rabbitmq_management"]
    broker.queues[queue]["online"] = ["rabbit@b", "rabbit@c"]
    broker.queues[queue_name(SizeClass.LARGE)]["members"] = ["rabbit@b"]
    assert found_in(broker) == {
        ("node rabbit@a", "state"),
        ("node rabbit@b", "plugin rabbitmq_prometheus"),
        ("node rabbit@c", "disk space alarm"),
        (f"queue {queue}", "member on rabbit@a"),
        (f"queue {queue_name(SizeClass.LARGE)}", "members"),
    }


def test_a_policy_is_told_only_where_it_applies() -> None:
    policies = [
        {"name": "ours", "pattern": "^evaluations\\.small$", "apply-to": "quorum_queues"},
        {"name": "theirs", "pattern": "^other", "apply-to": "all"},
        {"name": "streams", "pattern": ".*", "apply-to": "streams"},
    ]
    assert found_in(observed(policies=policies)) == {(f"queue {queue_name(SizeClass.SMALL)}", "policy")}
