"""``touchline-server serve``: runs the server."""

from __future__ import annotations

import enum
import logging
from pathlib import Path
from typing import Annotated

import typer

from touchline_server import __version__
from touchline_server.cli.logs import begin_log
from touchline_server.cli.options import ConfigPath
from touchline_server.cli.terminal import EXIT_FAILED, EXIT_USAGE, exit_with, progress_bars
from touchline_server.config.source import ConfigError, glance, sources_of
from touchline_server.errors import ReplayError, StoreMismatchError
from touchline_server.service.stop_signals import StopSignals

logger = logging.getLogger("touchline_server")


class LogFormat(enum.StrEnum):
    """Format of the log."""

    TEXT = "text"
    JSON = "json"


class LogLevel(enum.StrEnum):
    """Lowest level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    config: ConfigPath = None,
    log_level: Annotated[
        LogLevel | None,
        typer.Option("--log-level", help="Lowest level to log, on stderr. Overrides server.log_level, by default info."),
    ] = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option("--log-format", help="Text, or a line of JSON per record. Overrides server.log_format, by default text."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Address to listen on; 0.0.0.0 accepts other machines. Overrides server.host, by default 127.0.0.1.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="PORT", help="TCP port; 0 takes a free one, which is printed. Overrides server.port, by default 50051."
        ),
    ] = None,
    unix_socket: Annotated[
        str | None,
        typer.Option(
            "--unix-socket", metavar="PATH", help="Unix socket to listen on instead of host and port. Overrides server.unix_socket."
        ),
    ] = None,
    accept_eviction: Annotated[
        bool,
        typer.Option(
            "--accept-eviction",
            help="Start even if storage.data_dir holds more than config.buffer_size: the oldest episodes are evicted for good.",
        ),
    ] = False,
) -> None:
    """Run the server until SIGTERM or SIGINT.

    After the signal, calls in progress may finish. Logs go to stderr. Once clients are served, "listening on HOST:PORT" is printed on
    stdout, and then "web page on URL" if the server has its page (section [http]).

    An environment variable TOUCHLINE_<SECTION>__<KEY> overrides a key of the configuration file, and an option here overrides both. --host
    and --port also override a Unix socket in the configuration.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --host 0.0.0.0
      touchline-server serve --unix-socket /run/touchline/replay.sock
      TOUCHLINE_CONFIG__BATCH_SIZE=64 touchline-server serve

    \b
    Exit status:
      0  stopped by a signal, even before it listened
      1  the address is in use, storage.data_dir or storage.scratch_dir cannot
         be used, or data_dir holds more than the buffer would
      2  the configuration or the command line is wrong
    """
    # Before the imports that take long: a signal during them would end the process with another exit status.
    stop = StopSignals().install()
    try:
        _begin_log(config, log_level, log_format)

        from touchline_server.config.settings import read_cfg
        from touchline_server.service.access import check_exposure, read_access
        from touchline_server.service.tls import server_credentials

        options = _given(host=host, port=port, unix_socket=unix_socket, log_level=log_level, log_format=log_format)
        effective = read_cfg(config).override(server=options, storage={"accept_eviction": True} if accept_eviction else {})
        sources = sources_of(config)
        # The server checks these too; checked here, a mistake is reported before seconds of importing.
        server_credentials(effective.tls)
        check_exposure(effective, read_access(effective))
    except ConfigError as error:
        exit_with(str(error), EXIT_USAGE)

    from touchline_protos.log_lines import OneLine
    from touchline_server.service.app import AddressInUseError, run

    for handler in logging.getLogger().handlers:
        handler.addFilter(OneLine())  # also for what gRPC and asyncio log

    try:
        with progress_bars(lambda table: f"restoring {Path(effective.storage.data_dir, table)}") as progress:
            status = run(effective, progress, stop)
    except ConfigError as error:
        exit_with(str(error), EXIT_USAGE)
    except StoreMismatchError as error:
        exit_with(f"{error}\n{sources}", EXIT_FAILED)
    except (AddressInUseError, ReplayError) as error:
        exit_with(str(error), EXIT_FAILED)
    raise typer.Exit(status)


def _given(**options: str | int | None) -> dict[str, str | int]:
    """Returns the ``[server]`` keys that options were given for; a host or a port also overrides a configured Unix socket."""
    given = {key: value for key, value in options.items() if value is not None}
    if given.keys() & {"host", "port"}:
        given.setdefault("unix_socket", "")
    return given


def _begin_log(config: Path | None, level: LogLevel | None, form: LogFormat | None) -> None:
    """Sets up logging and logs the first line, before imports that take seconds on a busy machine.

    Raises:
        ConfigError: the configuration file cannot be read or is not TOML.
    """
    keys = glance(config, "server.log_level", "server.log_format")
    name = level or keys["server.log_level"]
    # An unknown level is refused later, with the rest of the configuration.
    begin_log(level=name if name in set(LogLevel) else LogLevel.INFO, form=form or keys["server.log_format"])
    logger.info("touchline-server %s is starting; %s", __version__, sources_of(config))
