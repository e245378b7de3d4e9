"""The log of a whole platform at its most talkative: each line a JSON object, and nobody's code or secret in any."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import TYPE_CHECKING

import pytest
import structlog

from crucible import logs
from crucible.settings import LogSettings
from tests.support.capabilities import needs
from tests.support.folders import scratch_dir
from tests.support.platform import running_platform

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

MARK = "people_write_this_and_nobody_logs_it"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers, root.level
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        logs.configure("crucible", LogSettings(level="debug", format="json"))
    root.setLevel(logging.DEBUG)
    yield stream
    root.handlers, root.level = before, level
    structlog.reset_defaults()


@needs("postgres", "sandbox")
async def test_neither_code_nor_secrets_reach_the_log(log: io.StringIO) -> None:
    for folder in scratch_dir():
        async with running_platform(folder) as (platform, client):
            await client.run(f"print({MARK!r})", stdin=MARK)
            await client.run(f"raise ValueError({MARK!r})", labels={"a": "b"})
            for body in (f'{{"code": "{MARK}", "priority": 99}}', f'{{"code": "{MARK}\\u0000"}}', f'["{MARK}"]', MARK):
                refused = await client.http.post("/v1/evaluations", content=body)
                assert 400 <= refused.status_code < 500
            await client.http.get("/v1/evaluations", headers={"Authorization": f"Bearer crk_abcd1234_{'s' * 43}"})
            key = platform.api_key
    text = log.getvalue()
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) > 5
    for record in records:
        assert {"event", "time", "level", "service"} <= set(record)
    assert MARK not in text
    assert key.split("_", 2)[2] not in text
    assert "s" * 43 not in text
