"""What differs between the versions of Gymnasium, from 0.29 on.

======================  ======================================  =============================================================
Gymnasium               vector environments reset themselves    the last observation of an episode that ended is in
======================  ======================================  =============================================================
0.29                    in the same step                        ``infos["final_observation"]``
1.0                     in the next step                        what the step returns
1.1 and later           as ``metadata["autoreset_mode"]`` says  ``infos["final_obs"]``, or what the step returns
======================  ======================================  =============================================================

A single environment resets itself inside of ``AutoResetWrapper`` in 0.29 (in the same step), of ``Autoreset`` later (in the next step).
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
"""Gymnasium 0.29: vector environments are environments, and so are their wrappers."""

if TYPE_CHECKING:
    from gymnasium.vector import AutoresetMode as AutoresetMode

    VectorBase = vector.VectorWrapper
else:
    VectorBase = gymnasium.Wrapper if BEFORE_1 else vector.VectorWrapper
    """What a wrapper of vector environments derives from."""

    if hasattr(vector, "AutoresetMode"):
        AutoresetMode = vector.AutoresetMode
    else:

        class AutoresetMode(enum.Enum):
            """When an environment resets itself; as in Gymnasium 1.1."""

            NEXT_STEP = "NextStep"
            SAME_STEP = "SameStep"
            DISABLED = "Disabled"


_KEEPS_OBSERVATIONS = (gymnasium.ActionWrapper, gymnasium.RewardWrapper, wrappers.RecordEpisodeStatistics)
"""Wrappers that hand on a vector environment's observations as they are."""


def vector_autoreset_mode(env: Any, given: Any) -> AutoresetMode:
    """Returns when a vector environment resets itself.

    Args:
        env: the vector environment, perhaps wrapped.
        given: the mode that the caller names; None asks the environment.

    Raises:
        InvalidArgumentError: unknown; or a wrapper of Gymnasium 0.29 that changes observations, but not those in ``infos``.
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
            "give it as an argument"
        ) from None


def autoreset_mode(env: Any) -> AutoresetMode:
    """Returns when a single environment resets itself.

    Raises:
        InvalidArgumentError: another wrapper is around Gymnasium 0.29's AutoResetWrapper. It may change observations, but does not change
            the last one of an episode, which is in ``info``.
    """
    outermost = env
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, getattr(wrappers, "Autoreset", ())):
            return AutoresetMode.NEXT_STEP
        if isinstance(env, getattr(wrappers, "AutoResetWrapper", ())):
            if env is not outermost:
                raise InvalidArgumentError(
                    f"{type(outermost).__name__} around AutoResetWrapper: the last observation of an episode would not pass through it; "
                    "put AutoResetWrapper directly inside of the recorder, or leave it out and call reset()"
                )
            return AutoresetMode.SAME_STEP
        env = env.env
    return AutoresetMode.DISABLED


def final_obs(info: Mapping[str, Any]) -> Any:
    """Returns the last observation of an episode whose end and the next one's reset were one step; of a vector environment, all of them.

    Raises:
        InvalidEpisodeError: it is not there.
    """
    for key in ("final_obs", "final_observation"):
        if key in info:
            return info[key]
    raise InvalidEpisodeError(
        "obs: the environment gave no info['final_obs'] (before Gymnasium 1.1: 'final_observation') at an episode's end"
    )


def _of_gymnasium() -> tuple[type, ...]:
    """Returns Gymnasium's own vector environments; those of ``make_vec`` are others than ``vector``'s before 1.0."""
    places = [vector]
    if BEFORE_1:
        places.append(import_module("gymnasium.experimental.vector"))
    return tuple(kind for place in places for kind in (place.SyncVectorEnv, place.AsyncVectorEnv))


def _check_wrappers(env: Any) -> None:
    while env is not env.unwrapped:
        if not isinstance(env, _KEEPS_OBSERVATIONS):
            raise InvalidArgumentError(
                f"{type(env).__name__} around a vector environment: in Gymnasium {gymnasium.__version__} the last observation of an "
                "episode would not pass through it; wrap the single environments instead, or install Gymnasium 1.1 or later"
            )
        env = env.env
