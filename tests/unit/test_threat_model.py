"""The threat model names for every threat the test that tries it; here each of them is looked up."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.kubernetes.attacks import exhaustion, filesystem, network, privileges, trying

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parents[1]
MODEL = TESTS.parent / "docs" / "threat-model.md"
NAMED = re.compile(r"`((?:kubernetes|integration|unit)/\w+\.py)::(\w+)(?:\[(\w+)\])?`")
MODULES = (exhaustion, filesystem, network, privileges)


def rows() -> list[list[str]]:
    """The cells of each row of each table, without the heads."""
    lines = [line for line in MODEL.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "boundary" and set(row[0]) != {"-"}]


@cache
def functions_of(file: str) -> frozenset[str]:
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_threat_has_all_its_cells_and_a_test() -> None:
    assert len(rows()) >= 30
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        assert NAMED.search(row[-1]), f"no test tries this: {row[:3]}"
        assert not NAMED.sub("", row[-1]).strip(), f"is not the name of a test: {row[-1]}"


def test_every_test_that_is_named_exists() -> None:
    missing = [
        f"{file}::{name}"
        for row in rows()
        for file, name, _ in NAMED.findall(row[-1])
        if name not in functions_of(file)
    ]
    assert missing == []


def test_every_attack_that_is_named_is_one() -> None:
    named = {attack for row in rows() for _, _, attack in NAMED.findall(row[-1]) if attack}
    assert named - set(trying.ATTACKS) == set()
    assert {function.__module__ for function in trying.ATTACKS.values()} == {module.__name__ for module in MODULES}


def test_every_attack_says_what_it_tries() -> None:
    assert [name for name in trying.ATTACKS if not trying.tried(name).endswith(".")] == []
