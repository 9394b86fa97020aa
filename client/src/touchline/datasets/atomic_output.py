"""Where an export writes: beside its place under a hidden name, and into its place once it is whole."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from touchline.datasets.errors import DatasetError
from touchline_protos.files.locks import sync


class AtomicOutput:
    """A file or folder that appears whole or not at all.

    Args:
        place: of the result.
        force: put it in the place of what is there.
        replaceable: whether a folder that is there is one that an export may replace.

    Raises:
        DatasetError: something is there that is not to be replaced, or there is no folder to write to.
    """

    def __init__(self, place: Path, *, force: bool, replaceable: Callable[[Path], bool] = lambda _: False) -> None:
        self.place = place
        self._force = force
        self._replaceable = replaceable
        self._check()
        if not place.parent.is_dir():
            raise DatasetError(f"{place}: no folder {place.parent} to write to")
        self.partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
        """Path to write to; nothing is there yet. What a killed export leaves behind, which may be deleted."""

    def commit(self, written: Path | None = None) -> None:
        """Puts what was written into its place, on the disk before that.

        Args:
            written: within ``partial``, to take that alone; None takes all of it.

        Raises:
            DatasetError: something has appeared there since.
        """
        written = written or self.partial
        self._check()
        for file in written.rglob("*") if written.is_dir() else [written]:
            if file.is_file():
                sync(file)
        if self.place.is_dir():
            aside = self.partial.with_suffix(".replaced")
            self.place.rename(aside)
            written.rename(self.place)
            shutil.rmtree(aside)
        else:
            written.replace(self.place)
        sync(self.place.parent)
        self.discard()

    def discard(self) -> None:
        """Removes what was written and not put into its place."""
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)

    def _check(self) -> None:
        if not self.place.exists():
            return
        if not self._force:
            raise DatasetError(f"{self.place}: is there already; --force (force=True) replaces it")
        if self.place.is_dir() and not self._replaceable(self.place):
            raise DatasetError(f"{self.place}: a folder with something else in it, which is not replaced; choose another place")
