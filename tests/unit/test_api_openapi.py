"""The OpenAPI document: complete, canonical, and compared by what would break a client."""

from __future__ import annotations

import copy
import html
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from crucible.api.openapi import breaking_changes, canonical_spec
from crucible.api.page import render
from crucible.problems import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return canonical_spec()


def operations(spec: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in spec["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def test_the_document_is_the_same_each_time_and_sorted(spec: dict[str, Any]) -> None:
    text = json.dumps(spec)
    assert text == json.dumps(canonical_spec()) == json.dumps(spec, sort_keys=True)


def test_the_document_does_not_depend_on_the_installations_settings(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRUCIBLE_LIMITS__TIMEOUT_MAX_S", "7200")
    monkeypatch.setenv("CRUCIBLE_API__PORT", "1")
    assert canonical_spec() == spec


def test_every_reference_leads_somewhere(spec: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for reference in set(references(spec)):
        assert reference.removeprefix("#/components/schemas/") in spec["components"]["schemas"], reference


def test_operations_have_readable_names_summaries_and_descriptions(spec: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(spec)]
    assert len(set(names)) == len(names)
    assert {"submit_evaluation", "list_evaluations", "cancel_evaluation", "get_output", "health"} <= set(names)
    for path, method, operation in operations(spec):
        assert operation["summary"], (path, method)
        assert operation["description"], (path, method)
        assert operation["tags"], (path, method)


def test_every_error_is_a_problem_and_every_guarded_route_says_what_it_needs(spec: dict[str, Any]) -> None:
    for path, method, operation in operations(spec):
        where = (path, method)
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and path != "/readyz":
                assert list(answer["content"]) == ["application/problem+json"], (where, status)
        if not path.startswith("/v1/"):
            assert "security" not in operation, where
            continue
        assert operation["security"] == [{"apiKey": []}], where
        assert {"401", "500", "503"} <= set(operation["responses"]), where
        if operation.get("parameters"):
            assert "422" in operation["responses"], where
        if "requestBody" in operation:
            assert {"400", "413", "415", "422"} <= set(operation["responses"]), where
    assert all(len(str(kind.status)) == 3 for kind in KINDS.values())


def test_the_document_describes_how_to_authenticate(spec: dict[str, Any]) -> None:
    assert spec["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"


def test_the_page_shows_every_operation_and_runs_and_loads_nothing(spec: dict[str, Any]) -> None:
    page = render(spec)
    for path, _, operation in operations(spec):
        assert f'id="{operation["operationId"]}"' in page
        assert html.escape(path) in page
    for name in spec["components"]["schemas"]:
        assert f'id="{name}"' in page
    anchors = set(re.findall(r'href="#(\w+)"', page))
    assert anchors <= set(re.findall(r'id="(\w+)"', page))
    assert "<script" not in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)


SUBMIT = ("/v1/evaluations", "post")


def _schema(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return spec["components"]["schemas"][name]  # type: ignore[no-any-return]


def _operation(spec: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    return spec["paths"][path][method]  # type: ignore[no-any-return]


def _parameter(spec: dict[str, Any], name: str) -> dict[str, Any]:
    found = _operation(spec, "/v1/evaluations", "get")["parameters"]
    return next(parameter for parameter in found if parameter["name"] == name)


BREAKING: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("/v1/me: removed", lambda s: s["paths"].pop("/v1/me")),
    ("DELETE /v1/keys/{key_id}: removed", lambda s: s["paths"]["/v1/keys/{key_id}"].pop("delete")),
    ("body: field priority: required now", lambda s: _schema(s, "EvaluationRequest")["required"].append("priority")),
    ("body: field stdin: removed", lambda s: _schema(s, "EvaluationRequest")["properties"].pop("stdin")),
    (
        "body: field team: new and required",
        lambda s: _schema(s, "EvaluationRequest").update(
            properties=_schema(s, "EvaluationRequest")["properties"] | {"team": {"type": "string"}},
            required=["code", "team"],
        ),
    ),
    (
        "body: field code: type changed from string to integer",
        lambda s: _schema(s, "EvaluationRequest")["properties"].update(code={"type": "integer"}),
    ),
    (
        "body: field code: maxLength lowered to 10",
        lambda s: _schema(s, "EvaluationRequest")["properties"]["code"].update(maxLength=10),
    ),
    ("field reason: removed", lambda s: _schema(s, "EvaluationView")["properties"].pop("reason")),
    ("field id: may be absent now", lambda s: _schema(s, "EvaluationView")["required"].remove("id")),
    (
        "field attempt: type changed from integer to integer or null",
        lambda s: _schema(s, "EvaluationView")["properties"].update(
            attempt={"anyOf": [{"type": "integer"}, {"type": "null"}]}
        ),
    ),
    ("parameter state[]: no longer accepts queued", lambda s: _schema(s, "State")["enum"].remove("queued")),
    ("parameter limit: required now", lambda s: _parameter(s, "limit").update(required=True)),
    ("parameter limit: maximum lowered to 10", lambda s: _parameter(s, "limit")["schema"].update(maximum=10)),
    (
        "parameter label: removed",
        lambda s: _operation(s, "/v1/evaluations", "get")["parameters"].remove(_parameter(s, "label")),
    ),
    (
        "parameter tenant: new and required",
        lambda s: _operation(s, "/v1/evaluations", "get")["parameters"].append(
            {"in": "query", "name": "tenant", "required": True, "schema": {"type": "string"}}
        ),
    ),
    ("answer 201: removed", lambda s: _operation(s, *SUBMIT)["responses"].pop("201")),
    (
        "answer 201: header Location: removed",
        lambda s: _operation(s, *SUBMIT)["responses"]["201"]["headers"].pop("Location"),
    ),
    (
        "text/event-stream: removed",
        lambda s: _operation(s, "/v1/events", "get")["responses"]["200"]["content"].pop("text/event-stream"),
    ),
    ("body: removed", lambda s: _operation(s, *SUBMIT).pop("requestBody")),
    ("GET /problems/{slug}: needs a key now", lambda s: _operation(s, "/problems/{slug}", "get").update(security=[{}])),
]


@pytest.mark.parametrize(("told", "change"), BREAKING, ids=[told for told, _ in BREAKING])
def test_a_change_that_breaks_clients_is_named(
    spec: dict[str, Any], told: str, change: Callable[[dict[str, Any]], object]
) -> None:
    new = copy.deepcopy(spec)
    change(new)
    found = breaking_changes(spec, new)
    assert any(line.endswith(told) for line in found), found


HARMLESS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("nothing", lambda _: None),
    ("a new path", lambda s: s["paths"].update({"/v1/new": {"get": {"responses": {}}}})),
    ("a new answer field", lambda s: _schema(s, "EvaluationView")["properties"].update(new={"type": "string"})),
    ("a new optional request field", lambda s: _schema(s, "EvaluationRequest")["properties"].update(new={})),
    ("a new state", lambda s: _schema(s, "State")["enum"].append("paused")),
    ("a wider limit", lambda s: _parameter(s, "limit")["schema"].update(maximum=1000)),
    ("another error", lambda s: _operation(s, *SUBMIT)["responses"].update({"418": {"description": "x"}})),
    ("one error less", lambda s: _operation(s, *SUBMIT)["responses"].pop("429")),
    ("other words", lambda s: s["info"].update(description="other")),
    ("no key needed", lambda s: _operation(s, "/v1/me", "get").pop("security")),
]


@pytest.mark.parametrize(("what", "change"), HARMLESS, ids=[what for what, _ in HARMLESS])
def test_a_change_that_breaks_nobody_is_not_named(
    spec: dict[str, Any], what: str, change: Callable[[dict[str, Any]], object]
) -> None:
    new = copy.deepcopy(spec)
    change(new)
    assert breaking_changes(spec, new) == []
