"""``touchline-server healthcheck``: asks a server whether it is healthy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from touchline_server.cli.options import ConfigPath
from touchline_server.cli.terminal import EXIT_FAILED, exit_with
from touchline_server.config.source import ConfigError


def healthcheck(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|unix:/PATH",
            help="Server to ask. Default: the server of the configuration, 127.0.0.1:50051 unless configured otherwise.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", metavar="SECONDS", help="How long to wait for an answer.", min=0.001)] = 5.0,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            metavar="PATH",
            envvar="TOUCHLINE_TLS_CA",
            help="With --address: use TLS, and check the server's certificate against this CA bundle.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert", metavar="PATH", envvar="TOUCHLINE_TLS_CERT", help="Client certificate, if the server asks for one (mutual TLS)."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="PATH", envvar="TOUCHLINE_TLS_KEY", help="Private key of --tls-cert."),
    ] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            metavar="NAME",
            envvar="TOUCHLINE_TLS_SERVER_NAME",
            help="Name in the server's certificate, if it differs from the one in the address.",
        ),
    ] = None,
    config: ConfigPath = None,
) -> None:
    """Ask a server whether it is healthy.

    A healthy server samples, and stores what actors send. Uses the standard grpc.health.v1 and needs no token. Without --address it asks
    the server of the configuration, with TLS if that is configured, and accepts only the configured certificate; if that server does not
    answer, it also reports what keeps it from starting.

    \b
    Examples:
      touchline-server healthcheck
      touchline-server healthcheck --address replay:50051 --timeout-s 2
      touchline-server healthcheck --address unix:/run/touchline/replay.sock
      touchline-server healthcheck --address replay:50051 --tls-ca ca.pem

    \b
    Exit status (the reason is on stderr):
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
        exit_with(str(error), EXIT_FAILED)
    if not finding.serving:
        exit_with(finding.text, EXIT_FAILED)
    typer.echo(finding.text, err=True)
