"""The real platform for tests: PostgreSQL, storage, dispatcher, worker and API over a folder that is thrown away."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from crucible.local.platform import Platform
from crucible.settings import Settings
from tests.support.waits import wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TERMINAL = {"completed", "failed", "timeout", "cancelled"}
READ_TRIES, READ_PAUSE_SECONDS = 15, 2.0


def test_settings(data_dir: Path, **sections: Any) -> Settings:
    """Return settings for one test platform: a free port, few slots, its own folder."""
    defaults: dict[str, Any] = {
        "api": {"port": 0},
        "worker": {"slots": 4, "drain_seconds": 2},
        "log": {"level": "warning"},
    }
    for name, values in sections.items():
        defaults[name] = {**defaults.get(name, {}), **values} if isinstance(values, dict) else values
    return Settings(data_dir=data_dir, **defaults)


test_settings.__test__ = False  # type: ignore[attr-defined] # not a test, whatever its name


class Client:
    """A thin client of the public API for tests."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def submit(self, code: str, **fields: Any) -> dict[str, Any]:
        """Submit and return the evaluation as first shown."""
        response = await self.http.post("/v1/evaluations", json={"code": code, **fields})
        assert response.status_code in (200, 201), response.text
        return response.json()  # type: ignore[no-any-return]

    async def get(self, evaluation_id: str, *, wait: float = 0) -> dict[str, Any]:
        """Read one evaluation, waiting up to `wait` seconds (at most 60) for its end."""
        response = await self.http.get(f"/v1/evaluations/{evaluation_id}", params={"wait": wait} if wait else {})
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    async def ended(self, evaluation_id: str, *, wait: float = 30) -> dict[str, Any]:
        """Wait for the end of an evaluation and return it."""
        return (await wait_for(self, evaluation_id, simple=True, seconds=wait)).result

    async def run(self, code: str, **fields: Any) -> dict[str, Any]:
        """Submit, wait for the end, and return the evaluation."""
        return await self.ended((await self.submit(code, **fields))["id"])

    async def output(self, evaluation_id: str, stream: str = "stdout") -> bytes:
        """Read a whole output stream."""
        response = await self.http.get(f"/v1/evaluations/{evaluation_id}/output/{stream}")
        assert response.status_code == 200, response.text
        return response.content


class ReadingAgain(httpx.AsyncHTTPTransport):
    """Reads again what a replica was asked for that went away meanwhile, or that asks for patience (503), as a client must.

    What it did is in `repeated`, so that a test can say so: the reasons, each with how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repeated: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; a GET several times if need be."""
        for _ in range(READ_TRIES - 1 if request.method == "GET" else 0):
            try:
                response = await super().handle_async_request(request)
            except httpx.TransportError as error:
                self.repeated[type(error).__name__] += 1
            else:
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    return response
                self.repeated[str(json.loads(await response.aread())["detail"])] += 1
                await response.aclose()
            await asyncio.sleep(READ_PAUSE_SECONDS)
        return await super().handle_async_request(request)


@asynccontextmanager
async def connect(url: str, key: str, *, transport: httpx.AsyncBaseTransport | None = None) -> AsyncIterator[Client]:
    """Open a client of a running platform; with `ReadingAgain` of one whose replicas come and go."""
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=90, transport=transport) as http:
        yield Client(http)


@asynccontextmanager
async def running_platform(data_dir: Path, **sections: Any) -> AsyncIterator[tuple[Platform, Client]]:
    """Run the platform in this process over `data_dir`; not durable against power loss, everything else as shipped."""
    platform = Platform(test_settings(data_dir, **sections), durable=False)
    await platform.start()
    try:
        async with connect(platform.url, platform.api_key) as client:
            yield platform, client
    finally:
        await platform.aclose()
