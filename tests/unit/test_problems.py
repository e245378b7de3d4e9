"""Problem details: every error has one kind, a body that JSON can carry, and advice."""

from __future__ import annotations

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.evaluation import EvaluationRequest, RequestRejectedError, Violation, resolve
from crucible.health import Health
from crucible.limits import Limits
from crucible.problems import CONTENT_TYPE, KINDS, ProblemDetails, ProblemError, invalid_request
from crucible.service import make_app

pytestmark = pytest.mark.unit


def test_a_kind_is_complete_and_its_status_is_an_errors() -> None:
    for slug, kind in KINDS.items():
        assert kind.slug == slug == slug.lower().strip("-")
        assert 400 <= kind.status < 600
        assert kind.title
        assert kind.advice.endswith(".")
        # Only what may pass by itself is called retryable.
        assert not kind.retryable or kind.status in {409, 424, 429, 503}


def test_a_body_has_what_rfc_9457_asks_for_and_points_to_its_explanation() -> None:
    for slug, kind in KINDS.items():
        body = ProblemError(slug, "because").body("request-1")
        assert body["type"] == f"/problems/{slug}"
        assert (body["status"], body["title"], body["detail"]) == (kind.status, kind.title, "because")
        assert body["instance"] == "request-1"


def test_violations_and_further_members_travel_and_absent_ones_do_not() -> None:
    violation = Violation(field="priority", message="must be 0 to 10", value="11", limit="10", accepted="0 to 10")
    body = ProblemError("invalid-request", "x", violations=[violation], limit=5).body()
    assert body["violations"] == [violation.model_dump()]
    assert body["limit"] == 5
    assert "instance" not in body


def test_an_unknown_kind_is_a_mistake_found_where_it_is_made() -> None:
    with pytest.raises(KeyError):
        ProblemError("no-such-kind", "x")


_ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(_ANY_TEXT, _ANY_TEXT, st.dictionaries(_ANY_TEXT, _ANY_TEXT, max_size=3))
def test_whatever_a_problem_quotes_its_body_is_json(detail: str, field: str, extra: dict[str, str]) -> None:
    error = ProblemError("invalid-request", detail, violations=[Violation(field=field, message=detail)], given=extra)
    body = orjson.loads(orjson.dumps(error.body(detail)))
    assert ProblemDetails.model_validate(body).status == 422


async def test_a_service_answers_with_the_problem_its_type_and_when_to_try_again() -> None:
    app = make_app("api", Health("api", "1"), title="t", description="d")

    @app.get("/busy")
    async def busy() -> None:
        raise ProblemError("rate-limited", "slow down", retry_after=0.2)

    @app.get("/hostile")
    async def hostile() -> None:
        try:
            resolve(EvaluationRequest(code="pass", image="\ud800\x00", labels={"\udfff": "\x00"}), Limits())
        except RequestRejectedError as error:
            raise ProblemError("invalid-request", str(error), violations=error.violations) from error

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        answer = await http.get("/busy", headers={"X-Request-ID": "mine"})
        refused = await http.get("/hostile")
        missing = await http.get("/nowhere")
    assert (answer.status_code, answer.headers["Content-Type"]) == (429, CONTENT_TYPE)
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["instance"] == "mine"
    assert refused.status_code == 422
    assert {violation["field"] for violation in refused.json()["violations"]} == {"image", "labels"}
    assert (missing.status_code, missing.json()["type"]) == (404, "/problems/not-found")


def test_a_refused_request_names_its_fields_once_each_and_not_all_of_very_many() -> None:
    violations = [Violation(field=field, message="is wrong") for field in ("code", "priority", "code")]
    assert invalid_request(violations).detail == "refused because of code, priority"
    many = [Violation(field=f"f{n}", message="is wrong") for n in range(50)]
    assert invalid_request(many).detail == "refused because of f0, f1, f2, f3, f4 and 45 more"
    assert invalid_request(many).violations == many
