"""The sections of the configuration: each key's type, default, bounds and description, the only place where they stand.

:mod:`.settings` reads and combines them. ``server/generate_configuration.py`` writes from them ``cfg/default.toml`` and its packaged copy,
the tables of ``docs/configuration.md``, and the variables that ``docker-compose.yml`` passes on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from touchline_protos.types.limits import DEFAULT_MAX_COLUMNS, DEFAULT_MAX_EPISODE_BYTES, DEFAULT_MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES

_INT64_MAX = 2**63 - 1
_INT32_MAX = 2**31 - 1


def _refuse_bool(value: object) -> object:
    # pydantic would accept true as 1, which is always a mistake.
    if isinstance(value, bool):
        raise ValueError("expected a number")  # not TypeError, which pydantic would let through
    return value


def _unset_if_empty(value: object) -> object:
    # The environment has no null, so an empty variable unsets a seed that the file sets.
    return None if value == "" else value


def _check_device(value: str) -> str:
    if re.fullmatch(r"auto|cuda|cuda:[0-9]+|cpu|disk", value) is None:
        raise ValueError("expected 'auto', 'cuda', 'cuda:N', 'cpu' or 'disk'")
    return value


def _check_law(value: str) -> str:
    # Imported here because the laws need numpy, which not every reader of a configuration does.
    from touchline_server.selectors.registry import LAWS

    if value not in LAWS:
        raise ValueError(f"expected {' or '.join(repr(law) for law in LAWS)}")
    return value


_Int = Annotated[int, BeforeValidator(_refuse_bool)]
_Count = Annotated[_Int, Field(ge=1, le=_INT64_MAX)]
_Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1, allow_inf_nan=False)]
_Seed = Annotated[Annotated[int, Field(ge=0, le=_INT64_MAX)] | None, BeforeValidator(_refuse_bool), BeforeValidator(_unset_if_empty)]

_OptionalCount = Annotated[_Count | None, BeforeValidator(_unset_if_empty)]
_HalfLife = Annotated[
    Annotated[float, BeforeValidator(_refuse_bool), Field(ge=1, allow_inf_nan=False)] | None, BeforeValidator(_unset_if_empty)
]


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BufferConfig(Section):
    """What the buffer holds, and what a batch is."""

    buffer_size: _Count = 1_000_000
    """Capacity in steps (stored rows). Whole episodes are evicted, oldest first, to stay within it."""
    batch_size: _Count = 256
    """Slices in a batch, unless a request asks for another number."""
    min_history: Annotated[_Int, Field(ge=0, le=_INT64_MAX)] = 100_000
    """Steps stored before training should start: ``wait_until_ready()`` waits for them, or for a full buffer. Sampling works earlier, as
    soon as one episode is long enough."""
    horizon: _Count = 3
    """Transitions in a slice, unless a request asks for another number: a slice is horizon + 1 consecutive steps of one episode."""


class StorageConfig(Section):
    """Where the steps live, and whether they outlive the server."""

    device: Annotated[str, AfterValidator(_check_device)] = "auto"
    """Device of the columns: ``"auto"`` (CUDA if 2.5 times the buffer fits in its free memory, otherwise host memory), ``"cuda"``,
    ``"cuda:N"``, ``"cpu"`` or ``"disk"`` (memory-mapped files in scratch_dir)."""
    scratch_dir: str = ""
    """Folder of the memory-mapped files, for device ``"disk"``. It needs space for the whole buffer and belongs to one server. The files
    are working memory: a restart does not read them back."""
    share_columns: Literal["auto", "on", "writable", "off"] = "auto"
    """Whether learners on this host may read the columns themselves: then batches are row numbers, and nothing is copied for them.
    ``"auto"``: in a server on a machine that may have a CUDA device. ``"on"``: also elsewhere, and in process. ``"writable"``: the same,
    and learners may also write columns in host memory, since most CUDA devices on PCIe read no others (docs/gpu.md). Shared columns take
    a sixteenth more memory, all of it reserved with the first episode. Files of device ``"disk"`` are not shared."""
    allow_non_finite: bool = False
    """Whether to store observations, actions, rewards and dones that are NaN or infinite. Otherwise an episode that contains one is
    refused."""
    data_dir: str = ""
    """Folder of the durable store: a server that starts on it has the stored episodes again. Empty: episodes live as long as the server."""
    durability: Literal["sync", "batch", "memory", "none"] = "batch"
    """Promise of an acknowledgement, with a data_dir. ``"sync"``: the episode is on disk. ``"batch"``: it survives a crash of the server,
    and after sync_interval_ms one of the machine. ``"memory"``: it is in memory and will be written later. ``"none"``: it is in memory and
    never written, although there is a data_dir. See docs/guarantees.md."""
    sync_interval_ms: Annotated[_Int, Field(ge=1, le=60_000)] = 100
    """Longest time in milliseconds from an acknowledgement until the episode is on disk, for durability ``"batch"``."""
    accept_eviction: bool = False
    """Whether a start may evict, for good, the oldest stored episodes if buffer_size has become too small for them. Otherwise such a start
    is refused."""


class SamplingConfig(Section):
    """How slices are drawn, and what their rows mean."""

    law: Annotated[str, AfterValidator(_check_law)] = "episode"
    """Law of the draws. ``"episode"``: an episode that is long enough, uniformly, then a start within it, uniformly, as TorchRL's
    SliceSampler and TD-MPC2 draw. ``"step"``: every possible start with the same probability. ``"recent"``: starts in the newest rows, by
    recent_steps or recent_half_life. ``"fresh_first"``: each start once, newest first, then as ``"episode"``. ``"task"``: tasks
    uniformly, then as ``"episode"`` within the task. ``"prioritized"``: by the priorities that learners send. See docs/laws.md."""
    recent_steps: _OptionalCount = None
    """Newest rows that the law ``"recent"`` draws from, all alike, unless a request says otherwise. Unset: recent_half_life applies."""
    recent_half_life: _HalfLife = None
    """Rows behind the newest one after which a start is half as likely under the law ``"recent"``, at least 1, unless a request says
    otherwise. Unset: recent_steps applies."""
    pad: Literal["none", "end"] = "none"
    """Slices of episodes that end too soon, unless a request says otherwise. ``"none"``: they are not drawn. ``"end"``: every transition
    can be a start; rows beyond the episode's end repeat its last one, and ``batch.valid`` says which transitions are real."""
    priority_alpha: _Share = 0.6
    """Exponent of the priorities of the law ``"prioritized"``, 0 to 1: 0 draws every start alike, 1 in proportion to its priority."""
    priority_beta: _Share = 0.4
    """Exponent of the weights of the law ``"prioritized"``, 0 to 1, unless a request asks for another: 1 corrects all of the law's bias."""
    priority_eta: _Share = 0.9
    """Share, 0 to 1, of the highest priority of a slice's steps in the priority of the slice; the rest is their mean's (R2D2)."""
    seed: _Seed = None
    """Seed of the draws, an integer of at least 0: the same seed, episodes and draws give the same batches. Unset: fresh entropy."""
    row_convention: Literal["incoming", "outgoing"] = "incoming"
    """Meaning of row t of an episode. ``"incoming"``: observation t, and the action, reward and done that led to it (TD-MPC2; row 0 is the
    reset observation). ``"outgoing"``: observation t, and the action taken from it with its reward and done."""


