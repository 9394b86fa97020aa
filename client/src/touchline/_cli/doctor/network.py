"""Checks below gRPC: the address, its name, a connection, and TLS."""

from __future__ import annotations

import socket
import ssl
import stat
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from touchline._cli.doctor.findings import Finding, GaveUpError, Level, give_up
from touchline._rpc.credentials import CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE, SERVER_NAME_VARIABLE, Credentials, TlsConfig
from touchline.errors import InvalidArgumentError
from touchline_protos.log_lines import escape

EXPIRES_SOON_DAYS = 14
"""Days before the end of a certificate from which on it is a warning."""

_ADVICE_MUTUAL = f"if it asks for client certificates, set {CERT_VARIABLE} and {KEY_VARIABLE} to one that is signed by its tls.client_ca."

SocketAddress = tuple[int, Any]
"""Family and address of a socket."""


def check_settings(address: str) -> Credentials:
    """Returns the credentials that every command uses for the address.

    Raises:
        GaveUpError: the address, a TLS file or the token cannot be used.
    """
    from touchline._rpc.channel import check_address

    try:
        return Credentials(check_address(address))
    except InvalidArgumentError as error:
        raise give_up("settings", escape(str(error)), "Correct the address or the environment variable that the text names.") from None


def resolve(address: str) -> tuple[list[SocketAddress], Finding]:
    """Returns the addresses of sockets behind an address, and what was found.

    Raises:
        GaveUpError: the name is unknown, or the path is no socket.
    """
    if address.startswith("unix:"):
        return _find_socket(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        advice = f"Check the spelling of {escape(host)!r}, or give an IP address; on the server's machine `hostname -I` prints it."
        raise give_up("resolve", f"{escape(host)}: {error.strerror or error}", advice) from None
    places: list[SocketAddress] = list(dict.fromkeys((int(family), place) for family, _, _, _, place in found))
    names = [place[0] for _, place in places]
    what = "an address, so there is no name to look up" if names == [host] else ", ".join(map(str, names))
    return places, Finding("resolve", Level.OK, f"{escape(host)} is {what}", figures={"addresses": names})


def _find_socket(path: str) -> tuple[list[SocketAddress], Finding]:
    advice = "Start the server with --unix-socket and this path; in containers, mount the socket's folder in both."
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise give_up("resolve", f"{escape(path)}: {error.strerror}", advice) from None
    if not stat.S_ISSOCK(mode):
        raise give_up("resolve", f"{escape(path)}: not a socket", advice)
    return [(socket.AF_UNIX, path)], Finding("resolve", Level.OK, f"{escape(path)} is a socket")


def connect(places: list[SocketAddress], timeout_s: float) -> tuple[SocketAddress, Finding]:
    """Returns the first address that accepts a connection, and what was found.

    Raises:
        GaveUpError: none does.
    """
    failures: list[tuple[SocketAddress, OSError]] = []
    for place in places:
        started_s = time.perf_counter()
        try:
            _open(place, timeout_s).close()
        except OSError as error:
            failures.append((place, error))
            continue
        took_s = time.perf_counter() - started_s
        others = "; not " + ", ".join(_name(other) for other, _ in failures) if failures else ""
        text = f"connected to {_name(place)} in {took_s * 1e3:.1f} ms{others}"
        level = Level.NOTE if failures else Level.OK
        return place, Finding("connect", level, text, figures={"connect_s": took_s})
    text = "; ".join(f"{_name(place)}: {error.strerror or error}" for place, error in failures)
    raise give_up("connect", text, _advice_of(failures))


def _advice_of(failures: list[tuple[SocketAddress, OSError]]) -> str:
    if any(isinstance(error, ConnectionRefusedError) for _, error in failures):
        return (
            "Nothing listens on this port. Start the server (touchline-server serve), or correct the port: the server prints "
            "`listening on HOST:PORT`. On 127.0.0.1, the default, no other machine reaches it: --host 0.0.0.0."
        )
    if any(isinstance(error, PermissionError) for _, error in failures):
        return "This user may not open the socket: give it write permission, or run as the server's user."
    return (
        "The machine does not answer: check that it is up, that the address is right, and that its firewall lets the port through "
        "(one TCP port, 50051 by default)."
    )


def _open(place: SocketAddress, timeout_s: float) -> socket.socket:
    family, target = place
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(target)
    except BaseException:
        connection.close()
        raise
    return connection


def _name(place: SocketAddress) -> str:
    family, target = place
    if family == socket.AF_UNIX:
        return escape(str(target))
    host, port = target[:2]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def check_tls(address: str, place: SocketAddress, credentials: Credentials, timeout_s: float) -> Iterator[Finding]:
    """Yields what a handshake with the client's TLS settings found; without TLS, whether the server expects it.

    Raises:
        GaveUpError: one of the two sides uses TLS and the other does not, or the server's certificate is not trusted.
    """
    tls = credentials.arguments["tls"]
    if not tls:
        if _speaks_tls(place, timeout_s):
            advice = f"Set {CA_VARIABLE} to the CA of the server's certificate (a PEM file); see docs/security.md."
            raise give_up("tls", "the server uses TLS and this client does not", advice)
        yield Finding("tls", Level.OK if _is_here(place) else Level.NOTE, "no TLS on either side")
        return
    host = tls.server_name or address.rpartition(":")[0].strip("[]") or "localhost"
    try:
        certificate = _handshake(place, _context_of(tls), host, timeout_s)
    except ssl.SSLCertVerificationError as error:
        raise _not_trusted(error, host) from None
    except ssl.SSLError as error:
        raise _no_session(error) from None
    except OSError as error:
        advice = f"If the server does not use TLS, unset {CA_VARIABLE}; {_ADVICE_MUTUAL if tls.cert is None else 'else see its log.'}"
        raise give_up("tls", f"the server gave no TLS session: {error}", advice) from None
    yield _describe(certificate, host)


def _context_of(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    context.set_alpn_protocols(["h2"])
    if tls.cert is not None:
        context.load_cert_chain(str(tls.cert), None if tls.key is None else str(tls.key))
    return context


def _handshake(place: SocketAddress, context: ssl.SSLContext, host: str, timeout_s: float) -> dict[str, Any]:
    """Returns the server's certificate, empty if it is not verified; raises OSError if there is no session."""
    with _open(place, timeout_s) as plain, context.wrap_socket(plain, server_hostname=host) as secured:
        certificate = dict(secured.getpeercert() or {})
        # In TLS 1.3 a server refuses a client's certificate only after the handshake. A gRPC server speaks first.
        if not secured.recv(1):
            raise ConnectionError("it closed the connection after the handshake")
        return certificate


def _speaks_tls(place: SocketAddress, timeout_s: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is sent over this connection; it only asks which protocol the server speaks.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _open(place, timeout_s) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        # A server that asks for a client certificate says so with an alert, which is TLS as well.
        return "ALERT" in str(error).upper()
    except OSError:
        return False


def _not_trusted(error: ssl.SSLCertVerificationError, host: str) -> GaveUpError:
    text = f"the server's certificate is not trusted: {error.verify_message}"
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        advice = f"Use a name that is in the certificate as the address, or set {SERVER_NAME_VARIABLE} to it; {escape(host)!r} is not one."
    elif error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
        advice = "Renew the server's certificate and restart the server, or correct this machine's clock."
    else:
        advice = f"Set {CA_VARIABLE} to the CA that signed the server's certificate; for a self-signed one, that is the certificate itself."
    return give_up("tls", text, advice)


def _no_session(error: ssl.SSLError) -> GaveUpError:
    reason = error.reason or str(error)
    if "ALERT" in reason.upper():
        advice = f"See the server's log; {_ADVICE_MUTUAL}"
        return give_up("tls", f"the server refused the handshake: {reason}", advice)
    advice = f"If the server does not use TLS, unset {CA_VARIABLE}; else start it with tls.cert and tls.key."
    return give_up("tls", f"this client uses TLS and the server does not: {reason}", advice)


def _describe(certificate: dict[str, Any], host: str) -> Finding:
    names = ", ".join(escape(str(name)) for _, name in certificate.get("subjectAltName", ()))
    ends_s = ssl.cert_time_to_seconds(certificate["notAfter"])
    days = (ends_s - time.time()) / 86400
    until = datetime.fromtimestamp(ends_s, timezone.utc).date().isoformat()
    text = f"TLS, certificate for {names or host} until {until}"
    figures = {"days_left": days}
    if days < EXPIRES_SOON_DAYS:
        advice = "Renew the server's certificate and restart the server: certificates are read when it starts."
        return Finding("tls", Level.WARNING, f"{text}, {days:.0f} days", advice, figures)
    return Finding("tls", Level.OK, text, figures=figures)


def _is_here(place: SocketAddress) -> bool:
    family, target = place
    return family == socket.AF_UNIX or str(target[0]).startswith("127.") or target[0] == "::1"
