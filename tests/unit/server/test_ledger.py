"""The ledger of keys: retries, conflicts, gaps, and memory that does not grow with what was sent."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.store_cases import make_config, traced
from touchline_protos.codec import EpisodeKey
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import InvalidEpisodeError, KeyConflictError, ReplayBuffer
from touchline_server.durability.database import Database
from touchline_server.store import dedup
from touchline_server.store.dedup import DedupLedger, KnownEpisode, intervals_to_keep, payload_digest, sender_name


def key(sequence: int, client_id: str = "robot", incarnation: int = 1) -> EpisodeKey:
    return EpisodeKey(client_id, incarnation, sequence)


def test_digest_depends_on_values_names_dtypes_and_shapes_but_not_on_order() -> None:
    columns = {"a": np.arange(6, dtype=np.int32), "b": np.ones((2, 3))}
    others = [
        {"a": np.arange(1, 7, dtype=np.int32), "b": np.ones((2, 3))},
        {"a": np.arange(6, dtype=np.int32), "c": np.ones((2, 3))},
        {"a": np.arange(6, dtype=np.int32).view(np.float32), "b": np.ones((2, 3))},
        {"a": np.arange(6, dtype=np.int32), "b": np.ones((3, 2))},
        {"a": np.arange(6, dtype=np.int32)},
    ]

    digest = payload_digest(columns)

    assert payload_digest({"b": np.asfortranarray(columns["b"]), "a": np.repeat(columns["a"], 2)[::2]}) == digest
    assert digest not in [payload_digest(other) for other in others]


def test_digest_of_empty_scalar_and_bfloat16_columns_is_defined() -> None:
    columns = {"empty": np.empty((0, 3)), "scalar": np.float32(1), "bits": np.zeros(4, np.uint16).view(BFLOAT16), "\ud800": np.zeros(2)}

    assert payload_digest(columns) == payload_digest(columns) != payload_digest(columns | {"scalar": np.float32(2)})


def test_find_known_key_returns_its_episode() -> None:
    keys = DedupLedger()
    assert keys.find(key(3), 77) is None

    keys.remember(key(3), 77, 12)

    assert keys.find(key(3), 77) == KnownEpisode(12)


@pytest.mark.parametrize("other", [key(4), key(3, "another"), key(3, incarnation=2)])
def test_find_other_key_is_new(other: EpisodeKey) -> None:
    keys = DedupLedger()
    keys.remember(key(3), 77, 12)

    assert keys.find(other, 77) is None


def test_find_known_key_of_another_payload_conflicts() -> None:
    keys = DedupLedger()
    keys.remember(key(3), 77, 12)

    with pytest.raises(KeyConflictError, match=r"key \(robot, 1, 3\): was used for another episode"):
        keys.find(key(3), 78)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (key(0, ""), "key.client_id: 0 characters, expected 1 to 128"),
        (key(0, "n" * 129), "key.client_id: 129 characters, expected 1 to 128"),
        (key(-1), "key.sequence: -1, expected 0 or more"),
    ],
)
def test_find_malformed_key_is_refused(bad: EpisodeKey, message: str) -> None:
    with pytest.raises(InvalidEpisodeError, match=message):
        DedupLedger().find(bad, 0)


def limits(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setattr(dedup, f"MAX_{name.upper()}", value)


def answers(keys: DedupLedger, sequences: Iterable[int], client_id: str = "robot") -> list[object]:
    """The answer to each number: an id, -1, None if it is new, or "refused"."""
    found: list[object] = []
    for sequence in sequences:
        try:
            remembered = keys.find(key(sequence, client_id), 0)
            found.append(None if remembered is None else remembered.episode_id)
        except KeyConflictError as error:
            assert "too far behind" in str(error)
            found.append("refused")
    return found


def intervals(keys: DedupLedger) -> list[list[tuple[int, int]]]:
    return [spans for _, _, spans in keys.senders()]


def test_limits_keep_what_they_promise_to_keep() -> None:
    """A sender that is forgotten leaves no recent episode behind, and each keeps three intervals, however many senders there are."""
    most = [3] * (dedup.MAX_SENDERS - 100) + [dedup.MAX_INTERVALS] * 100

    assert dedup.MAX_RECENT <= dedup.MAX_SENDERS
    assert sum(most) > dedup.MAX_ALL_INTERVALS
    assert min(intervals_to_keep(most)) == 3


def test_find_key_older_than_its_checksum_is_still_a_duplicate() -> None:
    keys = DedupLedger()
    for sequence in range(dedup.MAX_RECENT + 5):
        keys.remember(key(sequence), 0, sequence)

    assert answers(keys, (0, 4, 5, dedup.MAX_RECENT + 4, dedup.MAX_RECENT + 5)) == [-1, -1, 5, dedup.MAX_RECENT + 4, None]


def test_remember_numbers_in_any_order_takes_the_memory_of_their_intervals() -> None:
    keys = DedupLedger()
    order = np.random.default_rng(0).permutation(500)
    for sequence in order.tolist():
        keys.remember(key(sequence), 0, 0)

    assert intervals(keys) == [[(0, 500)]]


def test_remember_takes_the_largest_numbers() -> None:
    keys = DedupLedger()
    for sequence in (2**63 - 2, 2**63 - 4, 0):
        keys.remember(key(sequence, incarnation=-(2**63)), 0, sequence % 10)

    assert intervals(keys) == [[(0, 1), (2**63 - 4, 2**63 - 3), (2**63 - 2, 2**63 - 1)]]
    assert keys.find(key(2**63 - 2, incarnation=-(2**63)), 0) == KnownEpisode(6)


def test_remember_too_many_gaps_refuses_what_it_forgot_and_acknowledges_nothing_falsely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits(monkeypatch, intervals=4, recent=2)
    keys = DedupLedger()
    for sequence in range(0, 200, 2):
        keys.remember(key(sequence), 0, sequence)

    assert answers(keys, range(190, 202)) == ["refused"] * 2 + [-1, None, -1, None, 196, None, 198, None, None, None]
    assert set(answers(keys, range(190))) == {"refused"}
    assert intervals(keys) == [[(192, 193), (194, 195), (196, 197), (198, 199)]]
    assert keys.forgotten_intervals == 96
    assert [record.args[0] for record in caplog.records] == [1, 2, 4, 8, 16, 32, 64]


def test_remember_too_many_intervals_of_all_takes_them_from_the_senders_with_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits(monkeypatch, all_intervals=64, recent=2)
    keys = DedupLedger()
    for number in range(4):
        for sequence in range(0, 6, 2):
            keys.remember(key(sequence, f"robot-{number}"), 0, 0)
    before = intervals(keys)
    for sequence in range(0, 106, 2):
        keys.remember(key(sequence, "broken"), 0, 0)

    assert intervals(keys)[:4] == before
    assert len(intervals(keys)[4]) == 51  # 63 of all, a 64th less than may be
    assert answers(keys, range(2, 6), "broken") == ["refused", "refused", -1, None]
    assert (keys.forgotten_intervals, keys.forgotten_senders) == (2, 0)
    assert "2 intervals of sequence numbers are forgotten, now 2 of 1 senders, whose" in caplog.text


def test_remember_too_many_senders_forgets_the_one_that_stored_longest_ago(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits(monkeypatch, senders=3, recent=3)
    keys = DedupLedger()
    for number in range(3):
        keys.remember(key(0, f"robot-{number}"), 0, number)
    keys.remember(key(1, "robot-0"), 0, 3)

    keys.remember(key(0, "robot-3"), 0, 4)

    assert [answers(keys, [0], f"robot-{number}") for number in range(4)] == [[-1], [None], [2], [4]]
    assert keys.forgotten_senders == 1
    assert "1 senders are forgotten" in caplog.text


def test_find_does_not_count_as_storing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The durable ledger does not see who only asks."""
    limits(monkeypatch, senders=2, recent=2)
    keys = DedupLedger()
    for number in range(2):
        keys.remember(key(0, f"robot-{number}"), 0, number)
    keys.find(key(0, "robot-0"), 0)

    keys.remember(key(0, "robot-2"), 0, 2)

    assert [answers(keys, [0], f"robot-{number}") for number in range(3)] == [[None], [1], [2]]


