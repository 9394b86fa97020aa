"""Messages without tensors: generated protobuf classes to and from the domain's values, and checks of what requests contain."""

from __future__ import annotations

import math
import tomllib
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from touchline_protos import PROTOCOL_VERSION, Counts
from touchline_protos.codec import CodecError, EpisodeKey, OversizeError
from touchline_protos.codec.status import rate_to_message
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.dtypes import to_numpy, to_wire
from touchline_protos.types.mix import WHEN_EMPTY
from touchline_protos.types.priorities import PriorityUpdate, check_priorities
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.durability.storage_state import StorageState
from touchline_server.errors import (
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    ReplayError,
    TooLargeError,
)
from touchline_server.selectors.options import NO_OPTIONS, LawOptions
from touchline_server.selectors.registry import LAWS
from touchline_server.service.grpc_status import shorten
from touchline_server.service.table_report import rate_info
from touchline_server.store.inserts import Stored
from touchline_server.store.reader import EpisodeQuery
from touchline_server.tables.mix_sampler import MixSpec
from touchline_server.tables.ranks import Rank
from touchline_server.tables.table import Table

_LAW_OF: dict[int, str | None] = {pb.LAW_UNSPECIFIED: None} | {pb.Law.Value(f"LAW_{law.upper()}"): law for law in LAWS}

_WHEN_EMPTY_OF: dict[int, str] = {pb.WHEN_EMPTY_UNSPECIFIED: "wait"} | {
    pb.WhenEmpty.Value(f"WHEN_EMPTY_{rule.upper()}"): rule for rule in WHEN_EMPTY
}

_PAD_OF: dict[int, str | None] = {pb.PAD_UNSPECIFIED: None, pb.PAD_NONE: "none", pb.PAD_END: "end"}

_OUTCOME_OF: dict[type[Exception], pb.EpisodeResult.Outcome] = {
    OversizeError: pb.EpisodeResult.OUTCOME_TOO_LARGE,
    CodecError: pb.EpisodeResult.OUTCOME_INVALID,
    InvalidEpisodeError: pb.EpisodeResult.OUTCOME_INVALID,
    KeyConflictError: pb.EpisodeResult.OUTCOME_KEY_CONFLICT,
    TooLargeError: pb.EpisodeResult.OUTCOME_TOO_LARGE,
}
"""The outcome for each error that is the episode's own fault; the first class that fits counts."""

_STORAGE_STATE_OF: dict[StorageState, pb.StorageState] = {
    StorageState.OK: pb.STORAGE_STATE_OK,
    StorageState.FULL: pb.STORAGE_STATE_FULL,
    StorageState.FAILED: pb.STORAGE_STATE_FAILED,
}

_COUNTS = [field.name for field in fields(Counts)]

M = TypeVar("M", bound=Message)

MAX_STREAM_REQUEST_BYTES = 1 << 16
"""Size of the largest message from a learner on a sampling stream, which may keep it for as long as it lasts."""

MAX_WAIT_S = 3600.0
"""Longest time for which a call may wait for the store to fill."""


def serialize(message: Message) -> bytes:
    """Returns a message as bytes."""
    return message.SerializeToString()


def parse(kind: type[M], data: bytes) -> M:
    """Returns the message that the bytes encode.

    Raises:
        InvalidArgumentError: the bytes are not a message of this type.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidArgumentError(f"{len(data)} bytes that are not a message, expected one of type {kind.DESCRIPTOR.name}") from None


async def parse_all(kind: type[M], stream: AsyncIterator[bytes]) -> AsyncIterator[M]:
    """Yields the messages of a stream as they arrive.

    Raises:
        InvalidArgumentError: as :func:`parse`, or a message is larger than :data:`MAX_STREAM_REQUEST_BYTES`.
    """
    async for data in stream:
        if len(data) > MAX_STREAM_REQUEST_BYTES:
            raise InvalidArgumentError(f"a message of {len(data)} bytes on the stream, expected at most {MAX_STREAM_REQUEST_BYTES}")
        yield parse(kind, data)


def checked_wait(wait_s: float) -> float:
    """Returns the time for which a call may wait; raises InvalidArgumentError if it is out of range."""
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidArgumentError(f"wait_s: {wait_s}, expected 0 to {MAX_WAIT_S:.0f} seconds")
    return wait_s


def counts(values: Counts) -> pb.Counts:
    """Returns the counts of a table as a message."""
    return pb.Counts(**{name: getattr(values, name) for name in _COUNTS})


def key(episode_key: EpisodeKey | None) -> pb.EpisodeKey | None:
    """Returns an episode's key as a message."""
    if episode_key is None:
        return None
    return pb.EpisodeKey(client_id=episode_key.client_id, incarnation=episode_key.incarnation, sequence=episode_key.sequence)


