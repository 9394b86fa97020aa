"""The committed stubs match the committed .proto."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
STUBS = ("replay_pb2.py", "replay_pb2.pyi", "replay_pb2_grpc.py")
ENVIRONMENT = Path(os.environ.get("TOUCHLINE_STUBS_VENV") or PROTOS.parent / ".venv-stubs")
"""The generator's environment. If it is missing it is made, once, which takes a package index and a minute."""


@pytest.mark.slow
@pytest.mark.skipif(
    not ENVIRONMENT.exists() and sys.version_info >= (3, 13),
    reason="the pinned generator, grpcio-tools 1.63.2, has no wheels for Python 3.13 and later",
)
def test_stubs_generated_anew_are_those_in_the_tree(tmp_path: Path) -> None:
    out = tmp_path / "out"

    command = [sys.executable, PROTOS / "generate_stubs.py", "--out", out, "--venv", ENVIRONMENT]
    subprocess.run(command, check=True, cwd=tmp_path)

    generated = out / "touchline_protos" / "v1"
    assert sorted(path.name for path in generated.iterdir()) == sorted(STUBS)
    for name in STUBS:
        committed = PROTOS / "src" / "touchline_protos" / "v1" / name
        assert committed.read_text() == (generated / name).read_text(), f"{name}: run protos/generate_stubs.py"
