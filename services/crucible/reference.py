"""Writes the parts of the documentation that only repeat what the code says, and finds where the two have drifted apart.

`python -m crucible.reference` writes them below `docs/`; with `--check` it writes nothing, names what differs and ends with code 1.
Whole pages: `configuration.md`, `errors.md`, `schemas/events/*.json`. Between markers in pages that people write:
`events.md` and `lifecycle.md`. It must not say anything of its own that the code does not hold, but for what the reasons mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, create_model

from crucible.evaluation import (
    ACTIVE_STATES,
    RETRYABLE_REASONS,
    TERMINAL_REASONS,
    TRANSITIONS,
    Reason,
    State,
    Violation,
)
from crucible.events import DATA, Event, EventType
from crucible.limits import PRIORITY_MAX, PRIORITY_MIN, Limits, SizeClass
from crucible.problems import KINDS, ProblemDetails, invalid_request
from crucible.quantity import format_memory
from crucible.settings import Settings, env_name
from crucible.streams.contract import DEAD_ENTRY, DEAD_STREAM, ENTRY, HINTS, STREAM, channel, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pydantic.fields import FieldInfo

_GENERATED = "<!-- Written by `python -m crucible.reference`; do not edit. -->"

# What each reason means, and what its reader can do about it.
REASONS: dict[Reason, tuple[str, str]] = {
    Reason.EXIT_ZERO: ("The code ran to its end.", "Nothing."),
    Reason.EXIT_NONZERO: ("The code chose another exit code than 0.", "Read its output; `exit_code` is what it chose."),
    Reason.EXCEPTION: (
        "An exception was not caught. Its class is what the code's own process told.",
        "Read the traceback on standard error.",
    ),
    Reason.SIGNAL: ("A signal ended it, such as 11 for a crash in native code.", "Read its output; see `signal`."),
    Reason.OOM_KILLED: ("It used more memory than its limit.", "Use less, or ask for more with `memory_limit`."),
    Reason.OUTPUT_LIMIT: (
        "It wrote more than is kept; all up to the limit is there.",
        "Write less.",
    ),
    Reason.WALL_CLOCK: (
        "It still ran at its time limit.",
        "Do less, or ask for more with `timeout_seconds`.",
    ),
    Reason.DEADLINE: (
        "The sandbox did not end by itself after its time limit and was ended from outside.",
        "As for `wall_clock`; if it happens often, tell an operator.",
    ),
    Reason.QUEUE_WAIT: (
        "It waited for longer than its `queue_timeout_seconds`, and never ran.",
        "Submit it again, at a higher priority or with more patience.",
    ),
    Reason.SCHEDULING: (
        "No node could ever take it, which was learned only after it was accepted.",
        "Ask for less; see `GET /v1/capacity`.",
    ),
    Reason.EVICTED: (
        "A node under pressure ended the sandbox.",
        "Nothing: it was tried again, until attempts ran out.",
    ),
    Reason.PREEMPTED: (
        "The platform ended the sandbox to give way, such as when a worker stops.",
        "Nothing: it is tried again, as often as that happens.",
    ),
    Reason.NODE_LOST: (
        "Whoever held it fell silent: a worker, dispatcher or node is gone.",
        "Nothing: it was tried again, until attempts ran out.",
    ),
    Reason.IMAGE_ERROR: ("The runtime image could not be used.", "Tell an operator."),
    Reason.SANDBOX_ERROR: (
        "The sandbox could not be made, or ended without saying how.",
        "Nothing: it was tried again, until attempts ran out. An operator finds the cause in the logs.",
    ),
    Reason.CANCELLED_BY_USER: ("Its owner cancelled it.", "Nothing."),
    Reason.CANCELLED_BY_OPERATOR: ("An operator cancelled it.", "Ask the operator."),
}


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: object) -> str:
    return f"`{text}`"


# --- configuration --------------------------------------------------------------------------------------------------------


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not type(None)]
    return annotation


def _kind(annotation: Any) -> str:
    """Name the type of a setting the way it is written in the environment."""
    kind = _without_none(annotation)
    if get_origin(kind) is Literal:
        return ", ".join(_code(choice) for choice in get_args(kind))
    if get_origin(kind) in (tuple, dict):
        return "JSON list" if get_origin(kind) is tuple else "JSON object"
    if Path in (kind, *get_args(kind)):
        return "path"
    if kind is bool:
        return "`true`, `false`"
    if int in (kind, *get_args(kind)):
        return "whole number"
    return {float: "number", str: "text", SecretStr: "secret"}[kind]


_BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} entry",
}


def _bounds(field: FieldInfo) -> str:
    """Say what a value must keep to, from the field's own constraints."""
    found = [
        text.format(f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else value)
        for constraint in [*field.metadata, *_alias_constraints(field.annotation)]
        for name, text in _BOUNDS.items()
        if (value := getattr(constraint, name, None)) is not None
    ]
    patterns = [
        f"matches {_code(pattern)}"
        for item in field.metadata
        if isinstance(pattern := getattr(item, "pattern", None), str)
    ]
    return ", ".join(dict.fromkeys(found + patterns))


