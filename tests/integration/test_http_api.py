"""The JSON API of the web page, on real servers."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.pages import Answer, request
from support.service_calls import DEADLINE_S, Caller, eventually, make_config, make_episode
from touchline_protos.codec import Episode, encode_add_episode
from touchline_server import Config
from touchline_server.durability import restore as restoring
from touchline_server.http import episodes
from touchline_server.service.app import ServerThread

ROWS = 24
TOKEN = "demos-token-01234567"


def image_episode(seed: int, *, rows: int = ROWS, **origin: Any) -> Episode:
    rng = np.random.default_rng(seed)
    columns = {
        "obs.rgb": rng.integers(0, 256, (rows, 9, 16, 16), dtype=np.uint8),
        "obs.state": rng.standard_normal((rows, 20)).astype(np.float32),
        "action": rng.standard_normal((rows, 2)).astype(np.float32),
        "reward": rng.standard_normal(rows).astype(np.float32),
    }
    columns["action"][0] = columns["reward"][0] = np.nan
    return Episode(columns, **origin)


EPISODES = [image_episode(number, actor=f"robot-{number % 3}", policy_version=number) for number in range(10)]


def config_of(**sections: dict[str, Any]) -> Config:
    return make_config(**{"http": {"port": 0}, **sections})


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(config_of(tables={"demos": {}}), http=True) as server, Caller(server.address) as caller:
        for episode in EPISODES:
            caller.add(episode)
        caller.add(encode_add_episode(make_episode(30), table="demos"))
        yield server


@pytest.fixture(scope="module")
def address(server: ServerThread) -> str:
    return server.http_address


@contextmanager
def event_stream(address: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The snapshots of an open stream of events."""
    connection = http.client.HTTPConnection(address, timeout=DEADLINE_S)
    connection.request("GET", "/api/events")
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")

    def snapshots() -> Iterator[dict[str, Any]]:
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    try:
        yield snapshots()
    finally:
        connection.close()


# Snapshots


def test_status_has_the_counts_of_every_table(server: ServerThread, address: str) -> None:
    with event_stream(address) as events:
        next(events)
        next(events)  # taken after the last add
    status = request(address, "/api/status").json

    assert [table["table"] for table in status["tables"]] == ["", "demos"]
    counts = server.buffer.counts()
    assert status["tables"][0]["counts"]["steps_stored"] == counts.steps_stored == 10 * ROWS
    assert status["tables"][0]["newest"][0]["episode_id"] == 9
    assert status["server"]["state"] == "serving"


def test_events_are_snapshots_of_different_moments_with_the_points_of_the_charts(address: str) -> None:
    with event_stream(address) as events:
        first, second = next(events), next(events)

    assert 0.3 < second["time_unix_s"] - first["time_unix_s"] < 30
    assert second["points"][""]["rows_stored"] == second["tables"][0]["counts"]["steps_stored"]
    assert "buckets" not in json.dumps(second)


def test_history_ends_with_the_newest_snapshot(address: str) -> None:
    with event_stream(address) as events:
        newest = next(events)["time_unix_s"]

    fine, coarse = request(address, "/api/history").json, request(address, "/api/history?resolution_s=10").json

    assert fine["time_unix_s"][-1] >= newest
    assert (fine["resolution_s"], coarse["resolution_s"]) == (1, 10)
    assert fine["tables"]["demos"]["rows_stored"][-1] == 30