class RateConfig(Section):
    """How often what is stored is sampled: a limit on both sides, off by default. It can be changed while the server runs."""

    samples_per_insert: Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """Slices delivered to learners for each step added. Learners wait while there are too few steps, and actors while learners are too
    slow. 0: no limit."""
    tolerance: Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1e18, allow_inf_nan=False)] = 0.0
    """Slices by which deliveries may be ahead of samples_per_insert, or behind it; at least a batch. 0: 16 batches, or the slices of
    1,000 steps if those are more."""
    min_steps: Annotated[_Int, Field(ge=0, le=_INT64_MAX)] = 0
    """Steps that must be stored before learners get batches. Adds are not limited until then, and these steps do not count for
    samples_per_insert."""


TABLE_SECTIONS: dict[str, type[Section]] = {"config": BufferConfig, "storage": StorageConfig, "sampling": SamplingConfig}
"""Sections that describe the default table. Every other table takes from them what it leaves out."""

KEYS_OF_THE_SERVER = {"data_dir"}
"""Keys of those sections that are not a table's own: its folder is a folder of its name in data_dir."""

MAX_TABLE_NAME_CHARS = 64
"""Length of the longest name of a table."""

RESERVED_TABLE_NAMES = ("default", "lock", "acknowledged")
"""Names that no table may have: the default table's is empty, and the others are files in data_dir."""


