"""What the episodes of a Minari data set announce, looked at before Minari reads them: it reads all of an episode, infos included."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.errors import DatasetError
from touchline.datasets.size_limit import SizeCounter, SizeLimit
from touchline.installing import install_command

try:
    import h5py
    from gymnasium import spaces
    from minari.dataset.minari_storage import is_image_space
    from PIL import Image
except ImportError as error:
    raise DatasetError(f"Minari data sets need minari ({error}): {install_command('minari')}") from error

from touchline.datasets.hdf5 import announced  # needs h5py, which Minari's extra brings along: the message above comes first

FILE = "main_data.hdf5"
"""Of a data set that Minari stored as ``hdf5``."""
TOO_MANY_PIXELS = Image.DecompressionBombError
"""What reading a JPEG raises that says it has more than 179 million pixels."""


class MinariSizes:
    """The sizes in one data set of Minari's format ``hdf5``. Its file stays open until this is closed.

    Args:
        folder: of the data.
        storage: Minari's own, of that folder.

    Raises:
        OSError: there is no such file, or it is damaged.
    """

    def __init__(self, folder: Path, storage: Any) -> None:
        self._file = h5py.File(folder / FILE, "r")
        self._spaces = {"observations": storage.observation_space, "actions": storage.action_space}
        self._jpeg = storage.jpeg_encoding

    def check(self, number: int, limit: SizeLimit) -> None:
        """Raises DatasetError where the episode of a number announces more than it may have, as Minari would read it."""
        tally = replace(limit, changes=replace(limit.changes, drop=())).tally()
        for name, value in self._file[f"episode_{number}"].items():
            self._count(name, value, self._spaces.get(name), tally)

    def flags(self, numbers: Sequence[int], limit: SizeLimit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields terminations and truncations of those episodes that have them, and of which they are not too large."""
        for number in numbers:
            group = self._file.get(f"episode_{number}")
            if group is None or "terminations" not in group or "truncations" not in group:
                continue
            tally = limit.tally()
            try:
                for name in ("terminations", "truncations"):
                    announced(name, group[name], tally)
            except DatasetError:
                continue  # it is refused when its turn comes
            yield group["terminations"][()], group["truncations"][()]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _count(self, name: str, value: Any, space: Any, tally: SizeCounter) -> None:
        if isinstance(value, h5py.Group):
            tally.visit(name)
            for part, below in value.items():
                self._count(f"{name}.{part}", below, _below(space, part), tally)
        elif value.dtype.hasobject:
            # Texts: no more than the file has, unless it has them often.
            tally.take(name, value.shape, np.dtype(np.intp))
        else:
            announced(name, value, tally)
        if self._jpeg and space is not None and is_image_space(space) and len(value):
            # Minari makes all frames as large as the first.
            with Image.open(io.BytesIO(value[0])) as image:
                tally.take(name, (len(value), image.height, image.width, len(image.getbands())), np.dtype(np.uint8))


def _below(space: Any, part: str) -> Any:
    if isinstance(space, spaces.Dict):
        return space.spaces.get(part)
    if isinstance(space, spaces.Tuple):
        number = part.removeprefix("_index_")
        return space.spaces[int(number)] if number.isdecimal() and int(number) < len(space.spaces) else None
    return None
