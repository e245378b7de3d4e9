"""RabbitMQ's definitions file, made from the topology: what a node imports at its first start (`definitions.local.path`).

Pure. Passwords enter only as hashes, and come from the environment or from files, never from a command line.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crucible.broker.topology import USERS, Argument, User, topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crucible.settings import BrokerSettings

HASHING = "rabbit_password_hashing_sha256"
_SALT_BYTES = 4

# A node that imports definitions makes no default user, so without this one nobody could administer it.
ADMIN = User("crucible-admin", write=".*", read=".*", configure=".*", tags=("administrator",))


class PasswordError(Exception):
    """Passwords that are missing or cannot be read; names their variables, never their values."""


def password_variable(user: User) -> str:
    """Return the environment variable with this user's password; with `_FILE` at its end, it names a file that holds it."""
    return f"CRUCIBLE_BROKER_PASSWORD_{user.name.removeprefix('crucible-').upper()}"


def read_passwords(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the passwords that the environment gives, by user name.

    Raises:
        PasswordError: one is given twice, is empty, or its file cannot be read.
    """
    found: dict[str, str] = {}
    for user in (*USERS, ADMIN):
        name = password_variable(user)
        direct, file = environment.get(name), environment.get(f"{name}_FILE")
        if direct and file:
            raise PasswordError(f"{name} and {name}_FILE are both set; keep one")
        if file:
            try:
                # Editors and `echo` end a file with a line feed, which is not meant.
                direct = Path(file).read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise PasswordError(f"{name}_FILE: {file} cannot be read ({error})") from None
            if not direct:
                raise PasswordError(f"{name}_FILE: {file} is empty")
        if direct:
            found[user.name] = direct
    return found


def password_hash(password: str, salt: bytes | None = None) -> str:
    """Return a password as RabbitMQ stores it (its guide "Credentials and Passwords": base64 of salt and SHA-256 of both)."""
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def password_fits(password: str, hashed: str) -> bool:
    """Whether a stored hash is of this password."""
    salt = base64.b64decode(hashed)[:_SALT_BYTES]
    return hmac.compare_digest(password_hash(password, salt), hashed)


def exchange_body(kind: str) -> dict[str, Any]:
    """Return an exchange as the definitions file and the management API write it."""
    return {"type": kind, "durable": True, "auto_delete": False, "internal": False, "arguments": {}}


def queue_body(arguments: Mapping[str, Argument]) -> dict[str, Any]:
    """Return a queue as the definitions file and the management API write it."""
    return {"durable": True, "auto_delete": False, "arguments": dict(arguments)}


def user_body(user: User, hashed: str) -> dict[str, Any]:
    """Return a user as the definitions file and the management API write it."""
    return {"password_hash": hashed, "hashing_algorithm": HASHING, "tags": list(user.tags)}


def permission_body(user: User) -> dict[str, str]:
    """Return a user's permissions as the definitions file and the management API write them."""
    return {"configure": user.configure, "write": user.write, "read": user.read}


def definitions(settings: BrokerSettings, vhost: str, passwords: Mapping[str, str]) -> dict[str, Any]:
    """Return the whole definitions document.

    Raises:
        PasswordError: a user's password is not given; names all variables that are missing.
    """
    missing = [password_variable(user) for user in USERS if user.name not in passwords]
    if missing:
        raise PasswordError(f"no password for {len(missing)} users: set {', '.join(missing)} (or each with _FILE)")
    users = [user for user in (*USERS, ADMIN) if user.name in passwords]
    wanted = topology(settings)
    return {
        "vhosts": [{"name": vhost, "default_queue_type": "quorum"}],
        "users": [{"name": user.name, **user_body(user, password_hash(passwords[user.name]))} for user in users],
        "permissions": [{"user": user.name, "vhost": vhost, **permission_body(user)} for user in users],
        "exchanges": [
            {"name": exchange.name, "vhost": vhost, **exchange_body(exchange.type)} for exchange in wanted.exchanges
        ],
        "queues": [{"name": queue.name, "vhost": vhost, **queue_body(queue.arguments)} for queue in wanted.queues],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.routing_key,
                "arguments": {},
            }
            for binding in wanted.bindings
        ],
    }
