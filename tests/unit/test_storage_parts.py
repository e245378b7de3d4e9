"""The parts of storage that decide without a database: cursors, composed lists, frames taken apart, hostile values, backends."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.evaluation import Reason, State
from crucible.frames import Frame, Kind
from crucible.problems import ProblemError
from crucible.settings import StorageSettings
from crucible.storage import migrate
from crucible.storage.engine import compile_select
from crucible.storage.objects import open_backend
from crucible.storage.output import _Split
from crucible.storage.reading import make_cursor, page_statement, read_cursor
from crucible.storage.records import storable_int, storable_json, storable_seconds, storable_size, storable_text
from crucible.storage.submission import _Headroom

pytestmark = pytest.mark.unit

_NUMBERS = st.integers(0, 10**18 - 1)
_FRAMES = st.lists(
    st.builds(Frame, st.sampled_from([Kind.STDOUT, Kind.STDERR]), st.integers(0, 2**40), st.binary(max_size=20))
)


@given(_NUMBERS, _NUMBERS)
def test_a_cursor_leads_back_to_its_place(first: int, second: int) -> None:
    assert read_cursor(make_cursor(first, second)) == (first, second)


@pytest.mark.parametrize(
    "junk", ["", "x", "AAAA", "!!!", "é", "MTIzLg", "LTEuNQ", "MS4yLjM", "\x00", make_cursor(10**18, 0), "a" * 5000]
)
def test_a_cursor_that_was_not_made_here_is_refused(junk: str) -> None:
    with pytest.raises(ProblemError) as caught:
        read_cursor(junk)
    assert caught.value.kind.slug == "invalid-request"
    assert caught.value.violations is not None
    assert caught.value.violations[0].field == "cursor"


@given(st.text(max_size=200))
def test_any_text_as_a_cursor_is_a_cursor_or_a_problem(text: str) -> None:
    with suppress(ProblemError):
        first, second = read_cursor(text)
        assert min(first, second) >= 0


@given(_FRAMES)
def test_frames_taken_apart_go_together_again_in_their_order(frames: list[Frame]) -> None:
    assert _Split.of(frames).frames() == frames


def test_what_a_caller_writes_never_becomes_part_of_a_statement() -> None:
    hostile = "x'; DROP TABLE evaluations; --"
    sql, args = compile_select(
        page_statement(
            owner=hostile,
            state=[State.QUEUED, State.FAILED],
            reason=[Reason.SIGNAL],
            priority=3,
            label=[f"{hostile}={hostile}"],
            since=datetime(2026, 1, 1, tzinfo=UTC),
            until=None,
            limit=10,
            cursor=make_cursor(1, 2),
        )
    )
    assert "DROP" not in sql
    assert hostile in args
    assert orjson.dumps({hostile: hostile}).decode() in args
    assert sorted({int(number) for number in re.findall(r"\$(\d+)", sql)}) == list(range(1, len(args) + 1))


def test_a_reason_alone_narrows_the_list_to_its_state() -> None:
    sql, args = compile_select(
        page_statement(
            owner=None,
            state=(),
            reason=[Reason.OOM_KILLED],
            priority=None,
            label=(),
            since=None,
            until=None,
            limit=10,
            cursor=None,
        )
    )
    assert State.FAILED in args
    assert "evaluations.state =" in sql


@given(st.text(st.characters(exclude_categories=())))
def test_hostile_text_becomes_storable(text: str) -> None:
    clean = storable_text(text)
    assert clean is not None
    assert "\x00" not in clean
    clean.encode()


def test_storable_text_stays_as_it_is() -> None:
    assert storable_text("שלום 👋 \n\t") == "שלום 👋 \n\t"
    assert storable_text(None) is None


def test_hostile_numbers_become_storable() -> None:
    assert storable_int(7) == 7
    assert storable_int(2**31) is None
    assert storable_size(10**30) == 2**63 - 1
    assert storable_seconds(math.inf) is None
    assert storable_seconds(math.nan) is None
    assert storable_seconds(0.5) == 0.5


def test_event_data_with_nul_is_storable_json() -> None:
    assert "\\u0000" not in storable_json({"exception_type": "A\x00B", "exit_code": 3})


def test_backends_are_named_so_that_the_data_folder_may_move(tmp_path: Path) -> None:
    settings = StorageSettings()
    own = open_backend("local", settings, tmp_path)
    assert (own.name, own.folder) == ("local", tmp_path / "objects")
    assert open_backend(f"file://{tmp_path}/objects/", settings, tmp_path).name == "local"
    other = open_backend(f"file://{tmp_path}/else%20where", settings, tmp_path)
    assert (other.name, other.folder) == (f"file://{tmp_path}/else%20where", tmp_path / "else where")
    s3 = open_backend("s3://bucket/some/prefix/", settings, tmp_path)
    assert (s3.name, s3.kind) == ("s3://bucket/some/prefix", "s3")


@pytest.mark.parametrize("url", ["ftp://host/x", "s3:///nobucket", "file://otherhost/x", "relative/path", ""])
def test_what_is_no_object_store_is_refused_with_an_example(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        open_backend(url, StorageSettings(), tmp_path)


@given(
    max_active=st.integers(1, 60),
    concurrent=st.integers(1, 20),
    strangers=st.lists(st.integers(0, 5), min_size=1, max_size=40),
)
def test_uncounted_submissions_never_exceed_the_quota(max_active: int, concurrent: int, strangers: list[int]) -> None:
    """The worst case: nothing ever ends, and `concurrent` submissions always read the sequence before any of them raises it."""
    headroom = _Headroom()
    headroom.concurrent = concurrent
    active = number = 0
    for others in strangers:
        number += others
        until = headroom.until("ada", max_active)
        if until is None or number >= until:
            headroom.learn("ada", max_active, active=active, number=number)
            until = headroom.until("ada", max_active)
        passing = concurrent if until is not None and number < until else 0
        active += passing
        number += passing
        assert active <= max_active


def test_the_newest_migration_is_the_one_that_a_start_expects() -> None:
    versions = Path(migrate.__code__.co_filename).parent / "migrations" / "versions"
    from crucible.storage.migrate import HEAD

    assert max(path.name.split("_")[0] for path in versions.glob("[0-9]*.py")) == HEAD
