"""Logs: one JSON object a line with what a reader needs, and no secret of any shape in any of them."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from crucible import logs
from crucible.auth import make_key
from crucible.evaluation import EvaluationRequest
from crucible.settings import LogSettings

pytestmark = pytest.mark.unit

SECRET = "hunter2-Hunter2"
KEY = make_key()[0]
KEY_SECRET = KEY.split("_", 2)[2]
CODE = "print('people write this')"


class Written:
    """Logging into a buffer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._stream = io.StringIO()

    def configure(self, **settings: Any) -> None:
        with self._monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", self._stream)
            logs.configure("test-service", LogSettings.model_validate({"format": "json", **settings}))

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def __call__(self) -> list[dict[str, Any]]:
        """Return the records so far."""
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    root = logging.getLogger()
    before, level = root.handlers, root.level
    written = Written(monkeypatch)
    written.configure(level="debug")
    yield written
    root.handlers, root.level = before, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def shown(**fields: Any) -> str:
    """Return fields as a log line would show them."""
    return logs._to_json(logs.redact(None, "info", dict(fields)))


# --- what a record holds --------------------------------------------------------------------------------------------------


def test_a_record_says_who_when_how_grave_and_about_what(written: Written) -> None:
    with structlog.contextvars.bound_contextvars(evaluation_id="ev-1", trace_id="abc"):
        logs.get_logger("queue").warning("claimed", attempt=2)
    [record] = written()
    time = record.pop("time")
    assert time.endswith("Z")
    assert record == {
        "event": "claimed",
        "service": "test-service",
        "part": "queue",
        "level": "warning",
        "evaluation_id": "ev-1",
        "trace_id": "abc",
        "attempt": 2,
    }


@pytest.mark.parametrize("name", ["some.library", "uvicorn", "uvicorn.error", "uvicorn.access"])
def test_loggers_of_the_standard_library_go_the_same_way(written: Written, name: str) -> None:
    with structlog.contextvars.bound_contextvars(evaluation_id="ev-1"):
        logging.getLogger(name).error("cannot reach postgresql://me:%s@db/x", SECRET)
    [record] = written()
    assert record["event"] == "cannot reach postgresql://me:[redacted]@db/x"
    assert (record["service"], record["level"], record["evaluation_id"]) == ("test-service", "error", "ev-1")
    assert record["time"]


def test_libraries_are_heard_from_warning_on(written: Written) -> None:
    logging.getLogger("httpx").info("HTTP Request: GET /internal/keys/x?secret_sha256=y")
    logs.get_logger("own").debug("heard")
    assert [record["event"] for record in written()] == ["heard"]


def test_a_lower_level_is_not_written(written: Written) -> None:
    written.configure(level="error")
    logs.get_logger("x").warning("no")
    logging.getLogger("x").warning("no")
    logs.get_logger("x").error("yes")
    assert [record["event"] for record in written()] == ["yes"]


def test_an_exception_is_one_line_without_its_secrets(written: Written) -> None:
    def fail() -> None:
        raise ConnectionError(f"postgresql://me:{SECRET}@db refused {KEY}")

    try:
        fail()
    except ConnectionError:
        logs.get_logger("x").exception("failed")
        logging.getLogger("y").exception("failed")
    records = written()
    assert len(records) == 2
    for record in records:
        assert "ConnectionError" in record["exception"]
        assert SECRET not in json.dumps(record)
        assert KEY_SECRET not in json.dumps(record)


def test_a_person_at_a_terminal_reads_plain_lines(written: Written) -> None:
    written.configure(format="console")
    logs.get_logger("x").info("hello", token=SECRET)
    assert "hello" in written.text
    assert SECRET not in written.text
    assert not written.text.startswith("{")


# --- what no record holds -------------------------------------------------------------------------------------------------


@dataclass
class _Connection:
    host: str
    password: str


class _Options(BaseModel):
    name: str
    api_token: str


class _Plain:
    def __str__(self) -> str:
        return f"connected with password={SECRET}"


