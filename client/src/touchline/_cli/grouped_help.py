"""Plain-text help that lists a command's options, and a group's commands, by group (``rich_help_panel``).

Plain text, not typer's panels: it keeps the lines of the examples, reads the same in a log, and shows ``[tables.NAME]`` as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by group; those without one stand last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then each group of options in order of its first one.

        Args:
            ctx: the command's ``click.Context``; some versions of typer bring a click of their own, hence no type.
            formatter: the ``click.HelpFormatter`` to write to.
        """
        shown = [(parameter, parameter.get_help_record(ctx)) for parameter in self.get_params(ctx)]
        entries = [(_group_of(parameter), record) for parameter, record in shown if record is not None]
        _write_groups(formatter, sorted(entries, key=lambda entry: entry[0] != "Arguments"), others="Other options")


class GroupedGroup(TyperGroup):
    """A group whose help lists its commands by group, with the whole first paragraph of their help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes each group of commands in order of its first one; the arguments are those of :meth:`GroupedCommand.format_options`."""
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        shown = [command for command in commands if command is not None and not command.hidden]
        entries = [(getattr(command, "rich_help_panel", None), (command.name, _first_sentence(command.help))) for command in shown]
        _write_groups(formatter, entries, others="Commands")


def _group_of(parameter: Any) -> str | None:
    return "Arguments" if parameter.param_type_name == "argument" else getattr(parameter, "rich_help_panel", None)


def _first_sentence(help: str | None) -> str:
    return " ".join((help or "").partition("\n\n")[0].split())


def _write_groups(formatter: Any, entries: Iterable[tuple[str | None, Any]], *, others: str) -> None:
    """Writes a section for each group; entries without a group come last, under the title ``others``."""
    groups: dict[str | None, list[Any]] = {}
    for group, record in entries:
        groups.setdefault(group, []).append(record)
    ungrouped = groups.pop(None, [])
    for title, records in [*groups.items(), (others, ungrouped)]:
        if records:
            with formatter.section(title):
                formatter.write_dl(records)
