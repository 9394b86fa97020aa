"""Checks of arguments, and small messages to and from values of this package. Episodes and batches are the codec's."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from touchline.errors import (
    EpisodeResult,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    ServerError,
    TooLargeError,
    TouchlineError,
)
from touchline.types import ColumnInfo, ReadyState, ServerInfo, TableInfo
from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey
from touchline_protos.codec.status import rate_of_message
from touchline_protos.log_lines import escape
from touchline_protos.types.dtypes import dtype_name, to_numpy
from touchline_protos.types.mix import Mix, check_mix, check_when_empty
from touchline_protos.types.names import name_fault
from touchline_protos.v1 import replay_pb2 as pb

MAX_SECONDS = 366 * 24 * 3600
"""Longest time that is accepted: gRPC treats a much longer one, even infinity, as a deadline that has passed."""

_LAWS = {
    None: pb.LAW_UNSPECIFIED,
    "episode": pb.LAW_EPISODE,
    "step": pb.LAW_STEP,
    "recent": pb.LAW_RECENT,
    "prioritized": pb.LAW_PRIORITIZED,
    "fresh_first": pb.LAW_FRESH_FIRST,
    "task": pb.LAW_TASK,
}
_PADS = {None: pb.PAD_UNSPECIFIED, "none": pb.PAD_NONE, "end": pb.PAD_END}
_LAWS_OF_1_0 = (pb.LAW_UNSPECIFIED, pb.LAW_EPISODE, pb.LAW_STEP)
_LAW_NAMES = ", ".join(repr(law) for law in _LAWS if law)
_ERROR_OF_OUTCOME: dict[int, type[TouchlineError]] = {
    pb.EpisodeResult.OUTCOME_INVALID: InvalidEpisodeError,
    pb.EpisodeResult.OUTCOME_KEY_CONFLICT: KeyConflictError,
    pb.EpisodeResult.OUTCOME_TOO_LARGE: TooLargeError,
}
_STORAGE_STATES = {pb.STORAGE_STATE_OK: "ok", pb.STORAGE_STATE_FULL: "full", pb.STORAGE_STATE_FAILED: "failed"}
"""Name of each state of a durable store."""
_STORED = (pb.EpisodeResult.OUTCOME_ACCEPTED, pb.EpisodeResult.OUTCOME_DUPLICATE)


def whole_number(name: str, value: int, *, least: int, most: int = (1 << 31) - 1) -> int:
    """Returns the value as an int.

    Raises:
        InvalidArgumentError: the value is not a whole number from ``least`` to ``most``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentError(f"{name}: {value!r}, expected a whole number") from None
    if not least <= number <= most:
        raise InvalidArgumentError(f"{name}: {number}, expected {least} to {most}")
    return number


def number(name: str, value: float, *, least: float, most: float) -> float:
    """Returns the value as a float.

    Raises:
        InvalidArgumentError: the value is not a number from ``least`` to ``most``.
    """
    try:
        good = least <= value <= most
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InvalidArgumentError(f"{name}: {value!r}, expected a number from {least:g} to {most:g}")
    return float(value)


def seconds(name: str, value: float, *, or_zero: bool = False) -> float:
    """Returns the value.

    Raises:
        InvalidArgumentError: the value is not a number of seconds above 0 (or 0, with ``or_zero``) and up to a year.
    """
    try:
        good = 0 < value <= MAX_SECONDS or (or_zero and value == 0)
    except TypeError:
        good = False
    if not good:
        raise InvalidArgumentError(f"{name}: {value!r}, expected {'0' if or_zero else 'more than 0'} to {MAX_SECONDS:,} seconds")
    return value


def seconds_or_none(name: str, value: float | None) -> float | None:
    """Returns the value; None stays None.

    Raises:
        InvalidArgumentError: the value is not a number of seconds above 0 and up to a year.
    """
    return None if value is None else seconds(name, value)


def check_actor(actor: str) -> str:
    """Returns the name of an actor; raises as :func:`check_name`."""
    return check_name("actor", actor)


