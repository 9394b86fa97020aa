"""Finds phrases and names of ``tests/contract/english.toml`` in texts: docstrings, comments, messages, pages, names in code.

    python tests/support/english.py [PATH ...]

lists the findings below each path, or in every file that git does not ignore, as ``file:line: what was found -> what to write``.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
WORD_LIST = ROOT / "tests" / "contract" / "english.toml"

Kind = Literal["docstring", "attribute", "argument", "function", "comment", "text", "page", "name"]
PROSE: tuple[Kind, ...] = ("docstring", "attribute", "comment", "text", "page")
"""The kinds that a pattern looks into unless its entry says otherwise. Each text has one kind; "argument" and "function" are parts."""

CODE = re.compile(r"``[^`]*``|`[^`\n]*`")
LOOK_BEHIND = re.compile(r"(\(\?<![^)]*\))")
ARGUMENT = re.compile(r"^ {4,}\*{0,2}\w+: (?P<text>.*)$")
HASH_COMMENTS = {".toml", ".yml", ".yaml", ".txt"}
SLASH_COMMENTS = {".proto", ".mjs"}
HASH_NAMES = {"Makefile", "Dockerfile", ".dockerignore"}


@dataclass(frozen=True)
class Segment:
    """A text as a reader sees it."""

    kind: Kind
    line: int
    """Line of the file in which the text begins, from 1."""
    text: str


@dataclass(frozen=True)
class Finding:
    """One phrase that should be written otherwise."""

    path: str
    line: int
    found: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found!r} -> {self.write}"


@dataclass(frozen=True)
class Pattern:
    """One entry of the word list."""

    find: re.Pattern[str]
    write: str
    """The words to use instead."""
    kinds: tuple[Kind, ...]
    planted: tuple[str, ...]
    """Texts in which the pattern must be found."""
    fine: tuple[str, ...]
    """Texts in which it must not be found."""
    in_code: bool = False
    """Whether text between backticks is looked into, too."""

    def findings(self, path: str, segment: Segment) -> Iterator[Finding]:
        if segment.kind not in self.kinds:
            return
        text = segment.text if self.in_code else CODE.sub(_blank, segment.text)
        for match in self.find.finditer(text):
            line = segment.line + text.count("\n", 0, match.start())
            found = segment.text[match.start() : match.end()]
            yield Finding(path, line, " ".join(found.split()), self.write)


@dataclass(frozen=True)
class WordList:
    """The patterns of a word list, and the findings that are right where they stand: (path, phrase)."""

    patterns: tuple[Pattern, ...]
    exceptions: frozenset[tuple[str, str]]

    def findings(self, path: str, source: str) -> list[Finding]:
        """Returns what is found in a file's text, by line."""
        found = [
            finding
            for segment in segments(path, source)
            for pattern in self.patterns
            for finding in pattern.findings(path, segment)
            if (finding.path, finding.found) not in self.exceptions
        ]
        return sorted(found, key=lambda finding: finding.line)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^`\n]", "_", match.group())


def _pattern(entry: dict[str, Any]) -> Pattern:
    # A phrase may be wrapped anywhere, so each space stands for any white space; what is looked at behind has to be of fixed length.
    parts = LOOK_BEHIND.split(entry["find"])
    return Pattern(
        find=re.compile("".join(part if part.startswith("(?<!") else part.replace(" ", r"\s+") for part in parts)),
        write=entry["write"],
        kinds=tuple(entry.get("kinds", PROSE)),
        planted=tuple(entry["planted"]),
        fine=tuple(entry.get("fine", ())),
    )


def read_word_list() -> WordList:
    data = tomllib.loads(WORD_LIST.read_text("utf-8"))
    names = tuple(
        Pattern(re.compile(rf"\b{old}\b"), new, ("name", *PROSE), planted=(old,), fine=(), in_code=True)
        for old, new in data["old_names"].items()
    )
    return WordList(
        tuple(_pattern(entry) for entry in data["patterns"]) + names,
        frozenset((entry["path"], entry["text"]) for entry in data.get("exceptions", ())),
    )


def segments(path: str, source: str) -> Iterator[Segment]:
    """Yields the texts of a file, by its kind; nothing for a kind of file that has none."""
    name, suffix = Path(path).name, Path(path).suffix
    if suffix == ".py":
        yield from _python(source)
    elif suffix == ".md":
        yield Segment("page", 1, _without_code_blocks(source))
    elif suffix in SLASH_COMMENTS:
        yield from _comments(source, "//")
    elif suffix in HASH_COMMENTS or name in HASH_NAMES:
        yield from _comments(source, "#")


def _without_code_blocks(page: str) -> str:
    lines, fenced = [], False
    for line in page.split("\n"):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        lines.append("" if fenced or fence or line.startswith("    ") else line)
    return "\n".join(lines)


def _comments(source: str, mark: str) -> Iterator[Segment]:
    """Yields the comments of a file without strings that hold the mark; lines that follow each other are one text."""
    yield from _joined((number, line.split(mark, 1)[1]) for number, line in enumerate(source.split("\n"), 1) if mark in line)


def _joined(comments: Iterator[tuple[int, str]]) -> Iterator[Segment]:
    start, lines = 0, list[str]()
    for number, text in comments:
        if lines and number != start + len(lines):
            yield Segment("comment", start, "\n".join(lines))
            lines = []
        start = start if lines else number
        lines.append(text)
    if lines:
        yield Segment("comment", start, "\n".join(lines))


def _python(source: str) -> Iterator[Segment]:
    tree = ast.parse(source)
    seen = set[int]()
    for node, kind, text in _docstrings(tree):
        seen.add(id(node))
        yield Segment(kind, node.lineno, text)
        if kind == "docstring":
            yield from _arguments(node.lineno, text)
    for owner in ast.walk(tree):
        if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(owner, clean=False)):
            yield Segment("function", owner.body[0].lineno, text.split("\n")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            seen.update(id(part) for part in ast.walk(node) if part is not node)
            yield Segment("text", node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen and " " in node.value:
            yield Segment("text", node.lineno, node.value)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    yield from _joined((token.start[0], token.string.lstrip("#")) for token in tokens if token.type == tokenize.COMMENT)
    names = [""] * (source.count("\n") + 1)
    for token in tokens:
        if token.type == tokenize.NAME:
            names[token.start[0] - 1] += f" {token.string}"
    yield Segment("name", 1, "\n".join(names))


def _docstrings(tree: ast.AST) -> Iterator[tuple[ast.Constant, Kind, str]]:
    """Yields the docstrings of modules, classes and functions, and those behind the attributes that they describe."""
    for owner in ast.walk(tree):
        body = getattr(owner, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in zip([None, *body], body, strict=False):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                described = isinstance(before, ast.Assign | ast.AnnAssign)
                yield statement.value, "attribute" if described else "docstring", statement.value.value


def _arguments(line: int, docstring: str) -> Iterator[Segment]:
    """Yields what a docstring's section ``Args:`` says of each argument."""
    inside = False
    for number, text in enumerate(docstring.split("\n")):
        heading = text.strip()
        if heading.endswith(":") and " " not in heading:
            inside = heading == "Args:"
        elif inside and (match := ARGUMENT.match(text)):
            yield Segment("argument", line + number, match["text"])


def source_files() -> list[str]:
    """Returns the files of the repository that git does not ignore, without generated code and the word list itself."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    return [path for path in listed if path and "_protos/v1/" not in path and ROOT / path != WORD_LIST and (ROOT / path).is_file()]


def below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def findings_of(path: str, words: WordList) -> list[Finding]:
    try:
        source = (ROOT / path).read_text("utf-8")
    except UnicodeDecodeError:  # golden messages and pictures
        return []
    return words.findings(path, source)


def main(arguments: list[str]) -> int:
    words = read_word_list()
    folders = [str(Path(argument).resolve().relative_to(ROOT)) for argument in arguments]
    paths = [path for path in source_files() if not folders or folders == ["."] or below(path, folders)]
    found = [finding for path in paths for finding in findings_of(path, words)]
    for finding in found:
        print(finding)
    print(f"{len(found)} findings in {len(paths)} files")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
