#!/usr/bin/env python3
"""Generates the Python stubs of ``touchline/v1/replay.proto``.

The generator is an old one on purpose. Generated code works with the protobuf and grpcio that it was generated for and
with later ones, never with earlier ones: the newest generator would force its own versions on every robot that installs
the client. The stubs of grpcio-tools 1.63.2 run with protobuf 5.26 and grpcio 1.63, and with all that came after.

It cannot be installed beside a current protobuf, so it gets an environment of its own, and it needs an interpreter that
it has wheels for: Python 3.11 or 3.12.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
PROTO = "touchline_protos/v1/replay.proto"
# grpcio-tools imports pkg_resources, which setuptools 82 dropped.
REQUIREMENTS = ("grpcio-tools==1.63.2", "setuptools<82")
SUPPORTED = ((3, 11), (3, 12))


def find_python(environment: Path) -> Path:
    """Returns the interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare_environment(environment: Path) -> Path:
    """Makes the generator's environment unless it exists and has the right generator, and returns its interpreter."""
    python = find_python(environment)
    check = "from importlib.metadata import version; import pkg_resources; assert version('grpcio-tools') == '1.63.2'"
    if python.exists():
        probe = subprocess.run([python, "-W", "ignore", "-c", check], stderr=subprocess.DEVNULL)
        if probe.returncode == 0:
            return python
    if sys.version_info[:2] not in SUPPORTED:
        raise SystemExit(f"Python {sys.version.split()[0]}: the generator has wheels for 3.11 and 3.12 only")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def generate(python: Path, out: Path) -> None:
    """Writes ``touchline_protos/v1/replay_pb2*`` below a directory."""
    out.mkdir(parents=True, exist_ok=True)
    # The virtual path makes the stubs import each other as touchline_protos.v1, with nothing rewritten afterwards.
    arguments = ["-Itouchline_protos/v1=touchline/v1", PROTO]
    outputs = [f"--{kind}_out={out.resolve()}" for kind in ("python", "pyi", "grpc_python")]
    command = [str(python), "-W", "ignore", "-m", "grpc_tools.protoc", *outputs, *arguments]
    subprocess.run(command, cwd=PROTOS, check=True)


def main() -> None:
    """Reads the command line and generates."""
    parser = argparse.ArgumentParser(description="Generates the Python stubs of touchline/v1/replay.proto.")
    parser.add_argument("--out", type=Path, default=PROTOS / "src", help="output folder, which receives touchline_protos/v1/")
    parser.add_argument("--venv", type=Path, default=PROTOS.parent / ".venv-stubs", help="environment of the generator")
    options = parser.parse_args()
    generate(prepare_environment(options.venv.absolute()), options.out)


if __name__ == "__main__":
    main()