def _alias_constraints(annotation: Any) -> Iterator[Any]:
    """Give the constraints of an `Annotated` alias inside an optional type."""
    for item in getattr(_without_none(annotation), "__metadata__", ()):
        yield from getattr(item, "metadata", [item])


def _default(path: tuple[str, ...], field: FieldInfo) -> str:
    if path == ("data_dir",):
        return "XDG data folder, `/var/lib/crucible` for root"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, dict):
        lines = (_code(f'"{name}": {json.dumps(item.model_dump())}') for name, item in value.items())
        return "<br>".join(lines) or "none"
    if path[-1].endswith("_bytes") and format_memory(value) != str(value):
        return f"{_code(value)} ({format_memory(value)})"
    return _code(_plain_value(value))


def _plain_value(value: Any) -> str:
    """Write a value as it would stand in the environment."""
    if isinstance(value, tuple | bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings_rows(model: type[BaseModel], *path: str) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        if _section(field) is None:
            place = (*path, name)
            yield (
                _code(env_name(*place)),
                _kind(field.annotation),
                _default(place, field),
                _bounds(field),
                field.description or "",
            )


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


_CONFIGURATION = """\
All settings are environment variables. A value that cannot be used, and a nested setting that does not exist, is an error at
the start that names the variable. An empty variable counts as unset. Lists and objects are written as JSON; an object's members
may also be given one by one (`CRUCIBLE_LIMITS__PROFILES__SMALL__CPU_MILLIS`)."""

_LIMITS = """\
Requests are held against these, and `GET /v1/limits` shows them. Limits that contradict each other (a default or a profile beyond
a maximum) are refused at the start. Priorities are always {lowest} (last) to {highest} (first)."""


def configuration() -> str:
    """Return the page of all settings."""
    header = ("variable", "type", "default", "bounds", "meaning")
    parts = ["# Configuration", _GENERATED, _CONFIGURATION, "## General", _table(header, _settings_rows(Settings))]
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is not None:
            title = name.upper() if name == "api" else name.capitalize()
            parts += [f"## {title}", (section.__doc__ or "").strip()]
            parts += (
                [_LIMITS.format(lowest=PRIORITY_MIN, highest=PRIORITY_MAX), _size_classes()] if name == "limits" else []
            )
            parts.append(_table(header, _settings_rows(section, name)))
    return "\n\n".join(parts) + "\n"


def _size_classes() -> str:
    limits = Limits()
    spans = {
        SizeClass.SMALL: f"up to {format_memory(limits.medium_from_bytes - 1)}",
        SizeClass.MEDIUM: f"above that and below {format_memory(limits.large_from_bytes)}",
        SizeClass.LARGE: f"from {format_memory(limits.large_from_bytes)}",
    }
    listed = "; ".join(f"{_code(size)} {span}" for size, span in spans.items())
    return f"Size classes, which wait in queues of their own, follow from the memory limit: {listed}."


# --- errors ---------------------------------------------------------------------------------------------------------------


_ERRORS = """\
Every error of the API is a problem (RFC 9457) with `Content-Type: application/problem+json`. Its `type` is a path of the API itself
that explains it, and the same explanation is here. `instance` is the request's id: it is in the `X-Request-ID` header of every
answer and in the logs."""

_ERRORS_AGAIN = """\
A problem may have further members, which its advice names. Repeating the same request can only help where the table says so;
wait for `Retry-After` seconds first if that header is there."""


def errors() -> str:
    """Return the page of all problems."""
    kinds = sorted(KINDS.values(), key=lambda kind: (kind.status, kind.slug))
    members = ((_code(name), field.description or "") for name, field in ProblemDetails.model_fields.items())
    overview = (
        (str(kind.status), f"[{_code(kind.slug)}](#{kind.slug})", kind.title, "yes" if kind.retryable else "no")
        for kind in kinds
    )
    violation = Violation(field="priority", message="must be 0 to 10", value="11", limit="10", accepted="0 to 10")
    example = invalid_request([violation]).body("5f3c1a0e9d5b4f0f")
    parts = [
        "# Errors",
        _GENERATED,
        _ERRORS,
        _table(("member", "meaning"), members),
        f"```json\n{json.dumps(example, indent=2)}\n```",
        _ERRORS_AGAIN,
        _table(("status", "problem", "title", "try again?"), overview),
        *(f"## {kind.slug}\n\n{kind.status}. {kind.title}.\n\n{kind.advice}" for kind in kinds),
    ]
    return "\n\n".join(parts) + "\n"


# --- events ---------------------------------------------------------------------------------------------------------------


_STATES = {str(state): state for state in State}


def event_schema(kind: EventType) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one type of event, as it travels."""
    fields: dict[str, Any] = {"type": (Literal[kind], ...), "data": (DATA[kind], DATA[kind].model_construct())}
    state = _STATES.get(kind)
    if state:
        fields["state"] = (Literal[state], ...)
        if state.terminal:
            fields["reason"] = (Literal[tuple(sorted(TERMINAL_REASONS[state]))], ...)
    model = create_model(f"{kind.capitalize()}Event", __base__=Event, **fields)
    schema = model.model_json_schema()
    schema["properties"]["data"].pop("default", None)
    schema["examples"] = [json.loads(encode(example(kind)))]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"{kind}.json"} | schema


_WHEN = {
    EventType.SUBMITTED: "It was accepted and stored",
    EventType.QUEUED: "It waits; also when an attempt was void and another will be made",
    EventType.PROVISIONING: "A worker claimed it; its sandbox is being made",
    EventType.RUNNING: "Its code has started",
    EventType.OUTPUT: "There is more output to read; never in the table, and so never in the API's event streams",
    EventType.COMPLETED: "It ended well",
    EventType.FAILED: "It ended otherwise; `reason` says how",
    EventType.TIMEOUT: "It ran, or waited, for too long; `reason` says which",
    EventType.CANCELLED: "It was cancelled",
    EventType.COLLECTED: "All output is stored, and what a cluster keeps of the sandbox may go; written with the terminal event, and not in the `local` profile",
}


def event_types() -> str:
    """Return the table of event types."""
    rows = (
        (
            f"[{_code(kind)}](schemas/events/{kind}.json)",
            _WHEN[kind],
            ", ".join(map(_code, DATA[kind].model_fields)) or "nothing",
        )
        for kind in EventType
    )
    return _table(("type", "when", "`data` holds"), rows)


def _shape(field: FieldInfo) -> str:
    kind = _without_none(field.annotation)
    if get_origin(kind) is dict:
        return "object"
    return {int: "whole number", datetime: "time (RFC 3339, UTC)"}.get(kind, "text")


def event_members() -> str:
    """Return the table of what every event has."""
    rows = (
        (
            _code(name),
            _shape(field),
            "if known" if _without_none(field.annotation) is not field.annotation else "always",
            field.description or "",
        )
        for name, field in Event.model_fields.items()
    )
    return _table(("member", "is", "there", "meaning"), rows)


def event_data() -> str:
    """Return the table of what `data` may hold."""
    seen: dict[tuple[str, str], list[str]] = {}
    for kind, model in DATA.items():
        for name, field in model.model_fields.items():
            seen.setdefault((name, field.description or ""), []).append(kind)
    rows = ((_code(name), ", ".join(map(_code, kinds)), text) for (name, text), kinds in seen.items())
    return _table(("member of `data`", "of", "meaning"), rows)


_WORKER = "host-1f2e3d4c5b6a"
_ID = "ev-01kb3v8q6m0c3r5x7z9b1d3f5h"
_ACCEPTED = datetime(2026, 11, 24, 9, 30, 0, 120_000, tzinfo=UTC)
_RAN = {"exit_code": 0, "run_seconds": 0.014}
# Of each type: its place in a life, when that was, who caused it, and what it says.
_EXAMPLES: dict[EventType, dict[str, Any]] = {
    EventType.SUBMITTED: {"seq": 1, "actor": "ann", "data": {"priority": 5, "size_class": "small"}},
    EventType.QUEUED: {"seq": 2, "data": {"priority": 5, "size_class": "small"}},
    EventType.PROVISIONING: {"seq": 3, "after": 0.011, "actor": _WORKER, "attempt": 1, "data": {"worker": _WORKER}},
    EventType.RUNNING: {
        "seq": 4,
        "after": 0.04,
        "actor": f"dispatcher/{_WORKER}",
        "attempt": 1,
        "data": {"sandbox": f"{_ID}-1"},
    },
    EventType.OUTPUT: {
        "seq": 4,
        "after": 0.05,
        "state": State.RUNNING,
        "attempt": 1,
        "data": {"stdout_bytes": 42, "stderr_bytes": 0, "frames": 2},
    },
    EventType.COMPLETED: {
        "seq": 5,
        "after": 0.06,
        "actor": f"dispatcher/{_WORKER}",
        "attempt": 1,
        "reason": Reason.EXIT_ZERO,
        "detail": "ran to its end",
        "data": _RAN,
    },
    EventType.FAILED: {
        "seq": 5,
        "after": 0.06,
        "actor": f"dispatcher/{_WORKER}",
        "attempt": 1,
        "reason": Reason.EXCEPTION,
        "detail": "uncaught ZeroDivisionError",
        "data": {"exit_code": 1, "exception_type": "ZeroDivisionError", "run_seconds": 0.014},
    },
    EventType.TIMEOUT: {
        "seq": 5,
        "after": 30.05,
        "actor": f"dispatcher/{_WORKER}",
        "attempt": 1,
        "reason": Reason.WALL_CLOCK,
        "detail": "still ran at its time limit of 30 s",
        "data": {"signal": 9, "run_seconds": 30.0},
    },
    EventType.CANCELLED: {"seq": 3, "after": 2.5, "actor": "ann", "reason": Reason.CANCELLED_BY_USER, "data": {}},
    EventType.COLLECTED: {
        "seq": 6,
        "after": 0.06,
        "actor": "monitor/host-5c4b3a2d1e0f",
        "state": State.COMPLETED,
        "attempt": 1,
        "reason": Reason.EXIT_ZERO,
    },
}


def example(kind: EventType) -> Event:
    """Return an event of a type as it could be."""
    told = dict(_EXAMPLES[kind])
    moment = _ACCEPTED + timedelta(seconds=told.pop("after", 0.0))
    defaults = {"actor": "storage", "state": _STATES.get(kind)}
    return Event(type=kind, evaluation_id=_ID, at=moment, owner="ann", **(defaults | told))


def event_examples() -> str:
    """Return an example of each type."""
    return "\n\n".join(
        f"`{kind}`:\n\n```json\n{json.dumps(json.loads(encode(example(kind))), indent=2)}\n```" for kind in EventType
    )


def event_channels() -> str:
    """Return the table of where each type travels on Redis."""
    rows = (
        (_code(kind), "no" if kind in HINTS else "yes", _code(channel(kind)), f"[schema](schemas/events/{kind}.json)")
        for kind in EventType
    )
    return _table(("type", f"on the stream {_code(STREAM)}", "channel", "payload"), rows)


def _entry_fields(fields: Mapping[str, str], stream: str) -> str:
    return _table((f"field of an entry of {_code(stream)}", "meaning"), ((_code(k), v) for k, v in fields.items()))


def event_entries() -> str:
    """Return the fields of the stream's entries."""
    return _entry_fields(ENTRY, STREAM)


def dead_event_entries() -> str:
    """Return the fields of the entries of the stream of dead events."""
    return _entry_fields(DEAD_ENTRY, DEAD_STREAM)


# --- the life of an evaluation --------------------------------------------------------------------------------------------


def state_diagram() -> str:
    """Return the transition table as a Mermaid diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> submitted"]
    for state in State:
        lines += [f"    {state} --> {target}" for target in State if target in TRANSITIONS[state]]
    lines += [f"    {state} --> [*]" for state in State if state.terminal]
    return "\n".join([*lines, "```"])


def transitions() -> str:
    """Return the transition table."""
    rows = (
        (_code(state), ", ".join(_code(target) for target in State if target in TRANSITIONS[state]))
        for state in State
        if state in ACTIVE_STATES
    )
    return _table(("from", "to"), rows)


def reasons() -> str:
    """Return the table of reasons."""
    rows = (
        (_code(reason), _code(state), "yes" if reason in RETRYABLE_REASONS else "no", *REASONS[reason])
        for state in State
        if state.terminal
        for reason in Reason
        if reason in TERMINAL_REASONS[state]
    )
    return _table(("reason", "state", "tried again", "meaning", "what to do"), rows)


# --- writing and checking -------------------------------------------------------------------------------------------------

_PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration, "errors.md": errors}
_SCHEMAS = "schemas/events"
_INSERTED: dict[str, dict[str, Callable[[], str]]] = {
    "events.md": {
        "event-types": event_types,
        "event-members": event_members,
        "event-data": event_data,
        "event-examples": event_examples,
        "event-channels": event_channels,
        "event-entries": event_entries,
        "dead-event-entries": dead_event_entries,
    },
    "lifecycle.md": {"state-diagram": state_diagram, "transitions": transitions, "reasons": reasons},
}


class MarkerError(ValueError):
    """A page lacks the markers between which its generated part belongs."""


def insert(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the markers `<!-- generated: name -->` and `<!-- end -->`.

    Raises:
        MarkerError: the page has no such markers, or has them twice.
    """
    begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in after:
        raise MarkerError(f"the page needs {begin.strip()} and {end} once, for its generated part")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def expected(docs: Path) -> dict[Path, str]:
    """Return what every generated file should hold. Pages with markers are read first.

    Raises:
        MarkerError: a page lacks its markers.
        OSError: a page with markers is missing.
    """
    files = {docs / name: page() for name, page in _PAGES.items()}
    for kind in EventType:
        files[docs / _SCHEMAS / f"{kind}.json"] = json.dumps(event_schema(kind), indent=2) + "\n"
    for name, parts in _INSERTED.items():
        page = (docs / name).read_text()
        for part, text in parts.items():
            page = insert(page, part, text())
        files[docs / name] = page
    return files


def drifted(docs: Path) -> list[Path]:
    """Return the files that are not as they should be, also those that should not be there."""
    files = expected(docs)
    wrong = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    return wrong + [path for path in sorted((docs / _SCHEMAS).glob("*")) if path not in files]


def write(docs: Path) -> list[Path]:
    """Write what has drifted and return it."""
    changed = drifted(docs)
    files = expected(docs)
    for path in changed:
        if path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
        else:
            path.unlink()
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Write or check the generated documentation; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crucible.reference", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; end with code 1 if something differs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation (default: docs)")
    given = parser.parse_args(arguments)
    found = drifted(given.docs) if given.check else write(given.docs)
    word = "differs from the code" if given.check else "written"
    sys.stdout.writelines(f"{path}: {word}\n" for path in found)
    return 1 if given.check and found else 0


if __name__ == "__main__":
    raise SystemExit(main())
