"""Shows JUnit reports on a pull request: a table in the job's summary and an annotation at each failing test.

    python scripts/junit_summary.py reports

Standard library only, since it also runs where set-up failed. Reads every *.xml in the folder; none is no error (linting
writes none). The table goes to the file that GITHUB_STEP_SUMMARY names, or to standard output without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

DETAIL_CHARS = 4000


@dataclass(frozen=True)
class Case:
    """One test: where it is, how it went, and what it said if it did not pass."""

    name: str
    file: str
    line: int
    outcome: str  # passed, failed or skipped
    seconds: float
    message: str


def read_cases(report: Path) -> Iterator[Case]:
    """Yield the tests of one report, as pytest writes them with junit_family=xunit1."""
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by the step before
        told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if told is None else "skipped" if told.tag == "skipped" else "failed"
        yield Case(
            name=f"{case.get('classname', '')}::{case.get('name', '')}",
            file=case.get("file", ""),
            line=int(case.get("line", "0")) + 1,
            outcome=outcome,
            seconds=float(case.get("time", "0")),
            message="" if told is None else f"{told.get('message', '')}\n{told.text or ''}".strip(),
        )


def summary(tier: str, cases: list[Case]) -> str:
    """Return the Markdown of one tier: its counts, then what failed and what was skipped, each with its reason."""
    counts = [f"{sum(c.outcome == outcome for c in cases)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    lines = [f"### {tier}: {', '.join(counts)} in {sum(c.seconds for c in cases):.1f} s", ""]
    for case in cases:
        if case.outcome == "failed":
            detail = case.message[:DETAIL_CHARS].replace("```", "'''")
            lines += [f"<details><summary>{case.name}</summary>", "", "```", detail, "```", "</details>", ""]
    skipped = [case for case in cases if case.outcome == "skipped"]
    lines += [f"- skipped {case.name}: {case.message.splitlines()[0] if case.message else ''}" for case in skipped]
    return "\n".join([*lines, ""])


def annotation(case: Case) -> str:
    """Return the workflow command that marks a failing test in the changed files."""
    first = case.message.splitlines()[0] if case.message else "failed"
    text = f"{case.name}: {first}".replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error file={case.file},line={case.line}::{text}"


def main(folder: str) -> None:
    """Write the summary of every report in the folder, and the annotations to standard output."""
    markdown = []
    for report in sorted(Path(folder).glob("*.xml")):
        cases = list(read_cases(report))
        markdown.append(summary(report.stem, cases))
        for case in cases:
            if case.outcome == "failed":
                sys.stdout.write(annotation(case) + "\n")
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write("\n".join(markdown))
    else:
        sys.stdout.write("\n".join(markdown))


if __name__ == "__main__":
    main(sys.argv[1])
