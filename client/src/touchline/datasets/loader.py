"""From a source to a server, each episode exactly once however often the load is started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

from touchline._actor.rejections import Refusals, add_refusal
from touchline._actor.upload import make_episode
from touchline._rpc.convert import check_actor, whole_number
from touchline.client import ReplayClient
from touchline.datasets.errors import DatasetError
from touchline.datasets.formats import open_source
from touchline.datasets.read_ahead import ReadAhead
from touchline.datasets.size_limit import DEFAULT_MAX_EPISODE_BYTES, SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest, Source
from touchline.datasets.transforms import Changes
from touchline.errors import EpisodeResult, InvalidEpisodeError, TouchlineError
from touchline.types import ColumnInfo
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types import rules
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.dtypes import dtype_name

CALL_BYTES = 32 << 20
"""Payload of one call, and of what is read while it is under way: twice that is in memory. How often progress is told."""
READERS_VERSION = 1
"""Goes up when a reader makes other columns of the same file: those are other episodes, with other keys."""


@dataclass(slots=True)
class LoadReport:
    """What became of the episodes of a load so far. Always ``read == stored + duplicates + refused``."""

    read: int = 0
    """Episodes that were read and answered."""
    stored: int = 0
    """Of these, stored by this load."""
    duplicates: int = 0
    """Of these, stored before under the same key (by an earlier, interrupted load, say); not again, also where evicted since."""
    refused: int = 0
    """Of these, not stored: malformed, or not of the table's schema."""
    steps: int = 0
    """Rows of those that were stored or are duplicates."""
    size_bytes: int = 0
    """Payload of all that were sent."""
    reasons: dict[str, Refusals] = field(default_factory=dict)
    """Why, by the message with ``#`` for its numbers."""

    def refuse(self, position: int, error: Exception) -> None:
        """Counts an episode that was refused."""
        self.read += 1
        self.refused += 1
        add_refusal(self.reasons, position, str(error))


Watch = Callable[[str, int, int, LoadReport], None]
"""Called as a load goes on: what it does (``"fingerprint"``: bytes, ``"load"``: episodes), how much is done, how much there is."""


def load(
    client: ReplayClient,
    source: str,
    *,
    format: str | None = None,
    actor: str | None = None,
    changes: Changes | None = None,
    first: int = 0,
    limit: int | None = None,
    again: str = "",
    infos: bool = False,
    trust_pickle: bool = False,
    max_episode_bytes: int | None = None,
    watch: Watch | None = None,
) -> LoadReport:
    """Stores the episodes of a file, folder or Minari data set, and returns what became of them. Refusing one does not stop the others.

    An episode's key is the one that it was exported with, where the source has it and nothing is changed; else it is made of the content
    of the source, the changes and the episode's position. So a load that was interrupted is simply started again, and a file that was
    renamed is still the same; a file that was changed is another source, whose episodes are all new.

    Args:
        client: of the server.
        source: a path, or ``minari:<id>``.
        format: ``tdmpc2``, ``minari``, ``hdf5`` or ``npz``; None goes by the name.
        actor: who played the episodes; None takes what the source says, else the client's.
        changes: to the columns. None changes nothing.
        first: position of the first episode to store.
        limit: most episodes to store; None stores all.
        again: a label that makes the same episodes new ones, to store them once more on purpose: once for each label.
        infos: the arrays of Minari's infos become columns ``info.<name>``.
        trust_pickle: unpickle anything that a ``.pt`` file holds. That runs whatever code is in it.
        max_episode_bytes: an episode that announces more, as it would be stored, is refused before memory is taken for it. None: the
            server's own limit, ``limits.max_episode_bytes``.
        watch: told how far it is.

    Raises:
        DatasetError: the source cannot be read, or its rows are in another convention than the server's.
        UnavailableError, DeadlineError: a call failed. What was answered before is stored; start it again.
        InvalidArgumentError: an argument out of range.
    """
    with closing(open_source(source, format=format, trust_pickle=trust_pickle, infos=infos)) as opened:
        info = client.info()
        incoming = check_convention(source, opened, info.row_convention)
        changes = changes or Changes()
        size_limit = SizeLimit(info.max_episode_bytes if max_episode_bytes is None else max_episode_bytes, changes)
        report = LoadReport()
        total = _total(opened, first, limit)

        def told(stage: str, done: int, of: int) -> None:
            if watch is not None:
                watch(stage, done, of, report)

        @cache
        def sender() -> tuple[str, int]:
            sender = sender_of(opened, changes, again, lambda done, of: told("fingerprint", done, of))
            told("load", report.read, total)
            return sender

        told("load", 0, total)
        sent: list[tuple[int, int]] = []

        def items() -> Iterator[tuple[EpisodeKey, Episode | TouchlineError]]:
            for read in ahead:
                own = read.key if not changes and not again else None
                key = EpisodeKey(*sender(), read.position) if own is None else own
                made = _make(read, key, client.actor if actor is None else actor, actor is None)
                sent.append((read.position, made.length if isinstance(made, Episode) else 0))
                report.size_bytes += made.size_bytes if isinstance(made, Episode) else 0
                yield key, made

        read_episodes = (_changed(read, changes) for read in islice(opened.episodes(first, incoming=incoming, limit=size_limit), total))
        with ReadAhead(read_episodes, size_of=_size_of, max_bytes=CALL_BYTES) as ahead:
            for results in client.deliver_all(items(), max_bytes=CALL_BYTES):
                _account(report, results, sent)
                told("load", report.read, total)
        return report


