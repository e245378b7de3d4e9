"""The command line's client: where its key goes, what it takes for an event, and the words it shares with the domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crucible.cli.client import TERMINAL_STATES, Client, StreamEvent, evaluation_path, parse_events
from crucible.cli.explain import STATE_STYLES
from crucible.cli.session import Session
from crucible.evaluation import TERMINAL_STATES as DOMAIN_TERMINAL_STATES
from crucible.evaluation import State

pytestmark = pytest.mark.unit


def test_the_client_knows_the_states_of_the_domain() -> None:
    assert {str(state) for state in DOMAIN_TERMINAL_STATES} == TERMINAL_STATES
    assert set(STATE_STYLES) == {str(state) for state in State}


def test_a_stream_is_cut_into_its_events() -> None:
    stream = b"retry: 1000\n\n: still here\n\nevent: output\nid: 1-2\ndata: {\ndata: }\n\ndata:bare\n\nid: 9\n\ndata: cut off"
    assert list(parse_events(iter(stream.splitlines(keepends=True)))) == [
        StreamEvent("output", "{\n}", "1-2"),
        StreamEvent("message", "bare", "1-2"),
    ]


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://host", "file:///etc/passwd", "http://"])
def test_what_is_not_the_url_of_a_platform_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL of a platform"):
        Client(url, None)


def test_an_id_cannot_reach_another_path() -> None:
    assert evaluation_path("../keys?x=/#", "/cancel") == "/v1/evaluations/..%2Fkeys%3Fx%3D%2F%23/cancel"


@pytest.fixture
def server_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRUCIBLE_DATA_DIR", str(tmp_path))
    (tmp_path / "server.json").write_text(
        json.dumps({"url": "http://127.0.0.1:4711", "api_key": "crk_local", "pid": 1})
    )
    return tmp_path / "server.json"


def authorization(client: Client) -> str | None:
    return client._headers.get("Authorization")


def test_the_platform_of_this_machine_is_found_with_no_option(server_file: Path) -> None:
    client = Session().client()
    assert (client.url, authorization(client)) == ("http://127.0.0.1:4711", "Bearer crk_local")


def test_the_key_of_this_machine_is_never_sent_to_another_platform(server_file: Path) -> None:
    assert authorization(Session(url="http://elsewhere.example").client()) is None
    assert authorization(Session(url="http://127.0.0.1:4711").client()) == "Bearer crk_local"


def test_options_count_more_than_the_server_file(server_file: Path) -> None:
    client = Session(url="http://elsewhere.example/", api_key="crk_mine").client()
    assert (client.url, authorization(client)) == ("http://elsewhere.example", "Bearer crk_mine")


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '"x"'])
def test_a_broken_server_file_counts_as_none(server_file: Path, content: str) -> None:
    server_file.write_text(content)
    assert Session().client().url == "http://127.0.0.1:8080"
