"""`crucible setup` on real servers: it waits for them, makes what is missing, may run again, and names what it cannot mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from crucible.auth import make_key, split_key
from crucible.broker.definitions import password_variable
from crucible.broker.topology import USERS, queue_name
from crucible.contracts import Role
from crucible.limits import SizeClass
from crucible.problems import ProblemError
from crucible.serve.setup import ADMIN_KEY_VARIABLE, ADMIN_OWNER, SetupError, set_up
from crucible.settings import Settings, SettingsError, StorageSettings
from crucible.storage.engine import Database
from crucible.storage.keys import Keys
from crucible.storage.migrate import HEAD
from tests.support.broker import Installation
from tests.support.capabilities import needs
from tests.support.ports import free_port
from tests.support.postgres import empty_database
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from tests.servers.rabbitmq import RabbitCluster

pytestmark = [pytest.mark.integration, needs("postgres")]


def settings_for(database: str) -> Settings:
    return Settings(storage=StorageSettings(database_url=SecretStr(database)))


async def run(settings: Settings, *, wait: float = 30) -> list[str]:
    done: list[str] = []
    await set_up(settings, wait_seconds=wait, members=3, say=done.append)
    return done


async def test_an_empty_database_gets_the_schema_and_the_administrators_key_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, key_id, _ = make_key()
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, key)
    async with empty_database() as url:
        done = [await run(settings_for(url)), await run(settings_for(url))]
        assert done == [[f"database: schema {HEAD}", f"API key {key_id} of {ADMIN_OWNER}"]] * 2
        database = Database(url, 1)
        await database.open()
        try:
            parts = split_key(key)
            assert parts is not None
            found = await Keys(database).find(*parts)
            assert (found.owner, found.role) == (ADMIN_OWNER, Role.ADMIN)
            assert len(await Keys(database).list()) == 1
        finally:
            await database.close()


async def test_a_key_that_is_none_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "secret-that-is-no-key")
    with pytest.raises(SettingsError, match=ADMIN_KEY_VARIABLE) as raised:
        await run(settings_for("postgresql://nobody@127.0.0.1:1/none"))
    assert "secret-that" not in str(raised.value)


async def test_a_database_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    with pytest.raises(ProblemError, match="does not answer"):
        await run(settings_for(f"postgresql://nobody@127.0.0.1:{free_port()}/none"), wait=1)


@needs("rabbitmq")
async def test_the_broker_gets_all_that_the_code_says_and_what_cannot_be_changed_is_named(
    rabbitmq: RabbitCluster, rabbit_vhost: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = Installation(rabbitmq, rabbit_vhost)
    wait_until(installation.statistics_are_there, timeout=30, describe="the nodes to know each other's plugins")
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    for user in USERS:
        monkeypatch.setenv(password_variable(user), installation.passwords[user.name])
    wanted = settings_for(database).model_copy(
        update={"broker": installation.settings, "broker_url": SecretStr(rabbitmq.url(vhost=rabbit_vhost))}
    )
    try:
        assert "broker: all that the code says" in await run(wanted)
        assert installation.differences() == []
        small = queue_name(SizeClass.SMALL)
        rabbitmq.manage("DELETE", f"queues/{rabbit_vhost}/{small}")
        assert f"broker: queue {small}: made" in await run(wanted)
        shorter = wanted.model_copy(update={"broker": wanted.broker.model_copy(update={"queue_length_max": 7})})
        with pytest.raises(SetupError, match="x-max-length"):
            await run(shorter, wait=1)
    finally:
        installation.forget()
