"""Which format a source or a target has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from touchline.datasets.errors import DatasetError
from touchline.datasets.source import Source

FORMATS = ("tdmpc2", "minari", "hdf5", "npz")
"""Values of ``format``."""
MINARI_PREFIX = "minari:"
_OF_SUFFIX = {".pt": "tdmpc2", ".pth": "tdmpc2", ".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz"}


def format_of(place: str) -> str:
    """Returns the format of a source or a target, derived from the prefix ``minari:``, the suffix, or the content of a folder.

    Raises:
        DatasetError: the format cannot be derived.
    """
    if place.startswith(MINARI_PREFIX):
        return "minari"
    path = Path(place)
    if path.suffix.lower() in _OF_SUFFIX:
        return _OF_SUFFIX[path.suffix.lower()]
    if path.is_dir():
        if (path / "data" / "metadata.json").is_file() or (path / "metadata.json").is_file():
            return "minari"
        if any(path.glob("*.pt")):
            return "tdmpc2"
    raise DatasetError(
        f"{place}: unknown format, expected .pt, .h5, .hdf5, .npz, minari:<id>, the folder of a Minari data set, or a folder of .pt files; "
        f"or state the format with --format ({', '.join(FORMATS)})"
    )


def check_format(name: str) -> str:
    """Returns ``name`` if it is the name of a format.

    Raises:
        DatasetError: it is not.
    """
    if name not in FORMATS:
        raise DatasetError(f"format: {name!r}, expected one of {', '.join(FORMATS)}")
    return name


def open_source(place: str, *, format: str | None = None, trust_pickle: bool = False, infos: bool = False) -> Source:
    """Opens a file, a folder or a Minari data set for reading; the caller closes it.

    Args:
        place: a path, or ``minari:<id>``.
        format: one of :data:`FORMATS`; None derives it from ``place``.
        trust_pickle: whether to unpickle arbitrary objects in a ``.pt`` file. Doing so runs any code that the file contains.
        infos: whether the arrays among Minari's infos become columns too.

    Raises:
        DatasetError: the source does not exist or cannot be read, or a package that its format needs is missing.
    """
    if not place.startswith(MINARI_PREFIX) and not Path(place).exists():
        hint = f"; for a Minari data set, write minari:{place}" if "/" in place and "-v" in place else ""
        raise DatasetError(f"{place}: no such file or folder{hint}")
    name = format_of(place) if format is None else check_format(format)
    if name == "minari":
        from touchline.datasets.minari import MinariSource

        return MinariSource(place, infos=infos)
    path = Path(place)
    if name == "tdmpc2":
        from touchline.datasets.tdmpc2 import TDMPC2Source

        return TDMPC2Source(_files(path, ["*.pt", "*.pth"]), trust_pickle=trust_pickle)
    if path.is_dir():
        raise DatasetError(f"{place}: a folder, expected a file")
    if name == "hdf5":
        from touchline.datasets.hdf5 import Hdf5Source

        return Hdf5Source(path)
    from touchline.datasets.npz import NpzSource

    return NpzSource(path)


def _files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns ``path`` if it is a file, otherwise the files in it that match a pattern, sorted by name."""
    if not path.is_dir():
        return [path]
    files = sorted(file for pattern in patterns for file in path.glob(pattern))
    if not files:
        raise DatasetError(f"{path}: no {' or '.join(patterns)} in this folder")
    return files
