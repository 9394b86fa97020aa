"""The command ``touchline-server``: runs the server, and asks one whether it is well."""

from __future__ import annotations

import enum
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from touchline_server.config import Config, ConfigError, ServerConfig, read_cfg

EXIT_FAILED = 1
"""The server could not run, or is not well."""
EXIT_USAGE = 2
"""The command line or the configuration cannot be used."""

app = typer.Typer(
    name="touchline-server",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: it keeps the examples' lines, and reads the same in a container's log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class LogLevel(enum.StrEnum):
    """How much is logged, on stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="Configuration file (TOML). Without it: the one that $TOUCHLINE_CFG names, else ./cfg/default.toml,"
        " else the packaged defaults.",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"touchline-server {version('touchline-server')}")
        raise typer.Exit


@app.callback()
def _describe(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Touchline's replay server: actors push whole episodes, learners pull batches of slices of them, over gRPC.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --port 0
      touchline-server healthcheck --address 127.0.0.1:50051
    """


@app.command()
def serve(
    config: ConfigPath = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 accepts other machines. Overrides server.host."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="TCP port; 0 takes a free one, which is printed. Overrides server.port."),
    ] = None,
    unix_socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Unix socket to listen on instead of host and port. Overrides server.unix_socket."),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(help="How much is logged, on stderr.")] = LogLevel.INFO,
) -> None:
    """Runs the server until SIGTERM or SIGINT.

    Prints "listening on HOST:PORT" once it does. The signal lets calls in progress end.

    An environment variable TOUCHLINE_<TABLE>__<KEY> overrides a key of the configuration file, and an option here
    overrides both. A host or a port given here takes the place of a Unix socket of the configuration.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --host 0.0.0.0
      touchline-server serve --unix-socket /run/touchline/replay.sock
      TOUCHLINE_CONFIG__BATCH_SIZE=64 touchline-server serve

    \b
    Exit status:
      0  stopped by a signal
      1  the address is in use
      2  the configuration or the command line cannot be used
    """
    logging.basicConfig(stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        effective = _override(read_cfg(config), host=host, port=port, unix_socket=unix_socket)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)

    # Torch takes seconds to import, and --help and a bad configuration need none of it.
    from touchline_server.app import AddressInUseError, run

    try:
        status = run(effective)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    except AddressInUseError as error:
        _fail(str(error), EXIT_FAILED)
    raise typer.Exit(status)


@app.command()
def healthcheck(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|unix:/PATH",
            help="Server to ask. Without it: the one that the configuration describes, by default 127.0.0.1:50051.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait for an answer.", min=0.001)] = 5.0,
    config: ConfigPath = None,
) -> None:
    """Asks a server whether it is serving.

    The question is the standard one of grpc.health.v1, about the server as a whole.

    \b
    Examples:
      touchline-server healthcheck
      touchline-server healthcheck --address replay:50051 --timeout-s 2
      touchline-server healthcheck --address unix:/run/touchline/replay.sock

    \b
    Exit status (stderr says why):
      0  it is serving
      1  it is not, or does not answer
    """
    try:
        target = _address_of(read_cfg(config).server) if address is None else address
    except ConfigError as error:
        _fail(str(error), EXIT_FAILED)
    # A proxy of the environment is for the world outside, not for one's own server.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            _fail(f"{target}: {error.code().name}: {error.details()}", EXIT_FAILED)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        _fail(f"{target}: {status}", EXIT_FAILED)
    typer.echo(f"{target}: {status}", err=True)


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    app()


def _override(config: Config, **options: str | int | None) -> Config:
    """Returns the configuration with the options that were given in place of its ``[server]`` keys."""
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if given.keys() & {"host", "port"}:
        given.setdefault("unix_socket", "")
    server = {**config.server.model_dump(), **given}
    return Config(config=config.config, storage=config.storage, sampling=config.sampling, server=server)


def _address_of(server: ServerConfig) -> str:
    """Returns where a server of this configuration can be reached from its own machine.

    Raises:
        ConfigError: its port is not known beforehand.
    """
    if server.unix_socket:
        return f"unix:{server.unix_socket}"
    if server.port == 0:
        raise ConfigError("server.port: 0, expected a port that is known beforehand; give --address")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(server.host, server.host)
    return f"[{host}]:{server.port}" if ":" in host and not host.startswith("[") else f"{host}:{server.port}"


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"touchline-server: {message}", err=True)
    raise typer.Exit(status)
