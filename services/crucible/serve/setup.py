"""Bringing what the services stand on to what this version needs: the schema, the first administrator's key, the broker's topology.

Each step may be repeated, and waits for its server. Nothing is ever deleted. Services wait for none of it in particular: storage migrates
by itself, and what is missing in the broker is waited for.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

from crucible.auth import split_key
from crucible.broker import verify as compare
from crucible.broker.definitions import read_passwords
from crucible.broker.errors import BrokerError
from crucible.broker.management import Management
from crucible.broker.topology import VHOST
from crucible.broker.urls import BrokerUrl
from crucible.contracts import NewApiKey, Role
from crucible.problems import ProblemError
from crucible.settings import SettingsError, env_name
from crucible.storage.engine import Database
from crucible.storage.keys import Keys
from crucible.storage.migrate import HEAD, migrate

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.settings import Settings

ADMIN_KEY_VARIABLE = "CRUCIBLE_ADMIN_KEY"
ADMIN_OWNER = "admin"
_PAUSE_FIRST_S, _PAUSE_LONGEST_S = 0.5, 4.0


class SetupError(Exception):
    """Something is not as it must be, and waiting did not help."""


class _Patience:
    """Growing pauses, until the time is up."""

    def __init__(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._pause = _PAUSE_FIRST_S

    async def pause(self) -> bool:
        """Wait a moment; False, at once, if the time is up."""
        if asyncio.get_running_loop().time() + self._pause > self._deadline:
            return False
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        self._pause = min(2 * self._pause, _PAUSE_LONGEST_S)
        return True


async def set_up(settings: Settings, *, wait_seconds: float, members: int, say: Callable[[str], None]) -> None:
    """Do every step for which there is a setting.

    Args:
        settings: `storage.database_url` is needed; the broker is looked after where `broker.management_url` is set.
        wait_seconds: how long each server may take to answer, and the broker's queues to have all members.
        members: how many nodes must hold a copy of each queue.
        say: told of each thing that was done.

    Raises:
        SettingsError: a setting is missing or wrong.
        MigrationError: the schema is none that this version can use.
        ProblemError: the database does not answer, or the key's id is another key's.
        BrokerError: the broker does not answer, or refuses.
        SetupError: the broker has something that only a person can resolve.
        PasswordError: a password of the broker's users cannot be read.
    """
    url = settings.storage.database_url
    if url is None:
        raise SettingsError(f"{env_name('storage', 'database_url')}: `crucible setup` needs it")
    await _set_up_database(url.get_secret_value(), os.environ.get(ADMIN_KEY_VARIABLE), _Patience(wait_seconds), say)
    if settings.broker.management_url is not None:
        await _set_up_broker(settings, members, _Patience(wait_seconds), say)


async def _set_up_database(url: str, admin_key: str | None, patience: _Patience, say: Callable[[str], None]) -> None:
    parts = split_key(admin_key) if admin_key else None
    if admin_key and parts is None:
        raise SettingsError(f"{ADMIN_KEY_VARIABLE}: is not of the form crk_<id>_<secret>")
    while True:
        try:
            await migrate(url)
            break
        except ProblemError:
            if not await patience.pause():
                raise
    say(f"database: schema {HEAD}")
    if parts is None:
        return
    database = Database(url, 1)
    await database.open()
    try:
        key_id, digest = parts
        await Keys(database).add(
            NewApiKey(key_id=key_id, owner=ADMIN_OWNER, role=Role.ADMIN, name="setup", secret_sha256=digest)
        )
    finally:
        await database.close()
    say(f"API key {key_id} of {ADMIN_OWNER}")


def _vhost(settings: Settings) -> str:
    url = BrokerUrl.parse(settings.broker_url.get_secret_value()) if settings.broker_url else None
    return url.vhost if url is not None and url.kind == "rabbitmq" else VHOST


async def _set_up_broker(settings: Settings, members: int, patience: _Patience, say: Callable[[str], None]) -> None:
    passwords = read_passwords(os.environ)

    def apply() -> compare.Applied:
        with Management(settings.broker) as api:
            return compare.apply(api, settings.broker, _vhost(settings), passwords, members=members)

    while True:
        remaining: list[compare.Difference] = []
        try:
            applied = await asyncio.to_thread(apply)
        except BrokerError as error:
            if not error.passing or not await patience.pause():
                raise
            continue
        for done in applied.done:
            say(f"broker: {done}")
        remaining = applied.remaining
        # What is left may be the cluster still coming together: members of queues, nodes that are not there yet.
        if not remaining or not await patience.pause():
            break
    if remaining:
        raise SetupError("\n".join(map(str, remaining)))
    say("broker: all that the code says")
