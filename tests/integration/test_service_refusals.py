"""Bad episodes and bytes get a status and a text that names the column, what was found and what was expected. Nothing is stored in
part and the server goes on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from support.service_calls import Caller, key, make_episode, refused, serving
from touchline_protos.codec import Episode, encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode")
TOO_LARGE = (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")

Served = tuple[ServerThread, Caller]
ROWS = 10


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(limits={"max_columns": 8, "max_episode_bytes": 500_000}) as pair:
        yield pair


def with_columns(**columns: Any) -> Episode:
    """Returns a good episode with changed columns; None removes one. Double underscores stand for dots."""
    episode = make_episode(ROWS)
    given = {name.replace("__", "."): column for name, column in columns.items()}
    merged = {name: column for name, column in (episode.columns | given).items() if column is not None}
    return replace(episode, columns=merged)


def spoiled(column: str, row: int, value: float) -> Episode:
    """Returns a good episode with one bad value."""
    array = make_episode(ROWS).columns[column]
    array[row] = value
    return with_columns(**{column: array})


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def by_hand(change: Callable[[pb.AddEpisodeRequest], object]) -> bytes:
    """Returns a good request, changed with the generated classes into one that no encoder makes."""
    request = pb.AddEpisodeRequest.FromString(encode_add_episode(make_episode(ROWS)))
    change(request)
    return request.SerializeToString()


def tensor(number: int, **fields: Any) -> Callable[[pb.AddEpisodeRequest], object]:
    """Changes the tensor of the n-th column (obs, action, reward)."""

    def change(request: pb.AddEpisodeRequest) -> None:
        shape = fields.pop("shape", None)
        target = request.episode.columns[number].tensor
        if shape is not None:
            target.shape[:] = shape
        for name, value in fields.items():
            setattr(target, name, value)

    return change


MALFORMED = {
    "unknown dtype": (by_hand(tensor(0, dtype=99)), INVALID, "obs: dtype number 99 is unknown, expected one of 1..10"),
    "no dtype": (by_hand(tensor(2, dtype=0)), INVALID, "reward: dtype number 0 is unknown"),
    "too few bytes": (by_hand(tensor(1, data=b"\0" * 79)), INVALID, "action: 79 bytes of data, expected 80 for float32 of shape (10, 2)"),
    "too many bytes": (by_hand(tensor(1, data=b"\0" * 81)), INVALID, "action: 81 bytes of data, expected 80"),
    "no bytes": (by_hand(tensor(1, data=b"")), INVALID, "action: 0 bytes of data, expected 80"),
    "negative shape": (by_hand(tensor(0, shape=[ROWS, -4])), INVALID, "obs: negative dimension in shape (10, -4)"),
    "absurd shape": (by_hand(tensor(0, shape=[1 << 62, 1 << 62])), TOO_LARGE, "obs: shape"),
    "absurd but empty shape": (by_hand(tensor(0, shape=[0, 1 << 62, 1 << 62], data=b"")), TOO_LARGE, "obs: shape"),
    "17 dimensions": (by_hand(tensor(0, shape=[ROWS, 4] + [1] * 15)), TOO_LARGE, "obs: more than 16 dimensions"),
    "bool of 2": (by_hand(tensor(2, dtype=pb.DTYPE_BOOL, data=b"\2" * ROWS)), INVALID, "reward: byte 2 in a bool column"),
    "a column twice": (
        by_hand(lambda request: request.episode.columns.append(request.episode.columns[0])),
        INVALID,
        "obs: column appears twice",
    ),
    "a column without a name": (by_hand(lambda request: setattr(request.episode.columns[0], "name", "")), INVALID, "without a name"),
    "a name too long": (by_hand(lambda request: setattr(request.episode.columns[0], "name", "n" * 257)), TOO_LARGE, "256"),
    "a name nested too deep": (
        by_hand(lambda request: setattr(request.episode.columns[0], "name", "obs" + ".x" * 9)),
        TOO_LARGE,
        "nested 9 levels deep, expected at most 8",
    ),
    "no tensor": (by_hand(lambda request: request.episode.columns[1].ClearField("tensor")), INVALID, "action: no tensor"),
    "a key without a client": (
        by_hand(lambda request: request.episode.key.CopyFrom(pb.EpisodeKey(sequence=1))),
        INVALID,
        "key without a client_id",
    ),
    "a client id too long": (
        by_hand(lambda request: request.episode.key.CopyFrom(pb.EpisodeKey(client_id="c" * 129))),
        TOO_LARGE,
        "128",
    ),
    "an actor's name too long": (by_hand(lambda request: setattr(request.episode, "actor", "a" * 129)), TOO_LARGE, "128"),
    "no episode": (by_hand(lambda request: request.ClearField("episode")), INVALID, "no episode in the message"),
    "an empty message": (b"", INVALID, "no episode in the message"),
    "garbage": (b"\xff" * 40, INVALID, "malformed message"),
    "a cut message": (encode_add_episode(make_episode(ROWS))[:-3], INVALID, "malformed message"),
}

MISFITS = {
    "missing column": (with_columns(reward=None), INVALID, "reward: missing, expected "),
    "missing observation": (with_columns(obs=None), INVALID, "obs: missing, expected "),
    "unequal lengths": (with_columns(action=floats(ROWS - 1, 2)), INVALID, "action: shape (9, 2), expected (10, 2) to match obs"),
    "unequal lengths of scalars": (with_columns(reward=floats(ROWS + 1)), INVALID, "reward: shape (11,), expected (10,) to match obs"),
    "a scalar column": (with_columns(reward=np.float32(1)), INVALID, "reward: a scalar, expected one value per step"),
    "zero rows": (make_episode(0), INVALID, "obs: zero rows, expected at least 1"),
    "more rows than the capacity": (make_episode(2001), INVALID, "2001 rows, expected at most the buffer's capacity of 2000"),
    "NaN observation": (spoiled("obs", 0, np.nan), INVALID, "obs: a value that is not finite in row 0, expected finite"),
    "infinite observation": (spoiled("obs", 7, -np.inf), INVALID, "obs: a value that is not finite in row 7"),
    "NaN action": (spoiled("action", 1, np.nan), INVALID, "action: a value that is not finite in row 1"),
    "NaN reward": (spoiled("reward", 9, np.nan), INVALID, "reward: a value that is not finite in row 9"),
    "too many columns": (with_columns(**{f"extra_{n}": floats(ROWS) for n in range(6)}), TOO_LARGE, "more than 8 columns"),
    "too many bytes": (with_columns(extra=floats(ROWS, 20_000)), TOO_LARGE, "expected at most 500000"),
    "a negative number": (replace(make_episode(ROWS), key=key(-1)), INVALID, "key.sequence: -1, expected 0 or more"),
}

FIRST_MISFITS = {
    "reserved name": (with_columns(episode=floats(ROWS)), INVALID, "episode: a reserved column name"),
    "another reserved name": (with_columns(index=floats(ROWS)), INVALID, "index: a reserved column name"),
    "reserved prefix": (with_columns(provenance__start=floats(ROWS)), INVALID, "provenance.start: a reserved column name"),
    "a column that is a group too": (with_columns(obs__rgb=floats(ROWS, 3)), INVALID, "obs.rgb: obs is a column too"),
    "an empty part": (with_columns(**{"obs": None, "obs..x": floats(ROWS)}), INVALID, "'obs..x': not a column name"),
    "several rewards": (with_columns(reward=floats(ROWS, 2)), INVALID, "reward: shape (10, 2), expected one value per step: (10,)"),
    "no columns": (Episode({}), INVALID, "no columns, expected obs, action and reward"),
}

LATER_MISFITS = {
    "unknown column": (with_columns(value=floats(ROWS)), INVALID, "value: an unknown column, expected only action, obs, reward"),
    "another dtype": (with_columns(obs=np.zeros((ROWS, 4), np.float64)), INVALID, "obs: dtype float64, expected float32"),
    "another inner shape": (with_columns(obs=floats(ROWS, 5)), INVALID, "obs: shape (5,) a step, expected (4,)"),
    "another rank": (with_columns(reward=floats(ROWS, 1)), INVALID, "reward: shape (1,) a step, expected ()"),
}


def cases(*tables: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(
        ("bad", "status", "words"), [pytest.param(*case, id=name) for table in tables for name, case in table.items()]
    )


def refuse(caller: Caller, bad: Episode | bytes, status: tuple[grpc.StatusCode, str], words: str) -> None:
    refusal = refused(caller.add, bad)

    assert (refusal.code, refusal.reason) == status, refusal
    assert words in refusal.details


@cases(MALFORMED, MISFITS, FIRST_MISFITS)
def test_bad_first_episode_is_refused_and_fixes_no_schema(served: Served, bad: Episode | bytes, status: Any, words: str) -> None:
    server, caller = served

    refuse(caller, bad, status, words)

    assert server.buffer.store.schema is None
    assert caller.counts() == pb.Counts(episodes_refused=1)
    assert caller.add(make_episode(obs=9)).counts.episodes_stored == 1


@cases(MALFORMED, MISFITS, LATER_MISFITS)
def test_bad_later_episode_is_refused_and_leaves_the_stored_ones(served: Served, bad: Episode | bytes, status: Any, words: str) -> None:
    server, caller = served
    caller.add(make_episode(ROWS, seed=1))
    before = caller.counts()

    refuse(caller, bad, status, words)

    before.episodes_refused += 1
    assert caller.counts() == before
    assert len(server.buffer.store.entries()) == 1
    assert set(caller.sample().episode_id.tolist()) == {0}
    assert caller.add(make_episode(ROWS, seed=2)).counts.episodes_stored == 2


def test_fewer_rows_than_a_slice_are_accepted_counted_and_never_sampled(served: Served) -> None:
    _, caller = served
    caller.add(make_episode(4))

    counts = caller.add(make_episode(3)).counts

    assert (counts.episodes_stored, counts.episodes_too_short, counts.episodes_refused) == (2, 1, 0)
    assert set(caller.sample(batch_size=200).episode_id.tolist()) == {0}


def test_nan_in_row_0_of_action_reward_and_done_is_accepted(served: Served) -> None:
    _, caller = served
    done = floats(ROWS)
    done[0] = np.nan

    answer = caller.add(with_columns(done=done))

    assert (answer.counts.episodes_stored, answer.counts.episodes_refused) == (1, 0)
    assert np.isfinite(caller.sample(batch_size=200).done).all()


def test_non_finite_observations_are_accepted_where_the_configuration_says_so() -> None:
    with serving(storage={"device": "cpu", "allow_non_finite": True}) as (_, caller):
        answer = caller.add(spoiled("obs", 2, np.nan))

    assert answer.counts.episodes_stored == 1


def padded(size: int) -> bytes:
    """Returns a good request of exactly this size."""
    request = pb.AddEpisodeRequest.FromString(encode_add_episode(make_episode(100)))
    request.episode.columns[0].tensor.padding = bytes(size // 4)
    request.episode.columns[0].tensor.padding += bytes(size - request.ByteSize())
    assert request.ByteSize() == size
    return request.SerializeToString()


def test_message_above_the_limit_is_refused_with_the_numbers_and_at_the_limit_stored() -> None:
    with serving(limits={"max_message_bytes": 4096}) as (_, caller):
        refusal = refused(caller.add, padded(4097))

        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4097 vs. 4096" in refusal.details
        assert caller.add(padded(4096)).counts == pb.Counts(steps_stored=100, episodes_stored=1, steps_added=100, episodes_added=1)


def test_refusal_that_waiting_does_not_help_gives_no_delay(served: Served) -> None:
    _, caller = served

    assert refused(caller.add, b"").retry_after_ms == ""


def test_another_table_is_not_found_and_nothing_is_stored(served: Served) -> None:
    _, caller = served

    refusal = refused(caller.add, encode_add_episode(make_episode(), table="expert"))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "unknown-table")
    assert "'expert'" in refusal.details
    assert caller.counts() == pb.Counts()


@pytest.mark.parametrize("letter", ["n", "%", "é", "⚽"], ids=ascii)
def test_refusal_that_would_quote_very_much_still_arrives(letter: str) -> None:
    with serving() as (_, caller):
        names = [f"{letter * 250}{number}" for number in range(100)]
        wide = with_columns(**{name: floats(ROWS) for name in names})
        caller.add(wide)

        refusal = refused(caller.add, replace(wide, columns=wide.columns | {"odd": floats(ROWS)}))

        assert (refusal.code, refusal.reason) == INVALID
        assert refusal.details.startswith("odd: an unknown column, expected only ")
        assert refusal.details.endswith(" characters more)")


HELLOS = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": bytes.fromhex("16030100c5010000c10303") + bytes(186),
    "zeros": bytes(1000),
    "random": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)),
    "a cut preface": b"PRI * HTTP/2.0\r\n\r\nS",
    "an oversized frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS.keys())
def test_bytes_that_are_no_grpc_are_hung_up_on_and_the_server_goes_on(served: Served, hello: bytes) -> None:
    server, caller = served
    host, _, port = server.address.rpartition(":")

    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(hello)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass

    assert caller.add(make_episode()).counts.episodes_stored == 1


def test_many_connections_of_random_bytes_leave_the_server_serving(served: Served) -> None:
    server, caller = served
    host, _, port = server.address.rpartition(":")

    for _ in range(100):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(os.urandom(200))

    assert caller.add(make_episode()).counts.episodes_stored == 1


@pytest.mark.parametrize("method", ["Sample", "Ready", "Info", "Clear"])
def test_garbage_for_a_message_is_an_invalid_argument(served: Served, method: str) -> None:
    _, caller = served
    caller.add(make_episode())

    refusal = refused(caller.raw, method, b"\xff" * 9)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
    assert refusal.details == f"9 bytes that are not a message, expected one of type {method}Request"
    assert caller.counts().episodes_stored == 1


def test_unknown_method_is_unimplemented(served: Served) -> None:
    _, caller = served

    assert refused(caller.raw, "Forget", b"").code == grpc.StatusCode.UNIMPLEMENTED
