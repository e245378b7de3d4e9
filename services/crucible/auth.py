"""API keys: how they look, how they are made, and how they are recognised.

A key is `crk_<id>_<secret>`: the id (8 characters) is public and finds the row, the secret has 256 bits of entropy and is stored only
as its SHA-256. A fast hash is right for it: what has 256 bits cannot be guessed, which is what slow hashes protect passwords from.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crucible.contracts import Role

_KEY = re.compile(r"crk_(?P<id>[0-9a-z]{8})_(?P<secret>[A-Za-z0-9_-]{43})")
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, and what they may do."""

    owner: str
    role: Role
    key_id: str


def make_key() -> tuple[str, str, str]:
    """Return a new key, its id and the hex SHA-256 of its secret. The key itself is shown once and kept nowhere."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    secret = secrets.token_urlsafe(32)
    return f"crk_{key_id}_{secret}", key_id, hash_secret(secret)


def split_key(key: str) -> tuple[str, str] | None:
    """Return a key's id and the hex SHA-256 of its secret, or None if the text is not a key."""
    match = _KEY.fullmatch(key)
    return (match["id"], hash_secret(match["secret"])) if match else None


def hash_secret(secret: str) -> str:
    """Return the hex SHA-256 under which a secret is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same(left: str, right: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(left.encode("utf-8", "surrogatepass"), right.encode("utf-8", "surrogatepass"))
