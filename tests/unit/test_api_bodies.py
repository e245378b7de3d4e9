"""Request bodies: what is read, and how what is not is refused."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.requests import Request

from crucible.api.body import parse_json, read_body, read_model, validate
from crucible.evaluation import EvaluationRequest
from crucible.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.unit


def request(chunks: Iterable[bytes], **headers: str) -> Request:
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    pending = iter(messages)

    async def receive() -> dict[str, object]:
        return next(pending)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def refusal(body: bytes) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        validate(EvaluationRequest, (parsed := parse_json(body)).value, suspect=parsed.suspect)
    json.dumps(caught.value.body())
    return caught.value


async def test_a_body_is_refused_as_soon_as_it_is_longer_than_the_limit_whatever_its_length_says() -> None:
    for headers in ({}, {"content_length": "3"}):
        with pytest.raises(ProblemError) as caught:
            await read_body(request([b"x" * 60, b"x" * 60], **headers), 100)
        assert caught.value.kind.status == 413
        assert caught.value.extra["limit"] == 100


@pytest.mark.parametrize("declared", ["101", "9" * 30])
async def test_a_body_that_says_it_is_too_long_is_not_read_at_all(declared: str) -> None:
    with pytest.raises(ProblemError) as caught:
        await read_body(request([], content_length=declared), 100)
    assert caught.value.kind.status == 413


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_encoding": "gzip"},
    ],
)
async def test_a_body_that_is_not_plain_json_is_an_unsupported_media_type(headers: dict[str, str]) -> None:
    with pytest.raises(ProblemError) as caught:
        await read_body(request([b"{}"], **headers), 100)
    assert caught.value.kind.status == 415


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/vnd.x+json"])
async def test_json_by_any_of_its_names_is_read(kind: str) -> None:
    assert await read_body(request([b"{", b"}"], content_type=kind), 100) == b"{}"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"code": \n "x",}', "line 2"),
        (b'{"code": NaN}', "NaN is not JSON"),
        (b'{"code": -Infinity}', "-Infinity is not JSON"),
        (b'{"code": "a", "code": "b"}', "'code' is given more than once"),
        (b'{"labels": {"a": "1", "\\u0061": "2"}}', "'a' is given more than once"),
        (b'{"code": "\xff"}', "byte 10"),
        (b'\xff\xfe{\x00"\x00', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"priority": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[]", "object is expected"),
        (b'"code"', "object is expected"),
        (b"null", "object is expected"),
        (b'{"code": "a\tb"}', "control character"),
        (json.dumps({"labels": {str(i): "" for i in range(30_000)}}).encode(), "more than 20000 members"),
    ],
)
def test_what_is_not_json_of_the_right_shape_is_400_and_says_where(body: bytes, told: str) -> None:
    error = refusal(body)
    assert error.kind.status == 400
    assert told in error.detail


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        (b'{"code": "ab\\ud800"}', "code", "lone surrogate at offset 2"),
        (b'{"code": "x", "labels": {"a": "\\uDfff"}}', "labels.a", "lone surrogate at offset 0"),
        (b'{"code": "x", "\\ud800": 1}', "\\ud800", "lone surrogate at offset 0"),
        (b'{"code": "x", "extra": [{"deep": ["\\ud8001"]}]}', "extra.0.deep.0", "lone surrogate"),
    ],
)
def test_half_a_surrogate_pair_is_422_with_its_offset(body: bytes, field: str, told: str) -> None:
    error = refusal(body)
    assert error.kind.status == 422
    assert error.violations is not None
    [violation] = error.violations
    assert violation.field == field
    assert told in violation.message


def test_a_whole_surrogate_pair_is_a_character() -> None:
    parsed = parse_json(b'{"code": "\\ud83d\\ude00"}')
    assert parsed.suspect
    assert validate(EvaluationRequest, parsed.value, suspect=parsed.suspect).code == "😀"


def test_every_broken_rule_is_named_with_its_field() -> None:
    error = refusal(b'{"language": "ruby", "priority": "5", "labels": {"a": 1}, "colour": "red"}')
    assert error.violations is not None
    assert {violation.field for violation in error.violations} == {"code", "language", "priority", "labels.a", "colour"}
    by_field = {violation.field: violation for violation in error.violations}
    assert by_field["language"].value == "'ruby'"
    assert by_field["language"].accepted == "'python'"


def test_a_member_with_a_monstrous_name_does_not_come_back_whole() -> None:
    error = refusal(json.dumps({"code": "x", "é" * 100_000: 1}).encode())
    assert len(json.dumps(error.body())) < 2000


def test_many_violations_are_cut_to_what_a_person_reads() -> None:
    error = refusal(json.dumps({"code": "x", **{f"f{i}": i for i in range(5000)}}).encode())
    assert error.violations is not None
    assert len(error.violations) == 50


class _Anything(BaseModel):
    model_config = {"extra": "allow"}


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_the_parser_fail_in_any_other_way(body: bytes) -> None:
    with contextlib.suppress(ProblemError):
        parsed = parse_json(body)
        validate(_Anything, parsed.value, suspect=parsed.suspect)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(st.text(), _json, max_size=5))
def test_all_json_is_read_as_it_was_written(value: dict[str, object]) -> None:
    assert parse_json(json.dumps(value).encode()).value == value


async def test_a_model_is_read_in_one_step() -> None:
    read = await read_model(request([b'{"code"', b': "x"}']), EvaluationRequest, 100)
    assert read.code == "x"
