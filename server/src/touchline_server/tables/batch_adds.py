"""Batches of episodes for one table: from arrays or tensors [episodes, T, ...] to a block of the store, or to episodes one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from touchline_protos.codec import EpisodeKey
from touchline_protos.types.episode_batch import flatten_batch, is_tensor, to_host
from touchline_protos.types.flatten import ColumnError
from touchline_server.errors import InvalidEpisodeError, OverLimitError, ReplayError
from touchline_server.store.episode_block import EpisodeBlock, Origin, host_block
from touchline_server.store.inserts import Stored
from touchline_server.tables.table import Table


class EpisodeBatch(NamedTuple):
    """Episodes as they were given, checked to fit each other."""

    columns: Mapping[str, Any]
    """Column by dotted name, [episodes, T, ...]: arrays, or tensors on any device."""
    lengths: Sequence[int]
    """Rows of each episode."""
    origins: Sequence[Origin]
    """The actor, policy version and key of each episode."""

    @property
    def steps(self) -> int:
        """Rows of all episodes."""
        return sum(self.lengths)


def read_batch(
    batch: Any, lengths: Any, *, actor: str | Sequence[str], policy_version: int, keys: Sequence[EpisodeKey] | None
) -> EpisodeBatch:
    """Returns a batch of episodes, of which shapes and lengths are checked.

    Raises:
        InvalidEpisodeError: something does not fit; the message names it.
    """
    try:
        columns, checked = flatten_batch(batch, lengths)
    except ColumnError as error:
        raise InvalidEpisodeError(str(error)) from None
    count = len(checked)
    actors = [actor] * count if isinstance(actor, str) else list(actor)
    for name, given in (("actor", actors), ("keys", keys)):
        if given is not None and len(given) != count:
            raise InvalidEpisodeError(f"{name}: {len(given)}, expected {count}, one for each episode")
    of_each = [None] * count if keys is None else keys
    return EpisodeBatch(columns, checked, [Origin(name, policy_version, key) for name, key in zip(actors, of_each, strict=True)])


def add_batch(
    table: Table, td: Any, lengths: Any, *, actor: str | Sequence[str], policy_version: int, keys: Sequence[EpisodeKey] | None
) -> None:
    """Stores a batch of episodes; see :meth:`touchline_server.ReplayBuffer.add_batch`.

    Raises:
        InvalidEpisodeError: an episode is malformed or does not fit the schema; the message says which.
        ReplayError: as :meth:`Table.add`.
    """
    table.check_restored()
    with _counting_refused(table):
        batch = read_batch(td, lengths, actor=actor, policy_version=policy_version, keys=keys)
        if max(batch.lengths) > table.store.capacity:
            raise InvalidEpisodeError(f"{max(batch.lengths)} rows, expected at most the buffer's capacity of {table.store.capacity}")
    if not table.limiter.reserve_insert(batch.steps):
        raise OverLimitError(f"the rate limit holds adds back: {table.limiter.explain_adds()}")
    stored: list[Stored | Exception] = []
    try:
        if table.committer is None and all(origin.key is None for origin in batch.origins):
            with _counting_refused(table), table.store.writes.lock:
                for part in _block(table, batch).parts(table.store.capacity):
                    stored += table.store.writes.add_block(part)
        else:
            stored += _submit_each(table, batch)
    finally:
        added = sum(
            length for length, outcome in zip(batch.lengths, stored, strict=False) if isinstance(outcome, Stored) and not outcome.duplicate
        )
        if added:
            table.limiter.inserted(added)
        if added < batch.steps:
            table.limiter.cancel_insert(batch.steps - added)
    for number, outcome in enumerate(stored):
        if isinstance(outcome, InvalidEpisodeError):
            raise InvalidEpisodeError(f"episode {number}: {outcome}")
        if isinstance(outcome, Exception):
            raise outcome


@contextmanager
def _counting_refused(table: Table) -> Iterator[None]:
    """Counts a batch that the block refuses as one refused episode."""
    try:
        yield
    except InvalidEpisodeError as error:
        table.store.count_refused(str(error))
        raise


def _block(table: Table, batch: EpisodeBatch) -> EpisodeBlock:
    """Returns a block on the device of the tensors if the columns may be on it too, otherwise in host memory."""
    columns = table.store.columns
    if all(map(is_tensor, batch.columns.values())) and (columns is None or columns.on_cuda):
        from touchline_server.store.device_block import common_device, device_block

        device = common_device(batch.columns)
        if device is not None and (columns is None or columns.takes(device)):
            incoming, allowed = table.store.incoming, table.config.storage.allow_non_finite
            try:
                return device_block(batch.columns, batch.lengths, batch.origins, incoming=incoming, allow_non_finite=allowed)
            except ColumnError as error:
                raise InvalidEpisodeError(str(error)) from None
    return _host_block(batch)


def _host_block(batch: EpisodeBatch) -> EpisodeBlock:
    try:
        return host_block(to_host(batch.columns), batch.lengths, batch.origins)
    except ColumnError as error:
        raise InvalidEpisodeError(str(error)) from None


def _submit_each(table: Table, batch: EpisodeBatch) -> list[Stored | Exception]:
    """Stores each episode by itself: a key or a journal needs its bytes. Returns their outcomes when all are as durable as configured."""
    pending: list[Stored | Exception | Future[Stored]] = []
    for request in _host_block(batch).requests:
        try:
            pending.append(table.store.submit(request.episode))
        except ReplayError as error:
            pending.append(error)
    outcomes: list[Stored | Exception] = []
    for answer in pending:
        try:
            outcomes.append(answer.result() if isinstance(answer, Future) else answer)
        except ReplayError as error:
            outcomes.append(error)
    return outcomes
