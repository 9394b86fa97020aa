"""Tables: what they share (nothing), and how they are found by name."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from support.store_cases import check_traced, make_config, traced
from touchline_server import ReplayBuffer, UnknownTableError
from touchline_server.tables.registry import TableRegistry
from touchline_server.tables.table import Table


def named(*names: str) -> TableRegistry:
    tables = TableRegistry(Table("", make_config()))
    for name in names:
        tables.add(Table(name, make_config()))
    return tables


def test_registry_finds_tables_by_name_and_the_default_by_the_empty_one() -> None:
    tables = named("online", "demos")

    assert tables.get("") is tables.default
    assert [table.name for table in tables] == ["", "online", "demos"]
    assert [tables.get(name).name for name in ("online", "demos")] == ["online", "demos"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "table: 'expert' does not exist, expected the empty name of the default table"),
        (("online", "demos"), "table: 'expert' does not exist, expected the empty name of the default table or 'demos' or 'online'"),
    ],
)
def test_registry_names_the_tables_that_there_are_in_place_of_an_unknown_one(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnknownTableError) as caught:
        named(*names).get("expert")

    assert str(caught.value) == message


def test_registry_refuses_a_second_table_of_a_name() -> None:
    tables = named("online")
    first = tables.get("online")

    with pytest.raises(ValueError, match="'online' exists already"):
        tables.add(Table("online", make_config()))

    assert tables.get("online") is first


def test_tables_have_ids_counts_schemas_laws_and_seeds_of_their_own() -> None:
    one, other = Table("one", make_config(40, seed=1)), Table("other", make_config(200, horizon=5, law="step", seed=1))
    for number in range(6):
        one.add(traced(number, 12))
    stored = other.add(traced(0, 20))

    assert stored.episode_id == 0
    assert (one.counts().episodes_stored, other.counts().episodes_stored) == (3, 1)
    assert (one.spec().horizon, other.spec().horizon) == (3, 5)
    assert (one.spec().law, other.spec().law) == ("episode", "step")
    assert one.seeds.stream().random() == other.seeds.stream().random()


def test_add_to_a_table_does_not_wait_for_another_whose_writer_waits() -> None:
    one, other = Table("one", make_config(20)), Table("other", make_config(20))
    for table in (one, other):
        table.add(traced(0, 20))
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with one.draw(one.spec(), np.random.default_rng(0)):
            one.store.subscribe(waiting.set)
            held_back = pool.submit(one.add, traced(1, 20))
            for number in range(1, 50):
                other.add(traced(number, 20))

            assert not held_back.done()
        held_back.result(60)

    assert waiting.is_set()
    assert other.counts().episodes_added == 50


def test_buffer_uses_the_table_that_it_is_given() -> None:
    table = Table("demos", make_config(60))
    buffer = ReplayBuffer(table.config, table=table)

    table.add(traced(0, 20))
    buffer.add_episode(traced(1, 20))

    assert buffer.num_eps == table.counts().episodes_stored == 2
    check_traced(buffer.sample(), horizon=3)


def test_durable_tables_have_folders_of_their_own(tmp_path: Path) -> None:
    def opened() -> list[Table]:
        tables = [Table(name, make_config(60, storage={"data_dir": str(tmp_path / name)})) for name in ("one", "other")]
        for table in tables:
            assert not table.restored
            table.restore()
        return tables

    one, other = opened()
    one.add(traced(3, 20))
    for table in (one, other):
        table.close()

    one, other = opened()
    try:
        assert (one.counts().episodes_stored, other.counts().episodes_stored) == (1, 0)
        assert other.add(traced(4, 20)).episode_id == 0
    finally:
        for table in (one, other):
            table.close()
