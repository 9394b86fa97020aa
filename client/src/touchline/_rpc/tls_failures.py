"""Why a TLS session was not agreed on, in words that say what to change.

gRPC reports such a failure as UNAVAILABLE, like a server that is away, and has no code of its own for it: only the words that its TLS
library puts into the text tell them apart.
"""

from __future__ import annotations


def explain(details: str, address: str, *, server_name: str) -> str | None:
    """Returns what is wrong with the certificate, name or key; None if the failure is of another kind.

    Args:
        details: gRPC's text of an UNAVAILABLE call that went by TLS.
        address: of the server.
        server_name: that the client was told to look for; empty: the address's host.
    """
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"{address}: the client does not trust the server's certificate ({_cause(details)}); expected one that the CA in "
            "TlsConfig(ca=...), or TOUCHLINE_TLS_CA, vouches for and that is valid today"
        )
    if "Hostname Verification Check failed" in details or "not in peer certificate" in details:
        name, source = (server_name, "server_name") if server_name else (_host_of(address), "the address's host")
        return (
            f"{address}: the server's certificate is not for {name!r} ({source}); expected it among the certificate's names "
            "(subjectAltName). Use an address that is, or give one of them as TlsConfig(server_name=...) or TOUCHLINE_TLS_SERVER_NAME"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address}: what answers there speaks no TLS; expected a touchline-server with tls.cert, or a client without TLS"
    if "Failed to create security handshaker" in details:
        return f"{address}: the client's own TLS files cannot be used; expected tls.key to be the key of tls.cert, and tls.ca certificates"
    return None


def _cause(details: str) -> str:
    """Returns what the TLS library says after its code; older ones say nothing of use."""
    cause = details.rpartition("CERTIFICATE_VERIFY_FAILED")[2].strip(": ").removesuffix(": OK")
    return cause if cause and "verification context" not in cause else "CERTIFICATE_VERIFY_FAILED"


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
