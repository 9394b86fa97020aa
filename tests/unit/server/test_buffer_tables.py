"""Several tables in process: ``ReplayBuffer.tables``, ``create_table`` and ``drop_table``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from support.store_cases import check_traced, traced, traced_columns
from touchline_server import Config, InvalidArgumentError, ReplayBuffer, RestoringError, StoreInUseError, UnknownTableError
from touchline_server.durability.table_list import TableList


def config(data_dir: Path | None = None, **storage: str) -> Config:
    return Config(
        config={"buffer_size": 200, "batch_size": 8, "min_history": 0},
        storage={"device": "cpu", "data_dir": str(data_dir or ""), **storage},
        tables={"demos": {"buffer_size": 60, "horizon": 5}},
    )


def test_each_table_is_a_buffer_and_the_default_one_is_the_buffer_itself() -> None:
    buffer = ReplayBuffer(config())
    demos = buffer.tables["demos"]

    demos.add_episode(traced(0, 20))
    buffer.add_episode(traced(1, 30))

    assert list(buffer.tables) == ["", "demos"]
    assert buffer.tables[""] is buffer
    assert buffer.tables["demos"] is demos is demos.tables["demos"]
    assert demos.tables[""] is buffer
    assert (demos.size, buffer.size, demos.capacity, buffer.capacity) == (20, 30, 60, 200)
    check_traced(demos.sample(), horizon=5)
    check_traced(buffer.sample(), horizon=3)


def test_created_table_is_a_buffer_until_it_is_dropped() -> None:
    buffer = ReplayBuffer(config())
    expert = buffer.create_table("expert", buffer_size=100)
    expert.add(traced_columns(0, 20))

    assert buffer.create_table("expert", buffer_size=100) is expert is buffer.tables["expert"]
    assert buffer.drop_table("expert").steps_stored == 20
    for verb in (lambda: expert.add(traced_columns(1, 20)), expert.sample, expert.counts, expert.clear, lambda: list(expert.episodes())):
        with pytest.raises(UnknownTableError, match="table: 'expert' was dropped"):
            verb()
    again = buffer.create_table("expert")
    assert again is not expert
    assert (again.num_eps, again.capacity) == (0, 200)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("demos", {}, "table: 'demos' exists already"),
        ("Expert", {}, "table: 'Expert', expected a name of 1 to 64 lower-case letters"),
        ("expert", {"horizon": 0}, "tables.expert.horizon: 0, expected at least 1"),
    ],
)
def test_table_that_cannot_be_created_is_refused(name: str, keys: dict[str, int], message: str) -> None:
    buffer = ReplayBuffer(config())

    with pytest.raises(InvalidArgumentError) as caught:
        buffer.create_table(name, **keys)

    assert message in str(caught.value)
    assert list(buffer.tables) == ["", "demos"]


def test_closing_the_buffer_closes_its_tables_and_closing_a_table_does_not(tmp_path: Path) -> None:
    buffer = ReplayBuffer(config(tmp_path))
    expert = buffer.create_table("expert")
    expert.close()
    expert.add(traced_columns(0, 20))
    with pytest.raises(StoreInUseError):
        ReplayBuffer(config(tmp_path))
    buffer.close()

    again = ReplayBuffer(config(tmp_path))
    assert {name: table.num_eps for name, table in again.tables.items()} == {"": 0, "demos": 0, "expert": 1}
    again.close()


def test_data_dir_whose_default_table_is_not_durable_belongs_to_one_buffer_too(tmp_path: Path) -> None:
    buffer = ReplayBuffer(config(tmp_path, durability="none"))

    with pytest.raises(StoreInUseError, match=f"storage.data_dir: {tmp_path} is in use"):
        ReplayBuffer(config(tmp_path, durability="none"))

    buffer.close()
    ReplayBuffer(config(tmp_path, durability="none")).close()


def test_table_whose_folder_cannot_be_made_is_forgotten_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(config(tmp_path, device="disk", scratch_dir=str(tmp_path / "scratch")))
    (tmp_path / "scratch" / "expert").write_text("in the way")

    with pytest.raises(Exception, match=r"table 'expert': storage\.scratch_dir"):
        buffer.create_table("expert")

    assert list(buffer.tables) == ["", "demos"]
    assert TableList(tmp_path, hold=False).read() == {}
    buffer.close()


def test_refused_episode_of_a_table_is_counted_there() -> None:
    buffer = ReplayBuffer(config())
    with pytest.raises(ValueError, match=r"61 rows"):
        buffer.tables["demos"].add_episode(traced(0, 61))

    assert (buffer.tables["demos"].counts().episodes_refused, buffer.counts().episodes_refused) == (1, 0)


def test_restore_reports_its_progress_by_table_and_refuses_calls_until_the_last_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(ReplayBuffer(config(tmp_path))) as buffer:
        for name, lengths in (("", [20, 30]), ("demos", [10, 15])):
            for number, length in enumerate(lengths):
                buffer.tables[name].add_episode(traced(number, length))

    buffer, reported, refused = ReplayBuffer(config(tmp_path), restore=False), [], []

    def note(table: str, read: int, total: int) -> None:
        reported.append((table, read, total))
        with pytest.raises(RestoringError) as caught:
            buffer.registry.check_restored()
        refused.append(str(caught.value))

    buffer.registry.restore(note)

    assert reported == [("", 20, 50), ("", 50, 50), ("demos", 10, 25), ("demos", 25, 25)]
    assert refused[0].startswith(f"the durable store in {tmp_path} is being read (20 of 50 rows, 40 %)")
    assert refused[2].startswith(f"the durable store in {tmp_path / 'demos'} is being read (10 of 25 rows, 40 %)")
    buffer.registry.check_restored()
    buffer.close()
