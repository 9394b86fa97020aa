"""The command ``touchline-server``: runs the server, and asks one whether it is well.

Each command imports what it needs itself: `--help` and the server's first line need neither pydantic nor gRPC, a health check only gRPC.
"""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from touchline_server import __version__
from touchline_server.config.source import ConfigError, glance, sources_of
from touchline_server.errors import ReplayError, StoreMismatchError
from touchline_server.service.stop_signals import StopSignals

if TYPE_CHECKING:
    from touchline_server.config.settings import Config

logger = logging.getLogger("touchline_server")

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
        help="Configuration file (TOML). Default: the file that $TOUCHLINE_CFG names, else ./cfg/default.toml, else the packaged defaults.",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"touchline-server {__version__}")
        raise typer.Exit


@app.callback()
def _describe(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Touchline's replay server: actors push whole episodes, learners pull batches of slices, over gRPC.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --port 0
      touchline-server healthcheck --address 127.0.0.1:50051
      touchline-server check --data-dir /data
      touchline-server snapshot --data-dir /data /backup/monday
    """


@app.command()
def serve(
    config: ConfigPath = None,
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0 accepts other machines. Overrides server.host."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="PORT", help="TCP port; 0 takes a free one, which is printed. Overrides server.port."),
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
            help="Start although config.buffer_size is smaller than what storage.data_dir holds: the oldest episodes are evicted for good.",
        ),
    ] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option("--log-level", help="How much to log, on stderr. Overrides server.log_level, by default info.")
    ] = None,
) -> None:
    """Runs the server until SIGTERM or SIGINT.

    The signal lets calls in progress finish. Logs to stderr. Prints "listening on HOST:PORT" to stdout once clients are served.

    An environment variable TOUCHLINE_<TABLE>__<KEY> overrides a key of the configuration file, and an option here
    overrides both. --host and --port also override a Unix socket in the configuration.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --host 0.0.0.0
      touchline-server serve --unix-socket /run/touchline/replay.sock
      TOUCHLINE_CONFIG__BATCH_SIZE=64 touchline-server serve

    \b
    Exit status:
      0  stopped by a signal, also by one before it listened
      1  the address is in use, or storage.data_dir or scratch_dir cannot be used, or data_dir holds more than the buffer would
      2  the configuration or the command line is wrong
    """
    # Before the imports that take long: a signal during them would end the process with a code of its own.
    stop = StopSignals().install()
    try:
        _begin_log(config, log_level)

        from touchline_server.config.settings import read_cfg
        from touchline_server.service.access import check_exposure, read_access
        from touchline_server.service.tls import server_credentials

        effective = _override(read_cfg(config), host=host, port=port, unix_socket=unix_socket, log_level=log_level)
        if accept_eviction:
            effective = _accept_eviction(effective)
        sources = sources_of(config)
        # The server does this too. What is wrong is said here, before seconds of importing.
        server_credentials(effective.tls)
        check_exposure(effective, read_access(effective))
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)

    from touchline_protos.log_lines import OneLine
    from touchline_server.service.app import AddressInUseError, run

    for handler in logging.getLogger().handlers:
        handler.addFilter(OneLine())  # also what gRPC and asyncio log

    try:
        with _progress("restoring", effective.storage.data_dir) as progress:
            status = run(effective, progress, stop)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    except StoreMismatchError as error:
        _fail(f"{error}\n{sources}", EXIT_FAILED)
    except (AddressInUseError, ReplayError) as error:
        _fail(str(error), EXIT_FAILED)
    raise typer.Exit(status)


@app.command()
def healthcheck(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|unix:/PATH",
            help="Server to ask. Default: the one that the configuration describes, 127.0.0.1:50051 unless that says otherwise.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", metavar="SECONDS", help="How long to wait for an answer.", min=0.001)] = 5.0,
    config: ConfigPath = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            metavar="PATH",
            envvar="TOUCHLINE_TLS_CA",
            help="With --address: use TLS, and check the server's certificate with this CA bundle.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert", metavar="PATH", envvar="TOUCHLINE_TLS_CERT", help="Client certificate, if the server asks for one (mutual TLS)."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="PATH", envvar="TOUCHLINE_TLS_KEY", help="Private key of --tls-cert.")
    ] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            metavar="NAME",
            envvar="TOUCHLINE_TLS_SERVER_NAME",
            help="Name in the server's certificate, if it is not the one in the address.",
        ),
    ] = None,
) -> None:
    """Asks a server whether it is healthy.

    A healthy server samples and stores what actors send. Uses the standard grpc.health.v1 and needs no token. Without --address it asks the
    server that the configuration describes, by TLS if that has TLS, and accepts only the configured certificate. If that server does not
    answer, what keeps it from starting is named.

    \b
    Examples:
      touchline-server healthcheck
      touchline-server healthcheck --address replay:50051 --timeout-s 2
      touchline-server healthcheck --address unix:/run/touchline/replay.sock
      touchline-server healthcheck --address replay:50051 --tls-ca ca.pem

    \b
    Exit status (stderr says why):
      0  healthy
      1  not healthy, no answer, or the configuration cannot be read
    """
    from touchline_server.service.healthcheck import check_at, check_own

    try:
        if address is None:
            finding = check_own(config, timeout_s=timeout_s)
        else:
            finding = check_at(address, timeout_s=timeout_s, ca=tls_ca, cert=tls_cert, key=tls_key, server_name=tls_server_name)
    except ConfigError as error:
        _fail(str(error), EXIT_FAILED)
    if not finding.serving:
        _fail(finding.text, EXIT_FAILED)
    typer.echo(finding.text, err=True)


DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder of the durable store. Default: the configured storage.data_dir."),
]


@app.command()
def check(data_dir: DataDir = None, config: ConfigPath = None) -> None:
    """Verifies a durable store.

    Checks SQLite's structures, every episode's checksum, the ledger of keys and the counts. Changes nothing; a server may be running on the
    store.

    \b
    Examples:
      touchline-server check --data-dir /data

    \b
    Exit status:
      0  the store is undamaged
      1  something is damaged (stdout says what), or the store cannot be read
    """
    from touchline_server.durability import maintenance

    folder = _data_dir(data_dir, config)
    try:
        with _progress("checking", str(folder)) as progress:
            findings = maintenance.check(folder, progress)
    except ReplayError as error:
        _fail(str(error), EXIT_FAILED)
    _tell(findings.damage, f"{findings.episodes} episodes, {findings.steps} steps are whole")
    if findings.damage:
        _fail(f"{folder} is damaged; `touchline-server recover --data-dir {folder}` keeps what is whole", EXIT_FAILED)


@app.command()
def recover(
    data_dir: DataDir = None,
    config: ConfigPath = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Recover although something is lost. Otherwise a loss changes nothing.")
    ] = False,
) -> None:
    """Recovers the undamaged episodes of a damaged store.

    Finds every episode whose own bytes are intact, whatever else of the file is damaged, cut off or missing. They go into a new file, which
    replaces the old one; the old one stays beside it, unchanged, as touchline.db.damaged. No server may be running on the store, and the
    disk needs room for both files.

    \b
    Examples:
      touchline-server recover --data-dir /data
      touchline-server recover --data-dir /data --accept-loss

    \b
    Exit status:
      0  a server can start on the store again: with everything, or with --accept-loss with what is left
      1  nothing was changed: something is lost (stdout says what) without --accept-loss, or nothing is left
    """
    from touchline_server.durability import recovery

    folder = _data_dir(data_dir, config)
    try:
        with _progress("recovering", str(folder)) as progress:
            found = recovery.recover(folder, progress, accept_loss=accept_loss)
    except ReplayError as error:
        _fail(str(error), EXIT_FAILED)
    what = f"{found.episodes} episodes, {found.steps} steps"
    if found.replaced:
        _tell(found.lost, f"{what} were recovered; the old file is kept beside the new one")
        return
    _tell(found.lost, f"{what} can be kept")
    _fail(
        f"what is named above is lost, and nothing was changed; put a copy of {folder} back, or accept the loss: "
        f"`touchline-server recover --accept-loss --data-dir {folder}`",
        EXIT_FAILED,
    )


@app.command()
def snapshot(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the copy; made if it does not exist.")],
    data_dir: DataDir = None,
    config: ConfigPath = None,
) -> None:
    """Copies a durable store, consistently.

    The copy shows the store at one moment, even if a server is running on it. A server can start on the copy's folder as its data_dir.

    \b
    Examples:
      touchline-server snapshot --data-dir /data /backup/monday

    \b
    Exit status:
      0  the copy is complete and on the disk
      1  the copy could not be made
    """
    from touchline_server.durability import maintenance

    try:
        file = maintenance.snapshot(_data_dir(data_dir, config), target)
    except ReplayError as error:
        _fail(str(error), EXIT_FAILED)
    typer.echo(str(file))


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    app()


def _override(config: Config, **options: str | int | None) -> Config:
    """Returns the configuration with the options that were given in place of its ``[server]`` keys."""
    from touchline_server.config.settings import Config

    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if given.keys() & {"host", "port"}:
        given.setdefault("unix_socket", "")
    server = {**config.server.model_dump(), **given}
    return Config(**{name: getattr(config, name) for name in Config.model_fields} | {"server": server})


def _accept_eviction(config: Config) -> Config:
    """Returns the configuration with ``storage.accept_eviction``."""
    from touchline_server.config.settings import Config

    storage = {**config.storage.model_dump(), "accept_eviction": True}
    return Config(**{name: getattr(config, name) for name in Config.model_fields} | {"storage": storage})


def _begin_log(config: Path | None, level: LogLevel | None) -> None:
    """Sets up logging and logs the first line, before imports that take seconds on a busy machine.

    Raises:
        ConfigError: the configuration file cannot be read or is not TOML.
    """
    wanted = level or glance(config, "server.log_level")["server.log_level"]
    # An unknown level is refused later, with the rest of the configuration.
    known = LogLevel(wanted) if wanted in set(LogLevel) else LogLevel.INFO
    logging.basicConfig(stream=sys.stderr, level=known.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logger.info("touchline-server %s is starting; %s", __version__, sources_of(config))


def _data_dir(given: Path | None, config: Path | None) -> Path:
    """Returns the durable store's folder; ends the command where none is given or configured."""
    if given is not None:
        return given
    try:
        from touchline_server.config.settings import read_cfg

        configured = read_cfg(config).storage.data_dir
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    if not configured:
        _fail("storage.data_dir: '', expected a folder; give --data-dir", EXIT_USAGE)
    return Path(configured)


@contextmanager
def _progress(what: str, folder: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what shows how far something is: a bar on stderr where that is a terminal, a line at the end where it is not."""
    with ExitStack() as stack:
        bar: Any = None
        shown = 0

        def show(done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(typer.progressbar(length=total, label=f"{what} {folder}", file=sys.stderr))
            bar.update(done - shown)
            shown = done
            if done >= total:
                stack.close()

        yield show


def _tell(damage: list[str], summary: str) -> None:
    from touchline_protos.log_lines import escape

    for line in damage:
        typer.echo(escape(line))
    typer.echo(summary)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"touchline-server: {message}", err=True)
    raise typer.Exit(status)
