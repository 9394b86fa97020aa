"""The configuration: its sources, what overrides what, and the errors for mistakes."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from touchline_server.config.sections import MOVED_KEYS, SamplingConfig
from touchline_server.config.settings import Config, ConfigError, read_cfg

DEFAULT_TOML = Path(__file__).parents[3] / "cfg" / "default.toml"


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Removes the machine's variables, and moves to a working directory without a ``cfg`` folder."""
    for variable in os.environ:
        if variable.upper().startswith("TOUCHLINE_"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# Sources


def test_default_toml_has_every_default() -> None:
    assert read_cfg(DEFAULT_TOML) == Config()


def test_default_toml_names_every_key() -> None:
    text = DEFAULT_TOML.read_text(encoding="utf-8")

    sections = tomllib.loads(re.sub(r"^# (seed|recent_steps|recent_half_life) =", r"\1 =", text, flags=re.MULTILINE))

    expected = {section: list(keys) for section, keys in Config().model_dump(exclude={"tables"}).items()}
    assert {section: list(keys) for section, keys in sections.items()} == expected


def test_read_cfg_without_any_file_takes_the_packaged_copy() -> None:
    assert read_cfg() == Config()


def test_read_cfg_prefers_path_then_variable_then_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _write(tmp_path / "cfg" / "default.toml", "[config]\nbatch_size = 1\n")
    by_variable = _write(tmp_path / "variable.toml", "[config]\nbatch_size = 2\n")
    by_path = _write(tmp_path / "path.toml", "[config]\nbatch_size = 3\n")

    assert read_cfg().batch_size == 1
    monkeypatch.setenv("TOUCHLINE_CFG", str(by_variable))
    assert read_cfg().batch_size == 2
    assert read_cfg(by_path).batch_size == 3
    assert read_cfg(str(by_path)).batch_size == 3


def test_read_cfg_missing_key_has_its_default(tmp_path: Path) -> None:
    cfg = read_cfg(_write(tmp_path / "few.toml", "[config]\nhorizon = 5\n"))

    assert cfg == Config(config={"horizon": 5})


@pytest.mark.parametrize("by_variable", [False, True])
def test_read_cfg_missing_file_is_refused(by_variable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    if by_variable:
        monkeypatch.setenv("TOUCHLINE_CFG", str(missing))

    with pytest.raises(ConfigError) as caught:
        read_cfg(None if by_variable else missing)

    assert str(missing) in str(caught.value)
    assert ("TOUCHLINE_CFG" in str(caught.value)) == by_variable


def test_read_cfg_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        read_cfg(tmp_path)


@pytest.mark.parametrize(("text", "line"), [("[config]\nbatch_size = \n", "line 2"), ("[config]\nhorizon = 1\nx = [1,\n", "line 4")])
def test_read_cfg_syntax_error_names_file_and_line(text: str, line: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "broken.toml", text)

    with pytest.raises(ConfigError) as caught:
        read_cfg(file)

    assert str(file) in str(caught.value)
    assert line in str(caught.value)


def test_read_cfg_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes(b'[server]\nhost = "\xff"\n')

    with pytest.raises(ConfigError, match=r"latin\.toml: not UTF-8 text, byte 17"):
        read_cfg(file)


# The environment


def test_read_cfg_environment_overrides_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = _write(tmp_path / "a.toml", '[config]\nbatch_size = 32\nhorizon = 5\n[sampling]\nlaw = "episode"\n')
    monkeypatch.setenv("TOUCHLINE_CONFIG__BATCH_SIZE", "64")
    monkeypatch.setenv("TOUCHLINE_SAMPLING__LAW", "step")
    monkeypatch.setenv("TOUCHLINE_STORAGE__ALLOW_NON_FINITE", "true")
    monkeypatch.setenv("TOUCHLINE_SERVER__DRAIN_TIMEOUT_S", "0.5")

    assert read_cfg(file) == Config(
        config={"batch_size": 64, "horizon": 5},
        sampling={"law": "step"},
        storage={"allow_non_finite": True},
        server={"drain_timeout_s": 0.5},
    )


def test_read_cfg_environment_overrides_packaged_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_CONFIG__BATCH_SIZE", "64")

    assert read_cfg().batch_size == 64


OTHER_VALUES: dict[str, dict[str, Any]] = {
    "config": {"buffer_size": 500, "batch_size": 7, "min_history": 0, "horizon": 9},
    "storage": {
        "device": "cpu",
        "scratch_dir": "/scratch",
        "share_columns": "on",
        "allow_non_finite": True,
        "data_dir": "/data",
        "durability": "sync",
        "sync_interval_ms": 5,
        "accept_eviction": True,
    },
    "sampling": {
        "law": "recent",
        "recent_steps": 900,
        "recent_half_life": None,
        "pad": "end",
        "priority_alpha": 0.7,
        "priority_beta": 0.5,
        "priority_eta": 0.8,
        "seed": 3,
        "row_convention": "outgoing",
    },
    "rate": {"samples_per_insert": 4.5, "tolerance": 600.0, "min_steps": 70},
    "server": {
        "host": "::1",
        "port": 0,
        "unix_socket": "/run/a.sock",
        "log_level": "error",
        "log_format": "json",
        "log_summary_s": 60.0,
        "keepalive_s": 2.5,
        "drain_timeout_s": 0.5,
        "add_workers": 3,
        "sample_workers": 4,
        "gather_threads": 3,
        "sample_share": 0.25,
    },
    "limits": {
        "max_message_bytes": 4096,
        "max_request_bytes": 3_000_000,
        "max_episode_bytes": 5000,
        "max_columns": 9,
        "max_batch_size": 300,
        "max_horizon": 30,
        "max_streams": 8,
        "max_calls": 7,
        "max_connection_calls": 6,
        "max_receive_bytes": 5_000_000_000,
        "max_send_bytes": 4_000_000_000,
    },
    "ring": {"max_rings": 0, "max_ring_bytes": 1, "device": False, "max_hold_s": 2.5},
    "tls": {"cert": "a.pem", "key": "b.pem", "client_ca": "c.pem"},
    "auth": {"tokens_file": "tokens.toml", "allow_plaintext": True},
    "http": {"enabled": "on", "host": "0.0.0.0", "port": 0},
    "metrics": {"enabled": False},
}
"""A value other than the default for every key except ``recent_half_life``, which excludes ``recent_steps``."""


def test_every_key_has_the_same_value_from_code_file_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_code = Config(**OTHER_VALUES)
    from_file = read_cfg(_write(tmp_path / "all.toml", in_code.to_toml()))
    for section, keys in OTHER_VALUES.items():
        for key, value in keys.items():
            text = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
            monkeypatch.setenv(f"TOUCHLINE_{section}__{key}".upper(), text)

    defaults, dumped = Config().model_dump(), in_code.model_dump()
    assert dumped == OTHER_VALUES | {"tables": {}}
    same = [key for section, keys in defaults.items() for key, value in keys.items() if dumped[section][key] == value]
    assert same == ["recent_half_life"]
    assert in_code == from_file == read_cfg()


def test_read_cfg_empty_variable_unsets_the_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = _write(tmp_path / "seeded.toml", "[sampling]\nseed = 7\n")

    assert read_cfg(file).sampling.seed == 7
    monkeypatch.setenv("TOUCHLINE_SAMPLING__SEED", "")
    assert read_cfg(file).sampling.seed is None


def test_read_cfg_variable_with_the_name_of_a_section_only_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER", "replay:50051")

    assert read_cfg() == Config()


def test_variable_with_one_underscore_has_no_effect_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("TOUCHLINE_CONFIG_BATCH_SIZE", "TOUCHLINE_TLS_CERT", "TOUCHLINE_SERVER_TOKENS", "TOUCHLINE_SERVER_SERVICE_HOST"):
        monkeypatch.setenv(variable, "7")

    assert read_cfg() == Config()

    (record,) = caplog.records
    assert record.getMessage() == (
        "environment variable TOUCHLINE_CONFIG_BATCH_SIZE has no effect: TOUCHLINE_CONFIG__BATCH_SIZE, with two underscores, "
        "overrides config.batch_size"
    )


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TOUCHLINE_CONFIG__BACTH_SIZE", "64", "unknown key, expected one of buffer_size, batch_size"),
        ("TOUCHLINE_CONFIGS__BATCH_SIZE", "64", "unknown section 'configs', expected one of config, storage"),
        ("TOUCHLINE_CONFIG__BATCH_SIZE", "many", "'many', expected an integer"),
        ("TOUCHLINE_CONFIG__BATCH_SIZE", "", "'', expected an integer"),
        ("TOUCHLINE_CONFIG__BATCH_SIZE", "0", "'0', expected at least 1"),
        ("TOUCHLINE_CONFIG__BATCH_SIZE__X", "1", "unknown key, expected one of buffer_size, batch_size"),
        ("TOUCHLINE_SAMPLING__LAW", "uniform", "'uniform', expected 'episode' or 'step'"),
    ],
)
def test_read_cfg_bad_variable_is_named(variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError) as caught:
        read_cfg()

    assert variable in str(caught.value)
    assert expected in str(caught.value)


