"""What the options and files of the command line become before they are sent."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from crucible.cli import requests
from crucible.cli.requests import Item

pytestmark = pytest.mark.unit


def test_a_folder_gives_its_python_files_in_order(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "note.txt"):
        (tmp_path / name).write_text(f"# {name}")
    assert requests.read_batch(tmp_path, {"priority": 3}) == [
        Item(str(tmp_path / "a.py"), {"priority": 3, "code": "# a.py"}),
        Item(str(tmp_path / "b.py"), {"priority": 3, "code": "# b.py"}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[{"code": "1"}, {"code": "2", "priority": 9}]',
        '{"evaluations": [{"code": "1"}, {"code": "2", "priority": 9}]}',
        '{"code": "1"}\n\n{"code": "2", "priority": 9}\n',
    ],
)
def test_json_in_each_of_its_forms_gives_the_same_requests(tmp_path: Path, text: str) -> None:
    path = tmp_path / "batch.json"
    path.write_text(text)
    bodies = [item.body for item in requests.read_batch(path, {"priority": 3})]
    assert bodies == [{"priority": 3, "code": "1"}, {"priority": 9, "code": "2"}]


def test_json_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text(json.dumps({"code": "'\u2028'"}, ensure_ascii=False) + '\n{"code": "2"}')
    assert len(requests.read_batch(path, {})) == 2


@pytest.mark.parametrize("text", ["", "[]", "3", "[1]", '"x"', '{"code": "1"}\n{'])
def test_a_file_without_requests_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "batch.json"
    path.write_text(text)
    with pytest.raises(typer.BadParameter, match=r"batch\.json"):
        requests.read_batch(path, {})


def test_a_batch_is_cut_where_the_api_would_refuse_it() -> None:
    small = [Item(str(n), {"code": "x"}) for n in range(250)]
    assert [len(portion) for portion in requests.portions(small)] == [100, 100, 50]
    large = [Item(str(n), {"code": "x" * 1_000_000}) for n in range(40)]
    portions = list(requests.portions(large))
    assert [item for portion in portions for item in portion] == large
    assert all(len(json.dumps([item.body for item in portion])) < 32 * 1024**2 for portion in portions)


def test_labels_are_read_and_bad_ones_refused() -> None:
    assert requests.parse_labels(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(typer.BadParameter, match="key=value"):
        requests.parse_labels(["nothing"])


def test_times_are_iso_or_ages() -> None:
    parsed = requests.parse_time("2h", "--since")
    assert parsed is not None
    assert abs(datetime.now(UTC) - timedelta(hours=2) - datetime.fromisoformat(parsed)) < timedelta(seconds=10)
    assert requests.parse_time("2026-01-31T12:00:00+02:00", "--since") == "2026-01-31T10:00:00+00:00"
    assert requests.parse_time(None, "--since") is None
    with pytest.raises(typer.BadParameter, match="yesterday"):
        requests.parse_time("yesterday", "--since")


def test_source_that_is_not_utf8_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"print('\xe4')")
    with pytest.raises(typer.BadParameter, match="not UTF-8: byte 7"):
        requests.read_text(str(tmp_path / "latin.py"), "FILE")
    with pytest.raises(typer.BadParameter, match="No such file"):
        requests.read_text(str(tmp_path / "none.py"), "FILE")


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("print('ä')".encode())))
    assert requests.read_text("-", "FILE") == "print('ä')"
