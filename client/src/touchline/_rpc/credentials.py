"""TLS and tokens: how client and server authenticate to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc

from touchline.errors import InvalidArgumentError
from touchline_protos.types.metadata import TOKEN_METADATA_KEY

TOKEN_VARIABLE = "TOUCHLINE_TOKEN"
ALLOW_PLAINTEXT_VARIABLE = "TOUCHLINE_ALLOW_PLAINTEXT"
CA_VARIABLE = "TOUCHLINE_TLS_CA"
CERT_VARIABLE = "TOUCHLINE_TLS_CERT"
KEY_VARIABLE = "TOUCHLINE_TLS_KEY"
SERVER_NAME_VARIABLE = "TOUCHLINE_TLS_SERVER_NAME"

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS settings of a client. The files are in PEM form and read when the client is made.

    ::

        ReplayClient("replay-host:50051", tls=TlsConfig(ca="ca.pem"), token="...")
    """

    ca: FilePath | None = None
    """Path of the CA bundle that the server's certificate is checked with; None for gRPC's built-in roots."""
    cert: FilePath | None = None
    """Path of the client's certificate, for a server that asks for one (its ``tls.client_ca``)."""
    key: FilePath | None = None
    """Path of the private key of ``cert``."""
    server_name: str | None = None
    """Name that the server's certificate must have; None for the host of the address."""


class Credentials:
    """Credentials of a channel and of its calls. The repr shows no secret.

    Args:
        address: address of the server.
        tls: TLS settings; True trusts gRPC's built-in roots, False turns TLS off. None reads the environment, where ``TOUCHLINE_TLS_CA``
            turns it on (with ``_CERT``, ``_KEY``, ``_SERVER_NAME`` as in :class:`TlsConfig`).
        token: token sent with every call; None reads ``TOUCHLINE_TOKEN``, empty sends none.
        allow_plaintext: send the token to another machine even without TLS; None does so only if ``TOUCHLINE_ALLOW_PLAINTEXT`` is 1.
        environment: the environment's variables.

    Raises:
        InvalidArgumentError: a file cannot be read, the token cannot be sent, or it would be sent to another machine in plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: TlsConfig | bool | None = None,
        token: str | None = None,
        allow_plaintext: bool | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        if tls is None:
            tls = _tls_of(environment)
        elif tls is True:
            tls = TlsConfig()
        self._tls: TlsConfig | None = tls or None
        self._channel_credentials = _channel_credentials(self._tls) if self._tls is not None else None
        token = environment.get(TOKEN_VARIABLE, "") if token is None else token
        if not token.isascii() or not token.isprintable() or " " in token:
            raise InvalidArgumentError("token: has a character that no header can carry, expected printable ASCII without blanks")
        if allow_plaintext is None:
            allow_plaintext = environment.get(ALLOW_PLAINTEXT_VARIABLE, "") == "1"
        if token and self._tls is None and not allow_plaintext and not is_local(address):
            raise InvalidArgumentError(
                f"token: would be sent to {address} in plain text, expected TLS: set tls=TlsConfig(...) or {CA_VARIABLE}, or, on a private "
                f"network, allow_plaintext=True or {ALLOW_PLAINTEXT_VARIABLE}=1"
            )
        self.arguments: dict[str, Any] = {"tls": self._tls or False, "token": token, "allow_plaintext": allow_plaintext}
        """Arguments that make the same credentials in another process, whatever its environment. They hold the token, a secret."""
        self.metadata: tuple[tuple[str, str], ...] = ((TOKEN_METADATA_KEY, f"Bearer {token}"),) if token else ()
        """Metadata of every call."""

    @property
    def tls(self) -> bool:
        """Whether channels use TLS."""
        return self._tls is not None

    @property
    def server_name(self) -> str:
        """Name that the server's certificate must have; empty for the host of the address."""
        return (self._tls.server_name or "") if self._tls is not None else ""

    def __repr__(self) -> str:
        return f"Credentials(tls={self._tls!r}, token={'given' if self.metadata else 'none'})"

    def open(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Returns a channel to the address."""
        if self._tls is None or self._channel_credentials is None:
            return grpc.insecure_channel(address, options=options)
        if self._tls.server_name:
            options = (*options, ("grpc.ssl_target_name_override", self._tls.server_name))
        return grpc.secure_channel(address, self._channel_credentials, options=options)


def is_local(address: str) -> bool:
    """Returns whether data sent to the address stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _tls_of(environment: Mapping[str, str]) -> TlsConfig | None:
    ca = environment.get(CA_VARIABLE)
    others = {name: environment.get(name) or None for name in (CERT_VARIABLE, KEY_VARIABLE, SERVER_NAME_VARIABLE)}
    if ca:
        return TlsConfig(ca, *others.values())
    for name, value in others.items():
        if value is not None:
            # Going on without TLS is not what the variable was set for.
            raise InvalidArgumentError(f"{name}: set without {CA_VARIABLE}, which turns TLS on, expected both; or pass tls=")
    return None


def _channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        raise InvalidArgumentError(f"tls.{'key' if tls.key is None else 'cert'}: None, expected a file: cert and key are used together")
    return grpc.ssl_channel_credentials(_read("ca", tls.ca), _read("key", tls.key), _read("cert", tls.cert))


def _read(name: str, path: FilePath | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"tls.{name}: {os.fspath(path)}: {error.strerror or error}") from None
    if b"-----BEGIN " not in data:
        raise InvalidArgumentError(f"tls.{name}: {os.fspath(path)}: expected a file in PEM form")
    return data