SHAPES: dict[str, Any] = {
    "by name": {"password": SECRET},
    "by the end of a name": {"internal_token": SECRET, "client_secret": SECRET, "signing_key": SECRET},
    "whatever the case": {"Authorization": SECRET, "API_KEY": SECRET, "X-Api-Key": SECRET},
    "in a mapping in a list in a mapping": {"a": [{"b": {"secret": SECRET}}]},
    "in a tuple, in a set": {"a": (f"token={SECRET}",), "b": {f"token={SECRET}"}},
    "as a header pair": {"headers": [("authorization", SECRET), (b"cookie", SECRET.encode())]},
    "as bytes": {"line": f"Authorization: Bearer {SECRET}".encode()},
    "in a dataclass": {"connection": _Connection("db", SECRET)},
    "in a model": {"options": _Options(name="x", api_token=SECRET)},
    "in a model's secret": {"value": SecretStr(SECRET)},
    "in what prints itself": {"object": _Plain()},
    "in an exception": {"error": ValueError(f"bad token: {SECRET}")},
    "in the message": {"event": f"calling with Bearer {SECRET}"},
    "in a URL": {"url": f"postgresql+asyncpg://user:{SECRET}@host:5432/db?x=1"},
    "in a URL whose password has an at sign": {"url": f"amqp://user:a@{SECRET}@host/"},
    "in a URL without a user": {"url": f"redis://:{SECRET}@host"},
    "in a query": {"url": f"https://host/x?api_key={SECRET}&page=2"},
    "in a signed URL": {"url": f"https://bucket/x?X-Amz-Signature={SECRET}"},
    "in a connection string": {"dsn": f"host=db password={SECRET} dbname=x"},
    "in printed JSON": {"body": json.dumps({"client_secret": SECRET})},
    "in a printed mapping": {"body": repr({"password": SECRET})},
    "basic credentials": {"header": f"Basic {SECRET}"},
    "a private key": {"pem": f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----"},
    "as the name of a member": {"seen": {f"token={SECRET}": 1}},
    "too deep to be shown": {"a": {"b": {"c": {"d": {"e": {"f": {"g": f"token={SECRET}"}}}}}}},
}


def test_a_secret_of_any_shape_is_redacted() -> None:
    lines = {name: shown(**fields) for name, fields in SHAPES.items()}
    assert {name: line for name, line in lines.items() if SECRET in line} == {}
    assert all(json.loads(line) for line in lines.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"event": f"key {KEY} was used"},
        {"error": PermissionError(KEY)},
        {"a": {"b": [KEY, (KEY,)]}},
        {KEY: 1},
        {"raw": KEY.encode()},
    ],
)
def test_the_secret_of_an_api_key_is_redacted_and_its_id_kept(fields: dict[str, Any]) -> None:
    line = shown(**fields)
    assert KEY_SECRET not in line
    assert KEY.split("_")[1] in line


@pytest.mark.parametrize(
    "fields",
    [
        {"code": CODE},
        {"request": EvaluationRequest(code=CODE, stdin=CODE)},
        {"request": {"code": CODE, "stdin": CODE}},
        {"error": f"1 validation error\n  Input [type=x, input_value={CODE!r}, input_type=str]"},
        {"error": f"asyncpg: failed\n[SQL: INSERT]\n[parameters: ('ev-1', {CODE!r})]\n(Background on this error)"},
        {"error": f"null value\nDETAIL:  Failing row contains (ev-1, {CODE}, x)."},
    ],
)
def test_peoples_code_is_redacted(fields: dict[str, Any]) -> None:
    assert "people write this" not in shown(**fields)


@given(
    st.recursive(
        st.just(KEY) | st.just(f"x://u:{KEY_SECRET}@h") | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=12,
    )
)
def test_no_nesting_hides_a_key(value: Any) -> None:
    line = shown(value=value)
    assert KEY_SECRET not in line
    json.loads(line)


@pytest.mark.parametrize(
    "fields",
    [
        {"idempotency_key": "mine", "key_id": "abcd1234", "object_key": "ev-1/stdout"},
        {"event": "evaluation finished", "exit_code": 3, "reason": "exit_nonzero"},
        {"url": "http://127.0.0.1:8080/v1/evaluations?limit=5"},
        {"error": "ValueError: the table has no row"},
        {"when": None, "ratio": 0.5, "ok": True},
    ],
)
def test_what_is_no_secret_is_left_alone(fields: dict[str, Any]) -> None:
    assert json.loads(shown(**fields)) == fields


def test_what_json_cannot_hold_is_written_all_the_same() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    record = json.loads(shown(text="\ud800", big=10**5000, cyclic=cyclic, kind=object, odd={1: b"\xff"}))
    assert record["text"] == "\\ud800"
    assert record["big"].startswith("<integer of")
    assert record["odd"] == {"1": "\\xff"}


@pytest.mark.parametrize(
    "text", ["a-" * 500_000, "eyJ-" * 250_000, "x://:" * 200_000, "token=" * 200_000, "[parameters: " * 80_000]
)
def test_a_long_hostile_text_costs_little_and_is_cut(text: str) -> None:
    started = perf_counter()
    line = shown(text=text)
    assert perf_counter() - started < 20, (
        "cost grows with the square of the length: minutes, where it should be milliseconds"
    )
    assert len(line) < 200_000
    assert "characters more]" in line
