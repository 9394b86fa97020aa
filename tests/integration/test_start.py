"""Imports and output of a starting server, and the cost of a health check: judged by import order, not by a clock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.certificates import Authority
from support.service_calls import DEADLINE_S, ServerProcess
from support.store_cases import plain_columns
from touchline import ReplayClient
from touchline_server import ConfigError
from touchline_server.config.sections import TlsConfig
from touchline_server.service.healthcheck import check_own
from touchline_server.service.tls import server_credentials
from touchline_server.store import cuda_device

HEAVY = {"torch", "torchrl", "tensordict", "torch._dynamo"}

PROFILE = {"PYTHONPROFILEIMPORTTIME": "1"}
"""Environment that makes Python write a line to stderr for each module that it imports."""


def imported(log: str) -> set[str]:
    """Returns the modules that a process with :data:`PROFILE` imported, from its stderr."""
    return {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("device", ["auto", "cpu", "disk"])
def test_server_that_adds_samples_restores_and_reads_back_has_imported_no_torch(device: str, tmp_path: Path) -> None:
    if device == "auto" and cuda_device.is_possible():
        pytest.skip("where CUDA may be, torch has to look")
    storage = {
        "TOUCHLINE_STORAGE__DEVICE": device,
        "TOUCHLINE_STORAGE__SCRATCH_DIR": str(tmp_path / "scratch"),
        "TOUCHLINE_STORAGE__DATA_DIR": str(tmp_path / "data"),
        "TOUCHLINE_CONFIG__BUFFER_SIZE": "5000",
    }
    with ServerProcess(tmp_path, **storage) as server, ReplayClient(server.address) as client:
        client.add(plain_columns(20))

    with ServerProcess(tmp_path, **storage, **PROFILE) as server, ReplayClient(server.address) as client:
        client.add(plain_columns(30))
        client.load([plain_columns(40)])
        for ring in (True, False):
            with client.batches(ring=ring) as batches:
                assert np.asarray(next(batches).obs).shape == (4, 8, 2)
        client.sample()
        assert [episode.length for episode in client.episodes()] == [20, 30, 40]
        client.clear()
        client.add(plain_columns(10))
    modules = imported(server.log)

    assert {"numpy", "grpc", "touchline_server.store.columns", "touchline_server.durability.restore"} <= modules
    assert modules & HEAVY == set()


def test_first_line_comes_before_anything_heavy_and_names_file_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[config]\nhorizon = 5\n", encoding="utf-8")

    with ServerProcess(tmp_path, "--port", "0", "--config", str(file), **PROFILE) as server:
        assert server.address
    before, _, after = server.log.partition("is starting")
    first_line = f"{before.splitlines()[-1]}{after.splitlines()[0]}"

    assert imported(before) & {*HEAVY, "grpc", "touchline_server.config.settings", "numpy", "google.protobuf"} == set()
    assert {"grpc", "touchline_server.config.settings", "numpy"} <= imported(after)
    assert f"configuration file: {file}; environment variables in force: " in first_line
    assert "TOUCHLINE_CONFIG__BATCH_SIZE=8" in first_line
    assert "config.horizon = 5" in after


@pytest.mark.parametrize(
    ("variable", "option", "info", "debug"),
    [
        ({}, (), True, False),
        ({"TOUCHLINE_SERVER__LOG_LEVEL": "warning"}, (), False, False),
        ({"TOUCHLINE_SERVER__LOG_LEVEL": "debug"}, (), True, True),
        ({"TOUCHLINE_SERVER__LOG_LEVEL": "debug"}, ("--log-level", "error"), False, False),
        ({"TOUCHLINE_SERVER__LOG_LEVEL": "error"}, ("--log-level", "info"), True, False),
    ],
    ids=["neither", "less by variable", "more by variable", "less by option", "more by option"],
)
def test_log_level_is_that_of_the_option_else_of_the_key(
    variable: dict[str, str], option: tuple[str, ...], info: bool, debug: bool, tmp_path: Path
) -> None:
    with ServerProcess(tmp_path, "--port", "0", *option, **variable) as server:
        assert server.address

    assert ("is starting" in server.log, "[config]\nbuffer_size = 100000" in server.log) == (info, debug)


def test_log_level_of_the_file_holds_from_the_first_line_on(tmp_path: Path) -> None:
    file = tmp_path / "quiet.toml"
    file.write_text('[server]\nlog_level = "warning"\n', encoding="utf-8")

    with ServerProcess(tmp_path, "--port", "0", "--config", str(file)) as server:
        assert server.address

    assert server.log == ""


@pytest.mark.parametrize("way", ["option", "variable", "file"])
def test_log_as_json_has_a_record_a_line(way: str, tmp_path: Path) -> None:
    file = tmp_path / "json.toml"
    file.write_text('[server]\nlog_format = "json"\nlog_level = "debug"\n', encoding="utf-8")
    options, variables = {
        "option": (("--log-format", "json", "--log-level", "debug"), {}),
        "variable": (("--log-level", "debug"), {"TOUCHLINE_SERVER__LOG_FORMAT": "json"}),
        "file": (("--config", str(file)), {}),
    }[way]

    with ServerProcess(tmp_path, "--port", "0", *options, **variables) as server:
        assert server.address

    records = [json.loads(line) for line in server.log.splitlines()]
    assert {"time", "level", "logger", "message"} == set().union(*records)
    assert "is starting" in records[0]["message"]


def test_serve_on_a_missing_device_exits_2_with_the_reason(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--port", "0", TOUCHLINE_STORAGE__DEVICE="cuda:99") as server:
        status = server.process.wait(DEADLINE_S)

    assert status == 2
    assert "touchline-server: storage.device: 'cuda:99', expected a device that torch finds: there are" in server.log
    assert "Traceback" not in server.log


def healthcheck(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOUCHLINE_")}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
        check=False,
    )


def test_containers_health_check_imports_grpc_and_nothing_else_that_costs(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        port = server.address.rpartition(":")[2]

        result = healthcheck(tmp_path, "touchline_server.service.healthcheck", TOUCHLINE_SERVER__PORT=port, **PROFILE)

    assert (result.returncode, result.stdout) == (0, f"127.0.0.1:{port}: SERVING\n")
    modules = imported(result.stderr)
    assert "grpc" in modules
    assert modules & {*HEAVY, "numpy", "pydantic", "typer", "google.protobuf", "touchline_protos.codec", "cryptography"} == set()


COMMANDS = [("touchline_server.service.healthcheck",), ("touchline_server", "healthcheck")]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["key", "tokens"])
def test_health_check_names_a_file_that_keeps_the_server_from_starting(command: tuple[str, ...], file: str, tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("own", "localhost")
    environment = {"TOUCHLINE_SERVER__PORT": "1", "TOUCHLINE_TLS__CERT": str(pair.cert), "TOUCHLINE_TLS__KEY": str(pair.key)}
    if file == "key":
        pair.key.unlink()
        expected = f"tls.key: {pair.key}: No such file or directory"
    else:
        environment["TOUCHLINE_AUTH__TOKENS_FILE"] = str(tmp_path / "none.toml")
        expected = f"auth.tokens_file: {tmp_path}/none.toml: No such file or directory"

    result = healthcheck(tmp_path, *command, **environment)

    assert result.returncode == 1
    assert f"a server cannot start with this configuration: {expected}" in result.stdout + result.stderr


def test_file_that_this_user_may_not_read_is_an_error_that_names_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root can read everything, so the refusal is injected."""
    pair = Authority(tmp_path).issue("own", "localhost")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == pair.key:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)

    with pytest.raises(ConfigError) as refused:
        server_credentials(TlsConfig(cert=str(pair.cert), key=str(pair.key)))

    user = f"make it readable by user {os.geteuid()}, which this process runs as"
    assert str(refused.value) == f"tls.key: {pair.key}: Permission denied; {user}"


