"""Code blocks of Markdown pages, and running them: each page against a server of its own.

HTML comments, which readers do not see, direct what happens. Directly before a block:

- ``<!-- test: continues -->``: it has the variables of the page's Python block before it; otherwise each is a program of its own.
- ``<!-- test: server -->``: a TOML block that configures the page's server; ``<!-- test server`` with TOML on further lines does so
  invisibly.
- ``<!-- test: run -->``: a shell block that is really run; otherwise its commands are only parsed.
- ``<!-- test: file NAME -->``: the block is written to that file.
- ``<!-- test: not run, REASON -->``: it is not run here. Python must still compile.
- ``<!-- test setup`` with Python on further lines, which runs first, with the same variables and the page's ExitStack ``stack``. If it sets
  ``address``, that is the address of the server that the block means.

Directly behind a block: ``<!-- test check`` with Python, which runs with the block's variables and with ``client``, connected to the
page's server.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

from support.shell_blocks import check_commands
from touchline import ReplayClient
from touchline_server import read_cfg
from touchline_server.service.access import read_access
from touchline_server.service.app import ServerThread

ADDRESS = re.compile(r"(?<![\w.-])(?:127\.0\.0\.1|(?:[a-z]+-)?host):50051\b")
"""Addresses in the text that mean the page's server."""
PLACE = re.compile(r"(?<=[\s\"=:])/(?=(?:etc|var|mnt|backup)/)")
"""Beginnings of paths of the machine, which the tests have in a temporary folder."""
COMMENT = re.compile(r"<!-- test(?:: (?P<word>[^\n]*?)| (?P<kind>\w+)\n(?P<body>.*?)) ?-->", re.DOTALL)
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
TEXT = {"text"}
"""Languages of blocks that are no code."""


@dataclass
class Block:
    """A fenced block of a page, with what its comments say."""

    page: str
    line: int
    language: str
    code: str
    words: set[str] = field(default_factory=set)
    setup: str = ""
    check: str = ""
    server: str = ""
    not_run: str = ""
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(name: str, text: str) -> list[Block]:
    """Returns the blocks of a page, in order.

    Raises:
        ValueError: a block has no language or stands by indentation only, or a comment says what nothing does.
    """
    blocks: list[Block] = []
    comments: list[re.Match[str]] = []
    behind = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            for comment in COMMENT.finditer(token.content):
                if comment["kind"] == "check":
                    if not behind:
                        raise ValueError(f"{name}:{line}: a check without a block before it")
                    blocks[-1].check = comment["body"]
                else:
                    comments.append(comment)
        elif token.type == "code_block":
            raise ValueError(f"{name}:{line}: a block by indentation, expected a fence with a language")
        elif token.type == "fence":
            if not token.info.strip():
                raise ValueError(f"{name}:{line}: a block without a language")
            blocks.append(_direct(Block(name, line, token.info.strip(), token.content), comments))
            comments, behind = [], True
        elif token.block and token.type.endswith("_open"):
            comments, behind = [], False
    return blocks


def _direct(block: Block, comments: list[re.Match[str]]) -> Block:
    for comment in comments:
        word, kind = comment["word"] or "", comment["kind"] or ""
        if kind in ("setup", "server"):
            setattr(block, kind, comment["body"])
        elif word.startswith("not run, "):
            block.not_run = word.removeprefix("not run, ")
        elif word.startswith("file "):
            block.file = word.removeprefix("file ")
        elif word in ("continues", "server", "run"):
            block.words.add(word)
        else:
            raise ValueError(f"{block.place}: the comment {comment[0]!r} says nothing that can be done")
    if "server" in block.words:
        block.server = block.code
    return block


