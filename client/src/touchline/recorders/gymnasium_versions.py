"""Differences between the versions of Gymnasium, from 0.29 on.

======================  =====================================  ==============================================================
Gymnasium               vector environments reset themselves   last observation of an episode
======================  =====================================  ==============================================================
0.29                    in the same step                       ``infos["final_observation"]``
1.0                     in the next step                       returned by the step
1.1 and later           by ``metadata["autoreset_mode"]``      ``infos["final_obs"]``, or returned by the step
======================  =====================================  ==============================================================

A single environment resets itself if it is wrapped: in 0.29 by ``AutoResetWrapper`` (in the same step), later by ``Autoreset`` (in the
next step).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium import vector, wrappers

from touchline.errors import InvalidArgumentError, InvalidEpisodeError

BEFORE_1 = not hasattr(vector, "VectorWrapper")
"""Whether this is Gymnasium 0.29, in which vector environments and their wrappers are ordinary environments and wrappers."""

if TYPE_CHECKING:
    from gymnasium.vector import AutoresetMode as AutoresetMode

    VectorBase = vector.VectorWrapper
else:
    VectorBase = gymnasium.Wrapper if BEFORE_1 else vector.VectorWrapper
    """Base class of wrappers around vector environments."""

    if hasattr(vector, "AutoresetMode"):
        AutoresetMode = vector.AutoresetMode
    else:

        class AutoresetMode(enum.Enum):
            """Moment at which an environment resets itself, as in Gymnasium 1.1."""

            NEXT_STEP = "NextStep"
            SAME_STEP = "SameStep"
            DISABLED = "Disabled"


_KEEPS_OBSERVATIONS = (gymnasium.ActionWrapper, gymnasium.RewardWrapper, wrappers.RecordEpisodeStatistics)
"""Wrappers that pass a vector environment's observations on unchanged."""


def vector_autoreset_mode(env: Any, given: Any) -> AutoresetMode:
    """Returns the autoreset mode of a vector environment.

    Args:
        env: vector environment, perhaps wrapped.
        given: mode from the caller; None asks the environment.

    Raises:
        InvalidArgumentError: the mode is unknown; or, in Gymnasium 0.29, a wrapper changes observations but not those in ``infos``.
    """
    if BEFORE_1:
        _check_wrappers(env)
    found = given if given is not None else env.metadata.get("autoreset_mode")
    if found is None and not hasattr(vector, "AutoresetMode") and isinstance(env.unwrapped, _of_gymnasium()):
        return AutoresetMode.SAME_STEP if BEFORE_1 else AutoresetMode.NEXT_STEP
    try:
        return AutoresetMode(found)
    except ValueError:
        modes = ", ".join(repr(mode.value) for mode in AutoresetMode)
        raise InvalidArgumentError(
            f"autoreset_mode: {found!r} in the metadata of {env}, expected one of {modes} (gymnasium.vector.AutoresetMode); "
            "pass it as autoreset_mode="
        ) from None


def autoreset_mode(env: Any) -> AutoresetMode:
    """Returns the autoreset mode of a single environment.

    Raises:
        InvalidArgumentError: another wrapper is around Gymnasium 0.29's AutoResetWrapper. If it changes observations, it misses the last
            one of each episode, which is in ``info``.
    """
    outermost = env
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, getattr(wrappers, "Autoreset", ())):
            return AutoresetMode.NEXT_STEP
        if isinstance(env, getattr(wrappers, "AutoResetWrapper", ())):
            if env is not outermost:
                raise InvalidArgumentError(
                    f"{type(outermost).__name__} around AutoResetWrapper: the last observation of an episode would not pass through it; "
                    "put AutoResetWrapper directly inside the recorder, or remove it and call reset()"
                )
            return AutoresetMode.SAME_STEP
        env = env.env
    return AutoresetMode.DISABLED


def final_obs(info: Mapping[str, Any]) -> Any:
    """Returns the last observation of an episode that ended in the same step as the reset; for a vector environment, [num_envs] of them.

    Raises:
        InvalidEpisodeError: the environment did not return one.
    """
    for key in ("final_obs", "final_observation"):
        if key in info:
            return info[key]
    raise InvalidEpisodeError(
        "obs: the environment returned no info['final_obs'] (before Gymnasium 1.1: 'final_observation') at the end of an episode"
    )


def _of_gymnasium() -> tuple[type, ...]:
    """Returns Gymnasium's own classes of vector environments; before 1.0, ``make_vec`` makes them from a module of its own."""
    modules = [vector]
    if BEFORE_1:
        modules.append(import_module("gymnasium.experimental.vector"))
    return tuple(kind for module in modules for kind in (module.SyncVectorEnv, module.AsyncVectorEnv))


def _check_wrappers(env: Any) -> None:
    while env is not env.unwrapped:
        if not isinstance(env, _KEEPS_OBSERVATIONS):
            raise InvalidArgumentError(
                f"{type(env).__name__} around a vector environment: in Gymnasium {gymnasium.__version__} the last observation of an "
                "episode would not pass through it; wrap the single environments instead, or install Gymnasium 1.1 or later"
            )
        env = env.env
