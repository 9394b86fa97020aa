"""Options that several commands share, and a help text that lists options by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from touchline_server.config.source import ConfigError

CONFIGURATION, LISTENING, STORE, SERVER, TLS = "Configuration", "Listening", "Durable store", "Server", "TLS"
"""Groups of options in the help text, by ``rich_help_panel``."""

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="Configuration file (TOML). Default: the file that $TOUCHLINE_CFG names, otherwise ./cfg/default.toml, otherwise the packaged "
        "defaults.",
        rich_help_panel=CONFIGURATION,
    ),
]

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder of the durable store. Default: storage.data_dir of the configuration.",
        rich_help_panel=STORE,
    ),
]


TableName = Annotated[
    str | None,
    typer.Option("--table", metavar="NAME", help="Name of the table; the default table's is empty.", rich_help_panel=STORE),
]


def resolve_data_dir(data_dir: Path | None, config: Path | None) -> Path:
    """Returns the folder of the durable store: the given one, otherwise the configured one.

    Args:
        data_dir: value of ``--data-dir``.
        config: value of ``--config``.

    Raises:
        ConfigError: no folder is given or configured, or the configuration is wrong.
    """
    if data_dir is not None:
        return data_dir
    from touchline_server.config.settings import read_cfg

    configured = read_cfg(config).storage.data_dir
    if not configured:
        raise ConfigError("storage.data_dir: '', expected a folder; give --data-dir")
    return Path(configured)


def resolve_store(data_dir: Path, table: str) -> Path:
    """Returns the folder of a table's durable store.

    Args:
        data_dir: folder of all durable stores.
        table: name of the table; empty for the default table, whose folder is ``data_dir`` itself.

    Raises:
        ConfigError: another table has no store there; the text names those that have.
    """
    from touchline_server.durability.table_list import stores_of

    stores = stores_of(data_dir)
    if table and table not in stores:
        known = " or ".join(repr(name) for name in stores) or "none: there is no store"
        raise ConfigError(f"--table: {table!r} has no store in {data_dir}, expected {known}")
    return data_dir / table


class GroupedCommand(TyperCommand):
    """A command whose plain-text help lists its options by group (``rich_help_panel``); those without one stand last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then each group of options in the order of its first one.

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