def test_metrics_are_for_prometheus(address: str) -> None:
    answer = request(address, "/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    assert f"{10 * ROWS}.0" in answer.text


def test_stream_ends_when_the_server_stops(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        with ServerThread(config_of(), http=True) as server:
            events = stack.enter_context(event_stream(server.http_address))
            next(events)
            reading = threading.Thread(target=lambda: list(events))
            reading.start()
        reading.join(DEADLINE_S)

        assert not reading.is_alive()
    # Nothing had to be cancelled.
    assert "graceful shutdown" not in caplog.text


def test_page_beyond_the_most_streams_gets_a_reason(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.http.api.MAX_EVENT_STREAMS", 0)

    answer = request(address, "/api/events")

    assert answer.status == 503
    assert "the most at a time" in answer.json["error"]


# Episodes


def listed(address: str, query: str) -> list[int]:
    return [episode["episode_id"] for episode in request(address, f"/api/episodes?{query}").json["episodes"]]


def test_episodes_are_listed_newest_first_in_pages(address: str) -> None:
    first = request(address, "/api/episodes?limit=4").json

    assert [episode["episode_id"] for episode in first["episodes"]] == [9, 8, 7, 6]
    assert first["more"] is True
    assert listed(address, "limit=4&below=6") == [5, 4, 3, 2]
    assert request(address, "/api/episodes?limit=4&below=2").json["more"] is False


def test_episodes_of_one_actor_are_listed(address: str) -> None:
    assert listed(address, "actor=robot-1") == [7, 4, 1]
    assert listed(address, "actor=robot-1&limit=1&below=7") == [4]
    assert listed(address, "actor=stranger") == []


def test_listed_episode_has_its_return_and_size(address: str) -> None:
    (episode,) = request(address, "/api/episodes?limit=1").json["episodes"]
    columns = EPISODES[9].columns

    assert (episode["actor"], episode["policy_version"], episode["rows"]) == ("robot-0", 9, ROWS)
    assert episode["reward_sum"] == pytest.approx(float(columns["reward"][1:].sum(dtype=np.float64)))
    assert episode["bytes"] == sum(column.nbytes for column in columns.values())


def shown(address: str, path: str) -> dict[str, dict[str, Any]]:
    return {column["name"]: column for column in request(address, path).json["columns"]}


def test_episode_has_its_columns_as_points(address: str) -> None:
    columns = shown(address, "/api/episodes/4")

    assert columns["obs.rgb"]["kind"] == "image"
    assert columns["reward"]["rows"] == list(range(ROWS))
    assert columns["reward"]["values"][0][0] is None  # NaN: undefined in row 0
    assert columns["reward"]["values"][0][1:] == EPISODES[4].columns["reward"][1:].tolist()
    assert (columns["obs.state"]["dims"], len(columns["obs.state"]["values"])) == (20, episodes.MAX_DIMS)
    assert columns["obs.state"]["values"][7] == EPISODES[4].columns["obs.state"][:, 7].tolist()


def test_further_dimensions_are_shown_on_demand(address: str) -> None:
    columns = shown(address, "/api/episodes/4?column=obs.state&first_dim=16")

    assert list(columns) == ["obs.state"]
    assert columns["obs.state"]["values"] == EPISODES[4].columns["obs.state"][:, 16:].T.tolist()


@pytest.mark.parametrize("row", [0, 11, ROWS - 1])
def test_frame_is_the_newest_picture_of_its_row(address: str, row: int) -> None:
    answer = request(address, f"/api/episodes/4/frame?column=obs.rgb&row={row}")

    assert answer.headers["content-type"] == "image/png"
    expected = EPISODES[4].columns["obs.rgb"][row, 6:].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), expected)


def test_long_episode_is_shown_by_the_extremes_of_its_stretches() -> None:
    rows = 1900
    episode = make_episode(rows, obs=1)
    episode.columns["obs"][777] = 1e6
    with ServerThread(config_of(), http=True) as server, Caller(server.address) as caller:
        caller.add(episode)

        column = shown(server.http_address, "/api/episodes/0?column=obs")["obs"]

    assert len(column["rows"]) <= episodes.MAX_POINTS
    assert column["rows"] == sorted(set(column["rows"]))
    assert max(column["values"][0]) == 1e6
    assert min(column["values"][0]) == pytest.approx(float(episode.columns["obs"].min()))


def test_large_column_is_read_by_single_rows(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "MAX_WHOLE_BYTES", 100)
    monkeypatch.setattr(episodes, "MAX_POINTS", 5)

    column = shown(address, "/api/episodes/4?column=obs.state")["obs.state"]

    assert column["rows"] == [0, 5, 11, 17, 23]
    assert column["values"][3] == EPISODES[4].columns["obs.state"][column["rows"], 3].tolist()


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/api/episodes?table=nowhere", 404, "nowhere"),
        ("/api/episodes?limit=0", 400, "limit: 0, expected 1 to 100"),
        ("/api/episodes?limit=many", 400, "limit: 'many', expected a 64-bit integer"),
        ("/api/episodes/77", 404, "episode 77 is not stored"),
        ("/api/episodes/4?column=sound", 400, "column: 'sound', expected one of obs.rgb, obs.state, action, reward"),
        ("/api/episodes/4?first_dim=-1", 400, "first_dim: -1, expected 0 or more"),
        ("/api/episodes/4/frame?column=reward", 400, "column: 'reward', expected an image column: obs.rgb"),
        ("/api/episodes/4/frame?column=obs.rgb&row=24", 400, "row: 24, side: 512; expected 0 to 23"),
        ("/api/episodes/4/frame?column=obs.rgb&side=9999", 400, "1 to 1024"),
        ("/api/episodes/99999999999999999999999", 400, "episode: '99999999999999999999999', expected a 64-bit integer"),
        ("/api/episodes?below=99999999999999999999999", 400, "below"),
        ("/api/nothing", 404, "docs/http.md"),
    ],
)
def test_bad_request_says_what_was_expected(address: str, path: str, status: int, text: str) -> None:
    answer = request(address, path)

    assert answer.status == status, answer.body
    assert text in answer.json["error"]


