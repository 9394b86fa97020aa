"""Sources of the configuration: which file, and which environment variables. Values are read here and checked in :mod:`.settings`.

Importing this module takes a few milliseconds, unlike that one, so it also serves what has to be known before: the log level, and which
server a health check asks.
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
"""``TOUCHLINE_<SECTION>__<KEY>`` overrides one key."""

ENV_DELIMITER = "__"


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the key, its source, what was found and what was expected."""


def read_text(path: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Returns the name and the text of the configuration file to use.

    Args:
        path: the file. None: the file that ``$TOUCHLINE_CFG`` names, otherwise ``./cfg/default.toml``, otherwise its packaged copy.

    Raises:
        ConfigError: the file cannot be read.
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
    """Returns the content of a TOML text.

    Args:
        name: the file's name, for the error.
        text: the file's text.

    Raises:
        ConfigError: the text is not TOML; the message names the file and the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace("at end of document", f"at line {text.count(chr(10)) + 1}, the end of the file")
        raise ConfigError(f"configuration file {name}: not valid TOML: {message}") from None


def variables_in_force() -> dict[tuple[str, str], str]:
    """Returns the environment variables of the form ``TOUCHLINE_<SECTION>__<KEY>``, by section and key.

    ``TOUCHLINE_SERVER``, which has the name of a section but no key, is a client's address and not among them.
    """
    found = {}
    for variable in os.environ:
        section, delimiter, key = variable.removeprefix(ENV_PREFIX).lower().partition(ENV_DELIMITER)
        if variable.startswith(ENV_PREFIX) and delimiter:
            found[section, key] = variable
    return found


def glance(path: str | os.PathLike[str] | None, *keys: str) -> dict[str, Any]:
    """Returns the values of a few keys, unchecked; the value of an environment variable is text.

    Args:
        path: the configuration file, as for :func:`read_text`.
        keys: their dotted names, for example ``server.port``.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
    """
    layers = [parse_toml("the packaged default.toml", _packaged()), parse_toml(*read_text(path))]
    variables = variables_in_force()
    values: dict[str, Any] = {}
    for dotted in keys:
        section, _, key = dotted.partition(".")
        for layer in layers:
            if isinstance(layer.get(section), dict) and key in layer[section]:
                values[dotted] = layer[section][key]
        if (section, key) in variables:
            values[dotted] = os.environ[variables[section, key]]
    return values


def sources_of(path: str | os.PathLike[str] | None = None) -> str:
    """Returns the file and the environment variables of the configuration, for messages.

    Raises:
        ConfigError: the file cannot be read.
    """
    name, _ = read_text(path)
    variables = ", ".join(f"{variable}={os.environ[variable]}" for variable in sorted(variables_in_force().values()))
    return f"configuration file: {name}; environment variables in force: {variables or 'none'}"


def why_unreadable(error: OSError) -> str:
    """Returns why a file could not be read, and by which user: in a container it is rarely the user who made the file."""
    return _with_user(error, "make it readable by")


def why_unwritable(error: OSError) -> str:
    """Returns why a folder could not be created or written, and by which user."""
    return _with_user(error, "make it (or its parent folder, if it does not exist) writable by")


def _with_user(error: OSError, advice: str) -> str:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and hasattr(os, "geteuid"):
        reason += f"; {advice} user {os.geteuid()}, which this process runs as"
    return reason


def _packaged() -> str:
    return (resources.files("touchline_server.config") / "default.toml").read_text(encoding="utf-8")
