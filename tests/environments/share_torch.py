"""Links the torch of this interpreter's environment, with all that it is made of, into another environment of the same Python.

    .venv/bin/python tests/environments/share_torch.py .venv-quick/lib/python3.11/site-packages

So that an environment with other versions of everything else costs seconds. What is there already stays: numpy above all. To be run after
pip, which would follow the links.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed_by(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Returns a distribution and all that it needs here."""
    if name.lower() not in found:
        try:
            found[name.lower()] = distribution(name)
        except PackageNotFoundError:
            return found
        for requirement in map(Requirement, found[name.lower()].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed_by(requirement.name, found)
    return found


def main(target: Path) -> None:
    for each in needed_by("torch", {}).values():
        for top in {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = target / top
            if not link.exists():
                link.symlink_to(Path(str(each.locate_file(top))).resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
