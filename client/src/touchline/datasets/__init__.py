"""Data sets in and out: TD-MPC2's ``.pt`` files, Minari's data sets, HDF5 and NPZ files of episodes. ::

    from touchline import ReplayClient, datasets

    with ReplayClient("replay-host:50051") as client:
        report = datasets.load(client, "minari:D4RL/door/human-v2")
        datasets.export(client, "everything.h5")

The commands ``touchline load`` and ``touchline export`` do the same. A load may be interrupted and started again: each episode is stored
once. Importing this loads none of the formats' packages; a format needs its own alone (``touchline[torch]``, ``touchline[minari]``,
``touchline[hdf5]``; NPZ needs none). Layouts, and what survives in which: docs/datasets.md.
"""

from touchline._actor.rejections import Refusals
from touchline.datasets.errors import DatasetError, UnholdableError
from touchline.datasets.exporter import ExportReport, Selection, export
from touchline.datasets.formats import FORMATS, open_source
from touchline.datasets.loader import LoadReport, load, survey
from touchline.datasets.source import DatasetEpisode, Source
from touchline.datasets.transforms import Changes

__all__ = [
    "FORMATS",
    "Changes",
    "DatasetEpisode",
    "DatasetError",
    "ExportReport",
    "LoadReport",
    "Refusals",
    "Selection",
    "Source",
    "UnholdableError",
    "export",
    "load",
    "open_source",
    "survey",
]