def check_table(table: str) -> str:
    """Returns the name of a table, empty for the server's default one; raises as :func:`check_name`."""
    return check_name("table", table)


def check_name(what: str, name: str) -> str:
    """Returns a name.

    Raises:
        InvalidArgumentError: the name is not a str, too long, or contains control characters.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(f"{what}: {name!r}, expected a str")
    fault = name_fault(name)
    if fault is not None:
        raise InvalidArgumentError(f"{what}: {fault}")
    return name


def check_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Returns the dtype that float64 columns are stored as; None for no cast.

    Raises:
        InvalidArgumentError: the argument is neither None nor float32 (a str, or the dtype of any library).
    """
    if dtype is None:
        return None
    if str(getattr(dtype, "__name__", dtype)).removeprefix("torch.") != "float32":
        raise InvalidArgumentError(f"dtype: {dtype!r}, expected 'float32', to store float64 columns as float32, or None")
    return np.dtype(np.float32)


def check_policy_version(version: int) -> int:
    """Returns the version as an int.

    Raises:
        InvalidArgumentError: the version is not a whole number of 64 bits.
    """
    return whole_number("policy_version", version, least=-(1 << 63), most=(1 << 63) - 1)


def sample_request(
    *,
    table: str,
    batch_size: int | None = None,
    horizon: int | None = None,
    law: str | None = None,
    seed: int | None = None,
    wait_s: float = 0.0,
    recent_steps: int | None = None,
    recent_half_life: float | None = None,
    beta: float | None = None,
    pad: str | None = None,
    mix: Mix | None = None,
    when_empty: str = "wait",
    rank: int | None = None,
    world_size: int | None = None,
    job: str = "",
    first_batch: int | None = None,
) -> pb.SampleRequest:
    """Returns a SampleRequest; an argument that is None is left to the server's configuration.

    Raises:
        InvalidArgumentError: a value that no server accepts.
    """
    if law not in _LAWS:
        raise InvalidArgumentError(f"law: {law!r}, expected one of {_LAW_NAMES}")
    if pad not in _PADS:
        raise InvalidArgumentError(f"pad: {pad!r}, expected 'none' or 'end'")
    seconds("wait_s", wait_s, or_zero=True)
    request = pb.SampleRequest(table=table, law=_LAWS[law], wait_s=wait_s, pad=_PADS[pad])
    if batch_size is not None:
        request.batch_size = whole_number("batch_size", batch_size, least=1)
    if horizon is not None:
        request.horizon = whole_number("horizon", horizon, least=1)
    if seed is not None:
        request.seed = whole_number("seed", seed, least=-(1 << 63), most=(1 << 63) - 1)
    if recent_steps is not None:
        request.law_options.recent_steps = whole_number("recent_steps", recent_steps, least=1, most=(1 << 63) - 1)
    if recent_half_life is not None:
        request.law_options.recent_half_life = number("recent_half_life", recent_half_life, least=1, most=sys.float_info.max)
    if beta is not None:
        request.law_options.beta = number("beta", beta, least=0, most=1)
    if mix is not None:
        _add_mix(request, mix, when_empty)
    elif when_empty != "wait":
        raise InvalidArgumentError(f"when_empty: {when_empty!r} without a mix, expected it only with one")
    if rank is not None or world_size is not None:
        _add_rank(request, rank, world_size, job, first_batch)
    elif job or first_batch is not None:
        name, value = ("job", job) if job else ("first_batch", first_batch)
        raise InvalidArgumentError(f"{name}: {value!r} without rank and world_size, expected it only with both")
    return request


def check_mix_argument(mix: Mix, when_empty: str) -> tuple[tuple[str, float], ...]:
    """Returns the tables of a mix and their shares, in its order.

    Raises:
        InvalidArgumentError: the mix is not one (see :func:`touchline_protos.types.mix.check_mix`), or the rule is unknown.
    """
    try:
        shares = check_mix(mix)
        check_when_empty(when_empty)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
    for name, _ in shares:
        check_table(name)
    return shares


