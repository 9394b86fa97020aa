"""Load episodes from a source into a server, each exactly once however often the load is started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from touchline._actor.episode_factory import make_episode
from touchline._actor.refusal_summary import RefusalSummary, add_refusal
from touchline._rpc.convert import check_actor, whole_number
from touchline.client import ReplayClient
from touchline.datasets.errors import DatasetError
from touchline.datasets.formats import open_source
from touchline.datasets.read_ahead import ReadAhead
from touchline.datasets.renamed_arguments import renamed_arguments
from touchline.datasets.size_limit import SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest, Source
from touchline.datasets.transforms import ColumnTransforms
from touchline.errors import EpisodeResult, InvalidEpisodeError, TouchlineError
from touchline.types import ColumnInfo
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types import rules
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.limits import DEFAULT_MAX_EPISODE_BYTES

CALL_BYTES = 32 << 20
"""Payload of one call, and of the episodes read ahead meanwhile; so about twice this is in memory. Progress is reported once a call."""
READERS_VERSION = 1
"""Part of every key. Raise it when a reader derives other columns from the same file, because those are other episodes."""
_INT64_MAX = (1 << 63) - 1


@dataclass(slots=True)
class LoadReport:
    """Outcome of a load's episodes so far. ``read == stored + duplicates + refused`` at any moment."""

    read: int = 0
    """Episodes read from the source and answered by the server."""
    stored: int = 0
    """Episodes that this load stored."""
    duplicates: int = 0
    """Episodes stored earlier under the same key, for example by an interrupted load, even if they have been evicted since."""
    refused: int = 0
    """Episodes not stored: malformed, or not of the table's schema."""
    steps: int = 0
    """Rows of the episodes that were stored or are duplicates."""
    size_bytes: int = 0
    """Payload of all episodes sent, in bytes."""
    reasons: dict[str, RefusalSummary] = field(default_factory=dict)
    """Refusals by reason. A reason is an error message with its numbers replaced by ``#``."""

    def refuse(self, position: int, error: Exception) -> None:
        """Counts the episode at ``position`` as refused."""
        self.read += 1
        self.refused += 1
        add_refusal(self.reasons, position, str(error))


ProgressCallback = Callable[[str, int, int, LoadReport], None]
"""Called with the stage (``"fingerprint"``, ``"load"`` or ``"read"``), the amount done, its total, and the report so far.

The amounts are bytes for ``"fingerprint"`` and episodes for the others.
"""


@renamed_arguments(changes="transforms", again="reload_label", watch="progress")
def load(
    client: ReplayClient,
    source: str,
    *,
    format: str | None = None,
    table: str | None = None,
    actor: str | None = None,
    transforms: ColumnTransforms | None = None,
    first: int = 0,
    limit: int | None = None,
    reload_label: str = "",
    infos: bool = False,
    trust_pickle: bool = False,
    max_episode_bytes: int | None = None,
    progress: ProgressCallback | None = None,
) -> LoadReport:
    """Stores the episodes of a file, a folder or a Minari data set. An episode that is refused does not stop the others.

    Every episode has a key, so starting an interrupted load again stores nothing twice. An exported episode keeps the key it was stored
    under, unless it is transformed or reloaded; otherwise the key derives from the content of the source, the transforms and the
    episode's position. So a renamed file is the same source, and an edited file is a new one.

    Args:
        client: client of the server to store on.
        source: a path, or ``minari:<id>``.
        format: ``tdmpc2``, ``minari``, ``hdf5`` or ``npz``; None derives it from ``source``.
        table: table to store the episodes in; None takes the client's.
        actor: name of the actor to store the episodes under; None takes the source's, or else the client's.
        transforms: what to do to the columns; None stores them as they are.
        first: position of the first episode to store, from 0.
        limit: maximum number of episodes to store; None stores all.
        reload_label: if not empty, episodes that were stored before are stored again, once for each label.
        infos: whether the arrays among Minari's infos become columns ``info.<name>``.
        trust_pickle: whether to unpickle arbitrary objects in a ``.pt`` file. Doing so runs any code that the file contains.
        max_episode_bytes: maximum payload of an episode as stored; larger ones are refused before memory is allocated for them. None is
            the server's limit.
        progress: called about every 32 MiB, in this thread.

    Returns:
        The number of episodes stored, recognised as duplicates, and refused, with the reasons.

    Raises:
        DatasetError: the source cannot be read, or its row convention differs from the server's.
        UnavailableError, DeadlineError: a call failed. Everything acknowledged until then is stored; load again to continue.
        InvalidArgumentError: an argument is out of range.
    """
    if actor is not None:
        check_actor(actor)
    with closing(open_source(source, format=format, trust_pickle=trust_pickle, infos=infos)) as opened:
        info = client.info(table=table)
        incoming = check_convention(source, opened, info.row_convention)
        transforms = transforms or ColumnTransforms()
        size_limit = SizeLimit(info.max_episode_bytes if max_episode_bytes is None else max_episode_bytes, transforms)
        total = _count_selected(opened, first, limit)
        episodes = islice(opened.episodes(first, incoming=incoming, limit=size_limit), total)
        run = _LoadRun(client, opened, transforms, table=table, actor=actor, reload_label=reload_label, total=total, progress=progress)
        return run.send(_transform(episode, transforms) for episode in episodes)


