"""Checks what no other linter knows: promises that this repository makes about its own files.

Each rule is a pattern, where it applies, and what to do instead. Run by `make lint` over tracked and new files. A line that
must break a rule says so with `repository-check: allow` and why.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOW = "repository-check: allow"


@dataclass(frozen=True)
class Rule:
    """A pattern that no line of the files whose path matches `where` may contain."""

    pattern: re.Pattern[str]
    instead: str
    where: re.Pattern[str] = re.compile("")


RULES = (
    Rule(
        re.compile(r"\bsys\.path\b|\bPYTHONPATH\b|^\s*pythonpath\s*="),
        "install the package; nothing here changes where Python looks",
        # Python files are the linter's, which knows code from text (TID251 in pyproject.toml).
        where=re.compile(r"\.(toml|ya?ml|sh)$|^Makefile$|^scripts/[^.]+$|^\.ci/"),
    ),
    Rule(
        re.compile(
            r"\b(pypi\.org|pythonhosted\.org|registry\.npmjs\.org|proxy\.golang\.org|crates\.io|deb\.debian\.org)\b"
        ),
        "name packages, not the host they come from: that is each machine's own configuration",
    ),
    Rule(
        re.compile(r"(?<![\w.])/(home|Users)/(?!(?:user|someone|you|runner)\b)[a-z]\w*"),
        "make the path relative or configurable; this one exists on one machine",
    ),
    Rule(
        re.compile(r"uses:\s+(?!\./)[^@\s]+(@(?![0-9a-f]{40}\b).*)?$"),
        "pin the action to a full commit digest, with its version in a comment",
        where=re.compile(r"^\.github/"),
    ),
)
SLEEPS = {"time.sleep", "asyncio.sleep", "anyio.sleep", "trio.sleep", "sleep"}
# Modules whose `sleep` under another name would still be one.
SLEEPING_MODULES = {"time", "asyncio", "anyio", "trio"}
# The helpers that wait for everyone, and programs that tests run in sandboxes.
MAY_SLEEP = ("tests/support/", "tests/kubernetes/attacks/")
# Calls that return when the program has ended: with `sleep` as the program they are one.
RUNS = {"run", "call", "check_call", "check_output", "system", "getoutput", "create_subprocess_shell"}
SHELL_SLEEP = re.compile(r"(^|[\s;&|(])sleep\s+[\d.$]")
# These spell out what is forbidden.
OWN_RULES = {"scripts/check_repository.py", "tests/unit/test_scripts.py", "pyproject.toml"}


def repository_files() -> list[str]:
    """Return tracked and new files, without what git ignores, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603 - fixed
    return sorted({name for name in listing.split("\0") if name and (ROOT / name).is_file()})


def broken_lines(name: str, text: str) -> Iterator[str]:
    """Yield a finding for every line that breaks a rule."""
    rules = [rule for rule in RULES if rule.where.search(name)]
    for number, line in enumerate(text.splitlines(), start=1):
        if ALLOW in line:
            continue
        for rule in rules:
            if rule.pattern.search(line):
                yield f"{name}:{number}: {line.strip()[:100]}\n    {rule.instead}"


def is_sleep(node: ast.AST) -> bool:
    """Tell whether this passes time, or makes a name that does; `sleep(0)` only lets others run."""
    if isinstance(node, ast.ImportFrom):
        return node.module in SLEEPING_MODULES and any(name.name == "sleep" for name in node.names)
    if not isinstance(node, ast.Call):
        return False
    if ast.unparse(node.func) in SLEEPS:
        return [ast.unparse(argument) for argument in node.args] != ["0"]
    return ast.unparse(node.func).rpartition(".")[2] in RUNS and any(runs_sleep(argument) for argument in node.args)


def runs_sleep(argument: ast.expr) -> bool:
    """Tell whether this is a command that sleeps, as a list of words or as a line for a shell."""
    if isinstance(argument, ast.List) and argument.elts:
        return ast.unparse(argument.elts[0]) in ("'sleep'", "'/bin/sleep'", "'/usr/bin/sleep'")
    return (
        isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and bool(SHELL_SLEEP.match(argument.value))
    )


def sleeping_calls(name: str, text: str) -> Iterator[str]:
    """Yield a finding for every real sleep in a test; one in a string is code that a sandbox will run."""
    lines = text.splitlines()
    if not name.endswith(".py"):
        for number, line in enumerate(lines, start=1):
            if SHELL_SLEEP.search(line) and not line.lstrip().startswith("#") and ALLOW not in line:
                yield f"{name}:{number}: a script of the tests sleeps\n    wait for what it needs"
        return
    for node in ast.walk(ast.parse(text)):
        if is_sleep(node) and ALLOW not in lines[node.lineno - 1]:
            yield f"{name}:{node.lineno}: a test sleeps\n    wait for what it needs: tests/support/waits.py"


def findings(name: str, text: str) -> Iterator[str]:
    """Yield everything that is wrong with one file."""
    if name not in OWN_RULES:
        yield from broken_lines(name, text)
    if name.startswith("tests/") and not name.startswith(MAY_SLEEP) and name.endswith((".py", ".sh")):
        yield from sleeping_calls(name, text)


def main() -> int:
    """Check every file; the exit status is 1 if anything was found."""
    found = []
    for name in repository_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # A picture or an archive.
        found += findings(name, text)
    if (ROOT / "platform" / "__init__.py").exists():
        found.append(
            "platform/__init__.py: it would shadow the standard library's module; keep platform/ a plain folder"
        )
    if found:
        sys.stderr.write("\n".join(found) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
