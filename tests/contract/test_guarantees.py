"""Every promise of docs/guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
REFERENCE = re.compile(r"`(?:[\w/]*/)?(?P<file>test_\w+\.py)?(?:::(?P<name>\w+))?`")


def promises(page: str) -> list[tuple[str, str]]:
    """Returns the promises of the table and the cells with their tests; rows that are headings have neither limit nor test."""
    rows = [line.strip("| ").split(" | ") for line in page.partition("<!-- test: guarantees -->\n")[2].partition("\n\n")[0].splitlines()]
    return [(cells[0], cells[-1].removeprefix("| ").strip()) for cells in rows[2:] if not cells[0].startswith("**[")]


def references(text: str) -> list[tuple[str, str]]:
    """Returns the (file, function or class) that a text refers to; ``::name`` refers to the file before it."""
    found, file = list[tuple[str, str]](), ""
    for match in REFERENCE.finditer(text):
        if match["file"] or match["name"]:
            file = match["file"] or file
            found.append((file, match["name"] or ""))
    return found


def missing(text: str) -> list[str]:
    """Returns a line for each reference that does not lead to exactly one file, or to nothing in it."""
    faults = []
    for file, name in references(text):
        paths = list((ROOT / "tests").rglob(file))
        if len(paths) != 1:
            faults.append(f"{file}: {len(paths)} such files")
        elif name and name not in defined(paths[0]):
            faults.append(f"{file}::{name}: no such test")
    return faults


def defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    assigned = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
    return assigned | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def test_table_has_a_test_for_each_promise() -> None:
    found = promises(PAGE)

    assert len(found) > 40
    assert [promise for promise, tests in found if not references(tests)] == []


def test_tests_that_the_page_names_exist() -> None:
    assert missing(PAGE) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`test_nowhere.py`", "test_nowhere.py: 0 such files"),
        ("`test_guarantees.py::test_nothing`", "test_guarantees.py::test_nothing: no such test"),
        ("`conftest.py`, `test_waits.py`", "test_waits.py: 2 such files"),
        ("`test_guarantees.py::missing`, `::test_nothing`", "test_guarantees.py::test_nothing: no such test"),
    ],
)
def test_planted_reference_to_a_missing_test_is_found(text: str, fault: str) -> None:
    assert missing(text) == [fault]


def test_promise_without_a_test_is_found() -> None:
    page = "<!-- test: guarantees -->\n| Promise | Limit | Test |\n|---|---|---|\n| A promise | a limit | none |\n\n"

    assert [promise for promise, tests in promises(page) if not references(tests)] == ["A promise"]
