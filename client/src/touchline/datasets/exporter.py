"""Export episodes from a server to a file or folder, which appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from touchline.client import ReplayClient
from touchline.datasets.errors import DatasetError, UnsupportedEpisodeError
from touchline.datasets.formats import check_format, format_of
from touchline.datasets.provenance import Provenance
from touchline.datasets.renamed_arguments import renamed_arguments
from touchline.types import EpisodeSelection
from touchline_protos.codec import StoredEpisode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in the standard library from Python 3.11 on


Selection = EpisodeSelection
"""Keyword arguments of :func:`export`: which episodes to export, and which of their columns."""


class Target(Protocol):
    """A data set that is being written. Not thread-safe."""

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        """Writes one episode.

        Args:
            columns: [rows, ...] by name. Not kept after the call.
            provenance: origin of the episode.

        Raises:
            DatasetError: the format cannot represent any episode of this kind.
            UnsupportedEpisodeError: the format cannot represent this episode, but may represent others.
        """

    def finish(self) -> None:
        """Completes the data set and moves it to its final path."""

    def discard(self) -> None:
        """Removes everything that was written."""


@dataclass(slots=True)
class ExportReport:
    """Outcome of an export's episodes so far."""

    written: int = 0
    """Episodes written."""
    left_out: int = 0
    """Episodes skipped because the format cannot represent them."""
    evicted: int = 0
    """Episodes that the server evicted before they were read. Known only when the export is complete."""
    steps: int = 0
    """Rows written."""
    size_bytes: int = 0
    """Payload written, in bytes."""
    reasons: dict[str, list[int]] = field(default_factory=dict)
    """Reasons for skipping episodes, and the ids of the episodes skipped for each."""


ProgressCallback = Callable[[int, int, ExportReport], None]
"""Called after each episode: the number of episodes read, their total, the report so far."""


@renamed_arguments(watch="progress")
def export(
    client: ReplayClient,
    target: str,
    *,
    format: str | None = None,
    force: bool = False,
    compress: bool = False,
    progress: ProgressCallback | None = None,
    **selection: Unpack[Selection],
) -> ExportReport:
    """Writes a table's episodes to a file, a folder or a Minari data set, oldest first.

    The data set is written beside its path under a hidden name and renamed once it is complete. If the export fails or is killed, whatever
    was at the path stays as it was. Episodes are read and written one at a time.

    Args:
        client: client of the server to read from.
        target: a path, or ``minari:<id>``.
        format: ``tdmpc2``, ``minari``, ``hdf5`` or ``npz``; None derives it from ``target``.
        force: whether to replace an existing data set.
        compress: whether to compress (HDF5 and NPZ only): smaller and slower.
        progress: called after each episode, in this thread.
        selection: the table and the episodes to export; see :class:`~touchline.types.EpisodeSelection`.

    Returns:
        The number of episodes written and skipped.

    Raises:
        DatasetError: the target cannot be written, the format cannot represent the episodes, or none match.
        InvalidArgumentError: a selected id or column does not exist.
        UnavailableError, DeadlineError: the server was unreachable for too long.
    """
    report = ExportReport()
    with client.episodes(**selection) as episodes:
        total = episodes.total
        if not total:
            narrowed = any(value for name, value in selection.items() if name != "table")
            found = "no episodes match the selection" if narrowed else "no episodes are stored"
            raise DatasetError(f"{client.address}: {found}, so there is nothing to export")
        writer = open_target(
            target, client.info(table=selection.get("table")).row_convention, format=format, force=force, compress=compress
        )
        try:
            read = 0
            for episode in episodes:
                read += 1
                _write(writer, episode, report)
                if progress is not None:
                    progress(read, total, report)
            report.evicted = total - read
            if not report.written:
                reasons = "; ".join(report.reasons) or "the server evicted all of them first"
                raise DatasetError(f"{target}: none of the {total} episodes could be written: {reasons}")
            writer.finish()
        except BaseException:
            writer.discard()
            raise
    return report


def open_target(target: str, row_convention: str, *, format: str | None, force: bool, compress: bool) -> Target:
    """Returns a writer for a target; see :func:`export` for the arguments.

    Args:
        row_convention: ``incoming`` or ``outgoing``, as the server stores rows.

    Raises:
        DatasetError: the target cannot be written, or a package is missing.
    """
    name = format_of(target) if format is None else check_format(format)
    if compress and name not in ("hdf5", "npz"):
        raise DatasetError(f"{target}: {name} files cannot be compressed; hdf5 and npz files can")
    if name == "minari":
        from touchline.datasets.minari_target import MinariTarget

        return MinariTarget(target, row_convention, force=force)
    path = Path(target)
    if name == "tdmpc2":
        from touchline.datasets.tdmpc2_target import TDMPC2Target

        return TDMPC2Target(path, row_convention, force=force)
    if name == "hdf5":
        from touchline.datasets.hdf5 import Hdf5Target

        return Hdf5Target(path, row_convention, force=force, compress=compress)
    from touchline.datasets.npz import NpzTarget

    return NpzTarget(path, row_convention, force=force, compress=compress)


def _write(writer: Target, episode: StoredEpisode, report: ExportReport) -> None:
    """Writes an episode, or counts why it was skipped."""
    provenance = Provenance(episode.id, episode.key, episode.actor, episode.policy_version)
    try:
        writer.add(episode.columns, provenance)
    except UnsupportedEpisodeError as error:
        report.left_out += 1
        report.reasons.setdefault(str(error), []).append(episode.id)
    else:
        report.written += 1
        report.steps += episode.length
        report.size_bytes += episode.size_bytes