@pytest.mark.parametrize("key", ["data_dir", "scratch_dir"])
@pytest.mark.parametrize("exists", [True, False])
def test_health_check_names_a_folder_that_keeps_the_server_from_starting(
    key: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root can write to every folder, so the refusal is injected: for the folder, or for its parent."""
    folder = tmp_path / "inner" / "store"
    refused = folder if exists else tmp_path
    refused.mkdir(parents=True, exist_ok=True)
    for variable, value in {"SERVER__PORT": "1", "STORAGE__DEVICE": "disk", "STORAGE__SCRATCH_DIR": str(tmp_path / "other")}.items():
        monkeypatch.setenv(f"TOUCHLINE_{variable}", value)
    monkeypatch.setenv(f"TOUCHLINE_STORAGE__{key.upper()}", str(folder))
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != refused)

    finding = check_own()

    assert not finding.serving
    assert f"a server cannot start with this configuration: storage.{key}: {folder}: Permission denied; make it" in finding.text
    assert f"writable by user {os.geteuid()}, which this process runs as" in finding.text


@pytest.mark.parametrize("command", COMMANDS)
def test_health_check_of_a_server_that_cannot_start_says_why(command: tuple[str, ...], tmp_path: Path) -> None:
    """The reason is in the output of the health check, where the operator of a container looks."""
    file = tmp_path / "wrong.toml"
    file.write_text("[config]\nhorizon = -1\n[server]\nport = 1\n", encoding="utf-8")

    result = healthcheck(tmp_path, *command, TOUCHLINE_CFG=str(file))

    assert result.returncode == 1
    said = result.stdout + result.stderr
    assert "127.0.0.1:1: UNAVAILABLE" in said
    assert f"a server cannot start with this configuration: config.horizon (in {file}): -1, expected at least 1" in said


@pytest.mark.parametrize("text", ["[server", "[server]\nport = 0\n"])
def test_containers_health_check_that_finds_no_address_says_why(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text, encoding="utf-8")

    result = healthcheck(tmp_path, "touchline_server.service.healthcheck", TOUCHLINE_CFG=str(file))

    assert result.returncode == 1
    assert "not valid TOML" in result.stdout or "server.port: 0, expected a port that is known in advance" in result.stdout
    assert result.stderr == ""
