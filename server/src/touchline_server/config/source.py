"""Where the configuration comes from: which file, and which environment variables. Reads them without checking their values.

:mod:`.settings` checks. This module costs a few milliseconds, for what must be known before that: the log level, and what to ask a health
check.
"""

from __future__ import annotations

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

CONFIG_PATH_VARIABLE = "TOUCHLINE_CFG"
"""Environment variable that names the configuration file."""

ENV_PREFIX = "TOUCHLINE_"
"""``TOUCHLINE_<TABLE>__<KEY>`` overrides one key."""

ENV_DELIMITER = "__"


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, where it stands, what was found and expected."""


def read_text(path: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Returns the name and the text of the configuration file to use.

    Raises:
        ConfigError: it cannot be read.
    """
    variable = os.environ.get(CONFIG_PATH_VARIABLE)
    if path is not None:
        file, named_by = Path(path), ""
    elif variable:
        file, named_by = Path(variable), f" (named by the environment variable {CONFIG_PATH_VARIABLE})"
    elif (default := Path("cfg/default.toml")).is_file():
        file, named_by = default, ""
    else:
        return "the packaged default.toml", _packaged()
    try:
        return str(file), file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {file}{named_by}: {why_unreadable(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration file {file}{named_by}: not UTF-8 text, byte {error.start}") from None


def parse_toml(name: str, text: str) -> dict[str, Any]:
    """Returns what a TOML text holds.

    Raises:
        ConfigError: it is not TOML; the message names the file and the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace("at end of document", f"at line {text.count(chr(10)) + 1}, the end of the file")
        raise ConfigError(f"configuration file {name}: not valid TOML: {message}") from None


def variables_in_force() -> dict[tuple[str, str], str]:
    """Returns the environment variables of the form ``TOUCHLINE_<TABLE>__<KEY>``, by table and key."""
    found = {}
    for variable in os.environ:
        table, delimiter, key = variable.removeprefix(ENV_PREFIX).lower().partition(ENV_DELIMITER)
        if variable.startswith(ENV_PREFIX) and delimiter:
            found[table, key.partition(ENV_DELIMITER)[0]] = variable
    return found


def glance(path: str | os.PathLike[str] | None, *keys: str) -> dict[str, Any]:
    """Returns the values that keys, as in ``server.port``, will have, unchecked: a variable's is text.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
    """
    layers = [parse_toml("the packaged default.toml", _packaged()), parse_toml(*read_text(path))]
    variables = variables_in_force()
    values: dict[str, Any] = {}
    for dotted in keys:
        table, _, key = dotted.partition(".")
        for layer in layers:
            if isinstance(layer.get(table), dict) and key in layer[table]:
                values[dotted] = layer[table][key]
        if (table, key) in variables:
            values[dotted] = os.environ[variables[table, key]]
    return values


def sources_of(path: str | os.PathLike[str] | None = None) -> str:
    """Returns, for messages, where the configuration comes from: the file, and the variables in force.

    Raises:
        ConfigError: the file cannot be read.
    """
    name, _ = read_text(path)
    variables = ", ".join(f"{variable}={os.environ[variable]}" for variable in sorted(variables_in_force().values()))
    return f"configuration file: {name}; environment variables in force: {variables or 'none'}"


def why_unreadable(error: OSError) -> str:
    """Returns why a file could not be read, and as whom: in a container the user is rarely the one who made the file."""
    return _as_whom(error, "make it readable by")


def why_unwritable(error: OSError) -> str:
    """Returns why a folder could not be made or written to, and as whom."""
    return _as_whom(error, "make it (or, if it does not exist, the folder it is in) writable by")


def _as_whom(error: OSError, advice: str) -> str:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and hasattr(os, "geteuid"):
        reason += f"; {advice} user {os.geteuid()}, which this process runs as"
    return reason


def _packaged() -> str:
    return (resources.files("touchline_server.config") / "default.toml").read_text(encoding="utf-8")
