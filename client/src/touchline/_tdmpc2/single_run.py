"""One training run on a server that outlives the run and serves others, unlike a buffer in the trainer's own process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from touchline._rpc.calls import reason_of
from touchline._rpc.waits import waiting
from touchline.client import ReplayClient
from touchline.errors import AccessDeniedError, InvalidArgumentError, TooLargeError, UnavailableError
from touchline.types import ServerInfo
from touchline_protos import Batch, Counts
from touchline_protos.log_lines import get_logger

FRESH_VARIABLE = "TOUCHLINE_FRESH"
ACCEPT_EVICTION_VARIABLE = "TOUCHLINE_ACCEPT_EVICTION"
AWAY_S = 60.0
"""Longest wait for an absent server when the run begins."""

logger = get_logger(__name__)


class Backend(Protocol):
    """Methods of a buffer that ``touchline_server.ReplayBuffer`` and :class:`~touchline.ReplayClient` have in common."""

    @property
    def capacity(self) -> int:
        """Maximum number of rows."""

    def add(self, episode: Mapping[str, Any], /) -> int:
        """Stores one episode."""

    def load(self, episodes: Mapping[str, Any], /) -> int:
        """Stores many episodes."""

    def sample(self, *, batch_size: int, horizon: int, law: str, pad: str, **mixing: Any) -> Batch:
        """Draws one batch; ``mixing`` is ``mix`` and ``when_empty``, if it comes from several tables."""

    def counts(self) -> Counts:
        """Returns the counts of this moment."""

    def clear(self) -> Counts:
        """Removes all episodes."""


class SingleRun:
    """One run on a buffer that may have served others. Logs what the run finds there. Not thread-safe, except ``episodes``.

    Args:
        backend: buffer of the run.
        capacity: number of rows that the run asks for.
        fresh: whether to empty the buffer first; None: only if ``TOUCHLINE_FRESH`` is 1.
        accept_eviction: whether a load may evict what was loaded before; None: only if ``TOUCHLINE_ACCEPT_EVICTION`` is 1.

    Raises:
        InvalidArgumentError: the buffer's row convention is not ``incoming``, or a variable is neither 0 nor 1.
        UnavailableError: no server answers.
        AccessDeniedError: the token lacks the role.
    """

    def __init__(self, backend: Backend, *, capacity: int, fresh: bool | None = None, accept_eviction: bool | None = None) -> None:
        fresh = _is_set(FRESH_VARIABLE) if fresh is None else fresh
        self._accept_eviction = _is_set(ACCEPT_EVICTION_VARIABLE) if accept_eviction is None else accept_eviction
        self._backend = backend
        self._loaded = 0
        self._place, self._capacity, convention = _describe(backend)
        if convention != "incoming":
            raise InvalidArgumentError(f"sampling.row_convention of the server: {convention!r}, expected 'incoming', which is TD-MPC2's")
        counts = self._clear() if fresh else backend.counts()
        self._before = counts.episodes_evicted
        if counts.episodes_stored:
            logger.warning(
                "%s already holds %d episodes (%d steps), which this run samples, too; fresh=True or %s=1 empties it first",
                self._place,
                counts.episodes_stored,
                counts.steps_stored,
                FRESH_VARIABLE,
            )
        self._warn_of_capacity(capacity)

    def episodes(self) -> int:
        """Returns the number of this run's episodes: those stored when it began, and all added since."""
        counts = self._backend.counts()
        self._before = min(self._before, counts.episodes_evicted)  # fewer than before: the server has restarted without its episodes
        return counts.episodes_added - self._before

    def check_load(self, columns: Mapping[str, Any]) -> None:
        """Checks a load and adds it to the run's total.

        Args:
            columns: columns [episodes, rows, ...].

        Raises:
            TooLargeError: the run's loads would exceed the buffer together.
        """
        shape = tuple(next(iter(columns.values())).shape) if columns else ()
        rows = shape[0] * shape[1] if len(shape) > 1 else 0  # a malformed load: the backend raises the error
        if self._loaded + rows > self._capacity and not self._accept_eviction:
            before = f" after {self._loaded:,} loaded before" if self._loaded else ""
            raise TooLargeError(
                f"load: {rows:,} steps{before}, expected at most {self._capacity:,} in all, the capacity of {self._place} "
                f"(config.buffer_size): {self._loaded + rows - self._capacity:,} would be evicted. Start the server with a larger "
                f"config.buffer_size, or keep only the newest: accept_eviction=True or {ACCEPT_EVICTION_VARIABLE}=1"
            )
        self._loaded += rows

    def _clear(self) -> Counts:
        try:
            counts = self._backend.clear()
        except AccessDeniedError as error:
            raise AccessDeniedError(
                f"fresh: emptying the server takes a token of the role admin (TOUCHLINE_TOKEN): {error}. Or ask its operator to run "
                f"`touchline clear`, and remove fresh=True and {FRESH_VARIABLE}"
            ) from error
        logger.info("%s was emptied for this run", self._place)
        return counts

    def _warn_of_capacity(self, requested: int) -> None:
        if self._capacity == requested:
            return
        difference = f"{abs(requested - self._capacity):,} {'fewer' if self._capacity < requested else 'more'} than"
        logger.warning(
            "%s keeps %s steps (config.buffer_size), %s the %s that cfg asks for, min(cfg.buffer_size, cfg.steps); to change it, start the "
            "server with TOUCHLINE_CONFIG__BUFFER_SIZE=%d",
            self._place,
            f"{self._capacity:,}",
            difference,
            f"{requested:,}",
            requested,
        )


def check_row_convention(backend: Any, table: str) -> None:
    """Raises InvalidArgumentError if a table's row convention is not TD-MPC2's; UnknownTableError, of either side, if there is none."""
    if isinstance(backend, ReplayClient):
        convention = backend.info(table=table).row_convention
    else:
        convention = backend.registry.get(table).config.sampling.row_convention
    if convention != "incoming":
        raise InvalidArgumentError(f"row_convention of table {table!r}: {convention!r}, expected 'incoming', which is TD-MPC2's")


def _describe(backend: Any) -> tuple[str, int, str]:
    """Returns a buffer's name for messages, its capacity in rows, and its row convention."""
    if not isinstance(backend, ReplayClient):
        return "the buffer", backend.capacity, str(backend.config.sampling.row_convention)
    info = _first_answer(backend)
    table = f" (table {backend.table!r})" if backend.table else ""
    return f"the server at {backend.address}{table}", info.capacity, info.row_convention


def _first_answer(client: ReplayClient) -> ServerInfo:
    """Returns a server's information. Logs immediately if it is away, and waits: without limit while it is restoring."""
    with waiting("the drop-in buffer", client.address, lambda: "no answer yet", first_s=0.0):
        while True:
            try:
                return client.info(timeout_s=AWAY_S)
            except UnavailableError as error:
                if reason_of(error) != "restoring":
                    raise


def _is_set(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise InvalidArgumentError(f"environment variable {variable}: {value!r}, expected 1 or 0")
    return value == "1"
