"""The configuration: one frozen object, validated where it enters.

:func:`read_cfg` reads it from a TOML file and the environment; ``Config(config={"batch_size": 64})`` makes one in code, from its arguments
only. Sections, keys and defaults are those of :mod:`.sections`. Every mistake is a :class:`ConfigError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, PrivateAttr, ValidationError, field_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from touchline_protos.log_lines import get_logger
from touchline_server.config.sections import (
    MOVED_KEYS,
    TABLE_SECTIONS,
    AuthConfig,
    BufferConfig,
    HttpConfig,
    LimitsConfig,
    MetricsConfig,
    RateConfig,
    RingConfig,
    SamplingConfig,
    Section,
    ServerConfig,
    StorageConfig,
    TableConfig,
    TlsConfig,
    check_table_name,
)
from touchline_server.config.source import (
    ENV_DELIMITER,
    ENV_PREFIX,
    ConfigError,
    parse_toml,
    read_text,
    sources_of,
    variables_in_force,
)

__all__ = ["Config", "ConfigError", "read_cfg", "sources_of"]

_CLIENT_VARIABLES = ("TOUCHLINE_TLS_CERT", "TOUCHLINE_TLS_KEY")
"""Variables of clients that look like keys of the configuration."""

logger = get_logger(__name__)


class Config(Section):
    """The whole configuration. Immutable and hashable, so it is safe to share between threads.

    Made in code, it takes its arguments only, never a file or the environment:
    ``Config(config={"horizon": 5}, storage={"device": "cpu"})``.

    Args:
        sections: ``config``, ``storage``, ``sampling``, ``rate``, ``server``, ``limits``, ``ring``, ``tls``, ``auth`` and ``http``, each
            as a section object or a mapping, and ``tables``, a mapping from the name of each further table to its keys. A section or key
            that is left out has its default, and a key that a table leaves out has the default table's value.

    Raises:
        ConfigError: an unknown section or key, a bad value, or values that do not fit together.
    """

    config: BufferConfig = BufferConfig()
    storage: StorageConfig = StorageConfig()
    sampling: SamplingConfig = SamplingConfig()
    rate: RateConfig = RateConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    ring: RingConfig = RingConfig()
    tls: TlsConfig = TlsConfig()
    auth: AuthConfig = AuthConfig()
    http: HttpConfig = HttpConfig()
    metrics: MetricsConfig = MetricsConfig()
    tables: Mapping[Annotated[str, AfterValidator(check_table_name)], TableConfig] = {}
    _table: str = PrivateAttr("")

    def __init__(self, **sections: BaseModel | Mapping[str, Any]) -> None:
        self._fill(sections, {})

    def _fill(self, sections: Mapping[str, BaseModel | Mapping[str, Any]], sources: Mapping[tuple[str, ...], str]) -> None:
        """Validates the sections and takes their values; ``sources`` gives the origin of each value by its place, for errors."""
        plain: dict[str, Any] = {name: dict(section) if isinstance(section, Mapping) else section for name, section in sections.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(detail, sources) for detail in error.errors(include_url=False))) from None

    def __hash__(self) -> int:
        return hash(self.to_toml())

    @field_serializer("tables")
    def _only_set_keys(self, tables: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
        return {name: table.model_dump(exclude_unset=True) for name, table in tables.items()}

    # One table

    def for_table(self, name: str) -> Config:
        """Returns the configuration of one table: its own keys in ``config``, ``storage``, ``sampling`` and ``rate``, and no other tables.

        Folders that are not the table's own become a folder of its name in the default table's: ``storage.data_dir`` always, and
        ``storage.scratch_dir`` unless the table sets it.

        Args:
            name: the table's name; empty for the default table.
        """
        sections = {section: getattr(self, section) for section in type(self).model_fields if section != "tables"}
        if name:
            own = self.tables[name].model_dump(exclude_unset=True)
            folders = {key: str(Path(folder, name)) for key in ("data_dir", "scratch_dir") if (folder := getattr(self.storage, key))}
            for section, kind in TABLE_SECTIONS.items():
                values = {**(folders if section == "storage" else {}), **own}
                changes = {key: value for key, value in values.items() if key in kind.model_fields}
                sections[section] = sections[section].model_copy(update=changes)
            sections["rate"] = self.rate.model_copy(update=own.get("rate", {}))
        table = type(self).model_construct(**sections)
        table._table = name
        return table

    def with_rate(self, keys: Mapping[str, Any]) -> Config:
        """Returns a copy of one table's configuration with other values of some keys of its rate limit.

        Raises:
            ConfigError: an unknown key, a bad value, or values that do not fit together.
        """
        table = self.override(rate=keys)
        table._table = self._table
        return table

    def key(self, section: str, key: str) -> str:
        """Returns the full name of a key of this table, for errors: ``config.buffer_size`` or ``tables.demos.buffer_size``."""
        if not self._table:
            return f"{section}.{key}"
        return f"tables.{self._table}.rate.{key}" if section == "rate" else f"tables.{self._table}.{key}"

    @property
    def durable_dir(self) -> str:
        """Folder of the table's durable store; empty if it has none."""
        return "" if self.storage.durability == "none" else self.storage.data_dir

    @property
    def buffer_size(self) -> int:
        """Capacity in steps (stored rows)."""
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

    def override(self, **sections: Mapping[str, Any]) -> Config:
        """Returns a copy in which some keys have other values: ``cfg.override(server={"port": 0})``.

        Raises:
            ConfigError: an unknown section or key, a bad value, or values that do not fit together.
        """
        keys = self.model_dump()
        for name, changes in sections.items():
            keys[name] = {**keys.get(name, {}), **changes}
        return Config(**keys)

    def to_toml(self) -> str:
        """Returns the configuration in force as TOML, which reads back equal; an unset seed is left out."""
        return "\n".join(to_toml(section, keys) for section, keys in self._sections())

    def changed(self) -> str:
        """Returns the keys that differ from their defaults, for the log: ``config.horizon = 5, server.port = 0``."""
        default = dict(Config()._sections())
        changed = []
        for section, keys in self._sections():
            if section not in default and not keys:
                changed.append(section)
            known = default.get(section, {})
            changed += [f"{section}.{key} = {_toml_value(value)}" for key, value in keys.items() if key not in known or value != known[key]]
        return ", ".join(changed)

    def _sections(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the full name and the keys of every section, those of the tables last."""
        sections = self.model_dump()
        tables = sections.pop("tables", {})
        yield from sections.items()
        for name, keys in tables.items():
            yield f"tables.{name}", keys

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        tables = [self.for_table(name) for name in ("", *self.tables)]
        faults = [*self._limit_faults(), *self._file_faults()]
        for table in tables:
            faults += table._table_faults()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _table_faults(self) -> list[str]:
        buffer, limits = self.config, self.limits
        faults = []
        if buffer.batch_size > limits.max_batch_size:
            limit = f"limits.max_batch_size ({limits.max_batch_size})"
            faults.append(f"{self.key('config', 'batch_size')}: {buffer.batch_size}, expected at most {limit}")
        if buffer.horizon > limits.max_horizon:
            limit = f"limits.max_horizon ({limits.max_horizon})"
            faults.append(f"{self.key('config', 'horizon')}: {buffer.horizon}, expected at most {limit}")
        if buffer.buffer_size < buffer.horizon + 1:
            limit = f"{self.key('config', 'horizon')} + 1 ({buffer.horizon + 1})"
            faults.append(f"{self.key('config', 'buffer_size')}: {buffer.buffer_size}, expected at least {limit}")
        if self.storage.device == "disk" and not self.storage.scratch_dir:
            scratch_dir, device = self.key("storage", "scratch_dir"), self.key("storage", "device")
            faults.append(f"{scratch_dir}: '', expected a folder, because {device} is 'disk'")
        return [*faults, *self._recent_faults(), *self._rate_faults()]

    def _recent_faults(self) -> list[str]:
        sampling, steps = self.sampling, self.key("sampling", "recent_steps")
        faults = []
        if sampling.recent_steps is not None and sampling.recent_half_life is not None:
            faults.append(f"{steps}: {sampling.recent_steps} beside recent_half_life, expected only one of them")
        if sampling.law == "recent" and sampling.recent_steps is None and sampling.recent_half_life is None:
            faults.append(f"{steps}: unset, expected it or recent_half_life, because {self.key('sampling', 'law')} is 'recent'")
        least = 2 if sampling.pad == "end" else self.horizon + 1
        if sampling.recent_steps is not None and sampling.recent_steps < least:
            faults.append(f"{steps}: {sampling.recent_steps}, expected at least {least}, the rows of the shortest slice")
        return faults

    def _rate_faults(self) -> list[str]:
        buffer, rate = self.config, self.rate
        faults = []
        if rate.min_steps > buffer.buffer_size:
            limit = f"{self.key('config', 'buffer_size')} ({buffer.buffer_size}), because more steps are never stored"
            faults.append(f"{self.key('rate', 'min_steps')}: {rate.min_steps}, expected at most {limit}")
        if 0 < rate.tolerance < buffer.batch_size:
            limit = f"{self.key('config', 'batch_size')} ({buffer.batch_size}), because a batch is delivered as a whole"
            faults.append(f"{self.key('rate', 'tolerance')}: {rate.tolerance:g}, expected 0 or at least {limit}")
        return faults

    def _limit_faults(self) -> list[str]:
        limits = self.limits
        faults = []
        least = 2 * max(limits.max_message_bytes, limits.max_episode_bytes)
        if limits.max_receive_bytes < least:
            limit = f"2 x limits.max_message_bytes and 2 x limits.max_episode_bytes ({least})"
            faults.append(f"limits.max_receive_bytes: {limits.max_receive_bytes}, expected at least {limit}")
        if limits.max_send_bytes < limits.max_message_bytes:
            limit = f"limits.max_message_bytes ({limits.max_message_bytes})"
            faults.append(f"limits.max_send_bytes: {limits.max_send_bytes}, expected at least {limit}")
        return faults

    def _file_faults(self) -> list[str]:
        faults = []
        if bool(self.tls.cert) != bool(self.tls.key):
            missing, given = ("tls.key", "tls.cert") if self.tls.cert else ("tls.cert", "tls.key")
            faults.append(f"{missing}: '', expected a file, because {given} is set")
        if self.tls.client_ca and not self.tls.cert:
            faults.append("tls.client_ca: set without tls.cert, expected both: client certificates are part of TLS")
        return faults


def read_cfg(path: str | os.PathLike[str] | None = None) -> Config:
    """Returns the configuration of a TOML file, overridden by the environment.

    Args:
        path: the file. None: the file that ``$TOUCHLINE_CFG`` names, otherwise ``./cfg/default.toml``, otherwise its packaged copy.

    Raises:
        ConfigError: the file is missing or not TOML; or the file, or a variable ``TOUCHLINE_<SECTION>__<KEY>``, has an unknown key or a
            bad value.
    """
    name, text = read_text(path)
    sections = _parse_sections(name, text)
    sources = dict.fromkeys(_places(sections), f"in {name}")
    for place, variable in _overrides().items():
        keys: dict[str, Any] = sections
        for part in place[:-1]:
            keys = keys.setdefault(part, {})
        keys[place[-1]] = os.environ[variable]
        sources[place] = f"from the environment variable {variable}"
    config = Config.__new__(Config)
    config._fill(sections, sources)
    return config


def _parse_sections(name: str, text: str) -> dict[str, dict[str, Any]]:
    """Returns the sections of a TOML text; their keys and values are not checked yet."""
    sections = parse_toml(name, text)
    for section, keys in sections.items():
        if section not in Config.model_fields:
            raise ConfigError(f"{section} (in {name}): unknown section, expected one of {', '.join(Config.model_fields)}")
        if not isinstance(keys, dict):
            raise ConfigError(f"{section} (in {name}): {_short(keys)}, expected a section")
    return sections


def _places(keys: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the place of every value: the names of the sections around it, and its key."""
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _places(value, (*place, key))
        else:
            yield (*place, key)


def _overrides() -> dict[tuple[str, ...], str]:
    """Returns the environment variables that override keys, by the place of the key: ``("tables", "demos", "buffer_size")``.

    Raises:
        ConfigError: a variable of this form names no section, or a table without a key of it.
    """
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and ENV_DELIMITER not in variable.removeprefix(ENV_PREFIX):
            _warn_of_one_underscore(variable)
    found: dict[tuple[str, ...], str] = {}
    for (section, key), variable in variables_in_force().items():
        if section not in Config.model_fields:
            known = ", ".join(Config.model_fields)
            raise ConfigError(f"environment variable {variable}: unknown section {section!r}, expected one of {known}")
        place = (section, *key.split(ENV_DELIMITER)) if section == "tables" else (section, key)
        if section == "tables" and len(place) < 3:
            raise ConfigError(f"environment variable {variable}: expected {ENV_PREFIX}TABLES{ENV_DELIMITER}NAME{ENV_DELIMITER}KEY")
        found[place] = variable
    return found


def _warn_of_one_underscore(variable: str) -> None:
    """Warns of a variable that would be a key if it had two underscores.

    Not an error: an orchestrator may set variables of such names for a service that happens to be called ``touchline``.
    """
    section, _, key = variable.removeprefix(ENV_PREFIX).lower().partition("_")
    section, key = MOVED_KEYS.get((section, key), (section, key))
    if section in Config.model_fields and key in _keys_of((section,)) and variable not in _CLIENT_VARIABLES:
        meant = f"{ENV_PREFIX}{section}{ENV_DELIMITER}{key}".upper()
        logger.warning("environment variable %s has no effect: %s, with two underscores, overrides %s.%s", variable, meant, section, key)


_EXPECTED = {
    "int": "expected an integer",
    "float": "expected a number",
    "bool": "expected true or false",
    "string": "expected a string",
    "model": "expected a section",
    "dict": "expected a section",
}
"""Expected type, by the first word of pydantic's error type."""


def _explain(detail: ErrorDetails, sources: Mapping[tuple[str, ...], str]) -> str:
    """Returns what was wrong, actual and expected; several lines if it is about values that do not fit together."""
    loc = [str(part) for part in detail["loc"]]
    # What is behind a key is pydantic's: the alternatives of a type, for example.
    place = tuple(loc[: (4 if loc[2:3] == ["rate"] else 3) if loc[:1] == ["tables"] else 2])
    if not place:
        return str(detail["ctx"]["error"])
    if place[2:] == ("[key]",):
        return f"{'.'.join(place[:2])}: {_expected(detail)}"
    source = f" ({sources[place]})" if place in sources else ""
    name = f"{'.'.join(place)}{source}"
    if detail["type"] != "extra_forbidden":
        return f"{name}: {_short(detail['input'])}, {_expected(detail)}"
    if place in MOVED_KEYS:
        return f"{name} is now {'.'.join(MOVED_KEYS[place])}"
    what, known = ("section", Config.model_fields) if len(place) == 1 else ("key", _keys_of(place[:-1]))
    return f"{name}: unknown {what}, expected one of {', '.join(known)}"


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"expected {context['expected']}"
        case "greater_than_equal":
            return f"expected at least {context['ge']}"
        case "less_than_equal":
            return f"expected at most {context['le']}"
        case "finite_number":
            return "expected a finite number"
        case "string_too_short":
            return "expected a non-empty string"
        case _:
            return _EXPECTED.get(kind.partition("_")[0], detail["msg"])


def _keys_of(section: tuple[str, ...]) -> Mapping[str, FieldInfo]:
    if section[2:] == ("rate",):
        return RateConfig.model_fields
    if section[0] == "tables":
        return TableConfig.model_fields if len(section) > 1 else {}
    default: Section = Config.model_fields[section[0]].default
    return type(default).model_fields


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_toml(section: str, keys: Mapping[str, Any]) -> str:
    """Returns a section as TOML, with the sections in it after it; keys that are None are left out."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in keys.items() if value is not None and not isinstance(value, Mapping)]
    inner = [f"\n{to_toml(f'{section}.{key}', value)}" for key, value in keys.items() if isinstance(value, Mapping)]
    return "\n".join([f"[{section}]", *lines, ""]) + "".join(inner)


def _toml_value(value: str | int | float | bool) -> str:
    """Returns a value as TOML. JSON's notation is TOML's too, except for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
