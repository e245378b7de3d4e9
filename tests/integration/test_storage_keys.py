"""API keys in storage: only hashes, only valid ones, and the internal routes only for the platform itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from crucible import contracts as c
from crucible.auth import make_key, split_key
from crucible.clients import StorageClient, http_client
from crucible.health import Health
from crucible.resilience import CallFailedError
from crucible.storage import make_storage_app
from tests.support.storage import TOKEN, Bench, new_id, running_storage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


def new_key(**fields: object) -> tuple[str, c.NewApiKey]:
    key, key_id, digest = make_key()
    values = {"key_id": key_id, "owner": "ada", "role": c.Role.SUBMITTER, "name": "laptop", "secret_sha256": digest}
    return key, c.NewApiKey.model_validate(values | fields)


async def find(bench: Bench, key: str) -> c.ApiKey | None:
    parts = split_key(key)
    assert parts is not None
    return await bench.client.find_key(*parts)


async def test_a_key_is_found_by_its_id_and_secret_only(bench: Bench) -> None:
    key, new = new_key(role=c.Role.OPERATOR)
    stored = await bench.client.add_key(new)
    assert (stored.owner, stored.role, stored.name, stored.revoked_at) == ("ada", c.Role.OPERATOR, "laptop", None)
    assert await find(bench, key) == stored
    assert await bench.client.find_key(new.key_id, "0" * 64) is None
    assert await bench.client.find_key("nobodyss", new.secret_sha256) is None
    assert await bench.client.keys() == [stored]
    secret = key.rsplit("_", 1)[1]
    for row in await bench.sql("SELECT * FROM api_keys"):
        assert secret not in str(dict(row))


async def test_revoked_and_expired_keys_open_nothing_but_stay_on_the_list(bench: Bench) -> None:
    revoked, new = new_key()
    await bench.client.add_key(new)
    await bench.client.revoke_key(new.key_id)
    await bench.client.revoke_key(new.key_id)
    expired, old = new_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    await bench.client.add_key(old)
    valid, coming = new_key(expires_at=datetime.now(UTC) + timedelta(hours=1))
    await bench.client.add_key(coming)
    assert [await find(bench, key) is not None for key in (revoked, expired, valid)] == [False, False, True]
    assert len(await bench.client.keys()) == 3
    with pytest.raises(CallFailedError) as caught:
        await bench.client.revoke_key("nobodyss")
    assert caught.value.slug == "not-found"


async def test_storing_a_key_again_changes_nothing_and_its_id_cannot_be_taken_over(bench: Bench) -> None:
    key, new = new_key()
    first = await bench.client.add_key(new)
    assert await bench.client.add_key(new) == first
    _, thief = new_key(key_id=new.key_id, owner="eve", role=c.Role.ADMIN)
    with pytest.raises(CallFailedError) as caught:
        await bench.client.add_key(thief)
    assert caught.value.slug == "conflict"
    assert await find(bench, key) == first


async def test_internal_routes_are_closed_without_the_platforms_token(bench: Bench) -> None:
    app = make_storage_app(bench.storage, TOKEN, Health("storage", "test"))
    async with http_client(app, "another token") as http:
        for route in app.openapi()["paths"]:
            if not route.startswith("/internal"):
                continue
            for method in app.openapi()["paths"][route]:
                path = route.format(evaluation_id=new_id(), stream="stdout", letter_id=1, key_id="k")
                answer = await http.request(method, path)
                assert (path, answer.status_code) == (path, 401)
        with pytest.raises(CallFailedError) as caught:
            await StorageClient(http).usage()
        assert caught.value.status == 401
        assert (await http.get("/healthz")).status_code == 200
