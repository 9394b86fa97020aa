"""The HDF5 file of a Minari data set: how large its episodes are, and their flags, without reading anything else.

Minari reads an episode whole, infos included, so its size is checked here first.
"""

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

from touchline.datasets.hdf5 import count_dataset  # behind the import of h5py, whose message above names the right extra

FILE = "main_data.hdf5"
"""Name of the file in which Minari stores episodes."""
TOO_MANY_PIXELS = Image.DecompressionBombError
"""Exception that opening a JPEG of more than 179 million pixels raises."""


class MinariFile:
    """The HDF5 file of one Minari data set, open until it is closed. Not thread-safe.

    Args:
        folder: folder of the data.
        storage: Minari's storage of that folder.

    Raises:
        OSError: the file does not exist or is damaged.
    """

    def __init__(self, folder: Path, storage: Any) -> None:
        self._file = h5py.File(folder / FILE, "r")
        self._spaces = {"observations": storage.observation_space, "actions": storage.action_space}
        self._jpeg = storage.jpeg_encoding

    def check_size(self, number: int, limit: SizeLimit) -> None:
        """Checks that episode ``number`` is within the limit, as Minari would read it.

        Raises:
            DatasetError: the episode is too large.
        """
        # Minari reads all columns, also those that a load drops afterwards.
        counter = replace(limit, transforms=replace(limit.transforms, drop=())).counter()
        for name, value in self._file[f"episode_{number}"].items():
            self._count(name, value, self._spaces.get(name), counter)

    def flags(self, numbers: Sequence[int], limit: SizeLimit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the terminations [T] and truncations [T] of the given episodes, skipping any that cannot be loaded."""
        for number in numbers:
            group = self._file.get(f"episode_{number}")
            if group is None or "terminations" not in group or "truncations" not in group:
                continue
            counter = limit.counter()
            try:
                for name in ("terminations", "truncations"):
                    count_dataset(name, group[name], counter)
            except DatasetError:
                continue  # the episode is refused when it is read
            yield group["terminations"][()], group["truncations"][()]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _count(self, name: str, value: Any, space: Any, counter: SizeCounter) -> None:
        """Adds a dataset or group to the counter, and for JPEGs what they decode to."""
        if isinstance(value, h5py.Group):
            counter.add_name(name)
            for part, member in value.items():
                self._count(f"{name}.{part}", member, _space_in(space, part), counter)
        elif value.dtype.hasobject:
            # Texts of any length. Their pointers are counted; the texts themselves are in the file, uncompressed.
            counter.add(name, value.shape, np.dtype(np.intp))
        else:
            count_dataset(name, value, counter)
        if self._jpeg and space is not None and is_image_space(space) and len(value):
            # Minari allocates frames of the first one's size for all.
            with Image.open(io.BytesIO(value[0])) as image:
                counter.add(name, (len(value), image.height, image.width, len(image.getbands())), np.dtype(np.uint8))


def _space_in(space: Any, part: str) -> Any:
    """Returns the space of a member of a Dict or Tuple space; None if there is none."""
    if isinstance(space, spaces.Dict):
        return space.spaces.get(part)
    if isinstance(space, spaces.Tuple):
        number = part.removeprefix("_index_")
        return space.spaces[int(number)] if number.isdecimal() and int(number) < len(space.spaces) else None
    return None