def acceptance(episode_key: EpisodeKey | None, stored: Stored) -> pb.EpisodeResult:
    """Returns the result of a loaded episode that is stored."""
    outcome = pb.EpisodeResult.OUTCOME_DUPLICATE if stored.duplicate else pb.EpisodeResult.OUTCOME_ACCEPTED
    return pb.EpisodeResult(key=key(episode_key), outcome=outcome, episode_id=stored.episode_id)


def refusal(episode_key: EpisodeKey | None, error: CodecError | ReplayError) -> pb.EpisodeResult:
    """Returns the result of a loaded episode that was refused.

    Raises:
        CodecError, ReplayError: ``error`` itself if it is not the episode's own fault, so that it ends the call.
    """
    for kind, outcome in _OUTCOME_OF.items():
        if isinstance(error, kind):
            return pb.EpisodeResult(key=key(episode_key), outcome=outcome, episode_id=-1, reason=shorten(str(error)))
    raise error


def law(number: int) -> str | None:
    """Returns the name of a law; None if the request leaves it to the configuration.

    Raises:
        InvalidArgumentError: the number is unknown.
    """
    try:
        return _LAW_OF[number]
    except KeyError:
        raise InvalidArgumentError(f"law: number {number}, expected one of {sorted(_LAW_OF)}") from None


def law_options(request: pb.SampleRequest) -> LawOptions:
    """Returns a request's parameters of its law."""
    given = {field.name: value for field, value in request.law_options.ListFields()}
    return LawOptions(**given) if given else NO_OPTIONS


def priority_update(request: pb.UpdatePrioritiesRequest) -> PriorityUpdate:
    """Returns the priorities in a request.

    Raises:
        InvalidArgumentError: a tensor is malformed, or a number out of range.
    """
    try:
        update = check_priorities(*(_array(name, getattr(request, name)) for name in ("episode_id", "start", "priorities")))
    except ColumnError as error:
        raise InvalidArgumentError(str(error)) from None
    return update._replace(store_generation=request.store_generation)


def mix(request: pb.SampleRequest) -> MixSpec | None:
    """Returns a request's mix; None if it is about one table.

    Raises:
        InvalidArgumentError: the mix is not one, or the request names a table as well.
    """
    if not request.mix:
        if request.when_empty:
            raise InvalidArgumentError("when_empty: given without a mix, expected it only with one")
        return None
    if request.table:
        raise InvalidArgumentError(f"table: {request.table!r} and a mix, expected one of them")
    if request.when_empty not in _WHEN_EMPTY_OF:
        raise InvalidArgumentError(f"when_empty: number {request.when_empty}, expected one of {sorted(_WHEN_EMPTY_OF)}")
    return MixSpec.of([(share.table, share.share) for share in request.mix], _WHEN_EMPTY_OF[request.when_empty])


def rank(request: pb.SampleRequest) -> Rank | None:
    """Returns the rank of the learner in its job; None if it has none.

    Raises:
        InvalidArgumentError: a number is out of range, or the request does not fit a job.
    """
    if not request.HasField("learner_rank"):
        return None
    given = request.learner_rank
    if request.when_empty == pb.WHEN_EMPTY_OTHERS:
        raise InvalidArgumentError("when_empty: 'others' with a rank, expected 'wait': the parts of the ranks would differ in their shares")
    return Rank.of(given.rank, given.world_size, given.job, given.first_batch if given.HasField("first_batch") else None)


def asked_of_all_ranks(request: pb.SampleRequest) -> dict[str, object]:
    """Returns what the ranks of a job must agree about, by name; what a request leaves out is not in it."""
    asked: dict[str, object] = {"world_size": request.learner_rank.world_size}
    for field, value in request.ListFields():
        if field.name == "law":
            asked["law"] = law(value)
        elif field.name == "pad":
            asked["pad"] = pad(value)
        elif field.name == "mix":
            asked["mix"] = {share.table: share.share for share in value}
        elif field.name == "law_options":
            asked |= {option.name: number for option, number in value.ListFields()}
        elif field.name in ("batch_size", "horizon", "seed"):
            asked[field.name] = value
    return asked


