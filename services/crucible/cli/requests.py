"""What is submitted: reading source files and batches, and building request bodies from options.

Nothing is checked here that the platform checks: its limits are its own, and its refusals say what would be accepted.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crucible.cli.client import Document

_AGO = re.compile(r"(?P<count>\d+(?:\.\d+)?)(?P<unit>[smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
# The API's own bounds on a batch are 100 items and 32 MiB (crucible.limits); the bytes leave room for JSON's escapes.
_BATCH_ITEMS = 100
_BATCH_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a batch, and where it came from."""

    source: str
    body: Document


def read_text(path: str, option: str) -> str:
    """Return the text of a file, or of standard input for `-`.

    Raises:
        typer.BadParameter: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8: byte {error.start}", param_hint=option) from None


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """Return labels given as `key=value`.

    Raises:
        typer.BadParameter: a text without `=`.
    """
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not of the form key=value", param_hint="--label")
        labels[key] = value
    return labels


def parse_time(text: str | None, option: str) -> str | None:
    """Return a time as ISO 8601: given so, or as an age such as `90s`, `2h` or `7d`.

    Raises:
        typer.BadParameter: it is neither.
    """
    if text is None:
        return None
    age = _AGO.fullmatch(text)
    if age:
        return (datetime.now(UTC) - timedelta(**{_UNITS[age["unit"]]: float(age["count"])})).isoformat()
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat()
    except ValueError:
        hint = "write an ISO 8601 time such as 2026-01-31T12:00, or an age such as 90s, 2h or 7d"
        raise typer.BadParameter(f"{text!r} is not a time; {hint}", param_hint=option) from None


def given(**fields: Any) -> Document:
    """Return the fields that were given; what is left out is for the platform to fill in."""
    return {name: value for name, value in fields.items() if value not in (None, {})}


def read_batch(path: Path, defaults: Document) -> list[Item]:
    """Return the requests of a folder of .py files, a JSON list (or `{"evaluations": [...]}`), or JSON lines.

    Args:
        path: folder or file; `-` is JSON or JSON lines from standard input.
        defaults: fields for the requests that do not set them.

    Raises:
        typer.BadParameter: there is nothing usable there.
    """
    if path.is_dir():
        items = [Item(str(file), {"code": read_text(str(file), "PATH")}) for file in sorted(path.glob("*.py"))]
        if not items:
            raise typer.BadParameter(f"{path} holds no .py file", param_hint="PATH")
    else:
        items = list(_parse_batch(read_text(str(path), "PATH"), str(path)))
    return [Item(item.source, {**defaults, **item.body}) for item in items]


def _parse_batch(text: str, source: str) -> Iterator[Item]:
    try:
        parsed: Any = json.loads(text)
    except ValueError:
        parsed = _parse_lines(text, source)
    if isinstance(parsed, dict):
        parsed = parsed.get("evaluations", [parsed])
    if not isinstance(parsed, list) or not parsed:
        raise typer.BadParameter(f"{source} holds no list of requests", param_hint="PATH")
    for number, body in enumerate(parsed):
        if not isinstance(body, dict):
            raise typer.BadParameter(f"{source}: entry {number} is not an object", param_hint="PATH")
        yield Item(f"{source}[{number}]", body)


def _parse_lines(text: str, source: str) -> list[Any]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents.append(json.loads(line))
            except ValueError as error:
                raise typer.BadParameter(f"{source}, line {number}: {error}", param_hint="PATH") from None
    return documents


def portions(items: list[Item]) -> Iterator[list[Item]]:
    """Cut a batch into portions that the API takes at once."""
    portion: list[Item] = []
    weight = 0
    for item in items:
        size = len(json.dumps(item.body))
        if portion and (len(portion) == _BATCH_ITEMS or weight + size > _BATCH_BYTES):
            yield portion
            portion, weight = [], 0
        portion.append(item)
        weight += size
    if portion:
        yield portion