def test_config_in_code_ignores_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOUCHLINE_CONFIG__BATCH_SIZE", "64")
    monkeypatch.setenv("TOUCHLINE_CFG", str(_write(tmp_path / "other.toml", "[config]\nbatch_size = 32\n")))

    assert Config().batch_size == 256


# Mistakes


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("config", "batch_size", 0, "0, expected at least 1"),
        ("config", "batch_size", True, "True, expected a number"),
        ("config", "horizon", 2.5, "2.5, expected an integer"),
        ("config", "buffer_size", 2**63, f"{2**63}, expected at most {2**63 - 1}"),
        ("config", "min_history", -1, "-1, expected at least 0"),
        ("storage", "device", "gpu", "'gpu', expected 'auto', 'cuda', 'cuda:N', 'cpu' or 'disk'"),
        ("storage", "device", "cuda:", "'cuda:', expected 'auto'"),
        ("storage", "scratch_dir", 3, "3, expected a string"),
        ("storage", "allow_non_finite", "perhaps", "'perhaps', expected true or false"),
        ("sampling", "seed", -1, "-1, expected at least 0"),
        ("sampling", "seed", True, "True, expected a number"),
        ("sampling", "law", "uniform", "'uniform', expected 'episode' or 'step'"),
        ("sampling", "row_convention", "both", "'both', expected 'incoming' or 'outgoing'"),
        ("server", "host", "", "'', expected a non-empty string"),
        ("server", "port", 65_536, "65536, expected at most 65535"),
        ("server", "drain_timeout_s", float("nan"), "nan, expected"),
        ("server", "drain_timeout_s", float("inf"), "inf, expected a finite number"),
        ("limits", "max_message_bytes", 2**31, f"{2**31}, expected at most {2**31 - 1}"),
        ("server", "hots", "::1", "unknown key, expected one of host, port"),
    ],
)
def test_config_bad_value_names_key_actual_and_expected(section: str, key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{section: {key: value}})

    assert str(caught.value).startswith(f"{section}.{key}: {expected}")


