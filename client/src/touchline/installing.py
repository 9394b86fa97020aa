"""The pip command for an optional part. It works from a clone and from a wheel: it names packages, never ``touchline[...]``, which is on no
index."""

from __future__ import annotations

import re
from importlib import metadata


def install_command(extra: str, package: str | None = None) -> str:
    """Returns the pip command that installs the packages of an extra of this distribution, or only one ``package`` of them."""
    try:
        lines = metadata.requires("touchline") or []
    except metadata.PackageNotFoundError:  # sources without an installation
        lines = []
    requirements = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement)[0]
        if re.search(rf"extra == ['\"]{extra}['\"]", marker) and package in (None, name):
            requirements.append(requirement.strip())
    if not requirements:
        return f"install the packages of the extra {extra!r} in the client's pyproject.toml"
    return "pip install " + " ".join(f"'{requirement}'" for requirement in requirements)
