"""A start on a durable store: what it says, what it refuses before anything is known or lost, and what it takes as it is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.durable_cases import MODES, contents, durable_config, keyed_episode
from support.service_calls import DEADLINE_S, ServerProcess
from touchline_protos.codec import Episode
from touchline_server import Config, InvalidEpisodeError, ReplayBuffer, StoreMismatchError
from touchline_server.errors import RestoringError
from touchline_server.store.episode_ring import EpisodeRing

EPISODES = 40


def fill(data_dir: Path, *, capacity: int = 2_000, episodes: int = EPISODES) -> dict[int, Any]:
    """Leaves a closed store of episodes and returns them."""
    with closing(ReplayBuffer(durable_config(data_dir, capacity=capacity))) as buffer:
        for sequence in range(episodes):
            buffer.add_episode(keyed_episode(0, sequence))
        return contents(buffer)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """A store that tests start on and leave as it is."""
    data_dir = tmp_path_factory.mktemp("filled") / "data"
    return data_dir, fill(data_dir)


def rows_of(episodes: dict[int, Any]) -> list[int]:
    return [keyed_episode(0, sequence).length for _, sequence, _ in episodes.values()]


# A smaller buffer


@settings(max_examples=15, deadline=None)
@given(capacity=st.integers(4, 2_000), durability=st.sampled_from(MODES))
def test_start_that_would_evict_is_refused_with_the_counts_and_loses_nothing(
    filled: tuple[Path, dict[int, Any]], capacity: int, durability: str
) -> None:
    data_dir, episodes = filled
    rows = rows_of(episodes)
    kept = next(number for number in range(len(rows) + 1) if sum(rows[number:]) <= capacity)
    small = durable_config(data_dir, capacity=capacity, durability=durability)

    if kept:
        with pytest.raises(StoreMismatchError) as caught:
            ReplayBuffer(small)
        for words in (
            f"config.buffer_size: {capacity} rows, expected at least {sum(rows)}: it was 2000 when this store was last used",
            f"{data_dir} holds {EPISODES} episodes of {sum(rows)} rows",
            f"would evict the oldest {kept} of them ({sum(rows[:kept])} rows) for good; nothing was changed",
            "--accept-eviction, storage.accept_eviction = true",
        ):
            assert words in str(caught.value)

    with closing(ReplayBuffer(durable_config(data_dir, capacity=2_000))) as buffer:
        assert contents(buffer) == episodes


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_accepted_eviction_keeps_the_newest_and_is_logged(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fill(tmp_path)
    config = durable_config(tmp_path, capacity=200, storage={"accept_eviction": how == "configuration"})

    with closing(ReplayBuffer(config, accept_eviction=how == "argument")) as buffer:
        after, counts = contents(buffer), buffer.counts()

    assert after == dict(list(before.items())[-len(after) :])
    assert 200 - 50 < counts.steps_stored <= 200
    assert counts.episodes_added == counts.episodes_stored + counts.episodes_evicted == EPISODES
    assert "config.buffer_size is 200 rows, less than what is stored: the newest episodes are kept" in caplog.text
    with closing(ReplayBuffer(durable_config(tmp_path, capacity=200))) as buffer:
        assert contents(buffer) == after


def test_refused_server_names_the_file_and_the_variables_and_starts_once_eviction_is_accepted(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    before = fill(data_dir)
    file = tmp_path / "small.toml"
    file.write_text("[config]\nhorizon = 5\n", encoding="utf-8")
    variables = {"TOUCHLINE_CONFIG__BUFFER_SIZE": "300", "TOUCHLINE_STORAGE__DATA_DIR": str(data_dir)}

    with ServerProcess(tmp_path, "--port", "0", "--config", str(file), **variables) as process:
        assert process.wait() == 1
        refusal = process.log
    with closing(ReplayBuffer(durable_config(data_dir, capacity=2_000))) as buffer:
        kept = contents(buffer)
    with ServerProcess(tmp_path, "--port", "0", "--config", str(file), "--accept-eviction", **variables) as process:
        assert process.address
        started = process.log

    assert "config.buffer_size: 300 rows" in refusal
    assert f"configuration file: {file}; environment variables in force: " in refusal
    settings = "TOUCHLINE_CONFIG__BUFFER_SIZE=300, TOUCHLINE_CONFIG__MIN_HISTORY=100, TOUCHLINE_HTTP__ENABLED=off"
    assert f"{settings}, TOUCHLINE_STORAGE__DATA_DIR={data_dir}" in refusal
    assert kept == before
    assert "are evicted, as accepted" in started
    assert "restored " in started and "obs.state float32 (17,)" in started


# Other settings


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "a larger buffer": {"config": {"buffer_size": 9_000}},
    "a longer horizon": {"config": {"horizon": 60}},
    "columns over the limit": {"limits": {"max_columns": 2}},
    "episodes over the limit": {"limits": {"max_episode_bytes": 10}},
    "batches over the limit": {"limits": {"max_batch_size": 8, "max_horizon": 3}},
    "another law": {"sampling": {"law": "step", "seed": 3}},
    "values that are refused now": {"storage": {"allow_non_finite": False}},
    "columns in files": {"storage": {"device": "disk", "scratch_dir": "scratch"}},
    "columns in files of the same folder": {"storage": {"device": "disk", "scratch_dir": "data"}},
    **{mode: {"storage": {"durability": mode}} for mode in MODES},
}


def other_config(root: Path, changes: dict[str, dict[str, Any]]) -> Config:
    storage = {"device": "cpu", "data_dir": str(root / "data"), "allow_non_finite": True} | changes.get("storage", {})
    if "scratch_dir" in storage:
        storage["scratch_dir"] = str(root / storage["scratch_dir"])
    return Config(
        config={"buffer_size": 2_000, "batch_size": 8, "min_history": 0, "horizon": 3} | changes.get("config", {}),
        storage=storage,
        sampling=changes.get("sampling", {}),
        server={"port": 0},
        limits=changes.get("limits", {}),
    )


@pytest.mark.parametrize("name", list(SETTINGS))
def test_start_under_other_settings_has_every_episode_as_it_was_there_and_back(name: str, tmp_path: Path) -> None:
    base = other_config(tmp_path, {})
    with closing(ReplayBuffer(base)) as buffer:
        for sequence in range(20):
            episode = keyed_episode(0, sequence)
            episode.columns["obs.state"][1, 0] = np.nan
            buffer.add_episode(episode)
        before = contents(buffer)

    with closing(ReplayBuffer(other_config(tmp_path, SETTINGS[name]))) as buffer:
        under_others = contents(buffer)
    with closing(ReplayBuffer(base)) as buffer:
        back = contents(buffer)

    assert under_others == before
    assert back == before


def test_other_row_convention_is_refused_and_changes_nothing(filled: tuple[Path, dict[int, Any]]) -> None:
    data_dir, episodes = filled

    with pytest.raises(StoreMismatchError, match=r'written with sampling\.row_convention = "incoming", configured is "outgoing"'):
        ReplayBuffer(durable_config(data_dir, capacity=2_000, sampling={"row_convention": "outgoing"}))

    with closing(ReplayBuffer(durable_config(data_dir, capacity=2_000))) as buffer:
        assert contents(buffer) == episodes


# What a start says


def test_start_says_what_it_restored(filled: tuple[Path, dict[int, Any]], caplog: pytest.LogCaptureFixture) -> None:
    data_dir, episodes = filled

    with caplog.at_level(logging.INFO, "touchline_server"):
        ReplayBuffer(durable_config(data_dir, capacity=2_000)).close()

    assert f"restored {EPISODES} episodes, {sum(rows_of(episodes))} steps from {data_dir / 'touchline.db'} in " in caplog.text
    assert "columns: obs.image uint8 (8, 8), obs.state float32 (17,), action float64 (3,), reward float32 ()" in caplog.text


def test_start_on_an_empty_folder_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "touchline_server"):
        ReplayBuffer(durable_config(tmp_path)).close()

    assert f"{tmp_path / 'touchline.db'} holds no episodes: starting empty" in caplog.text


MISFITS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "dtype": (lambda columns: columns.update({"obs.state": columns["obs.state"].astype(np.float64)}), 'dtype="float32"'),
    "shape": (lambda columns: columns.update({"obs.state": columns["obs.state"][:, :5]}), ""),
    "missing": (lambda columns: columns.pop("obs.state"), ""),
    "unknown": (lambda columns: columns.update({"more": columns["reward"]}), ""),
}


@pytest.mark.parametrize("name", list(MISFITS))
def test_episode_that_does_not_match_restored_columns_is_refused_with_their_origin_and_a_remedy(name: str, tmp_path: Path) -> None:
    fill(tmp_path, episodes=3)
    change, remedy = MISFITS[name]
    columns = dict(keyed_episode(0, 99).columns)
    change(columns)

    with closing(ReplayBuffer(durable_config(tmp_path, capacity=2_000))) as buffer:
        with pytest.raises(InvalidEpisodeError) as caught:
            buffer.add_episode(Episode(columns))
        buffer.clear()
        buffer.add_episode(Episode(columns))
        with pytest.raises(InvalidEpisodeError, match="as in the first episode; "):
            buffer.add_episode(keyed_episode(0, 98))

    found = str(caught.value)
    assert f"as in the episodes restored from {tmp_path}; " in found
    assert remedy in found
    assert found.endswith(
        "to change the columns, empty the buffer (`touchline clear`, client.clear()), or start on another storage.data_dir"
    )


# While the store is read


@pytest.fixture
def half_restored(filled: tuple[Path, dict[int, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[ReplayBuffer]:
    """A buffer that has read a part of its store and reads on once the test is over."""
    buffer = ReplayBuffer(durable_config(filled[0], capacity=2_000), restore=False)
    reached, go_on = threading.Event(), threading.Event()
    apply, applied = EpisodeRing.apply, []

    def apply_until_the_tenth(ring: EpisodeRing, *arguments: Any) -> Any:
        if len(applied) == 10:
            reached.set()
            assert go_on.wait(DEADLINE_S)
        applied.append(arguments)
        return apply(ring, *arguments)

    monkeypatch.setattr(EpisodeRing, "apply", apply_until_the_tenth)
    thread = threading.Thread(target=buffer.restore)
    thread.start()
    try:
        assert reached.wait(DEADLINE_S)
        yield buffer
    finally:
        go_on.set()
        thread.join()
        assert buffer.num_eps == EPISODES
        buffer.close()


VERBS: dict[str, Callable[[ReplayBuffer], object]] = {
    "counts": lambda buffer: buffer.counts(),
    "num_eps": lambda buffer: buffer.num_eps,
    "size": lambda buffer: buffer.size,
    "ready": lambda buffer: buffer.ready(),
    "sample": lambda buffer: buffer.sample(),
    "add": lambda buffer: buffer.add(keyed_episode(1, 0).columns),
    "load": lambda buffer: buffer.load({name: column[None] for name, column in keyed_episode(1, 0).columns.items()}),
    "add_episode": lambda buffer: buffer.add_episode(keyed_episode(1, 0)),
    "submit": lambda buffer: buffer.table.submit(keyed_episode(1, 0)),
    "episodes": lambda buffer: next(buffer.episodes()),
    "clear": lambda buffer: buffer.clear(),
    "as_torchrl": lambda buffer: buffer.as_torchrl(),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_verb_during_a_restore_is_refused_with_the_progress(verb: str, half_restored: ReplayBuffer) -> None:
    with pytest.raises(RestoringError, match=r"is being read \(\d+ of \d+ rows, \d+ %\); try again when it is"):
        VERBS[verb](half_restored)


def test_verb_before_a_restore_is_refused(filled: tuple[Path, dict[int, Any]]) -> None:
    buffer = ReplayBuffer(durable_config(filled[0], capacity=2_000), restore=False)

    for verb in VERBS.values():
        with pytest.raises(RestoringError, match=r"is being read; try again when it is"):
            verb(buffer)