def pad(number: int) -> str | None:
    """Returns how slices are padded; None if the request leaves it to the configuration.

    Raises:
        InvalidArgumentError: the number is unknown.
    """
    try:
        return _PAD_OF[number]
    except KeyError:
        raise InvalidArgumentError(f"pad: number {number}, expected one of {sorted(_PAD_OF)}") from None


def query(request: pb.GetEpisodesRequest) -> EpisodeQuery:
    """Returns which episodes a request selects.

    Raises:
        InvalidArgumentError: its selectors cannot be combined, or are out of range.
    """

    def given(name: str) -> Any:
        return getattr(request, name) if request.HasField(name) else None

    return EpisodeQuery(
        ids=tuple(request.episode_ids) or None,
        first=given("first_episode_id"),
        last=given("last_episode_id"),
        actor=given("actor"),
        newest=given("newest"),
        columns=tuple(request.columns),
        skip_missing=request.skip_missing,
    )


def _array(name: str, tensor: pb.Tensor) -> np.ndarray:
    """Returns a small tensor as a view of its bytes; raises InvalidArgumentError if it is malformed."""
    expected = pb.DTYPE_FLOAT32 if name == "priorities" else pb.DTYPE_INT64
    if tensor.dtype != expected:
        raise InvalidArgumentError(f"{name}: dtype number {tensor.dtype}, expected {pb.DType.Name(expected)}")
    dtype, shape = to_numpy(expected), tuple(tensor.shape)
    size = math.prod(shape) * dtype.itemsize
    if len(shape) > 2 or any(extent < 0 for extent in shape) or size != len(tensor.data):
        raise InvalidArgumentError(f"{name}: {len(tensor.data)} bytes of data for {dtype.name} of shape {shape}, expected {size}")
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def info(table: Table, tables: Sequence[pb.TableInfo]) -> pb.InfoResponse:
    """Returns the description of the server and one table; ``tables`` are all that the caller may use."""
    from touchline_server import __version__

    columns = table.store.columns
    specs = columns.schema.columns if columns is not None else ()
    described = table_info(table, created=False)
    return pb.InfoResponse(
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        config_toml=described.config_toml,
        columns=[pb.ColumnSpec(name=spec.name, dtype=int(to_wire(spec.dtype)), shape=spec.shape) for spec in specs],  # type: ignore[arg-type]
        device=described.device,
        size_bytes=described.size_bytes,
        capacity=described.capacity,
        max_message_bytes=table.config.limits.max_message_bytes,
        counts=described.counts,
        storage_state=described.storage_state,
        storage_reason=described.storage_reason,
        tables=tables,
        rate=described.rate if described.HasField("rate") else None,
        episodes_not_sampled=described.episodes_not_sampled,
    )


def table_info(table: Table, *, created: bool, with_config: bool = True) -> pb.TableInfo:
    """Returns the description of a table.

    Args:
        table: the table.
        created: whether it was created at run time.
        with_config: whether to include its configuration, which is most of the message.
    """
    columns, monitor = table.store.columns, table.storage_monitor
    return pb.TableInfo(
        table=table.name,
        config_toml=table.config.to_toml() if with_config else "",
        counts=counts(table.counts()),
        capacity=table.store.capacity,
        device=columns.where if columns is not None else "",
        size_bytes=columns.size_bytes if columns is not None else 0,
        storage_state=_STORAGE_STATE_OF[monitor.state] if monitor is not None else pb.STORAGE_STATE_UNSPECIFIED,
        storage_reason=monitor.reason if monitor is not None else "",
        created=created,
        law=table.config.sampling.law,
        episodes_not_sampled=table.episodes_not_sampled(),
        rate=rate_to_message(rate_info(table.rate.status())) if table.rate.active else None,
    )


def table_keys(config_toml: str) -> dict[str, Any]:
    """Returns the keys of a table from their TOML. Only their syntax is checked.

    Raises:
        InvalidArgumentError: the text is not TOML.
    """
    try:
        return tomllib.loads(config_toml)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"config_toml: not valid TOML: {error}") from None
