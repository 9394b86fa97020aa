"""The configuration: one frozen object, validated where it enters.

:func:`read_cfg` reads it from a TOML file and the environment; ``Config(config={"batch_size": 64})`` makes one in code,
from its arguments alone. The tables and their defaults are those of ``cfg/default.toml``. Everything that is wrong is a
:class:`ConfigError`.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

CONFIG_PATH_VARIABLE = "TOUCHLINE_CFG"
"""Environment variable that names the configuration file."""

ENV_PREFIX = "TOUCHLINE_"
"""``TOUCHLINE_<TABLE>__<KEY>`` overrides one key."""

_ENV_DELIMITER = "__"
_INT64_MAX = 2**63 - 1
_INT32_MAX = 2**31 - 1


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, where it stands, what was found and expected."""


def _refuse_bool(value: object) -> object:
    # pydantic takes true for 1, and nobody means that.
    if isinstance(value, bool):
        raise ValueError("expected a number")  # not TypeError, which pydantic would let through
    return value


def _unset_if_empty(value: object) -> object:
    # The environment has no null: an empty variable takes a seed of the file away.
    return None if value == "" else value


def _check_device(value: str) -> str:
    if re.fullmatch(r"auto|cuda|cuda:[0-9]+|cpu|disk", value) is None:
        raise ValueError("expected 'auto', 'cuda', 'cuda:N', 'cpu' or 'disk'")
    return value


