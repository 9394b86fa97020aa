"""Import and export data sets: TD-MPC2's ``.pt`` files, Minari data sets, and HDF5 and NPZ files of episodes. ::

    from touchline import ReplayClient, datasets

    with ReplayClient("replay-host:50051") as client:
        report = datasets.load(client, "minari:D4RL/door/human-v2")
        datasets.export(client, "everything.h5")

The commands ``touchline load`` and ``touchline export`` do the same. An interrupted load can be started again: each episode is stored
exactly once. Importing this package imports none of the formats' libraries; each format needs only its own extra (``touchline[torch]``,
``touchline[minari]``, ``touchline[hdf5]``; NPZ needs none). The layouts, and what survives in which: docs/datasets.md.
"""

import warnings
from typing import Any

from touchline._actor.refusal_summary import RefusalSummary
from touchline.datasets.errors import DatasetError, UnsupportedEpisodeError
from touchline.datasets.exporter import ExportReport, Selection, export
from touchline.datasets.formats import FORMATS, open_source
from touchline.datasets.loader import LoadReport, inspect, load
from touchline.datasets.source import DatasetEpisode, Source
from touchline.datasets.transforms import ColumnTransforms

__all__ = [
    "FORMATS",
    "ColumnTransforms",
    "DatasetEpisode",
    "DatasetError",
    "ExportReport",
    "LoadReport",
    "RefusalSummary",
    "Selection",
    "Source",
    "UnsupportedEpisodeError",
    "export",
    "inspect",
    "load",
    "open_source",
]

_RENAMED = {"Refusals": "RefusalSummary", "Changes": "ColumnTransforms", "UnholdableError": "UnsupportedEpisodeError", "survey": "inspect"}
"""Names that this package had before, and what replaces each."""


def __getattr__(name: str) -> Any:
    """Returns what a former name stands for, with a DeprecationWarning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {__name__}.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