def test_reading_while_episodes_are_evicted_never_shows_rows_of_another() -> None:
    """Every value of an episode is its number, so a mix of two would show."""

    def episode(number: int) -> Episode:
        return Episode(
            {"obs": np.full((40, 3), number, np.float32), "action": np.zeros((40, 1), np.float32), "reward": np.zeros(40, np.float32)}
        )

    def check(answer: Answer, number: int) -> None:
        if answer.status == 200:
            (column,) = answer.json["columns"]
            assert {value for values in column["values"] for value in values} == {float(number)}
        else:
            assert answer.status == 404

    with (
        ServerThread(config_of(config={"buffer_size": 200, "batch_size": 8, "horizon": 3}), http=True) as server,
        Caller(server.address) as caller,
    ):
        over = threading.Event()

        def add() -> None:
            number = 0
            while not over.is_set():
                caller.add(episode(number))
                number += 1

        adding = threading.Thread(target=add)
        adding.start()
        try:
            for _ in range(40):
                for listed_id in listed(server.http_address, "limit=5"):
                    check(request(server.http_address, f"/api/episodes/{listed_id}?column=obs"), listed_id)
        finally:
            over.set()
            adding.join()


# Who sees what


def test_token_of_one_table_sees_only_that(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[token]]\nname = "d"\nrole = ["actor", "learner"]\ntables = ["demos"]\nvalue = "{TOKEN}"\n', encoding="utf-8")
    file.chmod(0o600)
    with ServerThread(config_of(tables={"demos": {}}, auth={"tokens_file": str(file)}), http=True) as server:

        def ask(path: str) -> Answer:
            return request(server.http_address, path, headers={"Authorization": f"Bearer {TOKEN}"})

        # The first snapshot may be of the start, when tables are not open yet.
        eventually(lambda: ask("/api/status").json["tables"], "the table is shown", every_s=0.05)
        assert [table["table"] for table in ask("/api/status").json["tables"]] == ["demos"]
        assert list(ask("/api/history").json["tables"]) == ["demos"]
        assert ask("/api/episodes?table=demos").status == 200
        assert ask("/api/episodes").status == ask("/api/episodes/0?table=").status == 403
        assert 'table=""' not in ask("/metrics").text
        assert ask("/api/session").json == {"tokens": True}


def test_page_of_a_server_that_restores_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(storage={"device": "cpu", "data_dir": str(tmp_path)})
    with ServerThread(config) as server, Caller(server.address) as caller:
        for episode in EPISODES:
            caller.add(episode)
    reading, go_on = threading.Event(), threading.Event()
    restore = restoring.restore

    def slow(store: Any, database: Any, progress: Any, **options: Any) -> None:
        progress(120, 240)
        reading.set()
        assert go_on.wait(DEADLINE_S)
        restore(store, database, progress, **options)

    monkeypatch.setattr(restoring, "restore", slow)
    server = ServerThread(config, http=True)
    starting = threading.Thread(target=server.__enter__)
    starting.start()
    try:
        assert reading.wait(DEADLINE_S)
        health, episodes = request(server.http_address, "/healthz"), request(server.http_address, "/api/episodes")

        def progress() -> tuple[str, int, int]:
            status = request(server.http_address, "/api/status").json
            durability = status["tables"][0]["durability"]
            return status["server"]["state"], durability["restored_rows"], durability["restore_rows"]

        eventually(lambda: progress() == ("restoring", 120, 240), "the progress is shown", every_s=0.05)
    finally:
        go_on.set()
        starting.join()
    with ExitStack() as stack:
        stack.push(server)
        assert request(server.http_address, "/healthz").status == 200

    assert health.status == episodes.status == 503
    assert "120 of 240" in health.text and "120 of 240" in episodes.json["error"]