def test_config_every_mistake_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(config={"batch_size": 0, "horizon": 0}, server={"port": -1})

    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "config.batch_size",
        "config.horizon",
        "server.port",
    ]


def test_config_long_value_is_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(storage={"device": "x" * 10_000})

    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[config]\nbacth_size = 64\n", "config.bacth_size (in {file}): unknown key, expected one of buffer_size"),
        ("[config]\nbatch_size = -5\n", "config.batch_size (in {file}): -5, expected at least 1"),
        ("[konfig]\nbatch_size = 64\n", "konfig (in {file}): unknown section, expected one of config, storage"),
        ("batch_size = 64\n", "batch_size (in {file}): unknown section, expected one of config, storage"),
        ("config = 64\n", "config (in {file}): 64, expected a section"),
    ],
)
def test_read_cfg_mistake_in_the_file_names_key_and_file(text: str, expected: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "wrong.toml", text)

    with pytest.raises(ConfigError) as caught:
        read_cfg(file)

    assert str(caught.value).startswith(expected.format(file=file))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"config": {"batch_size": 65_537}},
            "config.batch_size: 65537, expected at most limits.max_batch_size (65536)",
        ),
        ({"config": {"horizon": 1_025}}, "config.horizon: 1025, expected at most limits.max_horizon (1024)"),
        (
            {"config": {"buffer_size": 3, "min_history": 0}},
            "config.buffer_size: 3, expected at least config.horizon + 1 (4)",
        ),
        ({"storage": {"device": "disk"}}, "storage.scratch_dir: '', expected a folder"),
    ],
)
def test_config_values_that_do_not_fit_together_are_refused(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**sections)

    assert str(caught.value).startswith(expected)


def test_small_buffer_is_accepted_with_the_default_min_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_CONFIG__BUFFER_SIZE", "1000")

    assert (Config(config={"buffer_size": 1_000}).min_history, read_cfg().buffer_size) == (100_000, 1_000)


def test_config_values_at_their_limits_are_accepted() -> None:
    cfg = Config(
        config={"buffer_size": 1_025, "batch_size": 8, "min_history": 1_025, "horizon": 1_024},
        server={"port": 0},
        limits={"max_batch_size": 8},
        storage={"device": "cuda:1"},
    )

    assert (cfg.buffer_size, cfg.batch_size, cfg.min_history, cfg.horizon) == (1_025, 8, 1_025, 1_024)


# Keys that have moved


