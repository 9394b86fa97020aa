"""Rows that cannot be stored and their episodes, and numbers of another type than in the row before."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from support.client_faults import ScriptedServer
from touchline import EpisodeWriter, InvalidEpisodeError, ReplayClient
from touchline_protos.codec import Episode, decode_add_episode

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a missing column": ({"obs": 9.0, "action": 9.0}, "reward: missing in row 3"),
    "None": ({"obs": 9.0, "action": 9.0, "reward": None}, "reward: None, expected numbers"),
    "text": ({"obs": "left", "action": 9.0, "reward": 9.0}, r"obs: text \('left'\)"),
    "another shape": ({"obs": [9.0, 9.0], "action": 9.0, "reward": 9.0}, r"obs: shape \(2,\) in row 3"),
    "a masked value": ({"obs": np.ma.masked, "action": 9.0, "reward": 9.0}, "obs: 1 masked values"),
    "a float outside of float32": ({"obs": 9.0, "action": 9.0, "reward": 1e300}, r"reward: 1e\+300, which is inf as float32"),
}


@pytest.fixture
def stored() -> list[Episode]:
    return []


@pytest.fixture
def client(stored: list[Episode]) -> Iterator[ReplayClient]:
    def add(request: bytes, context: grpc.ServicerContext) -> bytes:
        stored.append(decode_add_episode(request)[1])
        return b""

    with ScriptedServer(AddEpisode=add) as server, ReplayClient(server.address) as client:
        yield client


def row(number: int) -> dict[str, Any]:
    return {"obs": float(number)} | ({"action": float(number), "reward": float(number)} if number else {})


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_row_that_cannot_be_stored_ends_its_episode_and_the_rest_is_no_other(
    client: ReplayClient, stored: list[Episode], bad: dict[str, Any], message: str
) -> None:
    with EpisodeWriter(client) as writer:
        for number in range(3):
            writer.append(row(number))
        with pytest.raises(
            InvalidEpisodeError, match=rf"^{message}.*\(row 3\); the 3 rows before it are kept .* refused until end_episode"
        ):
            writer.append(bad)
        for number in (4, 5):
            with pytest.raises(InvalidEpisodeError, match=rf"^the episode was refused before: {message}.* call end_episode\(\)"):
                writer.append(row(number))
        writer.end_episode()
        for number in range(3):
            writer.append(row(number))
        writer.end_episode()
        writer.flush(10)

        assert writer.counters.appended == writer.counters.acknowledged == 2
    assert [episode.columns["obs"].tolist() for episode in stored] == [[0, 1, 2], [0, 1, 2]]


def test_row_0_that_cannot_be_stored_refuses_the_whole_episode(client: ReplayClient, stored: list[Episode]) -> None:
    with EpisodeWriter(client) as writer:
        with pytest.raises(InvalidEpisodeError, match=r"^reward: None, expected numbers \(row 0; row 0 needs only obs: omit what a reset"):
            writer.append({"obs": 0.0, "reward": None, "action": None})
        with pytest.raises(InvalidEpisodeError, match=r"^the episode was refused before"):
            writer.append(row(1))
        assert writer.end_episode() is None
        writer.append(row(0))
        writer.append(row(1))
        writer.end_episode()

    assert [episode.columns["obs"].tolist() for episode in stored] == [[0, 1]]


def test_invalid_row_right_after_a_reset_leaves_no_episode(
    client: ReplayClient, stored: list[Episode], caplog: pytest.LogCaptureFixture
) -> None:
    with EpisodeWriter(client) as writer, caplog.at_level(logging.WARNING):
        writer.append(row(0))
        with pytest.raises(InvalidEpisodeError, match=r"\(row 1\); further rows are refused"):
            writer.append({"obs": "x"})

        assert writer.end_episode() is None
        assert writer.counters.discarded == 1
    assert not stored and "discarded 1 rows" in caplog.text


def test_row_after_a_cut_that_cannot_be_stored_keeps_the_pieces_before(client: ReplayClient, stored: list[Episode]) -> None:
    with EpisodeWriter(client, max_steps=2) as writer:
        for number in range(4):
            writer.append(row(number))
        with pytest.raises(InvalidEpisodeError, match=r"\(row 2 since the last cut\)"):
            writer.append({"obs": "x"})
        writer.end_episode()

    assert [episode.columns["obs"].tolist() for episode in stored] == [[0, 1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0.5, np.float64(0.1)], "float32", [0.5, np.float32(0.1)]),
        ([np.float64(0.1), 0.2], "float64", [0.1, 0.2]),
        ([np.float32(0.5), np.float64(0.1), 1, True, torch.tensor(2.0), np.int8(3)], "float32", [0.5, np.float32(0.1), 1, 1, 2, 3]),
        ([np.int64(1), 2.0, np.uint8(3), True], "int64", [1, 2, 3, 1]),
        ([False, 1, np.float32(0)], "bool", [False, True, False]),
    ],
)
def test_numbers_of_several_types_are_one_column_of_the_firsts(
    client: ReplayClient, stored: list[Episode], values: list[Any], dtype: str, expected: list[Any]
) -> None:
    with EpisodeWriter(client) as writer:
        writer.append({"obs": 0.0})
        for value in values:
            writer.append({"obs": 0.0, "action": 0.0, "reward": value})
        writer.end_episode()

    column = stored[0].columns["reward"][1:]
    assert column.dtype == dtype
    assert column.tolist() == expected


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1, 0.5),
        (True, 2),
        (np.uint8(3), 300),
        (np.uint8(3), -1),
        (0.5, 2**24 + 1),
        (np.int64(0), np.nan),
        (np.float32(1), 1e39),
        (1, 2.0**24 + 1.5),
    ],
)
def test_number_that_its_column_would_change_is_refused_at_its_row(client: ReplayClient, first: Any, then: Any) -> None:
    with EpisodeWriter(client) as writer:
        writer.append({"obs": 0.0})
        writer.append({"obs": 0.0, "reward": first})
        with pytest.raises(InvalidEpisodeError, match=r"^reward: .*, which is .*; expected a value of \w+ in row 2, as in the rows before"):
            writer.append({"obs": 0.0, "reward": then})
        writer.end_episode()


def test_float64_array_in_a_float32_column_names_the_cast(client: ReplayClient) -> None:
    with EpisodeWriter(client) as writer:
        writer.append({"obs": np.zeros(2, np.float32)})
        with pytest.raises(InvalidEpisodeError, match=r'^obs: dtype float64 in row 1, expected float32 .*; dtype="float32" on the client'):
            writer.append({"obs": np.zeros(2)})
        writer.end_episode()


@pytest.mark.parametrize("of_client", [True, False])
def test_writer_with_dtype_rounds_float64(client: ReplayClient, stored: list[Episode], of_client: bool) -> None:
    cast = ReplayClient(client.address, dtype="float32" if of_client else None)
    with cast, EpisodeWriter(cast, dtype=None if of_client else "float32") as writer:
        writer.append({"obs": np.full(2, 0.1), "step": np.float64(0)})
        writer.append({"obs": np.full(2, 0.1), "step": np.float64(0.2), "action": np.float32(1), "reward": 1})
        writer.end_episode()

    columns = stored[0].columns
    assert {name: column.dtype.name for name, column in columns.items()} == {
        "obs": "float32",
        "step": "float32",
        "action": "float32",
        "reward": "int64",
    }
    assert columns["obs"][1].tolist() == [np.float32(0.1)] * 2


def test_writer_with_dtype_refuses_what_would_be_infinite(client: ReplayClient) -> None:
    with EpisodeWriter(client, dtype="float32") as writer:
        with pytest.raises(InvalidEpisodeError, match=r"^obs: 1e\+300, which is inf as float32"):
            writer.append({"obs": np.array([0.0, 1e300])})
        writer.end_episode()
