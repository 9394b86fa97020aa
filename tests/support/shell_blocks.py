"""Commands of the pages, checked without running them.

Those of the project are parsed by their command lines. Of make and Python it is checked that what they name exists.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from touchline._cli.app import app as client_app
from touchline_server import read_cfg
from touchline_server.cli.main import app as server_app

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*)[a-z -]*:", MAKEFILE, re.MULTILINE))
MAKE_VARIABLES = set(re.findall(r"^([A-Z_0-9]+) \?=", MAKEFILE, re.MULTILINE))
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
SEPARATORS = {"&&", "||", ";", "&", "|"}
FILE_SUFFIXES = {".pt", ".h5", ".npz", ".toml", ".pem", ".key"}
SHELL = {"cd", "cat", "cp", "mv", "mkdir", "rm", "chmod", "kill", "wait", "sleep", "printf", "echo", "openssl", "sqlite3", "curl"}
"""Programs of the system, of which nothing is checked."""


def check_commands(script: str, place: str) -> None:
    """Checks every command of a block.

    Raises:
        AssertionError: a command does not exist, or would be refused.
    """
    for words in commands(script):
        assignments = [match for word in words if (match := ASSIGNMENT.fullmatch(word))] if words[0] == "export" else []
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            assignments.append(match)
            words = words[1:]
        for match in assignments:
            _check_variable(match[1], match[2], place)
        if words and words[0] != "export":
            program = Path(words[0]).name
            if program not in CHECKS and program not in SHELL:
                raise AssertionError(f"{place}: nothing knows {words[0]!r}; mark the block as not run, with the reason")
            CHECKS.get(program, _accept)(words[1:], place)


def commands(script: str) -> Iterator[list[str]]:
    """Yields the words of each simple command; comments are left out."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in SEPARATORS:
                if words:
                    yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def _check_variable(name: str, value: str, place: str) -> None:
    if not name.startswith("TOUCHLINE_"):
        return
    if "__" in name:
        with _environment(name, value):
            read_cfg(ROOT / "cfg" / "default.toml")
    else:
        assert name in _known_variables(), f"{place}: nothing reads {name}"


def _known_variables() -> set[str]:
    sources = [ROOT / "docker-compose.yml", *(path for part in ("client", "server", "examples") for path in (ROOT / part).rglob("*.py"))]
    return {name for path in sources for name in re.findall(r"\bTOUCHLINE_[A-Z_]+\b", path.read_text("utf-8"))}


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_make(words: list[str], place: str) -> None:
    for word in words:
        match = ASSIGNMENT.fullmatch(word)
        known = match[1] in MAKE_VARIABLES if match else word in TARGETS
        assert known, f"{place}: the Makefile has no {word!r}"


def _check_python(words: list[str], place: str) -> None:
    if words[0] == "-m":
        module = words[1].replace(".", "/")
        known = module == "pytest" or any((ROOT / path).exists() for path in (module, f"{module}.py"))
        assert known, f"{place}: no module {words[1]!r}"
    elif words[0] != "-c":
        text = (ROOT / words[0]).read_text("utf-8")
        unknown = [word for word in words[1:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in text]
        assert not unknown, f"{place}: {words[0]} has no options {unknown}"


def _parse_with(app: typer.Typer) -> Callable[[list[str], str], None]:
    def check(words: list[str], place: str) -> None:
        command = typer.main.get_command(app)
        _disarm(command)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            try:
                command.main([_existing(word) for word in words], standalone_mode=False)
            except Exception as error:
                message = getattr(error, "format_message", error.__str__)()
                raise AssertionError(f"{place}: {command.name} {shlex.join(words)}: {message}") from error

    return check


def _disarm(command: Any) -> None:
    """Leaves a command, with its subcommands, only its parser."""
    command.callback = None
    for inner in getattr(command, "commands", {}).values():
        _disarm(inner)


def _existing(word: str) -> str:
    """Returns a word that names a file as one that exists here, a pattern as a file that it could match."""
    path = Path(word.replace("*", "1").lstrip("/"))
    if path.suffix not in FILE_SUFFIXES or word.startswith("-"):
        return word
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def _accept(words: list[str], place: str) -> None:
    pass


CHECKS: dict[str, Callable[[list[str], str], None]] = {
    "make": _check_make,
    "python": _check_python,
    # test_installing.py looks at these.
    "pip": _accept,
    "touchline": _parse_with(client_app),
    "touchline-server": _parse_with(server_app),
}
