"""Options that several commands share."""

from __future__ import annotations

import enum
import os
from typing import Annotated

import typer

SERVER, EPISODES, COLUMNS, OUTPUT, REFUSED = "Server", "Which episodes", "Columns", "Output", "Refused episodes"
"""Groups of options in the help text, by ``rich_help_panel``."""

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Address of a server that is started without configuration."""
COMPLETION_TIMEOUT_S = 0.5
"""How long the shell waits for the names of tables."""


class FormatName(str, enum.Enum):
    """The values of ``--format``: :data:`touchline.datasets.FORMATS`."""

    TDMPC2 = "tdmpc2"
    MINARI = "minari"
    HDF5 = "hdf5"
    NPZ = "npz"


def complete_table(context: typer.Context) -> list[str]:
    """Returns the names of the tables of the server that the command line names, for the shell; none without an immediate answer."""
    from touchline.client import ReplayClient
    from touchline.errors import TouchlineError

    address = context.params.get("address") or os.environ.get("TOUCHLINE_ADDRESS") or DEFAULT_ADDRESS
    try:
        with ReplayClient(address, timeout_s=COMPLETION_TIMEOUT_S) as client:
            return [name for name in client.tables() if name]
    except TouchlineError:
        return []


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
    typer.Option(
        "--table",
        metavar="NAME",
        help="Table on the server. Default: the server's default table.",
        rich_help_panel=SERVER,
        autocompletion=complete_table,
    ),
]
TableNames = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="NAME",
        help="Only this table. Repeatable. Default: all that the token may use.",
        rich_help_panel=SERVER,
        autocompletion=complete_table,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.", rich_help_panel=OUTPUT)]