class PageRun:
    """Runs the blocks of one page in a temporary folder, which must be the working folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._server: ServerThread | None = None
        self._variables: dict[str, Any] = {}
        self._configuration = ""

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(self._variables)
        self._stack.close()

    def run(self, block: Block) -> None:
        """Runs, or checks, a block by its language."""
        if block.language == "python":
            compile(block.code, block.place, "exec")
        if block.server:
            assert self._server is None, f"{block.place}: the page's server runs already"
            self._configuration = block.server
        if block.not_run or block.language in TEXT:
            return
        if block.file:
            (self._folder / block.file).write_text(self._placed(block.code), "utf-8")
        runners = {"python": self._run_python, "sh": self._run_shell, "toml": self._check_toml, "yaml": _check_yaml, "json": _check_json}
        if block.language not in runners:
            raise AssertionError(f"{block.place}: nothing runs {block.language}; mark it as not run, with the reason")
        runners[block.language](block)

    @property
    def address(self) -> str:
        """The address of the page's server, which starts now if it does not run yet."""
        if self._server is None:
            file = self._folder / "page.toml"
            file.write_text(self._placed(self._configuration), "utf-8")
            config = read_cfg(file)
            device = "cpu" if config.storage.device == "auto" else config.storage.device
            config = config.model_copy(
                update={
                    "server": config.server.model_copy(update={"port": 0}),
                    "storage": config.storage.model_copy(update={"device": device}),
                }
            )
            self._server = self._stack.enter_context(ServerThread(config))
        return self._server.address

    def _placed(self, text: str) -> str:
        """Returns a text with the machine's paths in the temporary folder; what they lead to is made."""
        for path in re.findall(PLACE.pattern + r"[\w./-]*", text):
            (self._folder / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        return PLACE.sub(f"{self._folder}/", text)

    def _run_python(self, block: Block) -> None:
        if "continues" not in block.words:
            self._close(self._variables)
            self._variables = {"__name__": "__main__"}
        names = self._variables
        if block.setup:
            names["stack"] = self._stack
            _execute(self._addressed(block.setup, names), f"{block.place}, setup", names)
        code = self._addressed(self._placed(block.code), names)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            _execute("\n" * block.line + code, block.page, names)
        for expected in PRINTED.findall(block.code):
            assert expected in printed.getvalue(), f"{block.place} printed {printed.getvalue()!r}, expected {expected!r}"
        if block.check:
            with ReplayClient(names.get("address") or self.address) as client:
                _execute(block.check, f"{block.place}, check", names | {"client": client})

    def _addressed(self, code: str, names: dict[str, Any]) -> str:
        """Returns code with the real address of the server that it means."""
        return ADDRESS.sub(lambda _: names.get("address") or self.address, code)

    def _run_shell(self, block: Block) -> None:
        check_commands(block.code, block.place)
        if "run" in block.words:
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
            script = ADDRESS.sub(self.address, self._placed(block.code))
            command = ["bash", "-eu", "-o", "pipefail", "-c", script]
            environment = os.environ | {"PATH": path, "TOUCHLINE_ADDRESS": self.address}
            result = subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert result.returncode == 0, f"{block.place}: {result.stdout}{result.stderr}"
            _execute(block.check, f"{block.place}, check", {"printed": result.stdout, "folder": self._folder})

    def _check_toml(self, block: Block) -> None:
        file = self._folder / "block.toml"
        text = self._placed(block.code)
        if "token" in tomllib.loads(text):
            # Secrets are left out of the text: each gets one, or a digest, of its own.
            secrets = iter(range(1000))
            text = re.sub(r'(sha256 = )"\.\.\."', lambda match: f'{match[1]}"{next(secrets):064x}"', text)
            text = re.sub(r'(value = )"\.\.\."', lambda match: f'{match[1]}"{next(secrets):032}"', text)
            file.write_text(text, "utf-8")
            file.chmod(0o600)
            config = read_cfg()
            assert (
                read_access(config.model_copy(update={"auth": config.auth.model_copy(update={"tokens_file": str(file)})}), {}) is not None
            )
            return
        file.write_text(text, "utf-8")
        read_cfg(file)

    def _close(self, names: dict[str, Any]) -> None:
        """Closes what a program left open, as its end would have done."""
        for value in list(names.values()):
            if type(value).__module__.partition(".")[0] in ("touchline", "touchline_server") and hasattr(value, "close"):
                value.close()


def _execute(code: str, name: str, names: dict[str, Any]) -> None:
    exec(compile(code, name, "exec"), names)


def _check_yaml(block: Block) -> None:
    assert yaml.safe_load(block.code) is not None, f"{block.place}: empty"


def _check_json(block: Block) -> None:
    json.loads(block.code)


def examples_of(doc: str) -> Iterator[str]:
    """Yields the code blocks of a docstring, which follow ``::``."""
    for code in re.findall(r"::\n\n((?:    .*\n|\n)+)", doc + "\n"):
        yield "\n".join(line[4:] for line in code.rstrip().splitlines()) + "\n"
