"""The sections of the configuration: their keys, defaults and bounds. :mod:`.settings` reads them and puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_INT64_MAX = 2**63 - 1
_INT32_MAX = 2**31 - 1


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


def _check_law(value: str) -> str:
    # Imported when a law is checked: the laws need numpy, and not all that reads a configuration does.
    from touchline_server.selectors.registry import LAWS

    if value not in LAWS:
        raise ValueError(f"expected {' or '.join(repr(law) for law in LAWS)}")
    return value


_Int = Annotated[int, BeforeValidator(_refuse_bool)]
_Count = Annotated[_Int, Field(ge=1, le=_INT64_MAX)]
_Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
_Seed = Annotated[Annotated[int, Field(ge=0, le=_INT64_MAX)] | None, BeforeValidator(_refuse_bool), BeforeValidator(_unset_if_empty)]


class Section(BaseModel):
    """A section: immutable, and without keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BufferConfig(Section):
    """Section ``[config]``: what the buffer holds and what a batch is."""

    buffer_size: _Count = 1_000_000
    """Most steps (stored rows) that the buffer holds."""
    batch_size: _Count = 256
    """Slices in a batch."""
    min_history: Annotated[_Int, Field(ge=0, le=_INT64_MAX)] = 100_000
    """Steps stored before training should start; sampling works earlier."""
    horizon: _Count = 3
    """Transitions in a slice: a slice is horizon + 1 consecutive steps of one episode."""


class StorageConfig(Section):
    """Section ``[storage]``: where the steps live."""

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
    accept_eviction: bool = False
    """Whether a start may evict stored episodes for which ``config.buffer_size`` has become too small; otherwise it is refused."""


class SamplingConfig(Section):
    """Section ``[sampling]``: how slices are drawn and what their rows mean."""

    law: Annotated[str, AfterValidator(_check_law)] = "episode"
    """``episode``: an eligible episode uniformly, then a start in it uniformly. ``step``: every valid start alike."""
    seed: _Seed = None
    """Seed of the draws, at least 0; None is fresh entropy."""
    row_convention: Literal["incoming", "outgoing"] = "incoming"
    """``incoming``: row t holds observation t and the action, reward and done that led to it. ``outgoing``: the action
    taken from it, with its reward and done."""


class ServerConfig(Section):
    """Section ``[server]``: where the server listens, and how it works."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[_Int, Field(ge=0, le=65_535)] = 50_051
    """TCP port; 0 takes a free one."""
    unix_socket: str = ""
    """Path of a Unix socket to listen on instead of host and port; empty: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the server's process logs, on stderr."""
    keepalive_s: Annotated[_Seconds, Field(ge=1)] = 30.0
    """Silence in seconds after which a peer is asked whether it is there; without an answer for a third of it, it is gone."""
    drain_timeout_s: _Seconds = 10.0
    """Time that calls in progress get to end after SIGTERM, in seconds."""
    add_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that store episodes."""
    sample_workers: Annotated[_Int, Field(ge=1, le=1_024)] = 2
    """Threads that gather batches."""
    sample_share: Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=0.95, allow_inf_nan=False)] = 0.5
    """Share of the time that sampling keeps while learners wait for batches: adds are answered later for it. 0: adds never wait."""


class LimitsConfig(Section):
    """Section ``[limits]``: the largest messages, episodes and batches, and how much may be in progress at a time."""

    max_message_bytes: Annotated[_Int, Field(ge=1024, le=_INT32_MAX)] = 67_108_864
    """Largest message, either way; what is larger travels in chunks."""
    max_request_bytes: Annotated[_Int, Field(ge=2_097_152, le=_INT32_MAX)] = 2_097_152
    """Largest message to the server, if max_message_bytes is not less. Touchline's clients send larger episodes in chunks; raise it for a
    client of another make that does not. Each call that is being read has room for it."""
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


class RingConfig(Section):
    """Section ``[ring]``: shared memory for learners on the server's host."""

    max_rings: Annotated[_Int, Field(ge=0, le=1_024)] = 16
    """Most shared-memory rings, one a learner on this host; 0: none, learners get messages."""
    max_ring_bytes: _Count = 536_870_912
    """Largest ring; a learner whose batches do not fit three times gets messages."""


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
"""Where a (section, key) of former versions is now. The former name is refused by an error that says the new one."""


class TlsConfig(Section):
    """Section ``[tls]``: the server's certificate. Paths of PEM files, read when the server starts."""

    cert: str = ""
    """Server certificate, followed by the intermediate ones; empty: no TLS."""
    key: str = ""
    """The certificate's private key."""
    client_ca: str = ""
    """CA bundle for client certificates; if set, clients must authenticate with one (mutual TLS). Empty: clients need none."""


class AuthConfig(Section):
    """Section ``[auth]``: who may call what. There is no token in it, so it may be logged and told."""

    tokens_file: str = ""
    """TOML file with tokens and their roles, which nobody else may read. Empty: those of the environment; without any, everybody may call
    everything."""
    allow_plaintext: bool = False
    """Whether tokens are taken without TLS from other machines."""
