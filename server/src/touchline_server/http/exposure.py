"""Whether the server serves HTTP, and by which names it may be called."""

from __future__ import annotations

import re
from importlib.util import find_spec
from ipaddress import ip_address

from touchline_server.config.settings import Config, ConfigError

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
"""Packages of the extra ``http``."""


def why_not(config: Config, *, has_tokens: bool) -> str | None:
    """Returns why this server serves no HTTP; None if it does.

    Args:
        config: configuration of the server.
        has_tokens: whether callers need a token.

    Raises:
        ConfigError: ``http.enabled`` is ``"on"``, and the packages are missing.
    """
    if config.http.enabled == "off":
        return "http.enabled is 'off'"
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        reason = f"{', '.join(missing)} cannot be imported; pip install starlette uvicorn prometheus-client"
        if config.http.enabled == "on":
            raise ConfigError(f"http.enabled: 'on', but {reason}")
        return reason
    # The folder of a Unix socket keeps other users of the machine out; a port on loopback would not.
    if config.server.unix_socket and not has_tokens and config.http.enabled == "auto":
        return "server.unix_socket is set without tokens, and all users of this machine can reach a port; set http.enabled = 'on'"
    return None


def is_local_name(host: str) -> bool:
    """Returns whether a ``Host`` header cannot be a name that a foreign web page has pointed at this machine (DNS rebinding).

    Such are addresses, ``localhost`` and names without a dot: none of them can be registered on the internet.
    """
    name = re.sub(r":\d*\Z", "", host)
    if re.fullmatch(r"[\w-]+|[\w.-]+\.localhost", name):
        return True
    try:
        ip_address(name[1:-1] if re.fullmatch(r"\[.*\]", name) else name)
    except ValueError:
        return False
    return True