def survey(
    source: str,
    *,
    format: str | None = None,
    changes: Changes | None = None,
    first: int = 0,
    limit: int | None = None,
    infos: bool = False,
    trust_pickle: bool = False,
    max_episode_bytes: int | None = None,
    watch: Watch | None = None,
) -> tuple[LoadReport, dict[str, ColumnInfo]]:
    """Reads what :func:`load` would send, without a server, and returns what it found: nothing is stored, ``stored`` is what could be.

    Args:
        source: and all others: as for :func:`load`; without a server that says its limit, ``max_episode_bytes`` is 1 GiB.

    Returns:
        The report, and dtype and shape of each column of a row, as in the first episode that could be stored. Refused are those that are
        unlike it, and what every server refuses: required columns that are missing, say, or values that are not finite.

    Raises:
        DatasetError: the source cannot be read.
    """
    with closing(open_source(source, format=format, trust_pickle=trust_pickle, infos=infos)) as opened:
        report, schema = LoadReport(), dict[str, ColumnInfo]()
        total = _total(opened, first, limit)
        changes = changes or Changes()
        size_limit = SizeLimit(DEFAULT_MAX_EPISODE_BYTES if max_episode_bytes is None else max_episode_bytes, changes)
        incoming = opened.row_convention != "outgoing"
        for read in islice(opened.episodes(first, incoming=incoming, limit=size_limit), total):
            made = _make(_changed(read, changes), EpisodeKey("survey", 0, read.position), "", True)
            if isinstance(made, Episode):
                report.size_bytes += made.size_bytes
                found = {name: ColumnInfo(dtype_name(column.dtype), column.shape[1:]) for name, column in made.columns.items()}
                fault = (_difference(schema, found) if schema else None) or _broken_rule(made, first=not schema, incoming=incoming)
                schema = schema or ({} if fault is not None else found)
                made = fault or made
            if isinstance(made, Episode):
                report.read += 1
                report.stored += 1
                report.steps += made.length
            else:
                report.refuse(read.position, made)
            if watch is not None:
                watch("read", report.read, total, report)
        return report, schema


def sender_of(source: Source, changes: Changes, again: str, progress: Callable[[int, int], None]) -> tuple[str, int]:
    """Returns the client id and incarnation of a source's keys: made of its content, so reads all of it.

    Args:
        source: of the episodes.
        changes: to their columns, which make other episodes of them.
        again: a label that makes them others, too.
        progress: called with the bytes that were read, and that there are.
    """
    size_bytes = source.size_bytes
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, size_bytes)

    progress(0, size_bytes)
    digest = Digest(add)
    digest.add(f"{source.format} {READERS_VERSION} {changes!r}".encode())
    source.fingerprint(digest)
    label = Digest(lambda _: None)
    label.add(again.encode())
    return f"dataset-{source.format}-{digest.hex()}", int(label.hex()[:15], 16) if again else 0


def check_convention(name: str, source: Source, convention: str) -> bool:
    """Returns whether rows are incoming ones.

    Raises:
        DatasetError: the source's rows are of the other convention.
    """
    found = source.row_convention
    if found is not None and found != convention:
        raise DatasetError(
            f"{name}: rows of the convention {found!r}, expected {convention!r}, which is sampling.row_convention of the server; "
            "load it into a server that is configured so"
        )
    return convention == "incoming"


def _changed(read: DatasetEpisode, changes: Changes) -> DatasetEpisode:
    """Returns an episode with flat columns as they are to be stored."""
    if read.error is not None:
        return read
    try:
        return replace(read, columns=changes.of(read.columns))
    except TouchlineError as error:
        return replace(read, columns={}, error=error)


def _size_of(read: DatasetEpisode) -> int:
    return sum(column.nbytes for column in read.columns.values())


def _make(read: DatasetEpisode, key: EpisodeKey, actor: str, take_own: bool) -> Episode | TouchlineError:
    if read.error is not None:
        return read.error
    try:
        return make_episode(
            read.columns,
            key=key,
            actor=check_actor(read.actor) if take_own and read.actor else actor,
            policy_version=read.policy_version,
        )
    except TouchlineError as error:
        return error


def _difference(schema: Mapping[str, ColumnInfo], found: Mapping[str, ColumnInfo]) -> InvalidEpisodeError | None:
    for name in [*schema, *found]:
        if schema.get(name) != found.get(name):
            return InvalidEpisodeError(f"{name}: {_told(found.get(name))}, expected {_told(schema.get(name))} as in the first episode")
    return None


def _broken_rule(episode: Episode, *, first: bool, incoming: bool) -> InvalidEpisodeError | None:
    """Returns why a server that is configured as usual would refuse an episode; None where it would not."""
    try:
        rules.check_episode(episode.columns)
        if first:
            rules.check_columns(episode.columns)
            rules.check_ends(episode.columns)
        rules.check_finite(episode.columns, incoming=incoming)
    except ColumnError as error:
        return InvalidEpisodeError(str(error))
    return None


def _told(column: ColumnInfo | None) -> str:
    return "no such column" if column is None else f"{column.dtype} {column.shape}"


def _account(report: LoadReport, results: Iterable[EpisodeResult], sent: list[tuple[int, int]]) -> None:
    answered = 0
    for (position, steps), result in zip(sent, results, strict=False):
        answered += 1
        if result.error is not None:
            report.refuse(position, result.error)
            continue
        report.read += 1
        report.steps += steps
        report.duplicates += result.duplicate
        report.stored += not result.duplicate
    # One more may have been read, for the next call.
    del sent[:answered]


def _total(source: Source, first: int, limit: int | None) -> int:
    whole_number("first", first, least=0, most=(1 << 63) - 1)
    left = max(len(source) - first, 0)
    return left if limit is None else min(left, whole_number("limit", limit, least=0, most=(1 << 63) - 1))
