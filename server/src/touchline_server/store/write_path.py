"""The one write path: plan → journal → apply.

1. Plan (:mod:`.plan`): check each episode, and work out its id, the episodes it evicts, and the schema and counts that follow.
2. Journal (:mod:`.journal`): make the plan durable. A store in memory has the journal that does nothing.
3. Apply (:mod:`.episode_ring`): evict, copy the rows, publish; then answer.

A failure leaves nothing behind, whichever step it comes from: a plan changes nothing, a plan that the journal does not take is dropped, and
inserts that cannot be applied are taken out of the journal again. (What they evicted is gone, from ring and journal alike, and their ids
are not used again.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.errors import InvalidEpisodeError, OverLimitError, ReplayError, StorageFullError
from touchline_server.store.dedup import DedupLedger, payload_digest
from touchline_server.store.episode_block import EpisodeBlock
from touchline_server.store.episode_ring import EpisodeRing
from touchline_server.store.inserts import AddRequest, Duplicate, PlannedInsert, Stored
from touchline_server.store.journal import Journal, NullJournal
from touchline_server.store.plan import InsertPlan
from touchline_server.store.schema import Schema
from touchline_server.store.subscriptions import Subscriptions

logger = get_logger(__name__)

Outcome = Stored | Exception
"""Outcome of a request: the answer, or why it was refused."""


class WritePath:
    """Changes what a table holds, for one thread at a time. Every method may be called from any thread.

    Args:
        ring: the table's state.
    """

    def __init__(self, ring: EpisodeRing) -> None:
        self._ring = ring
        self.lock = threading.RLock()
        """The write lock, held from plan to apply; readers never take it. Reentrant: TorchRL's buffer holds it around its calls."""
        self.journal: Journal = NullJournal()
        """The journal in use. Set once, before anything is added."""
        self.subscriptions = Subscriptions()
        """Listeners to every change of what is stored."""

    def add(self, episode: Episode) -> Stored:
        """Stores one episode; without a journal, which needs a digest of each. Raises whatever refused it."""
        return self.store(AddRequest(episode, payload_digest(episode.columns) if episode.key is not None else 0))

    def store(self, request: AddRequest) -> Stored:
        """Stores one episode. Raises whatever refused it."""
        with self.lock:
            outcomes = self._commit((request,), may_wait=True)
        assert outcomes is not None
        stored = _stored(outcomes[0])
        self.subscriptions.notify()
        return stored

    def try_add(self, episode: Episode) -> Stored | None:
        """Stores one episode like :meth:`add`, or does nothing and returns None if that would mean waiting."""
        columns = self._ring.columns
        if self.journal.may_wait or columns is None or not columns.in_host_memory or not self.lock.acquire(blocking=False):
            return None
        try:
            # Checked again under the lock: the table may have been cleared meanwhile. Readers are checked again before the eviction; this
            # first check only saves the work of planning.
            if self._ring.columns is None or self._ring.epochs.active:
                return None
            digest = payload_digest(episode.columns) if episode.key is not None else 0
            outcomes = self._commit((AddRequest(episode, digest),), may_wait=False)
        finally:
            self.lock.release()
        if outcomes is None:
            return None
        stored = _stored(outcomes[0])
        self.subscriptions.notify()
        return stored

    def commit(self, requests: Sequence[AddRequest]) -> list[Outcome]:
        """Stores a group of episodes: those that are refused in the plan each by themselves, the others all or none up to the journal.

        Returns:
            An outcome for each request, in order. Refused episodes are counted already.
        """
        with self.lock:
            outcomes = self._commit(requests, may_wait=True)
        assert outcomes is not None
        for outcome in outcomes:
            if isinstance(outcome, Stored):
                self.subscriptions.notify()
                break
        return outcomes

    def add_block(self, block: EpisodeBlock) -> list[Stored]:
        """Stores episodes together, all or none; without a journal, and without keys. At most as many rows as the ring has.

        Raises:
            InvalidEpisodeError: an episode is malformed or does not fit the schema; the message says which.
        """
        with self.lock:
            plan = InsertPlan(self._ring)
            try:
                for number, request in enumerate(block.requests):
                    try:
                        plan.add(request)
                    except InvalidEpisodeError as error:
                        raise InvalidEpisodeError(f"episode {number}: {error}") from None
                assert plan.columns is not None
                stored = self._ring.apply_block(plan.inserts, plan.columns, block)
            except BaseException:
                plan.rollback()
                raise
        self.subscriptions.notify()
        return stored

    def clear(self) -> None:
        """Evicts every episode and forgets the schema; ids, keys and counts continue. Raises as :meth:`Journal.clear` does."""
        self.journal.check_writable()
        with self.lock:
            self.journal.clear(self._ring.totals.counts(0, 0))
            self._ring.empty()
        self.subscriptions.notify()

    def restore(
        self, inserts: Iterable[PlannedInsert], schema: Schema | None, *, counts: Counts, ledger: DedupLedger, next_id: int
    ) -> None:
        """Applies what a journal held when the table is opened. The table must be empty.

        Args:
            inserts: the stored episodes, oldest first; read one at a time.
            schema: the columns' schema; None if there are no episodes.
            counts: the counts with these episodes.
            ledger: the known keys.
            next_id: smallest id for the next episode.
        """
        with self.lock:
            columns = self._ring.allocate(schema) if schema is not None else None
            for insert in inserts:
                assert columns is not None
                self._ring.apply(insert, columns)
            self._ring.resume(counts, ledger, next_id=next_id)

    def counts(self) -> Counts:
        """Returns the table's counts at this moment."""
        return self._ring.counts()

    @property
    def next_id(self) -> int:
        """Id of the next episode. Stable while the write lock is held."""
        return self._ring.next_id

    def _commit(self, requests: Sequence[AddRequest], *, may_wait: bool) -> list[Outcome] | None:
        plan = InsertPlan(self._ring)
        answers: list[PlannedInsert | Duplicate | Exception] = []
        for request in requests:
            try:
                answers.append(plan.add(request))
            except Exception as error:
                if not isinstance(error, ReplayError):
                    logger.exception("an episode could not be planned")
                answers.append(error)
        if plan.inserts:
            if not may_wait and not self._ring.try_make_room(plan.inserts[-1]):
                plan.rollback()
                return None
            self._write_and_apply(plan)
        return [self._outcome(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _write_and_apply(self, plan: InsertPlan) -> None:
        """Sets the outcome of each insert."""
        try:
            self.journal.write(plan)
        except BaseException as error:
            plan.rollback()
            if not isinstance(error, Exception):
                raise
            _set_outcome(plan.inserts, error)
            return
        assert plan.columns is not None
        for position, insert in enumerate(plan.inserts):
            try:
                insert.outcome = self._ring.apply(insert, plan.columns)
            except BaseException as error:
                plan.rollback()
                if not isinstance(error, Exception):
                    raise  # an interrupt: how much of the group is in the ring is unknown
                lost = plan.inserts[position:]
                _set_outcome(lost, self._undo(lost, error))
                return

    def _undo(self, lost: Sequence[PlannedInsert], reason: Exception) -> Exception:
        """Takes back inserts that were written and could not be applied; returns why they are not stored, or may be after a restart."""
        ids = [insert.episode_id for insert in lost]
        logger.error("episodes %s could not be copied into the ring: they are not stored", ids)
        # Their ids may stand in pages of the journal's file that nothing else uses: they are not given to other episodes.
        self._ring.next_id = max(self._ring.next_id, ids[-1] + 1)
        # In the journal they have evicted others already, which the ring follows.
        evicted = [episode_id for insert in lost for episode_id in insert.evicted]
        if evicted:
            self._ring.evict_through(evicted[-1])
        try:
            self.journal.undo(lost, self._ring.counts())
        except ReplayError as error:
            return error
        return reason

    def _outcome(self, request: AddRequest, answer: PlannedInsert | Duplicate | Exception) -> Outcome:
        outcome: Outcome | None
        if isinstance(answer, PlannedInsert):
            outcome = answer.outcome
            if isinstance(outcome, Stored):
                return outcome
        elif isinstance(answer, Duplicate):
            original = answer.original
            # An original of the same group may have failed, and this one with it.
            failed = original is not None and isinstance(original.outcome, Exception)
            outcome = original.outcome if original is not None and failed else self._ring.count_duplicate(answer.episode_id)
        else:
            outcome = answer
        assert outcome is not None
        if isinstance(outcome, Exception) and _counts_as_refused(outcome):
            self._ring.count_refused(str(outcome), request.episode)
        return outcome


def _counts_as_refused(error: Exception) -> bool:
    """Returns whether the error refuses an episode. OverLimitError only asks to send it again later, except if a disk is full."""
    return isinstance(error, StorageFullError) or not isinstance(error, OverLimitError)


def _set_outcome(inserts: Iterable[PlannedInsert], error: Exception) -> None:
    for insert in inserts:
        insert.outcome = error


def _stored(outcome: Outcome) -> Stored:
    if isinstance(outcome, Stored):
        return outcome
    try:
        raise outcome
    finally:
        del outcome  # or its traceback and this frame would keep each other alive
