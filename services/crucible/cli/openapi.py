"""`crucible openapi`: the API's document as a file of the repository, and the check that it is still true.

Contents are compared, not bytes: a file that says the same in another layout is no drift, but a digest that does not fit its file is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from crucible.cli.exit_codes import ExitCode
from crucible.cli.session import Session, offline_command
from crucible.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.cli.client import Document

    BreakingChanges = Callable[[Document, Document], list[str]]

_DEFAULT = Path("docs/openapi.json")
_DIFFERENCES_SHOWN = 50


def rendered(spec: Document) -> str:
    """Return the document as it is kept: keys sorted, two spaces, a line feed at the end."""
    return json.dumps(spec, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest_path(path: Path) -> Path:
    """Return where the digest of a file is kept, in the form that `sha256sum -c` reads."""
    return path.with_name(path.name + ".sha256")


def differences(old: object, new: object, where: str = "") -> list[str]:
    """Return the places in which two documents differ, as JSON pointers (RFC 6901)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            place = f"{where}/{str(key).replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                found.append(f"{place}: only in the file")
            elif key not in old:
                found.append(f"{place}: only in the program")
            else:
                found += differences(old[key], new[key], place)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [text for index, (left, right) in pairs for text in differences(left, right, f"{where}/{index}")]
    return [] if old == new else [f"{where}: changed"]


def _problem_with_digest(path: Path, text: str) -> str | None:
    file = digest_path(path)
    try:
        kept = file.read_text().split()[0]
    except (OSError, IndexError):
        return f"{file} is missing or empty"
    actual = hashlib.sha256(text.encode()).hexdigest()
    return None if kept == actual else f"{file} does not fit {path}"


@offline_command
def openapi(
    session: Session,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here, and the digest beside it.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help=f"Compare with the file (default {_DEFAULT}); exit code 1 if it is not true."),
    ] = False,
) -> None:
    """Print the OpenAPI document of the API, write it to a file, or check that file. Needs no running platform."""
    # The whole API with FastAPI behind it: only this command pays for it.
    from crucible.api.openapi import breaking_changes, canonical_spec  # noqa: PLC0415

    spec = canonical_spec()
    path = output or _DEFAULT
    if check:
        report = _check(path, spec, breaking_changes)
        session.emit(report, lambda: _report_view(report))
        if not report["current"]:
            raise typer.Exit(ExitCode.NOT_COMPLETED)
    elif output is None:
        typer.echo(rendered(spec), nl=False)
    else:
        text = rendered(spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        digest_path(path).write_text(f"{digest}  {path.name}\n")
        session.emit({"file": str(path), "sha256": digest}, lambda: plain(f"wrote {path} ({digest})"))


def _check(path: Path, spec: Document, breaking_changes: BreakingChanges) -> Document:
    report: Document = {"file": str(path), "current": False, "problems": [], "differences": [], "breaking": []}
    try:
        text = path.read_text()
        kept = json.loads(text)
    except OSError as error:
        report["problems"].append(f"{path}: {error.strerror}")
        return report
    except ValueError as error:
        report["problems"].append(f"{path} is not JSON: {error}")
        return report
    if problem := _problem_with_digest(path, text):
        report["problems"].append(problem)
    # Through JSON, so that both sides hold only what JSON can hold.
    report["differences"] = differences(kept, json.loads(rendered(spec)))
    report["breaking"] = breaking_changes(kept, spec)
    report["current"] = not report["problems"] and not report["differences"]
    return report


def _report_view(report: Document) -> Group:
    if report["current"]:
        return Group(plain(f"{report['file']} is what the API serves"))
    lines = [plain(text, "red") for text in report["problems"]]
    lines += [plain(f"breaks clients: {text}", "bold red") for text in report["breaking"]]
    lines += [plain(f"differs: {text}") for text in report["differences"][:_DIFFERENCES_SHOWN]]
    if len(report["differences"]) > _DIFFERENCES_SHOWN:
        lines.append(plain(f"and {len(report['differences']) - _DIFFERENCES_SHOWN} more differences"))
    lines.append(plain(f"if this is meant: crucible openapi --output {report['file']}"))
    return Group(*lines)
