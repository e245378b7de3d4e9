"""The tour of the API in docs/api-tour.md works as printed: its commands are run in order, and their output compared."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
from pathlib import Path

import pytest

from tests.support.folders import scratch_dir
from tests.support.platform import running_platform

pytestmark = pytest.mark.integration

TOUR = Path(__file__).parents[2] / "docs" / "api-tour.md"
_BLOCK = re.compile(r"^```(?P<kind>sh|json|text)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_END = "--- end of step ---"


def steps() -> list[tuple[str, str]]:
    """Each command of the tour with what it is said to print."""
    found: list[tuple[str, str]] = []
    blocks = [(match["kind"], match["text"]) for match in _BLOCK.finditer(TOUR.read_text())]
    for (kind, text), (next_kind, shown) in itertools.pairwise(blocks):
        if kind == "sh":
            assert next_kind in ("json", "text"), f"no output is shown for: {text}"
            found.append((text, shown))
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether the output is what is shown, each `…` standing for anything."""
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


async def test_every_command_of_the_tour_prints_what_it_shows() -> None:
    if shutil.which("curl") is None:
        pytest.fail("the tour needs curl: apt-get install curl, or brew install curl")
    wanted = steps()
    assert len(wanted) > 10
    script = "set -euo pipefail\n" + "".join(f"{command}\necho; echo '{_END}'\n" for command, _ in wanted)
    for folder in scratch_dir():
        async with running_platform(folder) as (platform, _client):
            process = await asyncio.create_subprocess_exec(
                "bash",
                "-c",
                script,
                env={
                    "PATH": "/usr/local/bin:/usr/bin:/bin",
                    "CRUCIBLE_URL": platform.url,
                    "CRUCIBLE_API_KEY": platform.api_key,
                },
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said = (await process.communicate())[0].decode()
    printed = said.split(_END)[:-1]
    for (command, shown), output in zip(wanted, printed, strict=False):
        assert matches(shown, output), f"{command}\nis shown to print\n{shown}\nand printed\n{output}"
    assert process.returncode == 0, said
    assert len(printed) == len(wanted), said
