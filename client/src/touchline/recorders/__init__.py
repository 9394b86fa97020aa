"""Recorders: wrap an environment, and every episode that is played in it goes to a replay server. ::

    with ReplayClient("replay-host:50051", actor="left-foot") as client, GymnasiumRecorder(gymnasium.make("Pendulum-v1"), client) as env:
        obs, info = env.reset(seed=1)
        ...

A recorder has the interface of the environment that it wraps and changes nothing about it. An :class:`~touchline.EpisodeWriter` sends the
episodes in the background.

Episodes are stored in TD-MPC2's row convention. Row 0 holds the observation of the reset. Row t holds the observation that the t-th action
led to, the action, its reward, and whether it *terminated* the episode (``done``). A truncated episode (by a time limit, or by a reset
before its end) ends without ``done``. Observations that are dicts are stored as nested columns.

Importing this package imports none of the environments' libraries; each recorder imports its own. The extra ``touchline[recorders]``
installs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from touchline.installing import install_command
from touchline.recorders.recording import Recording, RecordingOptions

if TYPE_CHECKING:
    from touchline.recorders.dm_env import DmEnvRecorder
    from touchline.recorders.gymnasium import GymnasiumRecorder
    from touchline.recorders.gymnasium_vector import GymnasiumVectorRecorder
    from touchline.recorders.pettingzoo import PettingZooRecorder

__all__ = [
    "DmEnvRecorder",
    "GymnasiumRecorder",
    "GymnasiumVectorRecorder",
    "PettingZooRecorder",
    "Recording",
    "RecordingOptions",
]

_MODULES = {
    "DmEnvRecorder": "dm_env",
    "GymnasiumRecorder": "gymnasium",
    "GymnasiumVectorRecorder": "gymnasium_vector",
    "PettingZooRecorder": "pettingzoo",
}

_PACKAGES = {"dm_env": "dm-env", "gymnasium": "gymnasium", "gymnasium_vector": "gymnasium", "pettingzoo": "pettingzoo"}
"""Package from the extra ``recorders`` that each module needs."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        package = _PACKAGES[_MODULES[name]]
        if error.name != package.replace("-", "_"):
            raise
        raise ImportError(f"{name} needs {package} ({error}): {install_command('recorders', package)}") from error
    return getattr(module, name)