def check_table_name(name: str) -> str:
    """Returns the name of a table other than the default one.

    It is a folder, a part of an environment variable's name and a word on a command line, so it has only characters that all of them take.

    Raises:
        ValueError: the text cannot be a name.
    """
    if name in RESERVED_TABLE_NAMES:
        raise ValueError("expected another name: this one is reserved")
    if len(name) > MAX_TABLE_NAME_CHARS or "__" in name or re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise ValueError(
            f"expected a name of 1 to {MAX_TABLE_NAME_CHARS} lower-case letters, digits, '-' and '_', with a letter first and no '__'"
        )
    return name


def _table_keys() -> dict[str, Any]:
    """Returns the keys of a table other than the default one, flat, each with type and bounds of its section."""
    keys: dict[str, Any] = {}
    for section in TABLE_SECTIONS.values():
        for key, field in section.model_fields.items():
            if key not in KEYS_OF_THE_SERVER:
                keys[key] = (Annotated[(field.annotation, *field.metadata, Field(description=field.description))], None)
    return keys | {"rate": (RateConfig, Field(RateConfig(), description="The table's rate limit, a section of its own."))}


if TYPE_CHECKING:

    class TableConfig(Section):
        """The keys of one table, ``[tables.NAME]``. Only those that are set count: the default table has the others."""

        rate: RateConfig

else:
    TableConfig = create_model("TableConfig", __base__=Section, **_table_keys())


class ServerConfig(Section):
    """Where the server listens, and how it works."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. ``"0.0.0.0"`` accepts other machines: without [tls] and [auth], everyone who reaches the port can read, add and
    clear episodes."""
    port: Annotated[_Int, Field(ge=0, le=65_535)] = 50_051
    """TCP port. 0 takes a free one, which the server prints."""
    unix_socket: str = ""
    """Path of a Unix socket to listen on instead of host and port. Empty: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that the server logs, on stderr: ``"debug"``, ``"info"``, ``"warning"`` or ``"error"``."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log: ``"text"``, or ``"json"`` for a line of JSON per record."""
    log_summary_s: Annotated[_Seconds, Field(ge=0)] = 0.0
    """Seconds between lines that sum up each table: what came in and went out, who waits, how full it is. 0: no such lines."""
    keepalive_s: Annotated[_Seconds, Field(ge=1)] = 30.0
    """Seconds of silence after which the server pings a peer. A peer that does not answer within a third of that time is disconnected, and
    everything it held is released."""
    drain_timeout_s: _Seconds = 10.0
    """Seconds that calls in progress get to finish after SIGTERM."""
    add_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that store episodes."""
    sample_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that gather batches."""
    gather_threads: Annotated[_Int, Field(ge=0, le=64)] = 0
    """Threads that gather one batch of 4 MiB or more together. 0: as many as there are cores, up to 8; 1: only the one that makes it."""
    sample_share: Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=0.95, allow_inf_nan=False)] = 0.5
    """Share of the time, 0 to 0.95, that sampling keeps while learners wait for batches; adds are answered later in return. 0: adds never
    wait."""


