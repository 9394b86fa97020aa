"""The command ``touchline-server``: what it prints, and its exit statuses."""

from __future__ import annotations

import os
import re
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
from touchline_server import __version__
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
    """A running gRPC server with only the health service, and its port."""
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


@pytest.mark.parametrize("command", ["serve", "healthcheck", "check", "recover", "snapshot"])
def test_help_fits_a_terminal_and_says_the_exit_statuses(command: str, runner: CliRunner) -> None:
    text = runner.invoke(cli.app, [command, "--help"]).stdout

    assert "\n  Exit status" in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_of_the_root_says_in_whole_sentences_what_each_command_does(runner: CliRunner) -> None:
    commands = runner.invoke(cli.app, ["--help"]).stdout.partition("Commands:\n")[2].splitlines()

    assert [line.split()[0] for line in commands] == ["serve", "healthcheck", "check", "recover", "snapshot"]
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


@pytest.mark.parametrize("command", [["check"], ["recover"], ["snapshot", "copy"]])
def test_maintenance_that_is_interrupted_exits_130(command: list[str], runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for work in ("maintenance.check", "maintenance.snapshot", "recovery.recover"):
        monkeypatch.setattr(f"touchline_server.durability.{work}", interrupt)

    result = runner.invoke(cli.app, [*command, "--data-dir", "data"])

    assert result.exit_code == 130
    assert result.stderr.startswith("touchline-server: interrupted; ")


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
def test_maintenance_without_a_folder_exits_2_and_without_a_store_1(command: list[str], runner: CliRunner, tmp_path: Path) -> None:
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

    assert (result.returncode, result.stdout) == (0, f"touchline-server {__version__}\n")


def test_serve_bad_configuration_exits_2_and_names_key_and_file(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[config]\nbatch_size = 0\n", encoding="utf-8")

    result = runner.invoke(cli.app, ["serve", "--config", str(file)])

    assert result.exit_code == 2
    assert result.stderr == f"touchline-server: config.batch_size (in {file}): 0, expected at least 1\n"


def test_serve_moved_key_exits_2_and_gives_its_new_name(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER__MAX_RINGS", "4")

    result = runner.invoke(cli.app, ["serve"])

    assert result.exit_code == 2
    assert result.stderr.endswith(
        "touchline-server: server.max_rings (from the environment variable TOUCHLINE_SERVER__MAX_RINGS) is now ring.max_rings\n"
    )


def test_serve_bad_option_exits_2_and_names_the_key(runner: CliRunner) -> None:
    result = runner.invoke(cli.app, ["serve", "--port", "70000"])

    assert result.exit_code == 2
    assert "server.port: 70000, expected at most 65535" in result.stderr


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], {}),
        (["--unix-socket", "/b"], {"unix_socket": "/b"}),
        (["--port", "2"], {"port": 2, "unix_socket": ""}),
        (["--host", "::1"], {"host": "::1", "unix_socket": ""}),
        (["--port", "2", "--unix-socket", "/b"], {"port": 2, "unix_socket": "/b"}),
        (["--log-level", "error"], {"log_level": "error"}),
        (["--log-format", "json"], {"log_format": "json"}),
    ],
)
def test_serve_options_override_the_configuration(
    options: list[str], changes: dict[str, object], runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    configured = {"host": "10.0.0.1", "port": 1, "unix_socket": "/run/a.sock"}
    file.write_text(Config(server=configured, limits={"max_streams": 7}).to_toml(), encoding="utf-8")
    served: list[Config] = []
    monkeypatch.setattr("touchline_server.service.app.run", lambda config, *_: served.append(config) or 0)

    result = runner.invoke(cli.app, ["serve", "--config", str(file), *options])

    assert (result.exit_code, served) == (0, [Config(server=configured | changes, limits={"max_streams": 7})])


def test_serve_accept_eviction_sets_its_key(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Config] = []
    monkeypatch.setattr("touchline_server.service.app.run", lambda config, *_: served.append(config) or 0)

    result = runner.invoke(cli.app, ["serve", "--accept-eviction"])

    assert (result.exit_code, served) == (0, [Config(storage={"accept_eviction": True})])


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
    """A server that samples and cannot store, because its disk is full."""

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


def test_healthcheck_without_an_answer_in_time_exits_1_and_reports_it(runner: CliRunner) -> None:
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


def test_healthcheck_without_a_server_exits_1_and_reports_it(runner: CliRunner, tmp_path: Path) -> None:
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


def test_help_of_serve_has_the_defaults_of_the_configuration(runner: CliRunner) -> None:
    text = " ".join(runner.invoke(cli.app, ["serve", "--help"]).stdout.split())

    server = Config().server
    assert re.findall(r"Overrides server\.(\w+), by default ([\w.]+)\.", text) == [
        ("log_level", server.log_level),
        ("log_format", server.log_format),
        ("host", server.host),
        ("port", str(server.port)),
    ]
    assert f"{server.host}:{server.port} unless" in " ".join(runner.invoke(cli.app, ["healthcheck", "--help"]).stdout.split())
