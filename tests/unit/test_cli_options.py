"""The command line itself: options that every command has, what is refused, exit codes, and documentation that is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from crucible.cli.exit_codes import MEANINGS, ExitCode, for_status
from crucible.cli.main import app

pytestmark = pytest.mark.unit

runner = CliRunner()
DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
SERVICES = {"serve storage", "serve dispatcher", "serve api", "serve worker", "serve monitor", "serve cleanup"}
OFFLINE = SERVICES | {
    "up",
    "demo",
    "setup",
    "cleanup-cluster",
    "openapi",
    "events consume",
    "broker definitions",
    "broker apply",
    "broker verify",
}


def commands(group: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    group = group or get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


ALL = dict(commands())


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_json_and_those_that_call_the_platform_have_url_and_key(name: str) -> None:
    expected = {"--json"} if name in OFFLINE else {"--json", "--url", "--api-key"}
    assert expected <= options(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_every_command_explains_itself_and_each_of_its_options(name: str) -> None:
    done = runner.invoke(app, [*name.split(), "--help"])
    assert done.exit_code == 0
    for parameter in ALL[name].params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("name", ALL)
def test_the_documentation_has_every_command_and_option(name: str) -> None:
    text = DOCUMENT.read_text()
    section = re.search(rf"^### `crucible {re.escape(name)}.*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section for crucible {name}"
    for option in options(ALL[name]) - {"--json", "--url", "--api-key", "--help"}:
        assert f"`{option}" in section[0], f"docs/cli.md does not mention {option} of crucible {name}"


def test_the_help_and_the_documentation_list_every_exit_code() -> None:
    shown = runner.invoke(app, ["--help"]).stdout
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^ +{code.value}  {re.escape(meaning)}$", shown, re.MULTILINE)
        assert f"| {code.value} | {meaning} |" in DOCUMENT.read_text()
    assert set(MEANINGS) == set(ExitCode)


@pytest.mark.parametrize(
    ("status", "code"), [(400, 3), (401, 3), (404, 5), (409, 3), (422, 3), (429, 3), (500, 4), (503, 4)]
)
def test_each_http_status_has_its_exit_code(status: int, code: int) -> None:
    assert for_status(status) == code


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit"],
        ["submit", "a.py", "--code", "1"],
        ["submit", "--code", "1", "--stdin", "x", "--stdin-file", "y"],
        ["submit", "--code", "1", "--count", "2", "--follow"],
        ["submit", "--code", "1", "--count", "2", "--idempotency-key", "k"],
        ["submit", "--code", "1", "--label", "bad"],
        ["submit", "--code", "1", "--url", "nowhere"],
        ["submit", "--code", "1", "--idempotency-key", "two\nlines"],
        ["list", "--api-key", "ümlaut"],
        ["submit", "does-not-exist.py"],
        ["capacity", "--memory", "1Gi"],
        ["list", "--since", "yesterday"],
        ["storage", "cleanup"],
        ["dead-letters", "replay", "x"],
        ["no-such-command"],
        ["status"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == ExitCode.USAGE


def test_the_command_line_starts_without_what_only_the_platform_needs() -> None:
    program = "import sys, crucible.cli.main; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert not loaded & {"pydantic", "httpx", "fastapi", "sqlalchemy", "structlog", "uvicorn"}
