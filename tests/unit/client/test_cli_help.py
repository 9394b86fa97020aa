"""The help of the command ``touchline``: every option explained and in a group, examples on lines of their own."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from touchline._cli.app import app
from touchline.datasets import FORMATS

COMMANDS = [
    ["status"],
    ["top"],
    ["doctor"],
    ["bench"],
    ["episodes", "list"],
    ["episodes", "show"],
    ["load"],
    ["export"],
    ["snapshot"],
    ["clear"],
    ["spool", "show"],
    ["spool", "retry"],
    ["spool", "send"],
    ["table", "list"],
    ["table", "create"],
    ["table", "set"],
    ["table", "drop"],
]


def help_of(*command: str) -> str:
    found = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100"}, prog_name="touchline")
    assert found.exit_code == 0, found.output
    return found.output


def options_of(*command: str) -> list[Any]:
    found: Any = get_command(app)
    for name in command:
        found = found.commands[name]
    return [parameter for parameter in found.params if parameter.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples_exit_statuses_and_every_option(command: list[str]) -> None:
    text = help_of(*command)

    examples, _, statuses = text.partition("Examples:\n")[2].partition("Exit status:\n")
    assert examples.startswith(f"    touchline {' '.join(command)} ")
    assert statuses.startswith("    0  ")
    for option in options_of(*command):
        assert option.help and option.help.endswith((".", "IT.")), option.name
        assert f"  {option.opts[0]}" in text


def test_help_of_load_lists_options_by_group() -> None:
    text = help_of("load")

    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments:", "Server:", "Which episodes:", "Columns:", "Refused episodes:", "Output:", "Other options:"]
    assert "--drop" in text.partition("\nColumns:\n")[2].partition("\nRefused episodes:\n")[0]
    assert "--help" in text.partition("\nOther options:\n")[2]


@pytest.mark.parametrize("command", ["load", "export"])
def test_help_names_every_format(command: str) -> None:
    assert "|".join(FORMATS) in help_of(command)