@pytest.mark.parametrize(("old", "new"), MOVED_KEYS.items(), ids=".".join)
@pytest.mark.parametrize("source", ["file", "environment", "code"])
def test_moved_key_is_refused_with_an_error_that_gives_the_new_name(
    old: tuple[str, str], new: tuple[str, str], source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (section, key), value = old, Config().model_dump()[new[0]][new[1]]
    file, variable = tmp_path / "old.toml", f"TOUCHLINE_{section}__{key}".upper()
    where = {"file": f" (in {file})", "environment": f" (from the environment variable {variable})", "code": ""}[source]

    with pytest.raises(ConfigError) as caught:
        match source:
            case "file":
                read_cfg(_write(file, f"[{section}]\n{key} = {value}\n"))
            case "environment":
                monkeypatch.setenv(variable, str(value))
                read_cfg()
            case _:
                Config(**{section: {key: value}})

    assert str(caught.value) == f"{section}.{key}{where} is now {'.'.join(new)}"


def test_moved_key_among_other_mistakes_is_reported_too() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(config={"batch_size": 0}, server={"max_rings": 4})

    assert str(caught.value).splitlines() == ["config.batch_size: 0, expected at least 1", "server.max_rings is now ring.max_rings"]


def test_moved_key_with_one_underscore_is_logged_with_its_new_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER_MAX_RINGS", "4")

    assert read_cfg() == Config()

    (record,) = caplog.records
    assert record.getMessage() == (
        "environment variable TOUCHLINE_SERVER_MAX_RINGS has no effect: TOUCHLINE_RING__MAX_RINGS, with two underscores, "
        "overrides ring.max_rings"
    )


def test_moved_keys_exist_in_their_new_place_and_not_in_the_old() -> None:
    keys = {(section, key) for section, values in Config().model_dump().items() for key in values}

    assert set(MOVED_KEYS.values()) <= keys
    assert not MOVED_KEYS.keys() & keys


# The object


def test_config_accepts_sections_as_objects() -> None:
    assert Config(sampling=SamplingConfig(law="step")) == Config(sampling={"law": "step"})


def test_override_replaces_keys_and_leaves_the_others() -> None:
    cfg = Config(server={"host": "::1", "port": 1}, sampling={"seed": 3})

    assert cfg.override(server={"port": 2}, ring={"max_rings": 0}) == Config(
        server={"host": "::1", "port": 2}, sampling={"seed": 3}, ring={"max_rings": 0}
    )
    assert cfg.override() == cfg


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"server": {"port": -1}}, "server.port: -1, expected at least 0"),
        ({"server": {"max_rings": 1}}, "server.max_rings is now ring.max_rings"),
        ({"rings": {"max_rings": 1}}, "rings: unknown section, expected one of config, storage"),
        ({"config": {"batch_size": 70_000}}, "config.batch_size: 70000, expected at most limits.max_batch_size (65536)"),
    ],
)
def test_override_with_a_mistake_is_refused(changes: dict[str, dict[str, int]], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().override(**changes)

    assert str(caught.value).startswith(expected)


def test_config_is_frozen_and_hashable() -> None:
    cfg = Config()

    with pytest.raises(ValidationError, match="frozen"):
        cfg.config.batch_size = 1  # type: ignore[misc]
    assert hash(cfg) == hash(Config())


_TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@given(
    buffer_size=st.integers(2_000, 2**63 - 1),
    batch_size=st.integers(1, 65_536),
    min_history=st.integers(0, 2_000),
    scratch_dir=_TEXT,
    seed=st.none() | st.integers(0, 2**63 - 1),
    law=st.sampled_from(["episode", "step"]),
    host=_TEXT.filter(bool),
    drain_timeout_s=st.floats(0, allow_infinity=False),
    allow=st.booleans(),
)
def test_to_toml_reads_back_equal(
    buffer_size: int,
    batch_size: int,
    min_history: int,
    scratch_dir: str,
    seed: int | None,
    law: str,
    host: str,
    drain_timeout_s: float,
    allow: bool,
) -> None:
    cfg = Config(
        config={"buffer_size": buffer_size, "batch_size": batch_size, "min_history": min_history},
        storage={"scratch_dir": scratch_dir, "allow_non_finite": allow},
        sampling={"seed": seed, "law": law},
        server={"host": host, "drain_timeout_s": drain_timeout_s},
    )

    assert Config(**tomllib.loads(cfg.to_toml())) == cfg


def test_to_toml_is_a_configuration_file(tmp_path: Path) -> None:
    cfg = Config(config={"batch_size": 64}, sampling={"seed": 3}, storage={"scratch_dir": 'a "b"\n\x7f\\'})

    assert read_cfg(_write(tmp_path / "written.toml", cfg.to_toml())) == cfg


def test_every_key_is_described() -> None:
    described = {
        f"{table}.{key}": field.description
        for table, model in Config.model_fields.items()
        if table != "tables"
        for key, field in type(model.default).model_fields.items()
    }

    assert [name for name, description in described.items() if not description] == []
