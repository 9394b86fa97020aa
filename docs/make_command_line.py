"""Writes the help of every command into docs/command-line.md, between its two markers.

.venv/bin/python docs/make_command_line.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

from touchline._cli.app import app as client_app
from touchline_server.cli.main import app as server_app

PAGE = Path(__file__).with_name("command-line.md")
BEGIN, END = "<!-- help: begin, written by docs/make_command_line.py -->", "<!-- help: end -->"
WIDTH = 100


def commands_of(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields the path of every command that does something, below and including ``command``."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path
        return
    for name, child in children.items():
        yield from commands_of(child, (*path, name))


def help_of(app: Typer, path: tuple[str, ...]) -> str:
    """Returns the help of a command; the first word of its path is the program."""
    # The same help on every machine.
    environment = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "TOUCHLINE_ADDRESS": ""}
    found = CliRunner().invoke(app, [*path[1:], "--help"], env=environment, prog_name=path[0], max_content_width=WIDTH)
    assert found.exit_code == 0, found.output
    return "\n".join(line.rstrip() for line in found.stdout.strip().splitlines())


def sections() -> Iterator[str]:
    """Yields the part of the page about each command."""
    for app, program in ((client_app, "touchline"), (server_app, "touchline-server")):
        for path in commands_of(get_command(app), (program,)):
            yield f"### `{' '.join(path)}`\n\n```text\n{help_of(app, path)}\n```\n"


def updated(page: str) -> str:
    """Returns the page with the present help."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{chr(10).join(sections())}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8")), encoding="utf-8")
