"""The texts of the project are plain English: no phrase and no name of ``english.toml`` stands in a docstring, comment, message or page.

``python tests/support/english.py PATH`` lists what is found below a path and what to write instead.
"""

from __future__ import annotations

import tomllib

import pytest

from support.english import PROSE, WORD_LIST, Finding, Pattern, Segment, WordList, findings_of, read_word_list, source_files

WORDS = read_word_list()
PLANTED = [(pattern, text) for pattern in WORDS.patterns for text in pattern.planted]
PLANTED_FILES = [(file["path"], file["source"], file["lines"]) for file in tomllib.loads(WORD_LIST.read_text("utf-8"))["planted_files"]]
FINE = [(pattern, text) for pattern in WORDS.patterns for text in pattern.fine]


def found_in(pattern: Pattern, text: str) -> list[Finding]:
    return list(pattern.findings("planted.py", Segment(pattern.kinds[0], 1, text)))


@pytest.mark.parametrize(("pattern", "text"), PLANTED)
def test_word_list_planted_phrase_is_found(pattern: Pattern, text: str) -> None:
    assert found_in(pattern, text)


@pytest.mark.parametrize(("pattern", "text"), FINE)
def test_word_list_legitimate_phrase_is_not_found(pattern: Pattern, text: str) -> None:
    assert not found_in(pattern, text)


@pytest.mark.parametrize(("path", "source", "lines"), PLANTED_FILES)
def test_findings_of_each_kind_of_text_have_their_line(path: str, source: str, lines: list[int]) -> None:
    assert [finding.line for finding in WORDS.findings(path, source)] == lines


def test_findings_exception_covers_only_its_path() -> None:
    phrase = WORDS.patterns[-1].planted[0]

    words = WordList(WORDS.patterns, frozenset({("a.md", phrase)}))

    assert not words.findings("a.md", phrase)
    assert words.findings("b.md", phrase)


def test_every_text_is_clean() -> None:
    found = [finding for path in source_files() for finding in findings_of(path, WORDS)]

    assert not found, "\n" + "\n".join(map(str, found))


def test_exceptions_of_the_word_list_are_needed() -> None:
    everything = WordList(WORDS.patterns, frozenset())

    unneeded = [(path, text) for path, text in WORDS.exceptions if text not in {found.found for found in findings_of(path, everything)}]

    assert not unneeded


def test_word_list_kinds_are_known() -> None:
    assert {kind for pattern in WORDS.patterns for kind in pattern.kinds} <= {*PROSE, "argument", "function", "name"}
