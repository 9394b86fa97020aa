"""Write a file or folder under a hidden name, and rename it to its final path once it is complete."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from touchline.datasets.errors import DatasetError
from touchline_protos.files.locks import sync


class AtomicOutput:
    """A file or folder that appears complete or not at all. Not thread-safe.

    Args:
        place: final path.
        force: whether to replace what is there.
        replaceable: a function that returns whether an existing folder may be replaced, so that ``force`` deletes data sets only.

    Raises:
        DatasetError: something is there that may not be replaced, or the parent folder does not exist.
    """

    def __init__(self, place: Path, *, force: bool, replaceable: Callable[[Path], bool] = lambda _: False) -> None:
        self.place = place
        self._force = force
        self._replaceable = replaceable
        self._check()
        if not place.parent.is_dir():
            raise DatasetError(f"{place}: the folder {place.parent} does not exist; create it first")
        self.partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
        """Path to write to; nothing is there yet. If the process is killed it stays behind and may be deleted."""

    def commit(self, written: Path | None = None) -> None:
        """Syncs what was written to the disk and moves it to its final path.

        Args:
            written: path within ``partial`` of the part to move; None moves all of it.

        Raises:
            DatasetError: something has appeared at the final path that may not be replaced.
        """
        written = written or self.partial
        self._check()
        for file in written.rglob("*") if written.is_dir() else [written]:
            if file.is_file():
                sync(file)
        if self.place.is_dir():
            # A folder cannot be renamed onto another that is not empty, so for a moment there is none at the path.
            replaced = self.partial.with_suffix(".replaced")
            self.place.rename(replaced)
            written.rename(self.place)
            shutil.rmtree(replaced)
        else:
            written.replace(self.place)
        sync(self.place.parent)
        self.discard()

    def discard(self) -> None:
        """Removes what was written and not moved."""
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)

    def _check(self) -> None:
        if not self.place.exists():
            return
        if not self._force:
            raise DatasetError(f"{self.place}: already exists; --force (force=True) replaces it")
        if self.place.is_dir() and not self._replaceable(self.place):
            raise DatasetError(f"{self.place}: a folder that holds something else and is not replaced; choose another path")
