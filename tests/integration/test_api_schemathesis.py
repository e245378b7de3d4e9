"""The API held to its own OpenAPI document by schemathesis: hostile and valid requests to every operation, and sequences of them.

Every check that schemathesis has is made (what is left out, and why, stands in schemathesis.toml): no 5xx, no undocumented status,
content type, header or body, every operation closed without a key, wrong methods and wrong data refused.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.support.folders import scratch_dir
from tests.support.platform import running_platform

pytestmark = pytest.mark.integration

CONFIG = Path(__file__).with_name("schemathesis.toml")
# Fixed, so that a failure in CI is the same failure here.
SEED = 20260131
EXAMPLES = 30


async def test_no_request_gets_an_answer_that_the_document_does_not_allow() -> None:
    for folder in scratch_dir():
        async with running_platform(folder, api={"rate_per_second": 100_000}) as (platform, client):
            spec = (await client.http.get("/openapi.json")).json()
            await client.run("print('something to read')")
            report = folder / "report.json"
            said = await _schemathesis(
                folder,
                "run",
                f"{platform.url}/openapi.json",
                f"--header=Authorization: Bearer {platform.api_key}",
                f"--max-examples={EXAMPLES}",
                f"--seed={SEED}",
                f"--report-json-path={report}",
                "--phases=examples,coverage,fuzzing,stateful",
                "--continue-on-failure",
                "--request-timeout=10",
                "--generation-database=none",
            )
            done = json.loads(report.read_text())
            # It really asked, and every operation.
            operations = sum(len(item) for item in spec["paths"].values())
            assert done["operations"]["tested"] == operations, said
            assert {phase["status"] for phase in done["phases"].values()} == {"success"}, said
            assert done["test_cases"]["generated"] > 1000, said
            assert (await client.http.get("/readyz")).status_code == 200


async def _schemathesis(folder: Path, command: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("st"),
        f"--config-file={CONFIG}",
        "--no-color",
        command,
        *arguments,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said
