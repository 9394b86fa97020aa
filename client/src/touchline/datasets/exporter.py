"""From a server to a file or folder, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

import numpy as np

from touchline.client import ReplayClient
from touchline.datasets.errors import DatasetError, UnholdableError
from touchline.datasets.formats import check_format, format_of
from touchline.datasets.provenance import Provenance
from touchline_protos.codec import StoredEpisode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class Selection(TypedDict, total=False):
    """Which episodes, and what of them; as :meth:`touchline.ReplayClient.episodes` takes it. All where nothing is said."""

    ids: Iterable[int] | None
    """Those of these ids alone, and none of the next four."""
    first: int | None
    """From this id on."""
    last: int | None
    """Up to this id, itself included."""
    actor: str | None
    """Of the actor of this name."""
    newest: int | None
    """The newest so many of these."""
    columns: Iterable[str] | None
    """These columns alone; ``obs`` stands for all of ``obs.*`` too."""


class Target(Protocol):
    """Takes episodes, and is whole when it is finished. For one thread."""

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        """Takes one episode, [rows, ...] a column.

        Raises:
            DatasetError: the format cannot hold what all episodes are like.
            UnholdableError: it cannot hold this one.
        """

    def finish(self) -> None:
        """Puts everything into its place."""

    def discard(self) -> None:
        """Leaves nothing behind."""


@dataclass(slots=True)
class ExportReport:
    """What became of the episodes of an export so far."""

    written: int = 0
    """Episodes in the target."""
    left_out: int = 0
    """Episodes that the format cannot hold."""
    evicted: int = 0
    """Episodes that were there when it began, and were evicted before their turn. Known at the end."""
    steps: int = 0
    """Rows of those in the target."""
    size_bytes: int = 0
    """Payload of those in the target."""
    reasons: dict[str, list[int]] = field(default_factory=dict)
    """Why, and the ids of the episodes that were left out for it."""


Watch = Callable[[int, int, ExportReport], None]
"""Called as an export goes on: episodes that were read, and that there are."""


def export(
    client: ReplayClient,
    target: str,
    *,
    format: str | None = None,
    force: bool = False,
    compress: bool = False,
    watch: Watch | None = None,
    **selection: Unpack[Selection],
) -> ExportReport:
    """Writes a server's episodes to a file, a folder or a Minari data set, oldest first, and returns what was written.

    It is written under a hidden name beside its place and put there once it is whole; one that fails or is killed leaves the place as it
    was. Episodes are read and written one by one.

    Args:
        client: of the server.
        target: a path, or ``minari:<id>``.
        format: ``tdmpc2``, ``minari``, ``hdf5`` or ``npz``; None goes by the name.
        force: replace a data set that is there.
        compress: HDF5 and NPZ: smaller and slower.
        watch: told how far it is.
        selection: which episodes; see :class:`Selection`.

    Raises:
        DatasetError: it cannot be written there, the format cannot hold the episodes, or there are none.
        InvalidArgumentError: an id or a column that is not there.
        UnavailableError, DeadlineError: the server was away for too long.
    """
    report = ExportReport()
    with client.episodes(**selection) as episodes:
        total = episodes.total
        if not total:
            what = "no episodes that were asked for" if any(selection.values()) else "no episodes"
            raise DatasetError(f"{client.address}: {what}, so there is nothing to export")
        writer = open_target(target, client.info().row_convention, format=format, force=force, compress=compress)
        try:
            read = 0
            for episode in episodes:
                read += 1
                _add(writer, episode, report)
                if watch is not None:
                    watch(read, total, report)
            report.evicted = total - read
            if not report.written:
                raise DatasetError(f"{target}: none of the {total} episodes could be written: {'; '.join(report.reasons) or 'all evicted'}")
            writer.finish()
        except BaseException:
            writer.discard()
            raise
    return report


def open_target(target: str, row_convention: str, *, format: str | None, force: bool, compress: bool) -> Target:
    """Returns what writes a format.

    Raises:
        DatasetError: it cannot be written there, or a package is missing.
    """
    found = format_of(target) if format is None else check_format(format)
    if compress and found not in ("hdf5", "npz"):
        raise DatasetError(f"{target}: {found} is not compressed, hdf5 and npz are")
    if found == "minari":
        from touchline.datasets.minari_target import MinariTarget

        return MinariTarget(target, row_convention, force=force)
    path = Path(target)
    if found == "tdmpc2":
        from touchline.datasets.tdmpc2_target import TDMPC2Target

        return TDMPC2Target(path, row_convention, force=force)
    if found == "hdf5":
        from touchline.datasets.hdf5 import Hdf5Target

        return Hdf5Target(path, row_convention, force=force, compress=compress)
    from touchline.datasets.npz import NpzTarget

    return NpzTarget(path, row_convention, force=force, compress=compress)


def _add(writer: Target, episode: StoredEpisode, report: ExportReport) -> None:
    provenance = Provenance(episode.id, episode.key, episode.actor, episode.policy_version)
    try:
        writer.add(episode.columns, provenance)
    except UnholdableError as error:
        report.left_out += 1
        report.reasons.setdefault(str(error), []).append(episode.id)
    else:
        report.written += 1
        report.steps += episode.length
        report.size_bytes += episode.size_bytes
