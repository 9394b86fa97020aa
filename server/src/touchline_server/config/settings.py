"""The configuration: one frozen object, validated where it enters.

:func:`read_cfg` reads it from a TOML file and the environment; ``Config(config={"batch_size": 64})`` makes one in code,
from its arguments alone. The tables and their defaults are those of ``cfg/default.toml``. Everything that is wrong is a
:class:`ConfigError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from touchline_protos.log_lines import get_logger
from touchline_server.config.sections import (
    MOVED_KEYS,
    AuthConfig,
    BufferConfig,
    LimitsConfig,
    RingConfig,
    SamplingConfig,
    Section,
    ServerConfig,
    StorageConfig,
    TlsConfig,
)
from touchline_server.config.source import ENV_DELIMITER, ENV_PREFIX, ConfigError, parse_toml, read_text, sources_of, variables_in_force

__all__ = ["Config", "ConfigError", "read_cfg", "sources_of"]

_CLIENTS_VARIABLES = ("TOUCHLINE_TLS_CERT", "TOUCHLINE_TLS_KEY")
"""Look like keys, and are what a client goes by."""

logger = get_logger(__name__)


class Config(Section):
    """Everything that can be set, checked as a whole. Immutable and hashable, so safe to share between threads.

    Made in code it takes its arguments alone, never a file or the environment:
    ``Config(config={"horizon": 5}, storage={"device": "cpu"})``.

    Args:
        sections: ``config``, ``storage``, ``sampling``, ``server``, ``limits``, ``ring``, ``tls`` and ``auth``, each as a section object
            or a mapping. A section or key that is left out has its default.

    Raises:
        ConfigError: an unknown table or key, a bad value, or values that do not go together.
    """

    config: BufferConfig = BufferConfig()
    """What the buffer holds and what a batch is."""
    storage: StorageConfig = StorageConfig()
    """Where the steps live."""
    sampling: SamplingConfig = SamplingConfig()
    """How slices are drawn."""
    server: ServerConfig = ServerConfig()
    """Where the server listens, and how it works."""
    limits: LimitsConfig = LimitsConfig()
    """The largest messages, episodes and batches, and how much may be in progress at a time."""
    ring: RingConfig = RingConfig()
    """Shared memory for learners on the server's host."""
    tls: TlsConfig = TlsConfig()
    """What it proves itself with."""
    auth: AuthConfig = AuthConfig()
    """Who may call what."""

    def __init__(self, **sections: BaseModel | Mapping[str, Any]) -> None:
        plain = {name: dict(table) if isinstance(table, Mapping) else table for name, table in sections.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise ConfigError(_explain_all(error, {})) from None

    @property
    def buffer_size(self) -> int:
        """Most steps (stored rows) that the buffer holds."""
        return self.config.buffer_size

    @property
    def batch_size(self) -> int:
        """Slices in a batch."""
        return self.config.batch_size

    @property
    def min_history(self) -> int:
        """Steps stored before training should start."""
        return self.config.min_history

    @property
    def horizon(self) -> int:
        """Transitions in a slice."""
        return self.config.horizon

    def to_toml(self) -> str:
        """Returns the configuration in force as TOML, which reads back equal; a seed that is not set is left out."""
        tables = []
        for table, keys in self.model_dump().items():
            lines = [f"{key} = {_toml_value(value)}" for key, value in keys.items() if value is not None]
            tables.append("\n".join([f"[{table}]", *lines]))
        return "\n\n".join(tables) + "\n"

    def changed(self) -> str:
        """Returns, for the log, the keys that differ from their defaults: ``config.horizon = 5, server.port = 0``."""
        default = Config().model_dump()
        return ", ".join(
            f"{table}.{key} = {_toml_value(value)}"
            for table, keys in self.model_dump().items()
            for key, value in keys.items()
            if value != default[table][key]
        )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        buffer, limits = self.config, self.limits
        wrong = []
        if buffer.batch_size > limits.max_batch_size:
            limit = f"limits.max_batch_size ({limits.max_batch_size})"
            wrong.append(f"config.batch_size: {buffer.batch_size}, expected at most {limit}")
        if buffer.horizon > limits.max_horizon:
            limit = f"limits.max_horizon ({limits.max_horizon})"
            wrong.append(f"config.horizon: {buffer.horizon}, expected at most {limit}")
        if buffer.buffer_size < buffer.horizon + 1:
            limit = f"config.horizon + 1 ({buffer.horizon + 1})"
            wrong.append(f"config.buffer_size: {buffer.buffer_size}, expected at least {limit}")
        least = 2 * max(limits.max_message_bytes, limits.max_episode_bytes)
        if limits.max_receive_bytes < least:
            limit = f"2 x limits.max_message_bytes and 2 x limits.max_episode_bytes ({least})"
            wrong.append(f"limits.max_receive_bytes: {limits.max_receive_bytes}, expected at least {limit}")
        if limits.max_send_bytes < limits.max_message_bytes:
            limit = f"limits.max_message_bytes ({limits.max_message_bytes})"
            wrong.append(f"limits.max_send_bytes: {limits.max_send_bytes}, expected at least {limit}")
        if self.storage.device == "disk" and not self.storage.scratch_dir:
            wrong.append("storage.scratch_dir: '', expected a folder, because storage.device is 'disk'")
        if bool(self.tls.cert) != bool(self.tls.key):
            missing = "tls.key" if self.tls.cert else "tls.cert"
            wrong.append(f"{missing}: '', expected a file, because the other of tls.cert and tls.key is set")
        if self.tls.client_ca and not self.tls.cert:
            wrong.append("tls.client_ca: set without tls.cert, expected both: client certificates are part of TLS")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


def read_cfg(path: str | os.PathLike[str] | None = None) -> Config:
    """Returns the configuration of a TOML file, overridden by the environment.

    Args:
        path: the file; None: the one that ``$TOUCHLINE_CFG`` names,
            else ``./cfg/default.toml``, else its packaged copy.

    Raises:
        ConfigError: the file is missing or no TOML; or it, or a variable ``TOUCHLINE_<TABLE>__<KEY>``, has an unknown
            key or a bad value.
    """
    name, text = read_text(path)
    tables = _parse_tables(name, text)
    variables = _overrides()
    sources = {(table, key): f"in {name}" for table, keys in tables.items() for key in keys}
    sources |= {place: f"from the environment variable {variable}" for place, variable in variables.items()}
    try:
        merged = _Sources(**tables)
    except ValidationError as error:
        raise ConfigError(_explain_all(error, sources)) from None
    return Config(**{name: getattr(merged, name) for name in Config.model_fields})


class _KeyVariables(EnvSettingsSource):
    """Variables that set one key; ``TOUCHLINE_SERVER``, which has a table's name alone, may be a client's address."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, True


class _Sources(BaseSettings):
    """Merges the file (the arguments) with the environment, which wins."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, extra="forbid")

    config: BufferConfig = BufferConfig()
    storage: StorageConfig = StorageConfig()
    sampling: SamplingConfig = SamplingConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    ring: RingConfig = RingConfig()
    tls: TlsConfig = TlsConfig()
    auth: AuthConfig = AuthConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return _KeyVariables(settings_cls), init_settings


def _parse_tables(name: str, text: str) -> dict[str, Any]:
    """Returns the tables of a TOML text; their keys and values are not checked yet."""
    tables = parse_toml(name, text)
    for table, keys in tables.items():
        if table not in Config.model_fields:
            raise ConfigError(f"{table} (in {name}): unknown table, expected one of {', '.join(Config.model_fields)}")
        if not isinstance(keys, dict):
            raise ConfigError(f"{table} (in {name}): {_short(keys)}, expected a table")
    return tables


def _overrides() -> dict[tuple[str, str], str]:
    """Returns the environment variables that override keys, by table and key.

    Raises:
        ConfigError: a variable of this form names no table.
    """
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and ENV_DELIMITER not in variable.removeprefix(ENV_PREFIX):
            _warn_of_one_underscore(variable)
    found = variables_in_force()
    for (table, _), variable in found.items():
        if table not in Config.model_fields:
            known = ", ".join(Config.model_fields)
            raise ConfigError(f"environment variable {variable}: unknown table {table!r}, expected one of {known}")
    return found


def _warn_of_one_underscore(variable: str) -> None:
    """A warning and no error: an orchestrator may set variables of such names by itself, for a service that is called like this one."""
    table, _, key = variable.removeprefix(ENV_PREFIX).lower().partition("_")
    table, key = MOVED_KEYS.get((table, key), (table, key))
    if table in Config.model_fields and key in _keys_of(table) and variable not in _CLIENTS_VARIABLES:
        meant = f"{ENV_PREFIX}{table}{ENV_DELIMITER}{key}".upper()
        logger.warning("environment variable %s has no effect: %s, with two underscores, overrides %s.%s", variable, meant, table, key)


_EXPECTED = {
    "int": "expected an integer",
    "float": "expected a number",
    "bool": "expected true or false",
    "string": "expected a string",
    "model": "expected a table",
    "dict": "expected a table",
}
"""What a value of the wrong type should have been, by the first word of pydantic's error type."""


def _explain_all(error: ValidationError, sources: Mapping[tuple[str, str], str]) -> str:
    """Returns one line for each error; ``sources`` says where the value of a (table, key) stands."""
    return "\n".join(_explain(detail, sources) for detail in error.errors(include_url=False))


def _explain(detail: ErrorDetails, sources: Mapping[tuple[str, str], str]) -> str:
    place = tuple(str(part) for part in detail["loc"][:2])
    kind, context = detail["type"], detail.get("ctx", {})
    if not place:
        return str(context["error"])
    source = f" ({sources[place]})" if len(place) == 2 and place in sources else ""
    if kind == "extra_forbidden" and place in MOVED_KEYS:
        return f"{'.'.join(place)}{source} is now {'.'.join(MOVED_KEYS[place])}"
    if kind == "extra_forbidden":
        what, known = ("table", Config.model_fields) if len(place) == 1 else ("key", _keys_of(place[0]))
        return f"{'.'.join(place)}{source}: unknown {what}, expected one of {', '.join(known)}"
    match kind:
        case "value_error":
            expected = str(context["error"])
        case "literal_error":
            expected = f"expected {context['expected']}"
        case "greater_than_equal":
            expected = f"expected at least {context['ge']}"
        case "less_than_equal":
            expected = f"expected at most {context['le']}"
        case "finite_number":
            expected = "expected a finite number"
        case "string_too_short":
            expected = "expected some text"
        case _:
            expected = _EXPECTED.get(kind.partition("_")[0], detail["msg"])
    return f"{'.'.join(place)}{source}: {_short(detail['input'])}, {expected}"


def _keys_of(table: str) -> Mapping[str, FieldInfo]:
    default: Section = Config.model_fields[table].default
    return type(default).model_fields


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _toml_value(value: str | int | float | bool) -> str:
    """Returns a value as TOML; JSON's notation is TOML's too but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
