"""``[tables.NAME]`` of the configuration: what a table takes from the default one, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from touchline_server import Config, ConfigError, read_cfg

FILE = """
[config]
buffer_size = 1000
horizon = 5

[storage]
device = "disk"
scratch_dir = "/fast"
data_dir = "/data"

[tables.demos]
buffer_size = 500
law = "step"
durability = "sync"

[tables.high-reward_2]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tables.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_table_has_its_own_keys_and_the_default_tables_others(file: Path) -> None:
    cfg = read_cfg(file)

    demos, plain, default = cfg.for_table("demos"), cfg.for_table("high-reward_2"), cfg.for_table("")

    assert (demos.buffer_size, demos.horizon, demos.sampling.law, demos.storage.durability) == (500, 5, "step", "sync")
    assert (plain.buffer_size, plain.horizon, plain.sampling.law, plain.storage.durability) == (1000, 5, "episode", "batch")
    assert (default.buffer_size, default.sampling.law) == (1000, "episode")
    assert list(cfg.tables) == ["demos", "high-reward_2"]
    assert not demos.tables and not default.tables
    assert demos.limits == default.limits == cfg.limits


def test_table_has_folders_of_its_own(file: Path) -> None:
    cfg = read_cfg(file)
    own = cfg.override(tables={"demos": {"scratch_dir": "/own", "durability": "none"}}).for_table("demos")

    assert [cfg.for_table(name).durable_dir for name in ("", "demos")] == ["/data", "/data/demos"]
    assert [cfg.for_table(name).storage.scratch_dir for name in ("", "demos")] == ["/fast", "/fast/demos"]
    assert (own.durable_dir, own.storage.scratch_dir) == ("", "/own")
    assert Config(tables={"demos": {}}).for_table("demos").durable_dir == ""


def test_environment_changes_and_makes_tables(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_TABLES__DEMOS__BUFFER_SIZE", "700")
    monkeypatch.setenv("TOUCHLINE_TABLES__NEW_ONE__SEED", "4")

    cfg = read_cfg(file)

    assert cfg.for_table("demos").buffer_size == 700
    assert cfg.for_table("demos").sampling.law == "step"
    assert cfg.for_table("new_one").sampling.seed == 4


def test_tables_survive_toml_dump_override_and_hash(tmp_path: Path, file: Path) -> None:
    cfg = read_cfg(file)
    written = tmp_path / "written.toml"
    written.write_text(cfg.to_toml(), encoding="utf-8")

    assert read_cfg(written) == cfg == Config(**cfg.model_dump())
    assert hash(read_cfg(written)) == hash(cfg)
    assert cfg.override(server={"port": 0}).tables == cfg.tables
    assert 'tables.demos.law = "step"' in cfg.changed()
    assert "tables.high-reward_2" in cfg.changed()


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"Demos": {}}, "tables.Demos: expected a name of 1 to 64 lower-case letters, digits, '-' and '_'"),
        ({"a" * 65: {}}, "expected a name of 1 to 64 lower-case letters"),
        ({"two__parts": {}}, "and no '__'"),
        ({"1st": {}}, "with a letter first"),
        ({"": {}}, "expected a name of 1 to 64"),
        ({"../up": {}}, "expected a name of 1 to 64"),
        ({"default": {}}, "tables.default: expected another name: this one is reserved"),
        ({"lock": {}}, "tables.lock: expected another name"),
        ({"demos": {"buffer_size": 0}}, "tables.demos.buffer_size: 0, expected at least 1"),
        ({"demos": {"buffer_size": 3}}, "tables.demos.buffer_size: 3, expected at least tables.demos.horizon + 1 (4)"),
        ({"demos": {"horizon": 2_000}}, "tables.demos.horizon: 2000, expected at most limits.max_horizon (1024)"),
        ({"demos": {"batch_size": 70_000}}, "tables.demos.batch_size: 70000, expected at most limits.max_batch_size (65536)"),
        ({"demos": {"data_dir": "/data"}}, "tables.demos.data_dir: unknown key, expected one of buffer_size, batch_size"),
        ({"demos": {"port": 0}}, "tables.demos.port: unknown key"),
        ({"demos": {"device": "disk"}}, "tables.demos.scratch_dir: '', expected a folder, because tables.demos.device is 'disk'"),
        ({"demos": {"law": "uniform"}}, "tables.demos.law: 'uniform', expected 'episode' or 'step'"),
        ({"demos": 5}, "tables.demos: 5, expected a section"),
    ],
)
def test_mistake_in_a_table_names_key_actual_and_expected(tables: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(tables=tables)

    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "TOUCHLINE_TABLES__DEMOS__BUFFER_SIZE",
            "0",
            "tables.demos.buffer_size (from the environment variable {}): '0', expected at least 1",
        ),
        ("TOUCHLINE_TABLES__DEMOS__PORT", "0", "tables.demos.port (from the environment variable {}): unknown key"),
        ("TOUCHLINE_TABLES__DEMOS", "x", "environment variable {}: expected TOUCHLINE_TABLES__NAME__KEY"),
        ("TOUCHLINE_TABLES____LAW", "step", "tables.: expected a name"),
    ],
)
def test_mistake_in_a_variable_of_a_table_names_it(variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError) as caught:
        read_cfg()

    assert expected.format(variable) in str(caught.value)


def test_mistake_in_the_file_names_the_file(file: Path) -> None:
    file.write_text(FILE.replace('law = "step"', 'law = "stpe"'), encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"tables\.demos\.law \(in {file}\): 'stpe', expected"):
        read_cfg(file)
