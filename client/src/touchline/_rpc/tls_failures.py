"""Why a TLS handshake failed, in words that say what to change.

gRPC reports such a failure as UNAVAILABLE, as it does for a server that is away, and has no code of its own for it: only the words of
its TLS library in the text distinguish the two.
"""

from __future__ import annotations


def explain(details: str, address: str, *, server_name: str) -> str | None:
    """Returns what is wrong with the certificate, name or key; None for any other failure.

    Args:
        details: gRPC's text of a call over TLS that failed as UNAVAILABLE.
        address: address of the server.
        server_name: name that the client expects in the certificate; empty for the host of the address.
    """
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"{address}: the client does not trust the server's certificate ({_cause(details)}); expected one that is valid "
            "today and signed by the CA in TlsConfig(ca=...) or TOUCHLINE_TLS_CA"
        )
    if "Hostname Verification Check failed" in details or "not in peer certificate" in details:
        name, source = (server_name, "server_name") if server_name else (_host_of(address), "the address's host")
        return (
            f"{address}: the server's certificate is not for {name!r} ({source}); expected it among the certificate's names "
            "(subjectAltName). Use one of these names as the address, TlsConfig(server_name=...) or TOUCHLINE_TLS_SERVER_NAME"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address}: the server does not use TLS; expected a touchline-server with tls.cert, or a client without TLS"
    if "Failed to create security handshaker" in details:
        return (
            f"{address}: the client's own TLS files are unusable; expected tls.key to be the key of tls.cert, and tls.ca to hold "
            "certificates"
        )
    return None


def _cause(details: str) -> str:
    """Returns what the TLS library says after its code, which in older versions is nothing useful."""
    cause = details.rpartition("CERTIFICATE_VERIFY_FAILED")[2].strip(": ").removesuffix(": OK")
    return cause if cause and "verification context" not in cause else "CERTIFICATE_VERIFY_FAILED"


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
