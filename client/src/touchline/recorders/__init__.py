"""Recorders: wrap an environment, and every episode that it plays goes to a replay server.

A recorder has the interface of what it wraps and changes nothing of it; what was played is collected in TD-MPC2's row convention and sent
by an :class:`~touchline.EpisodeWriter` from the background. Row 0 of an episode holds the observation of the reset. Row t holds the
observation that the t-th action led to, that action, its reward, and whether it *terminated* the episode (``done``). An episode that was
truncated (by a time limit, or by a reset before its end) ends without ``done``. ::

    with ReplayClient("replay-host:50051", actor="left-foot") as client, GymnasiumRecorder(gymnasium.make("Pendulum-v1"), client) as env:
        obs, info = env.reset(seed=1)
        ...

Observations that are dicts are stored nested. Importing this loads none of the environments' libraries; each recorder loads its own, which
comes with the extra ``touchline[recorders]``.
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
"""What a module needs of the extra ``recorders``."""


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
