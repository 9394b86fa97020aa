"""Warning for an actor whose episodes look as if they used the other row convention."""

from __future__ import annotations

from collections.abc import Iterable

from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import server_info_of
from touchline.errors import TouchlineError
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_protos.types import rules
from touchline_protos.v1 import replay_pb2 as pb

INFO_TIMEOUT_S = 10.0
"""Deadline of the call that asks the server for its row convention."""

logger = get_logger(__name__)


class FirstRowCheck:
    """Warns once for each table of an action in row 0 under the row convention ``incoming``, which never samples it. Thread-safe.

    Args:
        rpc: client for the calls.
    """

    def __init__(self, rpc: RpcClient) -> None:
        self._rpc = rpc
        self._done: set[str] = set()
        """Tables whose row convention is known."""

    def check(self, episodes: Iterable[Episode], *, table: str) -> None:
        """Checks episodes stored in a table; asks the server for its row convention at the first one with an action in row 0."""
        if table in self._done:
            return
        found = next((episode for episode in episodes if rules.has_action_in_row_0(episode.columns)), None)
        if found is None:
            return
        self._done.add(table)
        request = pb.InfoRequest(table=table).SerializeToString()
        try:
            convention = server_info_of(self._rpc.unary("Info", request, timeout_s=INFO_TIMEOUT_S)).row_convention
        except (TouchlineError, KeyError, ValueError) as error:
            logger.debug("cannot read the row convention of %s: %s", self._rpc.channel.address, error)
            return
        if convention == "incoming":
            logger.warning("an episode of actor %r: %s", found.actor, rules.ACTION_IN_ROW_0)
