"""Keys of episodes, which make adding idempotent."""

from __future__ import annotations

import itertools
import secrets
import socket
import time
import uuid

from touchline._rpc.fork import register_after_fork
from touchline.errors import InvalidArgumentError
from touchline_protos.codec import EpisodeKey
from touchline_protos.types.names import name_fault

_RANDOM_BITS = 20


class Identity:
    """Identity of a client, and the source of its episodes' keys. Thread-safe.

    Args:
        client_id: name of the client, 1 to 128 characters; None makes ``<hostname>-<random>``.

    Raises:
        InvalidArgumentError: the name is not a str, is empty or too long, or has control characters.
    """

    def __init__(self, client_id: str | None = None) -> None:
        if client_id is not None and not isinstance(client_id, str):
            raise InvalidArgumentError(f"client_id: {client_id!r}, expected a str or None")
        fault = None if client_id is None else name_fault(client_id, min_chars=1)
        if fault is not None:
            raise InvalidArgumentError(f"client_id: {fault}")
        self.given_id = client_id
        """Name as the caller passed it; None for a generated one."""
        self._renew()
        register_after_fork(self)

    @property
    def client_id(self) -> str:
        """Name of the client."""
        return self._client_id

    def next_key(self) -> EpisodeKey:
        """Returns a new key."""
        return EpisodeKey(self._client_id, self._incarnation, next(self._sequence))

    def after_fork_in_child(self) -> None:
        """Takes a new identity: parent and child would give the same keys to different episodes."""
        self._renew()

    def _renew(self) -> None:
        self._client_id = self.given_id or f"{socket.gethostname()[:90]}-{uuid.uuid4().hex}"
        # Two senders of one name that start in the same clock tick differ in the low bits.
        self._incarnation = time.time_ns() >> _RANDOM_BITS << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        self._sequence = itertools.count()  # next() on it is one step under the interpreter's lock
