"""Prints the requirements of distributions of this repository, from only their pyproject.toml, without those on each other.

    python docker/requirements.py protos 'client[torch]' > requirements.txt

Lets an image rebuild its layer of dependencies only when they change, not at each change of the sources.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

OWN = "touchline"
"""Prefix of the names of this repository's distributions."""


def requirements(place: str) -> list[str]:
    """Returns the requirements of a folder's distribution; `folder[extra]` adds those of one extra."""
    folder, _, extra = place.rstrip("]").partition("[")
    project = tomllib.loads(Path(folder, "pyproject.toml").read_text("utf-8"))["project"]
    found = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]
    return [line for line in found if not line.startswith(OWN)]


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(line for place in sys.argv[1:] for line in requirements(place))))