class LimitsConfig(Section):
    """The largest messages, episodes and requests, and how much may be in progress at a time."""

    max_message_bytes: Annotated[_Int, Field(ge=1024, le=_INT32_MAX)] = DEFAULT_MAX_MESSAGE_BYTES
    """Largest message in either direction, in bytes. Larger episodes and batches travel in chunks."""
    max_request_bytes: Annotated[_Int, Field(ge=MAX_REQUEST_BYTES, le=_INT32_MAX)] = MAX_REQUEST_BYTES
    """Largest message to the server, in bytes, at least 2 MiB; max_message_bytes limits it too. Touchline's clients send larger episodes in
    chunks: raise it for another client that does not. Each call that is being read reserves this much memory."""
    max_episode_bytes: _Count = DEFAULT_MAX_EPISODE_BYTES
    """Largest episode in bytes, summed over its columns."""
    max_columns: _Count = DEFAULT_MAX_COLUMNS
    """Largest number of columns in an episode."""
    max_batch_size: _Count = 65_536
    """Largest batch size that a request may ask for."""
    max_horizon: _Count = 1_024
    """Largest horizon that a request may ask for."""
    max_streams: _Count = 1_024
    """Largest number of sampling, loading and reading streams open at a time. The next one is refused."""
    max_calls: _Count = 4_096
    """Largest number of calls in progress, streams included. The next one is refused, to be tried again later."""
    max_connection_calls: Annotated[_Int, Field(ge=1, le=_INT32_MAX)] = 256
    """Largest number of calls in progress on one connection. The next one waits at the client."""
    max_receive_bytes: _Count = 4_294_967_296
    """Largest number of bytes of episodes on their way in: half for messages, half for episodes in chunks. At least twice max_message_bytes
    and twice max_episode_bytes."""
    max_send_bytes: _Count = 4_294_967_296
    """Largest number of bytes of batches and episodes that the transport has not taken yet. At least max_message_bytes."""


class RingConfig(Section):
    """Shared memory for learners on the server's host."""

    max_rings: Annotated[_Int, Field(ge=0, le=1_024)] = 16
    """Largest number of shared-memory rings, one for each learner on this host. Further learners get messages; 0: all learners do."""
    max_ring_bytes: _Count = 536_870_912
    """Largest ring, in bytes. A learner gets messages if three of its batches do not fit."""
    device: bool = True
    """Whether learners that ask for it get row numbers, by which they gather batches themselves from columns that are shared
    (``storage.share_columns``). Otherwise they get batches."""
    max_hold_s: Annotated[_Seconds, Field(le=3_600)] = 1.0
    """Seconds for which an add waits for a learner that still reads rows of shared columns which are to be overwritten. Then the learner
    loses the batch and takes the next one."""


class TlsConfig(Section):
    """The server's certificate. Paths of PEM files, read when the server starts."""

    cert: str = ""
    """Server certificate, followed by its intermediate certificates. Empty: no TLS."""
    key: str = ""
    """Private key of the server certificate."""
    client_ca: str = ""
    """CA bundle for client certificates; if set, clients must authenticate with one (mutual TLS). Empty: clients need none."""


class AuthConfig(Section):
    """Who may call what. Contains no token, so it may be logged and reported."""

    tokens_file: str = ""
    """TOML file with the tokens and their roles, readable only by the server's user. Tokens may also come from the environment variable
    TOUCHLINE_SERVER_TOKENS; without any, everyone may call everything. See docs/security.md."""
    allow_plaintext: bool = False
    """Whether to accept tokens without TLS from other machines. Safe only if the network itself is private."""


class HttpConfig(Section):
    """The web page, its API and the metrics for Prometheus. Needs the extra ``touchline-server[http]``; see docs/http.md."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """Whether to serve HTTP. ``"auto"``: if the extra is installed and the port is free, but beside a Unix socket only with tokens;
    otherwise a line in the log says why not. ``"on"``: a missing extra or a port in use is an error. ``"off"``: no."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. With [auth], callers need a token of role learner or admin; with [tls], they connect by https. ``"0.0.0.0"``
    accepts other machines: without [auth], everyone who reaches the port can see counts and episodes."""
    port: Annotated[_Int, Field(ge=0, le=65_535)] = 8_080
    """TCP port. 0 takes a free one, which the server prints."""


class MetricsConfig(Section):
    """What the server counts while it works, for ``touchline status``, the web page and Prometheus."""

    enabled: bool = True
    """Whether to count flows, waits, latencies, actors, learners and refusals. Without, status shows only what is stored and configured."""


MOVED_KEYS = {
    ("server", key): ("ring" if key in ("max_rings", "max_ring_bytes") else "limits", key)
    for key in (
        "max_message_bytes",
        "max_request_bytes",
        "max_episode_bytes",
        "max_columns",
        "max_batch_size",
        "max_horizon",
        "max_streams",
        "max_calls",
        "max_connection_calls",
        "max_receive_bytes",
        "max_send_bytes",
        "max_rings",
        "max_ring_bytes",
    )
}
"""Present place of each (section, key) that has moved. The former name is refused with an error that gives the new one."""
