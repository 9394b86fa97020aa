"""Every situation of docs/troubleshooting.md is provoked by a test: ``situations.toml`` says by which."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
TEST_OF = tomllib.loads(Path(__file__).with_name("situations.toml").read_text("utf-8"))


def situations(page: str) -> list[str]:
    """Returns the first cell of every row of the page's tables; with the reason if several rows have the same one."""
    pairs = itertools.pairwise(page.splitlines())
    rows = [line.strip("| ").split(" | ") for above, line in pairs if line.startswith("| ") and above.startswith("|")]
    times = Counter(cells[0] for cells in rows)
    return [cells[0] + (f", {cells[1].rpartition(', ')[2]}" if times[cells[0]] > 1 else "") for cells in rows]


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    return (ROOT / file).is_file() and re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE) is not None


def test_every_situation_has_a_test_and_every_test_a_situation() -> None:
    found = situations(PAGE)

    assert len(found) > 80
    assert sorted(set(found) - set(TEST_OF)) == [], "rows of docs/troubleshooting.md without a test in situations.toml"
    assert sorted(set(TEST_OF) - set(found)) == [], "lines of situations.toml without a row"


def test_the_tests_exist() -> None:
    assert [(row, test) for row, test in TEST_OF.items() if not exists(test)] == []


def test_rows_are_read_and_a_test_that_is_gone_is_found() -> None:
    page = "| Error | Status |\n|---|---|\n| `A` | X, `one` |\n| `A` | X, `two` |\n| `B` | y |\n"
    assert situations(page) == ["`A`, `one`", "`A`, `two`", "`B`"]
    assert exists("tests/contract/test_troubleshooting.py::test_the_tests_exist")
    assert not exists("tests/contract/test_troubleshooting.py::test_that_is_gone")
    assert not exists("tests/contract/test_gone.py::test_the_tests_exist")