def _add_mix(request: pb.SampleRequest, mix: Mix, when_empty: str) -> None:
    shares = check_mix_argument(mix, when_empty)
    request.table = ""  # the client's own table, unless the mix names it
    request.mix.extend(pb.MixShare(table=name, share=share) for name, share in shares)
    request.when_empty = pb.WHEN_EMPTY_OTHERS if when_empty == "others" else pb.WHEN_EMPTY_WAIT


def _add_rank(request: pb.SampleRequest, rank: int | None, world_size: int | None, job: str, first_batch: int | None) -> None:
    if rank is None or world_size is None:
        raise InvalidArgumentError(f"rank: {rank} with world_size={world_size}, expected both or none")
    whole_number("world_size", world_size, least=1, most=(1 << 31) - 1)
    whole_number("rank", rank, least=0, most=world_size - 1)
    request.learner_rank.CopyFrom(pb.LearnerRank(rank=rank, world_size=world_size, job=check_name("job", job)))
    if first_batch is not None:
        request.learner_rank.first_batch = whole_number("first_batch", first_batch, least=0, most=(1 << 63) - 1)


def resumed(request: pb.SampleRequest, batches: int) -> pb.SampleRequest:
    """Returns the request that goes on after a stream of ``request`` has had some batches: with its place in a job, if it has one."""
    if not request.HasField("learner_rank"):
        return request
    again = pb.SampleRequest()
    again.CopyFrom(request)
    again.learner_rank.first_batch = request.learner_rank.first_batch + batches
    return again


def tables_of(request: pb.SampleRequest) -> tuple[str, ...]:
    """Returns the names of the tables that a request is about: of its mix, or its only one."""
    return tuple(share.table for share in request.mix) or (request.table,)


def table_names_of(request: pb.SampleRequest) -> tuple[str, ...]:
    """Returns the names of the tables of a request's mix; empty if it is about one table."""
    return tuple(share.table for share in request.mix)


def newer_feature(request: pb.SampleRequest) -> tuple[str, tuple[int, int]]:
    """Returns what in a request only newer servers know, so that older ones might ignore it, or "", and the protocol that has it."""
    if request.HasField("learner_rank"):
        return "rank=", (1, 3)
    return _feature_of_1_1(request), (1, 1)


def _feature_of_1_1(request: pb.SampleRequest) -> str:
    if request.law not in _LAWS_OF_1_0:
        return f"law={next(name for name, law in _LAWS.items() if law == request.law)!r}"
    if request.HasField("law_options"):
        return " and ".join(f"{field.name}=" for field, _ in request.law_options.ListFields())
    if request.mix:
        return "mix="
    if request.pad == pb.PAD_END:  # a 1.0 server never pads
        return "pad="
    return ""


def reach_of(request: pb.SampleRequest) -> int | None:
    """Returns how many transitions follow each start at least; None if the request leaves that to the server."""
    if request.pad == pb.PAD_END:
        return 1
    return request.horizon if request.HasField("horizon") else None


def episodes_request(
    *,
    table: str,
    ids: Iterable[int] | None = None,
    first: int | None = None,
    last: int | None = None,
    actor: str | None = None,
    newest: int | None = None,
    columns: Iterable[str] | None = None,
    skip_missing: bool,
    max_frame_bytes: int,
) -> pb.GetEpisodesRequest:
    """Returns a GetEpisodesRequest.

    Raises:
        InvalidArgumentError: an argument is out of range, or arguments exclude each other.
    """
    others = {"first": first, "last": last, "actor": actor, "newest": newest}
    given = [name for name, value in others.items() if value is not None]
    if ids is not None and given:
        raise InvalidArgumentError(f"ids and {given[0]}: both given, expected either ids or any of {', '.join(others)}")
    if skip_missing and ids is None:
        raise InvalidArgumentError("skip_missing: True without ids, expected ids with it")
    request = pb.GetEpisodesRequest(table=table, skip_missing=skip_missing, max_frame_bytes=max_frame_bytes)
    request.episode_ids.extend(_int64(f"ids[{position}]", number) for position, number in enumerate(() if ids is None else ids))
    if isinstance(columns, str):
        raise InvalidArgumentError(f"columns: {columns!r}, expected a sequence of names")
    request.columns.extend(columns or ())
    if first is not None:
        request.first_episode_id = _int64("first", first)
    if last is not None:
        request.last_episode_id = _int64("last", last)
    if actor is not None:
        request.actor = check_actor(actor)
    if newest is not None:
        request.newest = whole_number("newest", newest, least=1, most=(1 << 63) - 1)
    return request


