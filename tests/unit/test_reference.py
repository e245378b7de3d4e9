"""The documentation that is generated: never behind the code, complete, and its examples are true to the schemas."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible import reference
from crucible.evaluation import TERMINAL_REASONS, Reason, State
from crucible.events import DATA, Event, EventType
from crucible.problems import KINDS
from crucible.settings import Settings, env_name

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the documentation to break."""
    return Path(shutil.copytree(DOCS, tmp_path / "docs"))


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((DOCS / "schemas/events" / f"{kind}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def validate(event: dict[str, Any]) -> None:
    validator(event["type"]).validate(event)


def test_the_documentation_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = reference.main(["--check", "--docs", str(DOCS)])
    assert (code, capsys.readouterr().out) == (0, ""), "run `python -m crucible.reference`"


def test_drift_is_found_named_and_mended(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "configuration.md": ("8080", "8081"),
        "errors.md": ("RFC 9457", "RFC 7807"),
        "events.md": ("[`timeout`]", "[`timed-out`]"),
        "lifecycle.md": ("queued --> provisioning", "queued --> running"),
        "schemas/events/failed.json": ("exit_code", "code"),
    }
    for name, (old, new) in changes.items():
        (copy / name).write_text((copy / name).read_text().replace(old, new))
    assert reference.main(["--check", "--docs", str(copy)]) == 1
    told = set(capsys.readouterr().out.splitlines())
    assert told == {f"{copy / name}: differs from the code" for name in changes}
    assert reference.main(["--docs", str(copy)]) == 0
    assert all((copy / name).read_text() == (DOCS / name).read_text() for name in changes)
    assert reference.main(["--check", "--docs", str(copy)]) == 0


def test_a_schema_of_a_type_that_is_gone_is_removed_and_a_missing_one_made(copy: Path) -> None:
    (copy / "schemas/events/gone.json").write_text("{}")
    (copy / "schemas/events/failed.json").unlink()
    assert reference.main(["--check", "--docs", str(copy)]) == 1
    reference.main(["--docs", str(copy)])
    assert not (copy / "schemas/events/gone.json").exists()
    assert reference.drifted(copy) == []


def test_what_people_write_around_the_generated_parts_stays(copy: Path) -> None:
    page = copy / "events.md"
    page.write_text(page.read_text() + "\nOne more sentence.\n")
    assert reference.main(["--check", "--docs", str(copy)]) == 0


def test_a_page_without_its_markers_is_an_error_that_names_them(copy: Path) -> None:
    page = copy / "lifecycle.md"
    page.write_text(page.read_text().replace("<!-- generated: reasons -->\n", ""))
    with pytest.raises(reference.MarkerError, match="generated: reasons"):
        reference.drifted(copy)


def test_every_reason_setting_and_problem_is_documented() -> None:
    assert set(reference.REASONS) == set(Reason)
    lifecycle = (DOCS / "lifecycle.md").read_text()
    assert all(f"| `{reason}` |" in lifecycle for reason in Reason)
    configuration = (DOCS / "configuration.md").read_text()
    for name, field in Settings.model_fields.items():
        for part in getattr(field.annotation, "model_fields", {None: None}):
            assert f"`{env_name(name, *([part] if part else []))}`" in configuration
    errors = (DOCS / "errors.md").read_text()
    assert all(f"\n## {slug}\n" in errors for slug in KINDS)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_within_the_documentation_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        assert path or anchor in headings, target


# --- events against their schemas -----------------------------------------------------------------------------------------


def test_the_examples_on_the_events_page_are_events() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", (DOCS / "events.md").read_text(), re.DOTALL | re.MULTILINE)
    lives = [found["events"] for block in blocks if "events" in (found := json.loads(block))]
    each = [found for block in blocks if "events" not in (found := json.loads(block))]
    assert lives
    for events in lives:
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in each] == list(EventType)
    for event in [*each, *(event for events in lives for event in events)]:
        validate(event)
        Event.model_validate(event)
        assert set(event["data"]) <= set(DATA[EventType(event["type"])].model_fields)


_REASONS = {state: sorted(reasons) for state, reasons in TERMINAL_REASONS.items()}


@st.composite
def events(draw: st.DrawFn) -> Event:
    """Any event that storage could write."""
    kind = draw(st.sampled_from(EventType))
    state = State(kind) if kind in list(State) else draw(st.sampled_from(State))
    reason = draw(st.sampled_from(_REASONS[state])) if state.terminal else draw(st.none() | st.sampled_from(Reason))
    return Event(
        type=kind,
        evaluation_id="ev-" + "0" * 26,
        seq=draw(st.integers(1, 10**6)),
        at=datetime(2026, 1, 1, tzinfo=UTC),
        owner=draw(st.text()),
        actor="storage",
        state=state,
        attempt=draw(st.integers(0, 99)),
        reason=reason,
        detail=draw(st.none() | st.text()),
        data=draw(st.builds(DATA[kind])).model_dump(mode="json", exclude_none=draw(st.booleans())),
        cursor=draw(st.none() | st.text()),
    )


@settings(max_examples=40)
@given(events(), st.booleans())
def test_whatever_is_sent_keeps_to_its_schema(event: Event, absent: bool) -> None:
    travelling = json.loads(event.model_dump_json(exclude_none=absent))
    if not absent and event.reason is None:
        travelling["reason"] = None
    validate(travelling)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "finished"},
        {"state": "running"},
        {"reason": "wall_clock"},
        {"reason": None},
        {"seq": 0},
        {"data": {"exit_code": "one"}},
        {"attempt": -1},
    ],
)
def test_what_is_no_such_event_breaks_its_schema(change: dict[str, Any]) -> None:
    failed = {
        "type": "failed",
        "evaluation_id": "ev-1",
        "seq": 3,
        "at": "2026-01-01T00:00:00Z",
        "owner": "ann",
        "actor": "dispatcher",
        "state": "failed",
        "attempt": 1,
        "reason": "exit_nonzero",
        "data": {"exit_code": 3},
    }
    validate(failed)
    with pytest.raises(jsonschema.ValidationError):
        validator("failed").validate(failed | change)
