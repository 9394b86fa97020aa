"""``touchline doctor``: what works between this machine and a server, what does not, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from touchline._cli.doctor import network, sampling, server, traffic
from touchline._cli.doctor.findings import Finding, GaveUpError, Level
from touchline._cli.options import SERVER, Address, AsJson, TableName
from touchline._cli.terminal import EXIT_FAILED, EXIT_WARNING, print_grid, print_json, print_line, report_errors
from touchline._rpc.credentials import Credentials
from touchline.client import ReplayClient
from touchline.errors import TouchlineError
from touchline_protos.log_lines import escape

STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.FAILED: "bold red"}
WIDTHS = (7, 12)
"""Widths of a finding's level and of its check."""


def doctor(
    address: Address = "127.0.0.1:50051",
    table: TableName = "",
    timeout_s: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="How long to wait for a connection, and for the first answer.", min=0.1, rich_help_panel=SERVER
        ),
    ] = 5.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long to measure sampling; 0 does not. Default: 2, or 0 if the table has a rate limit, for which batches count.",
            min=0,
            max=3600,
            rich_help_panel=SERVER,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything between this machine and a server, and say what to do.

    In this order: the address and the environment's TLS and token, the name, a connection, TLS, an answer, the versions, the token's role,
    round trips, the store, what the table has to sample, its rate limit, who waits for whom, what was refused, a batch, the ring, and the
    throughput. Changes nothing. A check that the token's role does not allow is left out with a note.

    \b
    Examples:
      touchline doctor --address replay-host:50051
      touchline doctor --address replay-host:50051 --table demos --seconds 10
      touchline doctor --json | jq -r .todo[]

    \b
    Exit status:
      0    everything works
      1    something does not work: the line that says "failed"
      2    the command line is wrong
      3    everything works, but something holds sampling back ("warning")
      130  interrupted
    """
    findings: list[Finding] = []
    with report_errors("interrupted"):
        for finding in _findings(address, table, timeout_s=timeout_s, seconds=seconds):
            findings.append(finding)
            if not as_json:
                _print_finding(finding)
    status = _status_of(findings)
    todo = [finding.advice for finding in findings if finding.advice and finding.level in (Level.WARNING, Level.FAILED)]
    if as_json:
        print_json(_document(address, table, findings, todo, status))
    else:
        _print_todo(todo, status)
    raise typer.Exit(status)


def _findings(address: str, table: str, *, timeout_s: float, seconds: float | None) -> Iterator[Finding]:
    """Yields the finding of each check, until one fails without which the others make no sense."""
    try:
        credentials = network.check_settings(address)
        yield _describe_settings(address, credentials)
        places, finding = network.resolve(address)
        yield finding
        place, finding = network.connect(places, timeout_s)
        yield finding
        yield from network.check_tls(address, place, credentials, timeout_s)
        with ReplayClient(address, table=table, timeout_s=timeout_s) as client:
            info, finding = server.ask_info(client, timeout_s, tls=credentials.tls)
            yield finding
            yield server.check_version(info)
            roles, finding = server.check_roles(client, has_token=bool(credentials.metadata))
            yield finding
            yield server.check_round_trip(client)
            yield server.check_storage(info)
            data = server.check_data(client)
            yield data
            rate = server.check_rate(info)
            yield rate
            if roles & {"learner", "admin"}:
                yield from traffic.check_traffic(client, table)
            if not roles & {"learner", "admin"}:
                yield Finding("batch", Level.NOTE, "not tried: the token may not sample")
            elif not data.figures["can_sample"] or (info.rate is not None and rate.level is Level.WARNING):
                yield sampling.check_ring_unasked(address)
            else:
                yield from sampling.check_sampling(client, info, address=address, seconds=seconds)
    except GaveUpError as error:
        yield error.finding
    except TouchlineError as error:
        yield Finding("answer", Level.FAILED, f"{type(error).__name__}: {escape(str(error))}", "See the server's log, and run this again.")


def _describe_settings(address: str, credentials: Credentials) -> Finding:
    tls = "TLS" if credentials.tls else "no TLS"
    token = "a token" if credentials.metadata else "no token"
    return Finding(
        "settings", Level.OK, f"{address}, {tls}, {token}", figures={"tls": credentials.tls, "token": bool(credentials.metadata)}
    )


def _status_of(findings: list[Finding]) -> int:
    levels = {finding.level for finding in findings}
    if Level.FAILED in levels:
        return EXIT_FAILED
    return EXIT_WARNING if Level.WARNING in levels else 0


def _document(address: str, table: str, findings: list[Finding], todo: list[str], status: int) -> dict[str, Any]:
    document: dict[str, Any] = {"address": address, "table": table, "exit_status": status}
    return document | {"findings": [finding.to_dict() for finding in findings], "todo": todo}


def _print_finding(finding: Finding) -> None:
    style = STYLES[finding.level]
    print_grid(WIDTHS, [(str(finding.level), style), (finding.check, ""), (finding.text, "")])
    if finding.level is Level.NOTE and finding.advice:
        print_grid(WIDTHS, [("", ""), ("", ""), (finding.advice, "")])


def _print_todo(todo: list[str], status: int) -> None:
    print_line("")
    if not todo:
        print_line("Everything works; there is nothing to do." if status == 0 else "See the lines above.", "bold")
        return
    print_line("What to do:", "bold")
    for number, advice in enumerate(todo, 1):
        print_grid((3,), [(f"{number}.", ""), (advice, "")])
