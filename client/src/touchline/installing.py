"""What to install for an optional part, as a command that works from a clone and from a wheel: it names packages, never ``touchline[...]``,
which is on no index."""

from __future__ import annotations

import re
from importlib import metadata


def install_command(extra: str, package: str | None = None) -> str:
    """Returns the pip command that installs the packages of an extra of this distribution, or the one ``package`` of it."""
    try:
        lines = metadata.requires("touchline") or []
    except metadata.PackageNotFoundError:  # sources without an installation
        lines = []
    wanted = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement)[0]
        if re.search(rf"extra == ['\"]{extra}['\"]", marker) and package in (None, name):
            wanted.append(requirement.strip())
    if not wanted:
        return f"install the packages of the extra {extra!r} in the client's pyproject.toml"
    return "pip install " + " ".join(f"'{requirement}'" for requirement in wanted)
