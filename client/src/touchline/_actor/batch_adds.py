"""The verb of a client that adds the episodes of a vector simulator together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from touchline._actor.episode_factory import EpisodeFactory
from touchline._actor.upload import EpisodeUploader
from touchline._rpc.convert import seconds_or_none
from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline_protos.types.episode_batch import flatten_batch, split_batch, to_host
from touchline_protos.types.flatten import ColumnError


class BatchAdds:
    """Base of :class:`touchline.ReplayClient`."""

    actor: str
    _factory: EpisodeFactory
    _uploader: EpisodeUploader

    def add_batch(
        self,
        episodes: Mapping[str, Any],
        *,
        lengths: Any = None,
        table: str | None = None,
        actor: str | Sequence[str] | None = None,
        policy_version: int = 0,
        timeout_s: float | None = None,
    ) -> int:
        """Stores the episodes of a vector simulator and returns the number of episodes in the table.

        Tensors on a CUDA device go to pinned host memory, all in one go that waits for the current stream, and from there to the server.

        Args:
            episodes: mapping or TensorDict of arrays or tensors [envs, T, ...], with the columns of :meth:`ReplayClient.add`. Not changed,
                and not needed after the call.
            lengths: [envs] integers, 1 to T: rows of each episode, the first of its T. None: all T.
            table: table to store them in; None takes the client's.
            actor: name of the actor that played them, or a name for each; None takes the client's.
            policy_version: version of the policy that acted; 0 if unknown.
            timeout_s: deadline of each call; None takes the client's.

        Raises:
            LoadError: some episodes were refused, all others are stored. Its ``results`` has the outcome of each.
            InvalidEpisodeError: the arrays or the lengths do not fit each other. Nothing is stored.
            InvalidArgumentError: there is not a name for each episode, or an argument is out of range.
            UnavailableError, DeadlineError: a call failed. A note on the error says how many episodes were answered before.
        """
        try:
            columns, rows = flatten_batch(episodes, lengths)
            on_host = to_host(columns)
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        if actor is None:
            actor = self.actor
        if not isinstance(actor, str) and len(actor) != len(rows):
            raise InvalidArgumentError(f"actor: {len(actor)} names, expected {len(rows)}, one for each episode")
        made = self._factory.make_all(split_batch(on_host, rows), actor=actor, policy_version=policy_version)
        limit_s = seconds_or_none("timeout_s", timeout_s)
        counts = self._uploader.load(made, table=self._table_or_own(table), timeout_s=limit_s)
        assert counts is not None  # of at least one episode
        return counts.episodes_stored

    def _table_or_own(self, table: str | None) -> str:
        raise NotImplementedError
