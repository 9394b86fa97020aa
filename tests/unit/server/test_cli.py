"""The command touchline-server: its exit statuses and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.models import OptionInfo
from typer.testing import CliRunner

from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_server.cli import main as cli
from touchline_server.config.sections import ServerConfig
from touchline_server.config.settings import Config
from touchline_server.service.healthcheck import ADDING, own_address


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in os.environ:
        if variable.upper().startswith("TOUCHLINE_"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def health_service() -> Iterator[tuple[health.HealthServicer, int]]:
    """A running gRPC server that knows the health service alone, and its port."""
    servicer = health.HealthServicer()
    with serving(servicer) as port:
        yield servicer, port


@contextmanager
def serving(servicer: health.HealthServicer) -> Iterator[int]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(grace=None).wait()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["serve", "--help"], ["healthcheck", "--help"], ["check", "--help"], ["recover", "--help"], ["snapshot", "--help"]],
)
def test_help_explains_with_examples(arguments: list[str], runner: CliRunner) -> None:
    result = runner.invoke(cli.app, arguments)

    assert result.exit_code == 0
    assert "Examples:\n" in result.stdout


def test_options_have_their_names_whatever_the_version_of_typer() -> None:
    # Before 0.29, typer took the metavar of an option without a name for the name: --PORT.
    parameters = [
        parameter
        for command in cli.app.registered_commands
        if command.callback is not None
        for annotation in get_type_hints(command.callback, include_extras=True).values()
        for parameter in getattr(annotation, "__metadata__", ())
        if isinstance(parameter, OptionInfo) and parameter.metavar is not None
    ]

    assert len(parameters) >= 5
    # What an annotation gives first is a name, which typer keeps as the default until it builds the command.
    assert all(str(parameter.default).startswith("--") for parameter in parameters)


@pytest.mark.parametrize("command", [["check"], ["recover"], ["snapshot", "copy"]])
def test_upkeep_without_a_folder_exits_2_and_of_no_store_1(command: list[str], runner: CliRunner, tmp_path: Path) -> None:
    unset = runner.invoke(cli.app, command)
    missing = runner.invoke(cli.app, [*command, "--data-dir", str(tmp_path / "none")])

    assert (unset.exit_code, unset.stderr) == (2, "touchline-server: storage.data_dir: '', expected a folder; give --data-dir\n")
    assert missing.exit_code == 1
    assert "there is no touchline.db, expected the storage.data_dir of a touchline-server" in missing.stderr
    assert not (tmp_path / "none").exists()


def test_module_prints_the_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "touchline_server", "--version"], capture_output=True, text=True, timeout=300, check=False
    )

    assert (result.returncode, result.stdout) == (0, "touchline-server 0.1.0\n")


def test_serve_bad_configuration_exits_2_and_says_what(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[config]\nbatch_size = 0\n", encoding="utf-8")

    result = runner.invoke(cli.app, ["serve", "--config", str(file)])

    assert result.exit_code == 2
    assert result.stderr == f"touchline-server: config.batch_size (in {file}): 0, expected at least 1\n"


def test_serve_bad_option_exits_2_and_names_the_key(runner: CliRunner) -> None:
    result = runner.invoke(cli.app, ["serve", "--port", "70000"])

    assert result.exit_code == 2
    assert "server.port: 70000, expected at most 65535" in result.stderr


def test_options_override_the_configuration() -> None:
    config = Config(server={"host": "10.0.0.1", "port": 1, "unix_socket": "/run/a.sock"}, limits={"max_streams": 7})

    assert cli._override(config, host=None, port=None, unix_socket=None) == config
    assert cli._override(config, host=None, port=None, unix_socket="/b").server.unix_socket == "/b"
    by_port = cli._override(config, host=None, port=2, unix_socket=None)
    assert (by_port.server, by_port.limits) == (ServerConfig(host="10.0.0.1", port=2, unix_socket=""), config.limits)


def test_healthcheck_serving_exits_0(runner: CliRunner, health_service: tuple[health.HealthServicer, int]) -> None:
    _, port = health_service

    result = runner.invoke(cli.app, ["healthcheck", "--address", f"127.0.0.1:{port}"])

    assert (result.exit_code, result.stderr) == (0, f"127.0.0.1:{port}: SERVING\n")


def test_healthcheck_not_serving_exits_1(runner: CliRunner, health_service: tuple[health.HealthServicer, int]) -> None:
    servicer, port = health_service
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

    result = runner.invoke(cli.app, ["healthcheck", "--address", f"127.0.0.1:{port}"])

    assert (result.exit_code, result.stderr) == (1, f"touchline-server: 127.0.0.1:{port}: NOT_SERVING\n")


class FullDisk(health.HealthServicer):
    """Samples, and cannot store: as a server whose disk is full answers."""

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        context.set_trailing_metadata([(HEALTH_DETAIL_METADATA_KEY, "storage.data_dir: no space left on device; 3 adds refused")])
        return super().Check(request, context)


def test_healthcheck_of_a_server_that_only_samples_exits_1_and_prints_the_detail(runner: CliRunner) -> None:
    servicer = FullDisk()
    servicer.set(ADDING, health_pb2.HealthCheckResponse.NOT_SERVING)
    with serving(servicer) as port:
        result = runner.invoke(cli.app, ["healthcheck", "--address", f"127.0.0.1:{port}"])

    expected = f"touchline-server: 127.0.0.1:{port}: NOT_SERVING: storage.data_dir: no space left on device; 3 adds refused\n"
    assert (result.exit_code, result.stderr) == (1, expected)


def test_healthcheck_no_answer_in_time_exits_1_and_says_so(runner: CliRunner) -> None:
    release = threading.Event()

    class Hangs(health.HealthServicer):
        def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
            release.wait(60)
            return super().Check(request, context)

    with serving(Hangs()) as port:
        result = runner.invoke(cli.app, ["healthcheck", "--address", f"127.0.0.1:{port}", "--timeout-s", "0.3"])
        release.set()

    expected = f"touchline-server: 127.0.0.1:{port}: no answer within 0.3 s; it is overloaded or hangs\n"
    assert (result.exit_code, result.stderr) == (1, expected)


def test_healthcheck_finds_the_server_by_its_configuration(
    runner: CliRunner, health_service: tuple[health.HealthServicer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = health_service
    monkeypatch.setenv("TOUCHLINE_SERVER__HOST", "0.0.0.0")
    monkeypatch.setenv("TOUCHLINE_SERVER__PORT", str(port))

    result = runner.invoke(cli.app, ["healthcheck"])

    assert (result.exit_code, result.stderr) == (0, f"127.0.0.1:{port}: SERVING\n")


def test_healthcheck_no_server_exits_1_and_says_so(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["healthcheck", "--address", f"unix:{tmp_path}/none.sock", "--timeout-s", "5"])

    assert result.exit_code == 1
    assert "none.sock: UNAVAILABLE" in result.stderr


def test_healthcheck_port_not_known_beforehand_exits_1(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER__PORT", "0")

    result = runner.invoke(cli.app, ["healthcheck"])

    assert result.exit_code == 1
    assert "--address" in result.stderr


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({}, "127.0.0.1:50051"),
        ({"host": "::", "port": 1}, "[::1]:1"),
        ({"host": "fe80::1", "port": 1}, "[fe80::1]:1"),
        ({"host": "[::1]", "port": 1}, "[::1]:1"),
        ({"unix_socket": "/run/a.sock", "port": 0}, "unix:/run/a.sock"),
    ],
)
def test_address_of_server_is_one_to_connect_to(server: dict[str, object], expected: str) -> None:
    config = ServerConfig.model_validate(server)

    assert own_address(config.host, str(config.port), config.unix_socket) == expected
