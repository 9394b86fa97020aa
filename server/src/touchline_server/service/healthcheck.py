"""Checks whether a server is healthy at the cost of a bare gRPC client: without torch, numpy, pydantic, protobuf's runtime or typer.

A container does this every few seconds, even while the machine is busy. ``python -m touchline_server.service.healthcheck`` checks this
machine's own server and takes no options; ``touchline-server healthcheck`` has options and uses twice the CPU time.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_server.config.source import ConfigError, glance, why_unwritable
from touchline_server.service.tls import open_channel, open_own_channel

if TYPE_CHECKING:
    from touchline_server.config.settings import Config

ADDING = "touchline.v1.Replay/AddEpisode"
"""Service name for which health reports whether episodes are accepted: not while the disk is full or has failed."""

TIMEOUT_S = 5.0
"""Default time limit for an answer."""

CONTAINER_TIMEOUT_S = 20.0
"""Time limit of a container's check: on an overloaded machine, a server that answers late is still healthy."""

# HealthCheckResponse is one enum in field 1 (grpc/health/v1/health.proto); zero is not encoded.
_STATUS = {b"": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}


class Finding(NamedTuple):
    """Result of a health check."""

    serving: bool
    text: str
    """Address of the server, and its answer or the reason why there is none."""


def check_own(config: str | Path | None = None, *, timeout_s: float = TIMEOUT_S) -> Finding:
    """Checks the server that a configuration describes, from its own machine. If it is not running, says what keeps it from starting.

    Args:
        config: the configuration file; None: the one that the server reads.
        timeout_s: time limit for an answer.

    Raises:
        ConfigError: the configuration does not determine the server's address.
    """
    keys = ("server.host", "server.port", "server.unix_socket", "tls.cert", "tls.key", "tls.client_ca")
    # Not validated here: a fault in them is reported only if the server does not answer.
    host, port, unix_socket, cert, key, client_ca = (str(value) for value in glance(config, *keys).values())
    target = own_address(host, port, unix_socket)
    try:
        channel = open_own_channel(target, cert=cert, key=key, client_ca=client_ca)
    except ConfigError as error:
        return Finding(False, f"{target}: {error}")
    finding = ask(channel, target, timeout_s=timeout_s)
    return finding if finding.serving else finding._replace(text=finding.text + _why_it_cannot_start(config))


def check_at(
    address: str,
    *,
    timeout_s: float = TIMEOUT_S,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    server_name: str | None = None,
) -> Finding:
    """Checks any server. Arguments as for :func:`~touchline_server.service.tls.open_channel`, and a time limit for the answer.

    Raises:
        ConfigError: as :func:`~touchline_server.service.tls.open_channel`.
    """
    return ask(open_channel(address, ca=ca, cert=cert, key=key, server_name=server_name), address, timeout_s=timeout_s)


def ask(channel: grpc.Channel, target: str, *, timeout_s: float) -> Finding:
    """Checks a server by the standard ``grpc.health.v1`` and closes the channel. If it has no name for adding, checks the server itself."""
    with channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=None, response_deserializer=None)
        try:
            try:
                answer, call = check.with_call(_request(ADDING), timeout=timeout_s)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                answer, call = check.with_call(_request(""), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Finding(False, f"{target}: no answer within {timeout_s:g} s; it is overloaded or hangs")
            return Finding(False, f"{target}: {error.code().name}: {_one_line(error.details() or '')}")
    status = _STATUS.get(answer[:2], "UNKNOWN")
    detail = _one_line(_detail(call))
    return Finding(status == "SERVING", f"{target}: {status}" + (f": {detail}" if detail else ""))


def _one_line(text: str) -> str:
    """Returns a server's text on one line, as :func:`touchline_protos.log_lines.escape` does, but without importing its package."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def main() -> int:
    """Runs a container's check: prints the result and returns the exit status, 0 if the server is healthy."""
    try:
        finding = check_own(timeout_s=CONTAINER_TIMEOUT_S)
    except ConfigError as error:
        finding = Finding(False, str(error))
    print(finding.text)
    return 0 if finding.serving else 1


def _request(service: str) -> bytes:
    name = service.encode()
    return b"\x0a%c%s" % (len(name), name) if name else b""  # HealthCheckRequest: one string in field 1


def _detail(call: Any) -> str:
    return next((str(value) for key, value in call.trailing_metadata() or () if key == HEALTH_DETAIL_METADATA_KEY), "")


def own_address(host: str, port: str, unix_socket: str) -> str:
    """Returns the address of a server with this configuration as seen from its own machine.

    Raises:
        ConfigError: its port is not known in advance.
    """
    if unix_socket:
        return f"unix:{unix_socket}"
    if port.strip() == "0":
        raise ConfigError("server.port: 0, expected a port that is known in advance; give --address")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _why_it_cannot_start(config: str | Path | None) -> str:
    """Returns the fault in the configuration or in the files that it names, to end a message with; ``""`` if there is none."""
    from touchline_server.config.settings import read_cfg
    from touchline_server.service.access import check_exposure, read_access
    from touchline_server.service.tls import server_credentials

    try:
        effective = read_cfg(config)
        server_credentials(effective.tls)
        check_exposure(effective, read_access(effective))
        _check_folders(effective)
    except ConfigError as error:
        return f"\na server cannot start with this configuration: {error}"
    return ""


def _check_folders(config: Config) -> None:
    """Raises ConfigError if a configured folder, or the folder in which it would be created, is not writable."""
    folders = {"storage.data_dir": config.storage.data_dir}
    if config.storage.device == "disk":
        folders["storage.scratch_dir"] = config.storage.scratch_dir
    for key, folder in folders.items():
        there = next((path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists()), None)
        if folder and there is not None and not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"{key}: {folder}: {why_unwritable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))}")


if __name__ == "__main__":
    sys.exit(main())