def test_memory_at_every_limit_is_what_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most senders, with the longest names, the most intervals, and the most recent episodes: a 16th of each, and of the memory."""
    limits(monkeypatch, senders=dedup.MAX_SENDERS // 16, recent=dedup.MAX_RECENT // 16, all_intervals=dedup.MAX_ALL_INTERVALS // 16)
    each = dedup.MAX_ALL_INTERVALS // dedup.MAX_SENDERS
    tracemalloc.start()
    try:
        keys = DedupLedger()
        for number in range(dedup.MAX_SENDERS):
            name = f"{number:0128}".replace("0", "\U0001f916")
            for sequence in range(each):
                keys.remember(EpisodeKey(name, number << 32, sequence * 2), sequence, (number * each + sequence) << 16)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert sum(map(len, intervals(keys))) == dedup.MAX_ALL_INTERVALS
    assert (keys.forgotten_intervals, keys.forgotten_senders) == (0, 0)
    assert held < (40 << 20) / 16


class PlainLedger:
    """The same promises, kept by sets and lists and without a thought of memory or time."""

    def __init__(self) -> None:
        self.stored: dict[str, set[int]] = {}
        """Stored numbers by client, the least recent client first."""
        self.below: dict[str, int] = {}
        self.recent: list[tuple[str, int, int, int]] = []

    def intervals(self, client: str) -> list[tuple[int, int]]:
        numbers = self.stored[client]
        firsts = sorted(number for number in numbers if number - 1 not in numbers)
        return [(first, next(after for after in itertools.count(first) if after not in numbers)) for first in firsts]

    def find(self, client: str, sequence: int, digest: int) -> object:
        if client not in self.stored:
            return None
        for known in self.recent:
            if known[:2] == (client, sequence):
                return known[3] if known[2] == digest else "conflict"
        if sequence < self.below[client]:
            return "refused"
        return -1 if sequence in self.stored[client] else None

    def remember(self, client: str, sequence: int, digest: int, episode_id: int) -> None:
        self.stored[client] = self.stored.pop(client, set())
        self.below.setdefault(client, 0)
        while len(self.stored) > dedup.MAX_SENDERS:
            oldest = next(iter(self.stored))
            del self.stored[oldest], self.below[oldest]
        self.recent = [*self.recent, (client, sequence, digest, episode_id)][-dedup.MAX_RECENT :]
        self.stored[client].add(sequence)
        self.keep(client, dedup.MAX_INTERVALS)
        if self.count() > dedup.MAX_ALL_INTERVALS:
            while self.count() > dedup.MAX_ALL_INTERVALS - dedup.MAX_ALL_INTERVALS // 64:
                sizes = {name: len(self.intervals(name)) for name in self.stored}
                most = max(sizes.values())
                self.keep(next(name for name, size in sizes.items() if size == most), most - 1)

    def keep(self, client: str, most: int) -> None:
        kept = self.intervals(client)[-most:]
        if len(kept) < len(self.intervals(client)):
            self.below[client] = kept[0][0]
            self.stored[client] = {number for number in self.stored[client] if number >= kept[0][0]}

    def count(self) -> int:
        return sum(len(self.intervals(client)) for client in self.stored)

    def state(self) -> tuple[object, object]:
        senders = [(sender_name(client, 1), self.below[client], self.intervals(client)) for client in self.stored]
        return senders, [(sender_name(client, 1), *rest) for client, *rest in self.recent]


def state(keys: DedupLedger) -> tuple[object, object]:
    return list(keys.senders()), list(keys.recent())


class Crash(Exception):
    """Ends a transaction."""


class LedgersAgainstPlainOne(RuleBasedStateMachine):
    """The ledger in memory and the one in the file, with little memory, against the plain one, and against all that was ever stored."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        limits(self.patch, senders=4, recent=4, intervals=5, all_intervals=11)
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(Path(self.folder.name) / "touchline.db")
        self.keys = DedupLedger()
        self.plain = PlainLedger()
        self.ever: dict[tuple[str, int], int] = {}
        """Digest of what was stored last under each key."""
        self.next_id = 0

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()
        self.patch.undo()

    @rule(client=st.sampled_from("abcdef"), sequence=st.integers(0, 20), digest=st.integers(0, 1))
    def send(self, client: str, sequence: int, digest: int) -> None:
        sent = key(sequence, client)
        answer: object
        try:
            remembered = self.keys.find(sent, digest)
            answer = None if remembered is None else remembered.episode_id
        except KeyConflictError as error:
            answer = "refused" if "too far behind" in str(error) else "conflict"
        assert answer == self.plain.find(client, sequence, digest)
        assert answer in (None, "refused") or (client, sequence) in self.ever  # nothing is acknowledged falsely
        if answer is None:
            assert (client, sequence) not in self.ever  # nothing is stored twice
            self.store(sent, digest)

    @rule(clients=st.lists(st.sampled_from("abcdef"), min_size=2, max_size=5))
    def send_next_in_one_group(self, clients: list[str]) -> None:
        """Numbers that were never used, in one transaction."""
        sent = [key(100 + self.next_id + place, client) for place, client in enumerate(clients)]
        self.store_group([(one, 1) for one in sent])

    @rule(client=st.sampled_from("abcdef"), sequence=st.integers(30, 40))
    def fail(self, client: str, sequence: int) -> None:
        """A transaction that comes to nothing."""

        def write() -> None:
            self.database.ledger.remember(key(sequence, client), 0, self.next_id)
            raise Crash

        with pytest.raises(Crash):
            self.database._transact(write, sync=False)

    @rule()
    def restart(self) -> None:
        path = self.database.path
        self.database.close()
        self.database = Database(path)
        self.keys = self.loaded()

    def store(self, sent: EpisodeKey, digest: int) -> None:
        self.store_group([(sent, digest)])

    def store_group(self, group: list[tuple[EpisodeKey, int]]) -> None:
        numbered = [(one, digest, self.next_id + place) for place, (one, digest) in enumerate(group)]
        self.next_id += len(group) + 2

        def write() -> None:
            for one in numbered:
                self.database.ledger.remember(*one)

        self.database._transact(write, sync=False)
        for one, digest, episode_id in numbered:
            before = set(self.plain.stored)
            self.keys.remember(one, digest, episode_id)
            self.plain.remember(one.client_id, one.sequence, digest, episode_id)
            self.ever[one.client_id, one.sequence] = digest
            for client in before - set(self.plain.stored):
                self.ever = {known: value for known, value in self.ever.items() if known[0] != client}

    def loaded(self) -> DedupLedger:
        keys = DedupLedger()
        self.database.ledger.load(keys)
        return keys

    @invariant()
    def all_three_know_the_same(self) -> None:
        assert state(self.keys) == self.plain.state()
        assert state(self.loaded()) == self.plain.state()

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(intervals(self.keys)) <= 4
        assert max(map(len, intervals(self.keys)), default=0) <= 5
        assert sum(map(len, intervals(self.keys))) == self.keys._intervals <= 11
        assert len(list(self.keys.recent())) <= 4


