"""The ledger of keys: retries, conflicts, gaps, and memory that does not grow with what was sent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from store_cases import make_config, traced
from touchline_protos.codec import EpisodeKey
from touchline_protos.dtypes import BFLOAT16
from touchline_server import InvalidEpisodeError, KeyConflictError, ReplayBuffer, ledger
from touchline_server.ledger import KeyLedger, Remembered, payload_digest


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
    keys = KeyLedger()
    assert keys.find(key(3), 77) is None

    keys.remember(key(3), 77, 12)

    assert keys.find(key(3), 77) == Remembered(12)


@pytest.mark.parametrize("other", [key(4), key(3, "another"), key(3, incarnation=2)])
def test_find_other_key_is_new(other: EpisodeKey) -> None:
    keys = KeyLedger()
    keys.remember(key(3), 77, 12)

    assert keys.find(other, 77) is None


def test_find_known_key_of_another_payload_conflicts() -> None:
    keys = KeyLedger()
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
        KeyLedger().find(bad, 0)


def test_find_key_older_than_its_checksum_is_still_a_duplicate() -> None:
    keys = KeyLedger()
    for sequence in range(ledger.MAX_RECENT + 5):
        keys.remember(key(sequence), sequence, sequence)

    assert keys.find(key(4), 4) == Remembered(-1)
    assert keys.find(key(5), 5) == Remembered(5)


def test_remember_numbers_in_any_order_takes_the_memory_of_their_runs() -> None:
    keys = KeyLedger()
    order = np.random.default_rng(0).permutation(500)
    for sequence in order.tolist():
        keys.remember(key(sequence), 0, 0)

    sender = keys._senders["robot", 1]

    assert (sender._begins, sender._ends) == ([0], [500])


def test_remember_too_many_gaps_refuses_what_it_forgot_and_acknowledges_nothing_falsely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_GAPS", 4)
    monkeypatch.setattr(ledger, "MAX_RECENT", 2)
    keys = KeyLedger()
    for sequence in range(0, 200, 2):
        keys.remember(key(sequence), 0, sequence)

    answers = {}
    for sequence in range(202):
        try:
            answers[sequence] = keys.find(key(sequence), 0)
        except KeyConflictError as error:
            assert "too far behind" in str(error)
            answers[sequence] = "refused"

    assert all(answers[sequence] in (None, "refused") for sequence in range(1, 202, 2))
    assert all(answers[sequence] == Remembered(-1) for sequence in (192, 194))
    assert [answers[sequence] for sequence in (196, 198, 200, 201)] == [Remembered(196), Remembered(198), None, None]
    assert answers[0] == answers[1] == "refused"
    assert len(keys._senders["robot", 1]._begins) == 4


def test_remember_too_many_senders_forgets_the_one_heard_from_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_SENDERS", 3)
    keys = KeyLedger()
    for number in range(3):
        keys.remember(key(0, f"robot-{number}"), 0, number)
    keys.find(key(0, "robot-0"), 0)  # a retry is heard too

    keys.remember(key(0, "robot-3"), 0, 3)

    assert [keys.find(key(0, f"robot-{number}"), 0) for number in range(4)] == [Remembered(0), None, Remembered(2), Remembered(3)]


class LedgerAgainstSet(RuleBasedStateMachine):
    """The model keeps everything. The ledger, with little memory, may refuse what the model knows or not, but never gets one wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = ledger.MAX_GAPS, ledger.MAX_RECENT
        ledger.MAX_GAPS, ledger.MAX_RECENT = 5, 4
        self.keys = KeyLedger()
        self.stored: dict[EpisodeKey, tuple[int, int]] = {}
        self.newest: dict[str, list[int]] = {"a": [], "b": []}

    def teardown(self) -> None:
        ledger.MAX_GAPS, ledger.MAX_RECENT = self.limits

    @rule(client=st.sampled_from("ab"), sequence=st.integers(0, 40), digest=st.integers(0, 1))
    def send(self, client: str, sequence: int, digest: int) -> None:
        sent = key(sequence, client)
        known = self.stored.get(sent)
        recent = sequence in self.newest[client][-4:]
        try:
            answer = self.keys.find(sent, digest)
        except KeyConflictError as error:
            assert (recent and known is not None and known[0] != digest) or "too far behind" in str(error)
            return
        if known is None:
            assert answer is None
            self.stored[sent] = (digest, len(self.stored))
            self.newest[client].append(sequence)
            self.keys.remember(sent, *self.stored[sent])
        elif recent:
            assert known[0] == digest
            assert answer == Remembered(known[1])
        else:
            assert answer == Remembered(-1)

    @invariant()
    def memory_is_bounded(self) -> None:
        for sender in self.keys._senders.values():
            assert len(sender._begins) == len(sender._ends) <= 5
            assert len(sender.recent) <= 4


TestLedgerAgainstSet = LedgerAgainstSet.TestCase
TestLedgerAgainstSet.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


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
