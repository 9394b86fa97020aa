"""AddEpisode and LoadEpisodes on a real server: what is stored, counted, acknowledged and answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from support.service_calls import Caller, eventually, key, make_episode, refused, serving
from support.store_cases import read_episode, sample_with
from touchline_protos.codec import Episode, encode_load, encode_loads
from touchline_protos.types.dtypes import to_wire
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread

ACCEPTED = pb.EpisodeResult.OUTCOME_ACCEPTED
DUPLICATE = pb.EpisodeResult.OUTCOME_DUPLICATE
INVALID = pb.EpisodeResult.OUTCOME_INVALID
KEY_CONFLICT = pb.EpisodeResult.OUTCOME_KEY_CONFLICT
TOO_LARGE = pb.EpisodeResult.OUTCOME_TOO_LARGE

CHUNK_BYTES = 100

Served = tuple[ServerThread, Caller]


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as pair:
        yield pair


def stored_episode(server: ServerThread, position: int) -> dict[str, np.ndarray]:
    """Returns the columns of the n-th oldest stored episode."""
    return read_episode(server.buffer.store, server.buffer.store.entries()[position])


def assert_stored(server: ServerThread, position: int, episode: Episode) -> None:
    found = stored_episode(server, position)
    assert found.keys() == episode.columns.keys()
    for name, column in episode.columns.items():
        assert found[name].tobytes() == column.tobytes(), name


def test_add_episode_is_stored_bit_for_bit_and_counted(served: Served) -> None:
    server, caller = served
    first, second = make_episode(20, seed=1, actor="a", policy_version=7), make_episode(3, seed=2)

    answers = [caller.add(first), caller.add(second)]

    assert [(answer.episode_id, answer.duplicate) for answer in answers] == [(0, False), (1, False)]
    assert answers[-1].counts == pb.Counts(steps_stored=23, episodes_stored=2, steps_added=23, episodes_added=2, episodes_too_short=1)
    assert_stored(server, 0, first)
    assert_stored(server, 1, second)


def test_add_episode_by_the_generated_classes_is_stored_alike(served: Served) -> None:
    server, caller = served
    episode = make_episode(12, seed=3)
    columns = [
        pb.Column(name=name, tensor=pb.Tensor(dtype=int(to_wire(array.dtype)), shape=array.shape, data=array.tobytes()))
        for name, array in episode.columns.items()
    ]

    answer = caller.stub.AddEpisode(pb.AddEpisodeRequest(episode=pb.Episode(actor="g", policy_version=4, columns=columns)))

    assert (answer.episode_id, answer.counts.steps_stored) == (0, 12)
    assert_stored(server, 0, episode)
    batch = caller.sample()
    assert batch.actor_names[int(batch.actor[0])] == "g"
    assert set(batch.policy_version.tolist()) == {4}


def test_add_episode_same_key_and_payload_is_acknowledged_and_not_stored_again(served: Served) -> None:
    _, caller = served
    first = caller.add(make_episode(seed=1, key=key(0)))
    caller.add(make_episode(seed=2, key=key(1)))

    again = caller.add(make_episode(seed=1, key=key(0)))

    assert (again.episode_id, again.duplicate) == (first.episode_id, True)
    assert (again.counts.episodes_stored, again.counts.episodes_added, again.counts.episodes_duplicate) == (2, 2, 1)


def test_add_episode_same_key_and_another_payload_is_refused(served: Served) -> None:
    server, caller = served
    caller.add(make_episode(seed=1, key=key(5)))

    refusal = refused(caller.add, make_episode(seed=2, key=key(5)))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "key-conflict")
    assert "(player, 1, 5)" in refusal.details
    assert (caller.counts().episodes_stored, caller.counts().episodes_refused) == (1, 1)
    assert_stored(server, 0, make_episode(seed=1))


def test_add_episode_same_number_of_another_incarnation_is_another_episode(served: Served) -> None:
    _, caller = served
    caller.add(make_episode(seed=1, key=key(0, incarnation=1)))

    other = caller.add(make_episode(seed=1, key=key(0, incarnation=2)))

    assert (other.duplicate, other.counts.episodes_stored) == (False, 2)


def test_add_episode_without_a_key_is_stored_each_time(served: Served) -> None:
    _, caller = served

    answers = [caller.add(make_episode(seed=1)) for _ in range(2)]

    assert [answer.episode_id for answer in answers] == [0, 1]
    assert answers[-1].counts.episodes_duplicate == 0


def test_add_episode_same_key_from_many_threads_is_stored_once(served: Served) -> None:
    _, caller = served
    barrier = threading.Barrier(8)

    def add(_: int) -> pb.AddEpisodeResponse:
        barrier.wait()
        return caller.add(make_episode(seed=1, key=key(0)))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(add, range(8)))

    assert {answer.episode_id for answer in answers} == {0}
    assert sum(answer.duplicate for answer in answers) == 7
    assert (caller.counts().episodes_stored, caller.counts().episodes_duplicate) == (1, 7)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, CHUNK_BYTES], ids=["whole", "chunked"])
def test_added_and_loaded_under_the_same_key_are_the_same_episode(served: Served, chunk_bytes: int) -> None:
    _, caller = served
    added, loaded = make_episode(seed=1, key=key(0)), make_episode(seed=2, key=key(1))
    first = caller.add(added).episode_id
    second = caller.load(encode_load(loaded, chunk_bytes=chunk_bytes)).results[0].episode_id

    (result,) = caller.load(encode_load(added, chunk_bytes=chunk_bytes)).results
    answer = caller.add(loaded)

    assert (result.outcome, result.episode_id) == (DUPLICATE, first)
    assert (answer.duplicate, answer.episode_id) == (True, second)
    assert (caller.counts().episodes_stored, caller.counts().episodes_duplicate) == (2, 2)


def test_add_episode_past_the_capacity_evicts_the_oldest_whole_ones(served: Served) -> None:
    server, caller = served
    for seed in range(5):
        caller.add(make_episode(500, seed=seed))

    counts = caller.counts()

    assert (counts.steps_stored, counts.episodes_stored) == (2000, 4)
    assert (counts.steps_evicted, counts.episodes_evicted, counts.steps_added) == (500, 1, 2500)
    assert_stored(server, 0, make_episode(500, seed=1))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, CHUNK_BYTES, 1], ids=["whole", "chunked", "bytewise"])
def test_load_stores_episodes_bit_for_bit_in_order(served: Served, chunk_bytes: int) -> None:
    server, caller = served
    episodes = [make_episode(rows, seed=rows, key=key(rows), actor=f"actor {rows}") for rows in (4, 20, 7)]

    answer = caller.load(message for episode in episodes for message in encode_load(episode, chunk_bytes=chunk_bytes))

    assert [(result.key.sequence, result.outcome, result.episode_id) for result in answer.results] == [
        (4, ACCEPTED, 0),
        (20, ACCEPTED, 1),
        (7, ACCEPTED, 2),
    ]
    assert (answer.counts.episodes_stored, answer.counts.steps_stored) == (3, 31)
    for position, episode in enumerate(episodes):
        assert_stored(server, position, episode)


def test_load_of_nothing_answers_with_the_counts(served: Served) -> None:
    _, caller = served
    caller.add(make_episode())

    answer = caller.load([])

    assert (len(answer.results), answer.counts.episodes_stored) == (0, 1)


def sent_whole(episodes: list[Episode]) -> Iterator[bytes]:
    return (message for episode in episodes for message in encode_load(episode))


def sent_in_chunks(episodes: list[Episode]) -> Iterator[bytes]:
    return (message for episode in episodes for message in encode_load(episode, chunk_bytes=CHUNK_BYTES))


def sent_together(episodes: list[Episode]) -> list[bytes]:
    messages = list(encode_loads(episodes))
    assert len(messages) == 1
    return messages


@pytest.mark.parametrize("send", [sent_whole, sent_in_chunks, sent_together])
def test_load_says_of_each_episode_what_became_of_it(send: Callable[[list[Episode]], Iterable[bytes]]) -> None:
    other_shape = make_episode(10, seed=3, obs=5, key=key(3))
    not_finite = make_episode(10, seed=4, key=key(4))
    not_finite.columns["obs"][6] = np.inf
    episodes = [
        make_episode(10, seed=1, key=key(1)),
        make_episode(10, seed=1, key=key(1)),
        make_episode(10, seed=2, key=key(1)),
        other_shape,
        not_finite,
        make_episode(100, seed=5, key=key(5)),
        make_episode(10, seed=6, key=key(6)),
        make_episode(10, seed=7),
    ]
    with serving(limits={"max_episode_bytes": 2000}) as (server, caller):
        answer = caller.load(send(episodes))

        assert [result.outcome for result in answer.results] == [
            ACCEPTED,
            DUPLICATE,
            KEY_CONFLICT,
            INVALID,
            INVALID,
            TOO_LARGE,
            ACCEPTED,
            ACCEPTED,
        ]
        assert [result.episode_id for result in answer.results] == [0, 0, -1, -1, -1, -1, 1, 2]
        assert [result.key.sequence for result in answer.results[:-1]] == [1, 1, 1, 3, 4, 5, 6]
        assert not answer.results[-1].HasField("key")
        reasons = [result.reason for result in answer.results]
        assert "obs: shape (5,) a step, expected (4,)" in reasons[3]
        assert "obs: a value that is not finite in row 6" in reasons[4]
        assert "2000" in reasons[5]
        assert [bool(reason) for reason in reasons] == [False, False, True, True, True, True, False, False]
        counts = answer.counts
        assert (counts.episodes_stored, counts.episodes_duplicate, counts.episodes_refused) == (3, 1, 4)
        assert_stored(server, 1, episodes[6])


def test_load_of_many_small_episodes_while_learners_sample_stores_each_once_in_order(served: Served) -> None:
    """The event loop stores what it can inline and leaves to threads what would delay gathers; the order stays the same."""
    server, caller = served
    episodes = [make_episode(5, seed=number, key=key(number), policy_version=number) for number in range(3000)]
    sampling = threading.Event()
    stop = threading.Event()

    def sample() -> None:
        rng = np.random.default_rng(0)
        while not stop.is_set():
            if server.buffer.ready():
                sample_with(server.buffer, rng)
                sampling.set()

    with ThreadPoolExecutor(2) as pool:
        learners = [pool.submit(sample) for _ in range(2)]
        try:
            caller.add(make_episode(5, seed=9999))
            assert sampling.wait(60)
            results = caller.load(encode_loads(episodes)).results
        finally:
            stop.set()
        for learner in learners:
            learner.result(60)

    assert [result.episode_id for result in results] == list(range(1, 3001))
    assert server.buffer.store.entries()[:, 0].tolist() == list(range(3001 - 400, 3001))
    assert_stored(server, 399, episodes[-1])


def test_load_ending_within_chunks_is_refused_and_keeps_the_complete_episodes(served: Served) -> None:
    server, caller = served
    complete, cut = make_episode(seed=1, key=key(1)), make_episode(seed=2, key=key(2))
    messages = [*encode_load(complete, chunk_bytes=CHUNK_BYTES), *list(encode_load(cut, chunk_bytes=CHUNK_BYTES))[:-1]]

    refusal = refused(caller.load, messages)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode")
    assert "within an episode's chunks" in refusal.details
    counts = caller.counts()
    assert (counts.episodes_stored, counts.steps_stored, counts.episodes_refused) == (1, 20, 1)
    assert_stored(server, 0, complete)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda parts: parts[1:], "a chunk without a header"),
        (lambda parts: [*parts[:2], *parts[3:]], "expected column 0 at byte 100"),
        (lambda parts: [*parts[:2], parts[1], *parts[2:]], "expected column 0 at byte 100"),
        (lambda parts: [*parts[:2], *parts], "before the last one is complete"),
        (lambda parts: [*parts[:2], b"\xff\xff"], "malformed"),
        (lambda parts: [*parts[:2], b""], "0 parts in a message"),
    ],
    ids=["no header", "gap", "overlap", "unfinished", "garbage", "empty"],
)
def test_load_that_loses_its_framing_ends_and_keeps_the_complete_episodes(served: Served, spoil, words: str) -> None:
    _, caller = served
    complete = list(encode_load(make_episode(seed=1), chunk_bytes=CHUNK_BYTES))
    parts = list(encode_load(make_episode(seed=2), chunk_bytes=CHUNK_BYTES))

    refusal = refused(caller.load, [*complete, *spoil(parts)])

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode")
    assert words in refusal.details
    counts = caller.counts()
    assert (counts.episodes_stored, counts.steps_stored, counts.episodes_refused) == (1, 20, 1)
    assert caller.load(parts).results[0].outcome == ACCEPTED


def test_load_announcing_absurd_sizes_is_refused_and_the_next_episode_is_stored(served: Served) -> None:
    _, caller = served
    columns = [pb.ColumnSpec(name=name, dtype=pb.DTYPE_FLOAT32) for name in ("obs", "action", "reward")]
    headers = [pb.EpisodeHeader(key=pb.EpisodeKey(client_id="x"), length=length, columns=columns) for length in (1 << 40, 1 << 62, -1)]
    announced = [pb.LoadEpisodesRequest(header=header).SerializeToString() for header in headers]

    answer = caller.load([*announced, *encode_load(make_episode(), chunk_bytes=CHUNK_BYTES)])

    assert [result.outcome for result in answer.results] == [TOO_LARGE, TOO_LARGE, INVALID, ACCEPTED]
    assert [result.key.client_id for result in answer.results[:3]] == ["x"] * 3
    assert answer.counts.episodes_refused == 3


def test_load_broken_off_keeps_the_complete_episodes_and_can_be_sent_again(served: Served) -> None:
    server, caller = served
    episodes = [make_episode(seed=seed, key=key(seed)) for seed in range(3)]
    sent = [list(encode_load(episode, chunk_bytes=CHUNK_BYTES)) for episode in episodes]
    stored = threading.Event()

    def messages() -> Iterator[bytes]:
        yield from sent[0] + sent[1] + sent[2][:3]
        stored.wait()

    call = caller.channel.stream_unary("/touchline.v1.Replay/LoadEpisodes").future(messages())
    eventually(lambda: server.buffer.num_eps == 2, "two episodes stored while the stream is open")
    call.cancel()
    stored.set()

    answer = caller.load(message for parts in sent for message in parts)

    assert [result.outcome for result in answer.results] == [DUPLICATE, DUPLICATE, ACCEPTED]
    assert answer.counts.episodes_stored == 3


def test_load_messages_above_the_limit_end_the_stream_and_keep_the_complete_episodes() -> None:
    with serving(limits={"max_message_bytes": 4096}) as (_, caller):
        big = make_episode(200, seed=2)

        refusal = refused(caller.load, [*encode_load(make_episode(seed=1)), *encode_load(big)])

        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4096" in refusal.details
        assert caller.counts().episodes_stored == 1
        assert caller.load(encode_load(big, chunk_bytes=2048)).results[0].outcome == ACCEPTED


def test_load_of_another_table_is_not_found(served: Served) -> None:
    _, caller = served

    refusal = refused(caller.load, encode_load(make_episode(), table="expert"))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "unknown-table")
    assert "'expert'" in refusal.details
    assert caller.counts().episodes_stored == 0


def test_load_streams_above_max_streams_are_refused_until_one_ends() -> None:
    with serving(limits={"max_streams": 1}) as (server, caller):
        done = threading.Event()

        def messages() -> Iterator[bytes]:
            yield from encode_load(make_episode())
            done.wait()

        call = caller.channel.stream_unary("/touchline.v1.Replay/LoadEpisodes").future(messages())
        eventually(lambda: server.buffer.num_eps == 1, "the first stream is open")

        refusal = refused(caller.load, [])
        done.set()
        call.result()

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit")
        assert "limits.max_streams" in refusal.details
        assert refusal.retry_after_ms == "1000"
        assert caller.load([]).counts.episodes_stored == 1