TestLedgersAgainstPlainOne = LedgersAgainstPlainOne.TestCase
TestLedgersAgainstPlainOne.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("taken_back", [key(3), key(4), key(9), key(0, "another"), key(0, incarnation=2)])
def test_forget_leaves_the_file_as_it_was(taken_back: EpisodeKey, tmp_path: Path) -> None:
    database = Database(tmp_path / "touchline.db")

    def loaded() -> tuple[object, object]:
        keys = DedupLedger()
        database.ledger.load(keys)
        return state(keys)

    for number, sequence in enumerate((0, 1, 2, 5)):
        database.ledger.remember(key(sequence), 7, number)
    before = loaded()
    database.ledger.remember(taken_back, 7, 9)
    assert loaded() != before

    database.ledger.forget(taken_back, 9)

    assert loaded() == before
    database.close()


def test_add_retry_is_acknowledged_and_not_stored_again() -> None:
    buffer = ReplayBuffer(make_config())
    first = buffer.add_episode(traced(1, 10, key=key(0)))

    again = buffer.add_episode(traced(1, 10, key=key(0)))

    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.episode_id == first.episode_id
    assert (again.counts.episodes_stored, again.counts.episodes_added, again.counts.episodes_duplicate) == (1, 1, 1)


def test_add_same_key_with_another_payload_conflicts_and_is_counted() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add_episode(traced(1, 10, key=key(0)))

    with pytest.raises(KeyConflictError, match="was used for another episode"):
        buffer.add_episode(traced(2, 10, key=key(0)))

    counts = buffer.counts()
    assert (counts.episodes_stored, counts.episodes_refused, counts.episodes_duplicate) == (1, 1, 0)


def test_add_refused_episode_leaves_its_key_free() -> None:
    buffer = ReplayBuffer(make_config(capacity=20))
    with pytest.raises(InvalidEpisodeError, match="21 rows"):
        buffer.add_episode(traced(1, 21, key=key(0)))

    stored = buffer.add_episode(traced(1, 20, key=key(0)))

    assert not stored.duplicate


def test_add_retry_after_eviction_and_clear_is_still_a_duplicate() -> None:
    buffer = ReplayBuffer(make_config(capacity=20))
    buffer.add_episode(traced(0, 15, key=key(0)))
    buffer.add_episode(traced(1, 15, key=key(1)))
    buffer.clear()

    again = [buffer.add_episode(traced(number, 15, key=key(number))).duplicate for number in (0, 1)]

    assert again == [True, True]
    assert buffer.num_eps == 0