@renamed_arguments(changes="transforms", watch="progress")
def inspect(
    source: str,
    *,
    format: str | None = None,
    transforms: ColumnTransforms | None = None,
    first: int = 0,
    limit: int | None = None,
    infos: bool = False,
    trust_pickle: bool = False,
    max_episode_bytes: int | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[LoadReport, dict[str, ColumnInfo]]:
    """Reads what :func:`load` would send and checks it, without a server.

    Refuses episodes that differ in their columns from the first valid one, and those that every server refuses: without a required column,
    for example, or with values that are not finite.

    Args:
        source: a path, or ``minari:<id>``.
        format: the same as for :func:`load`; so are the arguments that follow.
        transforms: what to do to the columns.
        first: position of the first episode.
        limit: maximum number of episodes.
        infos: whether the arrays among Minari's infos become columns.
        trust_pickle: whether to unpickle arbitrary objects.
        max_episode_bytes: maximum payload of an episode as stored; None is 1 GiB, a server's default.
        progress: called after each episode, in this thread.

    Returns:
        The report, whose ``stored`` counts what could be stored, and the dtype and shape of one row of each column, as in the first valid
        episode.

    Raises:
        DatasetError: the source cannot be read.
    """
    with closing(open_source(source, format=format, trust_pickle=trust_pickle, infos=infos)) as opened:
        report, schema = LoadReport(), dict[str, ColumnInfo]()
        total = _count_selected(opened, first, limit)
        transforms = transforms or ColumnTransforms()
        size_limit = SizeLimit(DEFAULT_MAX_EPISODE_BYTES if max_episode_bytes is None else max_episode_bytes, transforms)
        incoming = opened.row_convention != "outgoing"
        for read in islice(opened.episodes(first, incoming=incoming, limit=size_limit), total):
            made = _make(_transform(read, transforms), EpisodeKey("inspect", 0, read.position), read.actor)
            if isinstance(made, Episode):
                report.size_bytes += made.size_bytes
                columns = {name: ColumnInfo(dtype_name(column.dtype), column.shape[1:]) for name, column in made.columns.items()}
                error = (_difference(schema, columns) if schema else None) or _broken_rule(made, first=not schema, incoming=incoming)
                if error is None:
                    schema = schema or columns
                    report.read += 1
                    report.stored += 1
                    report.steps += made.length
                else:
                    report.refuse(read.position, error)
            else:
                report.refuse(read.position, made)
            if progress is not None:
                progress("read", report.read, total, report)
        return report, schema


class _LoadRun:
    """One load: gives episodes their keys, sends them, and keeps the report. For one thread.

    Args:
        client: client of the server to store on.
        source: origin of the episodes; read for its fingerprint when the first key is needed.
        transforms: what was done to the columns.
        table: table to store them in; None takes the client's.
        actor: name to store the episodes under; None takes each episode's own, or else the client's.
        reload_label: label that gives the same episodes new keys; empty for the first load.
        total: number of episodes to send.
        progress: the caller's callback, or None.
    """

    def __init__(
        self,
        client: ReplayClient,
        source: Source,
        transforms: ColumnTransforms,
        *,
        table: str | None,
        actor: str | None,
        reload_label: str,
        total: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._client = client
        self._source = source
        self._transforms = transforms
        self._table = table
        self._actor = actor
        self._reload_label = reload_label
        self._total = total
        self._progress = progress
        self._report = LoadReport()
        self._unanswered: list[tuple[int, int]] = []  # position and rows of each episode sent, oldest first

    def send(self, episodes: Iterable[DatasetEpisode]) -> LoadReport:
        """Sends all episodes and returns the report."""
        self._report_progress("load", 0, self._total)
        with ReadAhead(episodes, size_of=_size_of, max_bytes=CALL_BYTES) as ahead:
            for results in self._client.deliver_all(self._keyed(ahead), table=self._table, max_bytes=CALL_BYTES):
                self._account(results)
                self._report_progress("load", self._report.read, self._total)
        return self._report

    def _keyed(self, episodes: Iterable[DatasetEpisode]) -> Iterator[tuple[EpisodeKey, Episode | TouchlineError]]:
        """Yields each episode, or the reason why it cannot be sent, with its key."""
        for read in episodes:
            # A transformed or reloaded episode is another one than the source's, so it cannot keep that one's key.
            own = read.key if not self._transforms and not self._reload_label else None
            key = EpisodeKey(*self._sender, read.position) if own is None else own
            made = _make(read, key, self._actor_of(read))
            rows, size_bytes = (made.length, made.size_bytes) if isinstance(made, Episode) else (0, 0)
            self._unanswered.append((read.position, rows))
            self._report.size_bytes += size_bytes
            yield key, made

    @cached_property
    def _sender(self) -> tuple[str, int]:
        """Client id and incarnation of the keys. Reads the whole source, so only when an episode has no key of its own."""
        sender = sender_of(
            self._source,
            self._transforms,
            reload_label=self._reload_label,
            progress=lambda done, total: self._report_progress("fingerprint", done, total),
        )
        self._report_progress("load", self._report.read, self._total)
        return sender

    def _actor_of(self, read: DatasetEpisode) -> str:
        if self._actor is not None:
            return self._actor
        return read.actor or self._client.actor

    def _account(self, results: Iterable[EpisodeResult]) -> None:
        """Counts the answers to the oldest episodes sent. An episode may already have been read for the next call; it stays unanswered."""
        answered = 0
        for (position, steps), result in zip(self._unanswered, results, strict=False):
            answered += 1
            if result.error is not None:
                self._report.refuse(position, result.error)
                continue
            self._report.read += 1
            self._report.steps += steps
            self._report.duplicates += result.duplicate
            self._report.stored += not result.duplicate
        del self._unanswered[:answered]

    def _report_progress(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total, self._report)


def sender_of(source: Source, transforms: ColumnTransforms, *, reload_label: str, progress: Callable[[int, int], None]) -> tuple[str, int]:
    """Returns the client id and the incarnation of a source's keys. Reads the whole source.

    The client id is a hash of the source's content and the transforms, the incarnation a hash of the label, so the same load always has
    the same keys.

    Args:
        source: origin of the episodes.
        transforms: what is done to their columns.
        reload_label: distinguishes deliberate reloads; empty for the first load.
        progress: called with the number of bytes read and their total.
    """
    size_bytes = source.size_bytes
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, size_bytes)

    progress(0, size_bytes)
    digest = Digest(add)
    digest.add(f"{source.format} {READERS_VERSION} {transforms.identity}".encode())
    source.fingerprint(digest)
    label = Digest(lambda _: None)
    label.add(reload_label.encode())
    # 15 hexadecimal digits, 60 bits, are the longest that fit an int64 whatever the digits.
    return f"dataset-{source.format}-{digest.hex()}", int(label.hex()[:15], 16) if reload_label else 0


def check_convention(name: str, source: Source, convention: str) -> bool:
    """Returns whether rows are to be read under the convention ``incoming``.

    Args:
        name: the source's name, for the message.
        source: the open source.
        convention: the server's row convention.

    Raises:
        DatasetError: the source's rows are stored under the other convention.
    """
    found = source.row_convention
    if found is not None and found != convention:
        raise DatasetError(
            f"{name}: row convention {found!r}, expected {convention!r} as configured on the server (sampling.row_convention); "
            "load it into a server with the same convention"
        )
    return convention == "incoming"


def _transform(read: DatasetEpisode, transforms: ColumnTransforms) -> DatasetEpisode:
    """Returns an episode with its columns flat and transformed, or with the reason why they cannot be."""
    if read.error is not None:
        return read
    try:
        return replace(read, columns=transforms.apply(read.columns))
    except TouchlineError as error:
        return replace(read, columns={}, error=error)


def _size_of(read: DatasetEpisode) -> int:
    return sum(column.nbytes for column in read.columns.values())


def _make(read: DatasetEpisode, key: EpisodeKey, actor: str) -> Episode | TouchlineError:
    """Returns the episode to send, or the reason why it cannot be sent."""
    if read.error is not None:
        return read.error
    try:
        return make_episode(read.columns, key=key, actor=check_actor(actor), policy_version=read.policy_version)
    except TouchlineError as error:
        return error


def _difference(schema: Mapping[str, ColumnInfo], columns: Mapping[str, ColumnInfo]) -> InvalidEpisodeError | None:
    """Returns the first column in which an episode differs from the schema, as an error; None if there is none."""
    for name in [*schema, *columns]:
        if schema.get(name) != columns.get(name):
            return InvalidEpisodeError(
                f"{name}: {_describe(columns.get(name))}, expected {_describe(schema.get(name))} as in the first episode"
            )
    return None


def _broken_rule(episode: Episode, *, first: bool, incoming: bool) -> InvalidEpisodeError | None:
    """Returns why a server with the default configuration would refuse an episode, or None if it would accept it."""
    try:
        rules.check_episode(episode.columns)
        if first:
            rules.check_columns(episode.columns)
            rules.check_done_name(episode.columns)
        rules.check_finite(episode.columns, incoming=incoming)
    except ColumnError as error:
        return InvalidEpisodeError(str(error))
    return None


def _describe(column: ColumnInfo | None) -> str:
    return "no such column" if column is None else f"{column.dtype} {column.shape}"


def _count_selected(source: Source, first: int, limit: int | None) -> int:
    """Returns the number of episodes that ``first`` and ``limit`` select.

    Raises:
        InvalidArgumentError: one of them is out of range.
    """
    whole_number("first", first, least=0, most=_INT64_MAX)
    left = max(len(source) - first, 0)
    return left if limit is None else min(left, whole_number("limit", limit, least=0, most=_INT64_MAX))