def _int64(name: str, number: int) -> int:
    return whole_number(name, number, least=-(1 << 63), most=(1 << 63) - 2)


def counts_of(counts: pb.Counts) -> Counts:
    """Returns the counts in a message."""
    return Counts(**{field.name: getattr(counts, field.name) for field in pb.Counts.DESCRIPTOR.fields})


def ready_state_of(message: bytes) -> ReadyState:
    """Returns the state in a ReadyResponse."""
    response = pb.ReadyResponse.FromString(message)
    return ReadyState(
        response.can_sample,
        response.min_steps_reached,
        response.min_history,
        counts_of(response.counts),
        horizon=response.horizon,
        episodes_eligible=response.episodes_eligible,
        longest_episode=response.longest_episode,
    )


def server_info_of(message: bytes) -> ServerInfo:
    """Returns the values in an InfoResponse."""
    response = pb.InfoResponse.FromString(message)
    return ServerInfo(
        version=response.version,
        protocol_version=response.protocol_version,
        config_toml=response.config_toml,
        columns={column.name: ColumnInfo(dtype_name(to_numpy(column.dtype)), tuple(column.shape)) for column in response.columns},
        device=response.device,
        size_bytes=response.size_bytes,
        capacity=response.capacity,
        max_message_bytes=response.max_message_bytes,
        counts=counts_of(response.counts),
        storage_state=_STORAGE_STATES.get(response.storage_state, ""),
        storage_reason=response.storage_reason,
        episodes_not_sampled=response.episodes_not_sampled,
        rate=rate_of_message(response.rate) if response.HasField("rate") else None,
        tables=table_infos_of(response.tables),
    )


def table_infos_of(tables: Iterable[pb.TableInfo]) -> dict[str, TableInfo]:
    """Returns the descriptions of tables by their names."""
    return {
        table.table: TableInfo(
            name=table.table,
            config_toml=table.config_toml,
            counts=counts_of(table.counts),
            capacity=table.capacity,
            device=table.device,
            size_bytes=table.size_bytes,
            storage_state=_STORAGE_STATES.get(table.storage_state, ""),
            storage_reason=table.storage_reason,
            created=table.created,
            law=table.law,
            episodes_not_sampled=table.episodes_not_sampled,
            rate=rate_of_message(table.rate) if table.HasField("rate") else None,
        )
        for table in tables
    }


def load_results_of(message: bytes, keys: list[EpisodeKey]) -> tuple[list[EpisodeResult], Counts]:
    """Returns the results in a LoadEpisodesResponse for the episodes of these keys, in the order in which they were sent.

    Raises:
        ServerError: the response has more or fewer results.
    """
    response = pb.LoadEpisodesResponse.FromString(message)
    if len(response.results) != len(keys):
        raise ServerError(f"load: {len(response.results)} results, expected {len(keys)}, one an episode")
    results = []
    for key, result in zip(keys, response.results, strict=True):
        if result.outcome in _STORED:
            duplicate = result.outcome == pb.EpisodeResult.OUTCOME_DUPLICATE
            results.append(EpisodeResult(key, result.episode_id, duplicate))
        else:
            kind = _ERROR_OF_OUTCOME.get(result.outcome, ServerError)
            results.append(EpisodeResult(key, error=kind(escape(result.reason) or f"refused with outcome {result.outcome}")))
    return results, counts_of(response.counts)
