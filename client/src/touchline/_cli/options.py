"""Options that several commands share, and a help text that lists options by group."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

SERVER, EPISODES, COLUMNS, OUTPUT, REFUSED = "Server", "Which episodes", "Columns", "Output", "Refused episodes"
"""Groups of options in the help text, by ``rich_help_panel``."""


class FormatName(str, enum.Enum):
    """The values of ``--format``: :data:`touchline.datasets.FORMATS`."""

    TDMPC2 = "tdmpc2"
    MINARI = "minari"
    HDF5 = "hdf5"
    NPZ = "npz"


Address = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT|unix:/PATH",
        envvar="TOUCHLINE_ADDRESS",
        help="Address of the server.",
        show_default=True,
        show_envvar=True,
        rich_help_panel=SERVER,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="How long one call waits for an unreachable server.", min=0.1, rich_help_panel=SERVER),
]
TableName = Annotated[
    str,
    typer.Option("--table", metavar="NAME", help="Table on the server. Default: the server's default table.", rich_help_panel=SERVER),
]


class GroupedCommand(TyperCommand):
    """A command whose plain-text help lists its options by group (``rich_help_panel``); those without one stand last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then each group of options in order of its first one.

        Args:
            ctx: the command's ``click.Context``; some versions of typer bring a click of their own, hence no type.
            formatter: the ``click.HelpFormatter`` to write to.
        """
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            group = "Arguments" if parameter.param_type_name == "argument" else getattr(parameter, "rich_help_panel", None)
            (others if group is None else groups.setdefault(group, [])).append(record)
        for title, records in [*groups.items(), ("Other options", others)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
