"""Where the randomness of draws comes from."""

from __future__ import annotations

import itertools

import numpy as np

from touchline_server.errors import InvalidArgumentError


class SeedSource:
    """Gives each stream of batches a random generator of its own. Thread-safe.

    Without a seed each generator takes fresh entropy. With one, a generator is seeded with it and the stream's number, so two learners
    never get the same batches by accident, yet the same order of streams gives the same batches again.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._streams = itertools.count()

    def stream(self, seed: int | None = None) -> np.random.Generator:
        """Returns the next stream's generator.

        Args:
            seed: if given, the only seed of the generator; the stream takes no number then.

        Raises:
            InvalidArgumentError: the seed is negative.
        """
        if seed is not None:
            if seed < 0:
                raise InvalidArgumentError(f"seed: {seed}, expected 0 or more")
            return np.random.default_rng(seed)
        number = next(self._streams)
        return np.random.default_rng(None if self._seed is None else [self._seed, number])
