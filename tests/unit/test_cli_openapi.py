"""`crucible openapi`: the file in the repository is compared by what it says, and every drift is named."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crucible.api import openapi as api_openapi
from crucible.cli.main import app
from crucible.cli.openapi import differences, digest_path

pytestmark = pytest.mark.unit

runner = CliRunner()


@pytest.fixture(autouse=True, scope="module")
def _spec_is_built_once() -> Iterator[None]:
    """The real document; building it for each call would take most of the tier's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api_openapi, "canonical_spec", functools.cache(api_openapi.canonical_spec))
        yield


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "openapi.json"
    assert runner.invoke(app, ["openapi", "--output", str(path)]).exit_code == 0
    return path


def check(path: Path) -> tuple[int, dict[str, Any]]:
    done = runner.invoke(app, ["openapi", "--check", "--output", str(path), "--json"])
    return done.exit_code, json.loads(done.stdout)


def rewrite(path: Path, spec: dict[str, Any], **layout: Any) -> None:
    text = json.dumps(spec, **layout)
    path.write_text(text)
    digest_path(path).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {path.name}\n")


def test_the_file_is_sorted_has_its_digest_beside_it_and_passes_its_own_check(written: Path) -> None:
    text = written.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert digest_path(written).read_text() == f"{hashlib.sha256(text.encode()).hexdigest()}  openapi.json\n"
    assert check(written)[0] == 0


def test_without_output_the_document_is_printed(written: Path) -> None:
    assert runner.invoke(app, ["openapi"]).stdout == written.read_text()


def test_another_layout_of_the_same_content_is_no_drift(written: Path) -> None:
    rewrite(written, json.loads(written.read_text()))
    assert check(written)[0] == 0


def test_drift_is_found_and_named(written: Path) -> None:
    spec = json.loads(written.read_text())
    spec["info"]["title"] = "Another"
    rewrite(written, spec)
    code, report = check(written)
    assert code == 1
    assert report["differences"] == ["/info/title: changed"]
    assert report["breaking"] == []


def test_a_breaking_change_is_named_as_one(written: Path) -> None:
    spec = json.loads(written.read_text())
    spec["paths"]["/v1/gone"] = {"get": {"responses": {"200": {"description": "was here"}}}}
    rewrite(written, spec)
    code, report = check(written)
    assert code == 1
    assert report["breaking"] == ["/v1/gone: removed"]
    shown = runner.invoke(app, ["openapi", "--check", "--output", str(written)])
    assert "breaks clients: /v1/gone: removed" in shown.stdout
    assert "/paths/~1v1~1gone: only in the file" in shown.stdout


def test_a_digest_that_does_not_fit_or_is_missing_is_drift(written: Path) -> None:
    digest_path(written).write_text("0" * 64 + "  openapi.json\n")
    assert "does not fit" in check(written)[1]["problems"][0]
    digest_path(written).unlink()
    code, report = check(written)
    assert code == 1
    assert "missing" in report["problems"][0]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_file_that_is_missing_or_broken_is_drift(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "openapi.json"
    if content is not None:
        path.write_text(content)
    code, report = check(path)
    assert code == 1
    assert report["problems"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b/c": 1}}, {"a": {"b/c": 2}}, ["/a/b~1c: changed"]),
        ({"a": 1}, {"b": 1}, ["/a: only in the file", "/b: only in the program"]),
        ([1, 2], [1, 3], ["/1: changed"]),
        ([1], [1, 2], [": changed"]),
        (1, "1", [": changed"]),
    ],
)
def test_differences_are_json_pointers(old: object, new: object, found: list[str]) -> None:
    assert differences(old, new) == found
