"""The server's certificates: read and checked when it starts, so that a fault in them is reported then rather than in each handshake."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from touchline_server.config.source import ConfigError, why_unreadable

if TYPE_CHECKING:
    from cryptography import x509

    from touchline_server.config.sections import TlsConfig

# A proxy in the environment is meant for the internet, not for one's own server.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """Returns the credentials with which the server listens; None if TLS is not configured.

    Raises:
        ConfigError: a file is missing or is not in PEM form, key and certificate do not match, or a certificate has expired.
    """
    if not tls.cert:
        return None
    chain, key = _read("tls.cert", tls.cert), _read("tls.key", tls.key)
    certificate, *_ = _certificates("tls.cert", tls.cert, chain)
    _check_key(tls, key, certificate)
    clients = None
    if tls.client_ca:
        clients = _read("tls.client_ca", tls.client_ca)
        _certificates("tls.client_ca", tls.client_ca, clients)
    return grpc.ssl_server_credentials([(key, chain)], root_certificates=clients, require_client_auth=clients is not None)


def open_own_channel(address: str, *, cert: str, key: str, client_ca: str) -> grpc.Channel:
    """Returns a channel to the server with these ``[tls]`` settings, from its own machine.

    It trusts only the server's own certificate, whichever CA signed it. If the server asks for a client certificate, the channel presents
    the server's own.

    Raises:
        ConfigError: as :func:`server_credentials`.
    """
    if not cert:
        return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
    chain = _read("tls.cert", cert)
    certificate, *_ = _certificates("tls.cert", cert, chain)
    pair = (_read("tls.key", key), chain) if client_ca else (None, None)
    options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", _name_of(certificate)))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(chain, *pair), options=options)


def open_channel(address: str, *, ca: Path | None, cert: Path | None, key: Path | None, server_name: str | None) -> grpc.Channel:
    """Returns a channel to any server, with TLS if ``ca`` is given.

    Raises:
        ConfigError: a file cannot be read, or ``cert`` is given without ``key`` or ``ca``, or ``key`` without ``cert``.
    """
    if (cert is None) != (key is None) or (ca is None and cert is not None):
        raise ConfigError("--tls-cert: expected together with --tls-key and --tls-ca")
    if ca is None:
        return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
    pair = (_read("--tls-key", key), _read("--tls-cert", cert)) if key is not None and cert is not None else (None, None)
    options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name)) if server_name else _CHANNEL_OPTIONS
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(_read("--tls-ca", ca), *pair), options=options)


def _read(option: str, path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: {path}: {why_unreadable(error)}") from None


def _certificates(option: str, path: str, data: bytes) -> Sequence[x509.Certificate]:
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ConfigError(f"{option}: {path}: expected a certificate in PEM form ({error})") from None
    now = datetime.now(UTC)
    for certificate in found:
        name = certificate.subject.rfc4514_string() or "a certificate"
        if certificate.not_valid_after_utc <= now:
            raise ConfigError(f"{option}: {path}: {name} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it")
        if certificate.not_valid_before_utc > now:
            raise ConfigError(
                f"{option}: {path}: {name} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
                "is this machine's clock right?"
            )
    return found


def _check_key(tls: TlsConfig, data: bytes, certificate: x509.Certificate) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigError(f"tls.key: {tls.key} is encrypted, expected a key without a passphrase") from None
    except ValueError:
        raise ConfigError(f"tls.key: {tls.key}: expected a private key in PEM form") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise ConfigError(f"tls.key: {tls.key} is not the key of the certificate in {tls.cert}; expected the leaf certificate first")


def _name_of(certificate: x509.Certificate) -> str:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ConfigError("tls.cert: no subject alternative name, expected at least one") from None
    dns = names.get_values_for_type(x509.DNSName)
    found = [name.replace("*.", "health.", 1) for name in dns]  # any name that the wildcard matches will do
    found += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    if not found:
        raise ConfigError("tls.cert: no DNS name or address among the subject alternative names, expected at least one")
    return found[0]
