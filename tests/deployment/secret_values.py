"""Passwords, keys and what is made of them: made once per installation, kept by the cluster and by nothing else."""

from __future__ import annotations

import base64
import json
import secrets
from typing import TYPE_CHECKING, Any

from crucible.auth import make_key
from crucible.broker.definitions import ADMIN, definitions, password_variable
from crucible.broker.topology import USERS, VHOST
from crucible.names import PLATFORM_NAMESPACE
from crucible.settings import BrokerSettings
from tests.deployment.certificates import authority, certificate

if TYPE_CHECKING:
    from collections.abc import Mapping

_STORAGE, _WORKER = "crucible-storage", "crucible-worker"
_NODES = tuple(f"rabbitmq-{number}" for number in range(3))
_AUTHORITY = "crucible-ca"

# By which services and RabbitMQ's own nodes call them; Erlang takes no `*` for a name.
_DOMAIN = f"{PLATFORM_NAMESPACE}.svc.cluster.local"
NAMES = {
    "rabbitmq": ("rabbitmq", *(f"{node}.rabbitmq{domain}" for node in _NODES for domain in ("", f".{_DOMAIN}"))),
    "redis": ("redis", f"redis.{_DOMAIN}"),
}

Values = dict[str, dict[str, str]]


def secret_values(present: Mapping[str, Mapping[str, str]]) -> Values:
    """Return the content of every Secret by name, from what the cluster has already; only what is missing is made up."""

    def kept(name: str, key: str, new: str) -> str:
        return present.get(name, {}).get(key) or new

    passwords = {
        user.name: kept("crucible-setup", password_variable(user), secrets.token_hex(24)) for user in (*USERS, ADMIN)
    }
    database = kept("postgres", "password", secrets.token_hex(24))
    redis = kept("redis", "password", secrets.token_hex(24))
    signer = authority(present.get(_AUTHORITY, {}))
    servers = {
        f"{server}-tls": certificate(signer, names, present.get(f"{server}-tls", {})) for server, names in NAMES.items()
    }
    database_url = f"postgresql://crucible:{database}@postgres:5432/crucible"
    redis_url = f"rediss://:{redis}@redis:6379/0"
    return {
        "crucible-internal": {"token": kept("crucible-internal", "token", secrets.token_urlsafe(32))},
        _AUTHORITY: signer,
        **servers,
        "postgres": {"password": database},
        "redis": {"password": redis},
        "rabbitmq": {
            "erlang-cookie": kept("rabbitmq", "erlang-cookie", secrets.token_hex(32)),
            "definitions.json": _definitions(passwords, present.get("rabbitmq", {}).get("definitions.json")),
        },
        "crucible-api": {"redis-url": redis_url},
        _STORAGE: {
            "database-url": database_url,
            "redis-url": redis_url,
            "broker-url": _broker_url(_STORAGE, passwords[_STORAGE]),
        },
        _WORKER: {"broker-url": _broker_url(_WORKER, passwords[_WORKER])},
        "crucible-setup": {
            "CRUCIBLE_STORAGE__DATABASE_URL": database_url,
            "CRUCIBLE_BROKER__MANAGEMENT_URL": f"https://{ADMIN.name}:{passwords[ADMIN.name]}@rabbitmq:15671",
            "CRUCIBLE_ADMIN_KEY": kept("crucible-setup", "CRUCIBLE_ADMIN_KEY", make_key()[0]),
            **{password_variable(user): passwords[user.name] for user in (*USERS, ADMIN)},
        },
    }


def _broker_url(user: str, password: str) -> str:
    return ",".join(f"amqps://{user}:{password}@{node}.rabbitmq:5671/{VHOST}" for node in _NODES)


def _definitions(passwords: Mapping[str, str], present: str | None) -> str:
    """Return RabbitMQ's definitions: those that are there if they say the same, since the hashes differ each time."""
    wanted = definitions(BrokerSettings(), VHOST, passwords)
    if present is not None:
        found = json.loads(present)
        if found | {"users": None} == wanted | {"users": None}:
            return present
    return json.dumps(wanted)


def secret_objects(values: Values) -> list[dict[str, Any]]:
    """Return the Secrets as Kubernetes has them."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": name,
                "namespace": PLATFORM_NAMESPACE,
                "labels": {"app.kubernetes.io/part-of": "crucible"},
            },
            "type": "Opaque",
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in content.items()},
        }
        for name, content in values.items()
    ]


def read_secrets(objects: list[dict[str, Any]]) -> Values:
    """Return what Secrets hold, by name and key."""
    return {
        found["metadata"]["name"]: {
            key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()
        }
        for found in objects
    }
