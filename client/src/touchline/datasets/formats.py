"""Which format a source or a target has, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from touchline.datasets.errors import DatasetError
from touchline.datasets.source import Source

FORMATS = ("tdmpc2", "minari", "hdf5", "npz")
"""Names that ``format`` takes."""
MINARI_PREFIX = "minari:"
_OF_SUFFIX = {".pt": "tdmpc2", ".pth": "tdmpc2", ".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz"}


def format_of(place: str) -> str:
    """Returns the format that a name tells: by ``minari:``, by its suffix, or by what a folder holds.

    Raises:
        DatasetError: it tells none.
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
        f"{place}: not told by its name what it is, expected .pt, .h5, .hdf5, .npz, minari:<id>, or a folder of one of Minari's data sets "
        f"or of .pt files; --format ({', '.join(FORMATS)}) says it"
    )


def check_format(name: str) -> str:
    """Returns the format's name.

    Raises:
        DatasetError: there is none of this name.
    """
    if name not in FORMATS:
        raise DatasetError(f"format: {name!r}, expected one of {', '.join(FORMATS)}")
    return name


def open_source(place: str, *, format: str | None = None, trust_pickle: bool = False, infos: bool = False) -> Source:
    """Returns the episodes of a file, a folder or one of Minari's data sets; close it.

    Args:
        place: a path, or ``minari:<id>``.
        format: one of :data:`FORMATS`; None goes by the name.
        trust_pickle: unpickle anything that a ``.pt`` file holds. That runs whatever code is in it.
        infos: the arrays of Minari's infos become columns too.

    Raises:
        DatasetError: there is nothing, it cannot be read, or a package that its format needs is missing.
    """
    if not place.startswith(MINARI_PREFIX) and not Path(place).exists():
        hint = f"; one of Minari's is minari:{place}" if "/" in place and "-v" in place else ""
        raise DatasetError(f"{place}: no such file or folder{hint}")
    found = format_of(place) if format is None else check_format(format)
    if found == "minari":
        from touchline.datasets.minari import MinariSource

        return MinariSource(place, infos=infos)
    path = Path(place)
    if found == "tdmpc2":
        from touchline.datasets.tdmpc2 import TDMPC2Source

        return TDMPC2Source(_files(path, ["*.pt", "*.pth"]), trust_pickle=trust_pickle)
    if path.is_dir():
        raise DatasetError(f"{place}: a folder, expected a file")
    if found == "hdf5":
        from touchline.datasets.hdf5 import Hdf5Source

        return Hdf5Source(path)
    from touchline.datasets.npz import NpzSource

    return NpzSource(path)


def _files(path: Path, patterns: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for pattern in patterns for file in path.glob(pattern))
    if not files:
        raise DatasetError(f"{path}: a folder without {' or '.join(patterns)}")
    return files
