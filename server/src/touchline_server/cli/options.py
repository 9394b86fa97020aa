"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from touchline_server.config.source import ConfigError

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="Configuration file (TOML). Default: the file that $TOUCHLINE_CFG names, otherwise ./cfg/default.toml, otherwise the packaged "
        "defaults.",
    ),
]

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder of the durable store. Default: storage.data_dir of the configuration."),
]


TableName = Annotated[
    str | None,
    typer.Option("--table", metavar="NAME", help="Name of the table; the default table's is empty."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]


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
