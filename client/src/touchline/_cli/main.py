"""Entry point of the command ``touchline``: says what to install if its packages are missing, otherwise runs the commands."""

from __future__ import annotations

import sys

from touchline.installing import install_command

PACKAGES = ("typer", "rich", "plotext")
"""Packages of the extra ``cli``."""


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    try:
        from touchline._cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        sys.exit(f"touchline: needs {', '.join(PACKAGES)} ({error}): {install_command('cli')}")
    app()