_Int = Annotated[int, BeforeValidator(_refuse_bool)]
_Count = Annotated[_Int, Field(ge=1, le=_INT64_MAX)]
_Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
_Seed = Annotated[Annotated[int, Field(ge=0, le=_INT64_MAX)] | None, BeforeValidator(_refuse_bool), BeforeValidator(_unset_if_empty)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BufferConfig(_Table):
    """Table ``[config]``: what the buffer holds and what a batch is."""

    buffer_size: _Count = 1_000_000
    """Most steps (stored rows) that the buffer holds."""
    batch_size: _Count = 256
    """Slices in a batch."""
    min_history: Annotated[_Int, Field(ge=0, le=_INT64_MAX)] = 100_000
    """Steps stored before training should start; sampling works earlier."""
    horizon: _Count = 3
    """Transitions in a slice: a slice is horizon + 1 consecutive steps of one episode."""


class StorageConfig(_Table):
    """Table ``[storage]``: where the steps live."""

    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """``cuda``, ``cuda:N``, ``cpu``, ``disk``, or ``auto``: CUDA if 2.5 times the buffer fits in its free memory,
    else host memory."""
    scratch_dir: str = ""
    """Folder of the memory-mapped files, for device ``disk``."""
    allow_non_finite: bool = False
    """Whether observations, actions, rewards and dones that are NaN or infinite are stored; otherwise their episode is refused."""
    data_dir: str = ""
    """Folder in which the episodes outlive the server; empty: nothing does."""
    durability: Literal["sync", "batch", "memory"] = "batch"
    """What an acknowledgement says, with a data_dir. ``sync``: the episode is on the disk. ``batch``: it is in the write-ahead
    log, which outlives the server's death, and on the disk after sync_interval_ms. ``memory``: it is in memory, and written
    behind."""
    sync_interval_ms: Annotated[_Int, Field(ge=1, le=60_000)] = 100
    """Longest time in milliseconds between an acknowledgement and the disk, for ``batch``."""


class SamplingConfig(_Table):
    """Table ``[sampling]``: how slices are drawn and what their rows mean."""

    law: Literal["episode", "step"] = "episode"
    """``episode``: an eligible episode uniformly, then a start in it uniformly. ``step``: every valid start alike."""
    seed: _Seed = None
    """Seed of the draws, at least 0; None is fresh entropy."""
    row_convention: Literal["incoming", "outgoing"] = "incoming"
    """``incoming``: row t holds observation t and the action, reward and done that led to it. ``outgoing``: the action
    taken from it, with its reward and done."""


class ServerConfig(_Table):
    """Table ``[server]``: where the server listens, and its limits."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[_Int, Field(ge=0, le=65_535)] = 50_051
    """TCP port; 0 takes a free one."""
    unix_socket: str = ""
    """Path of a Unix socket to listen on instead of host and port; empty: none."""
    max_message_bytes: Annotated[_Int, Field(ge=1024, le=_INT32_MAX)] = 67_108_864
    """Largest message, either way."""
    max_episode_bytes: _Count = 1_073_741_824
    """Largest episode, summed over its columns."""
    max_columns: _Count = 256
    """Most columns of an episode."""
    max_batch_size: _Count = 65_536
    """Largest batch size that a request may ask for."""
    max_horizon: _Count = 1_024
    """Largest horizon that a request may ask for."""
    max_streams: _Count = 1_024
    """Most sampling, loading and reading streams open at a time."""
    max_calls: _Count = 4_096
    """Most calls in progress, streams included."""
    max_connection_calls: Annotated[_Int, Field(ge=1, le=_INT32_MAX)] = 256
    """Most calls in progress on one connection; the next ones wait at the client."""
    max_receive_bytes: _Count = 4_294_967_296
    """Bytes of episodes that may be on their way in: half for messages, half for episodes that come in chunks."""
    max_send_bytes: _Count = 4_294_967_296
    """Bytes of batches and episodes that may be made and not taken yet by the transport."""
    keepalive_s: Annotated[_Seconds, Field(ge=1)] = 30.0
    """Silence in seconds after which a peer is asked whether it is there; without an answer for a third of it, it is gone."""
    max_rings: Annotated[_Int, Field(ge=0, le=1_024)] = 16
    """Most shared-memory rings, one a learner on this host; 0: none, learners get messages."""
    max_ring_bytes: _Count = 536_870_912
    """Largest ring; a learner whose batches do not fit three times gets messages."""
    add_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that store episodes."""
    sample_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that gather batches."""
    sample_share: Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=0.95, allow_inf_nan=False)] = 0.5
    """Share of the time that sampling keeps while learners wait for batches: adds are answered later for it. 0: adds never wait."""
    drain_timeout_s: _Seconds = 10.0
    """Time that calls in progress get to end after SIGTERM, in seconds."""


class TlsConfig(_Table):
    """Table ``[tls]``: what the server proves itself with. Paths of PEM files, read at the server's start."""

    cert: str = ""
    """Its certificate, followed by those between it and the root; empty: no TLS."""
    key: str = ""
    """The certificate's private key."""
    client_ca: str = ""
    """Certificates of those who vouch for clients; each client must show one of theirs. Empty: clients show none."""


class AuthConfig(_Table):
    """Table ``[auth]``: who may call what. There is no token in it, so it may be logged and told."""

    tokens_file: str = ""
    """TOML file with tokens and their roles, which nobody else may read. Empty: those of the environment; without any, everybody may call
    everything."""
    allow_plaintext: bool = False
    """Whether tokens are taken without TLS from other machines."""


class Config(_Table):
    """Everything that can be set, checked as a whole. Immutable and hashable, so safe to share between threads.

    Made in code it takes its arguments alone, never a file or the environment:
    ``Config(config={"horizon": 5}, storage={"device": "cpu"})``.

    Args:
        tables: ``config``, ``storage``, ``sampling``, ``server``, ``tls`` and ``auth``, each as a table object or a mapping. What is left
            out has its default.

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
    """Where the server listens, and its limits."""
    tls: TlsConfig = TlsConfig()
    """What it proves itself with."""
    auth: AuthConfig = AuthConfig()
    """Who may call what."""

    def __init__(self, **tables: BaseModel | Mapping[str, Any]) -> None:
        plain = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
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

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        buffer, server = self.config, self.server
        wrong = []
        if buffer.batch_size > server.max_batch_size:
            limit = f"server.max_batch_size ({server.max_batch_size})"
            wrong.append(f"config.batch_size: {buffer.batch_size}, expected at most {limit}")
        if buffer.horizon > server.max_horizon:
            limit = f"server.max_horizon ({server.max_horizon})"
            wrong.append(f"config.horizon: {buffer.horizon}, expected at most {limit}")
        if buffer.buffer_size < buffer.horizon + 1:
            limit = f"config.horizon + 1 ({buffer.horizon + 1})"
            wrong.append(f"config.buffer_size: {buffer.buffer_size}, expected at least {limit}")
        if buffer.min_history > buffer.buffer_size:
            limit = f"config.buffer_size ({buffer.buffer_size})"
            wrong.append(f"config.min_history: {buffer.min_history}, expected at most {limit}")
        least = 2 * max(server.max_message_bytes, server.max_episode_bytes)
        if server.max_receive_bytes < least:
            limit = f"2 x server.max_message_bytes and 2 x server.max_episode_bytes ({least})"
            wrong.append(f"server.max_receive_bytes: {server.max_receive_bytes}, expected at least {limit}")
        if server.max_send_bytes < server.max_message_bytes:
            limit = f"server.max_message_bytes ({server.max_message_bytes})"
            wrong.append(f"server.max_send_bytes: {server.max_send_bytes}, expected at least {limit}")
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
    name, text = _read_text(path)
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

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter=_ENV_DELIMITER, extra="forbid")

    config: BufferConfig = BufferConfig()
    storage: StorageConfig = StorageConfig()
    sampling: SamplingConfig = SamplingConfig()
    server: ServerConfig = ServerConfig()
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


def _read_text(path: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Returns the name and the text of the configuration file to use."""
    variable = os.environ.get(CONFIG_PATH_VARIABLE)
    if path is not None:
        file, named_by = Path(path), ""
    elif variable:
        file, named_by = Path(variable), f" (named by the environment variable {CONFIG_PATH_VARIABLE})"
    elif (default := Path("cfg/default.toml")).is_file():
        file, named_by = default, ""
    else:
        packaged = resources.files("touchline_server") / "default.toml"
        return "the packaged default.toml", packaged.read_text(encoding="utf-8")
    try:
        return str(file), file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {file}{named_by}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration file {file}{named_by}: not UTF-8 text, byte {error.start}") from None


def _parse_tables(name: str, text: str) -> dict[str, Any]:
    """Returns the tables of a TOML text; their keys and values are not checked yet."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace("at end of document", f"at line {text.count(chr(10)) + 1}, the end of the file")
        raise ConfigError(f"configuration file {name}: not valid TOML: {message}") from None
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
    found = {}
    for variable in os.environ:
        table, delimiter, key = variable.removeprefix(ENV_PREFIX).lower().partition(_ENV_DELIMITER)
        if not variable.startswith(ENV_PREFIX) or not delimiter:
            continue
        if table not in Config.model_fields:
            known = ", ".join(Config.model_fields)
            raise ConfigError(f"environment variable {variable}: unknown table {table!r}, expected one of {known}")
        found[table, key.partition(_ENV_DELIMITER)[0]] = variable
    return found


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
    default: _Table = Config.model_fields[table].default
    return type(default).model_fields


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _toml_value(value: str | int | float | bool) -> str:
    """Returns a value as TOML; JSON's notation is TOML's too but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
