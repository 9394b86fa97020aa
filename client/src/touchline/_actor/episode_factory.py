"""A caller's mappings of arrays become episodes that can be sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from touchline._actor.keys import Identity
from touchline._rpc.convert import check_actor, check_policy_version
from touchline.errors import InvalidArgumentError, InvalidEpisodeError, TouchlineError
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.casting import narrow
from touchline_protos.types.dtypes import to_wire
from touchline_protos.types.flatten import ColumnError, flatten_columns, split_episodes


class EpisodeFactory:
    """Makes episodes that carry everything the server stores with them. Thread-safe.

    Args:
        identity: gives each episode its key.
        dtype: the dtype that float64 columns are rounded to; None leaves them as they are.
    """

    def __init__(self, identity: Identity, *, dtype: np.dtype[Any] | None) -> None:
        self._identity = identity
        self._dtype = dtype

    def make(self, columns: Any, *, actor: str, policy_version: int, key: EpisodeKey | None) -> tuple[EpisodeKey, Episode]:
        """Returns one episode and its key; arguments and errors as :meth:`ReplayClient.add` has them."""
        if key is not None and not isinstance(key, EpisodeKey):
            raise InvalidArgumentError(f"key: {key!r}, expected an EpisodeKey, for example from next_key()")
        name, version = check_actor(actor), check_policy_version(policy_version)
        key = self._identity.next_key() if key is None else key
        return key, make_episode(columns, key=key, actor=name, policy_version=version, dtype=self._dtype)

    def make_all(
        self, episodes: Any, *, actor: str | Sequence[str], policy_version: int
    ) -> Iterator[tuple[EpisodeKey, Episode | TouchlineError]]:
        """Returns an iterator of episodes, each with its key, or with the error of a malformed one. Checks actor and version immediately.

        Args:
            episodes: the episodes, as :meth:`ReplayClient.load` takes them.
            actor: name of the actor of all of them, or as many names as there are episodes.
            policy_version: version of the policy that acted.

        Raises:
            InvalidArgumentError: an actor's name or the policy version is out of range.
            InvalidEpisodeError: while iterating, if ``episodes`` is one mapping whose arrays do not fit each other.
        """
        names = repeat(check_actor(actor)) if isinstance(actor, str) else list(map(check_actor, actor))
        version = check_policy_version(policy_version)

        def items() -> Iterator[tuple[EpisodeKey, Episode | TouchlineError]]:
            for columns, name in zip(split_load(episodes), names, strict=False):
                key = self._identity.next_key()
                try:
                    yield key, make_episode(columns, key=key, actor=name, policy_version=version, dtype=self._dtype)
                except InvalidEpisodeError as error:
                    yield key, error

        return items()


def make_episode(columns: Any, *, key: EpisodeKey, actor: str, policy_version: int, dtype: np.dtype[Any] | None = None) -> Episode:
    """Returns an episode that can be sent.

    Args:
        columns: mapping or TensorDict of arrays or tensors [rows, ...], perhaps nested. Not changed; its memory is shared.
        key: key of the episode, which makes sending it again harmless.
        actor: name of the actor that played it.
        policy_version: version of the policy that acted.
        dtype: dtype that float64 columns are rounded to; None leaves them as they are.

    Raises:
        InvalidEpisodeError: not a mapping of arrays of one length and of supported dtypes.
    """
    try:
        arrays = {name: narrow(name, column, dtype) for name, column in flatten_columns(columns).items()}
    except ColumnError as error:
        raise InvalidEpisodeError(str(error)) from None
    if not arrays:
        raise InvalidEpisodeError("episode: no columns, expected at least obs, action and reward")
    first = next(iter(arrays))
    for name, array in arrays.items():
        if not array.ndim:
            raise InvalidEpisodeError(f"{name}: a scalar, expected one value a row")
        try:
            to_wire(array.dtype)
        except ValueError as error:
            raise InvalidEpisodeError(f"{name}: {error}") from None
    for name, array in arrays.items():
        if len(array) != len(arrays[first]):
            raise InvalidEpisodeError(f"{name}: {len(array)} rows, expected {len(arrays[first])} to match {first}")
    return Episode(arrays, key=key, actor=actor, policy_version=policy_version)


def split_load(episodes: Any) -> Iterator[Any]:
    """Yields the episodes of a load, as :func:`~touchline_protos.types.flatten.split_episodes` does.

    Raises:
        InvalidEpisodeError: the arrays of one mapping hold unequal numbers of episodes, or have fewer than two dimensions.
    """
    try:
        yield from split_episodes(episodes)
    except ColumnError as error:
        raise InvalidEpisodeError(str(error)) from None
