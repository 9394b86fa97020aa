"""The three distributions: what they are, what they bring along and what they leave out."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = {"touchline-protos": "protos", "touchline": "client", "touchline-server": "server"}


def _project(dist: str) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / FOLDERS[dist] / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def _requirements(dist: str) -> list[Requirement]:
    project = _project(dist)
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(line) for line in [*project["dependencies"], *(line for extra in extras for line in extra)]]


def _lines(file: str) -> list[str]:
    text = (ROOT / file).read_text("utf-8")
    return [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]


def _modules_loaded_by(statement: str) -> set[str]:
    """Returns the top-level modules of a fresh interpreter after the statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def test_versions_of_the_three_distributions_agree() -> None:
    versions = {dist: _project(dist)["version"] for dist in FOLDERS}
    packages = {dist: importlib.import_module(dist.replace("-", "_")).__version__ for dist in FOLDERS}
    installed = {dist: metadata.version(dist) for dist in FOLDERS}

    assert len(set(versions.values())) == 1
    assert packages == versions
    assert installed == versions


@pytest.mark.parametrize("dist", FOLDERS)
def test_distribution_says_that_it_is_typed(dist: str) -> None:
    assert (ROOT / FOLDERS[dist] / "src" / dist.replace("-", "_") / "py.typed").is_file()


def test_constraints_pin_every_requirement_within_its_range() -> None:
    pins = dict(line.split("==") for line in _lines("constraints.txt"))
    pins = {_canonical(name): version for name, version in pins.items()}
    files = [line for folder in ("tests", "examples", "docs/site") for line in _lines(f"{folder}/requirements.txt")]
    required = [*(Requirement(line) for line in files), *(item for dist in FOLDERS for item in _requirements(dist))]

    loose = [
        str(item)
        for item in required
        if _canonical(item.name) not in FOLDERS and _applies(item) and not item.specifier.contains(pins.get(_canonical(item.name), "0"))
    ]

    assert loose == []


def _applies(item: Requirement) -> bool:
    return item.marker is None or item.marker.evaluate()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_client_requires_neither_torch_nor_the_server() -> None:
    required = {item.name for item in map(Requirement, _project("touchline")["dependencies"]) if item.marker is None}

    assert required == {"touchline-protos", "numpy", "protobuf", "grpcio"}


def test_client_import_loads_neither_torch_nor_tensordict_nor_the_server() -> None:
    loaded = _modules_loaded_by("import touchline; touchline.ReplayClient")

    assert "touchline" in loaded
    assert loaded & {"torch", "tensordict", "torchrl", "touchline_server", "pydantic"} == set()


def test_datasets_import_loads_no_package_of_a_format() -> None:
    loaded = _modules_loaded_by("from touchline import datasets; datasets.load")

    assert loaded & {"torch", "tensordict", "h5py", "minari", "gymnasium", "typer", "rich"} == set()


def test_protos_import_loads_only_numpy() -> None:
    loaded = _modules_loaded_by("import touchline_protos.codec, touchline_protos.gather")

    assert "numpy" in loaded
    assert loaded & {"torch", "triton", "tensordict", "grpc", "google", "touchline", "touchline_server"} == set()


@pytest.mark.parametrize(
    ("dist", "forbidden"),
    [
        ("touchline-protos", {"touchline", "touchline_server", "torch", "tensordict", "torchrl"}),
        ("touchline", {"touchline_server", "torchrl"}),
        ("touchline-server", {"touchline"}),
    ],
)
def test_no_module_imports_against_the_direction(dist: str, forbidden: set[str]) -> None:
    sources = sorted((ROOT / FOLDERS[dist] / "src").rglob("*.py"))

    found = {(file.name, name) for file in sources for name in _imported_by(file) if name in forbidden}
    # Only code that gathers on a device imports this module.
    found.discard(("row_gather.py", "torch"))

    assert sources
    assert found == set()


def _imported_by(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


EXPORTS = {
    "touchline_protos": [
        "Batch",
        "Counts",
        "DEFAULT_MAX_MESSAGE_BYTES",
        "MAX_REQUEST_BYTES",
        "PROTOCOL_METADATA_KEY",
        "PROTOCOL_VERSION",
        "__version__",
    ],
    "touchline": [
        "AccessDeniedError",
        "Batch",
        "BatchStream",
        "ClosedError",
        "ColumnInfo",
        "Counts",
        "DeadlineError",
        "EpisodeKey",
        "EpisodeResult",
        "EpisodeStream",
        "EpisodeWriter",
        "ForkError",
        "HeldCaller",
        "IncompatibleVersionError",
        "InvalidArgumentError",
        "InvalidEpisodeError",
        "KeyConflictError",
        "LoadError",
        "NotReadyError",
        "OverLimitError",
        "PriorityCounters",
        "RateInfo",
        "ReadyState",
        "ReplayClient",
        "ServerError",
        "ServerInfo",
        "ServerStatus",
        "SpoolError",
        "StatusWatch",
        "StoredEpisode",
        "TableInfo",
        "TlsConfig",
        "TlsError",
        "TooLargeError",
        "TouchlineError",
        "UnacknowledgedError",
        "UnauthenticatedError",
        "UnavailableError",
        "UnknownEpisodeError",
        "UnknownTableError",
        "WriterCounters",
        "__version__",
    ],
    "touchline.datasets": [
        "ColumnTransforms",
        "DatasetEpisode",
        "DatasetError",
        "ExportReport",
        "FORMATS",
        "LoadReport",
        "RefusalSummary",
        "Selection",
        "Source",
        "UnsupportedEpisodeError",
        "export",
        "inspect",
        "load",
        "open_source",
    ],
    "touchline_server": [
        "Batch",
        "Config",
        "ConfigError",
        "Counts",
        "DamagedStoreError",
        "DrainingError",
        "IncompatibleVersionError",
        "InvalidArgumentError",
        "InvalidEpisodeError",
        "KeyConflictError",
        "NotReadyError",
        "OverLimitError",
        "ReplayBuffer",
        "ReplayError",
        "RestoringError",
        "SchemaChangedError",
        "StorageFailedError",
        "StorageFullError",
        "StorageUncertainError",
        "StoreInUseError",
        "StoreMismatchError",
        "StoredEpisode",
        "TooLargeError",
        "UnavailableError",
        "UnknownEpisodeError",
        "UnknownTableError",
        "__version__",
        "read_cfg",
    ],
}


@pytest.mark.parametrize("package", EXPORTS)
def test_export_list_is_the_one_agreed_on(package: str) -> None:
    module = importlib.import_module(package)

    assert sorted(module.__all__) == EXPORTS[package]
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", ["grpcio", "grpcio-health-checking", "grpcio-reflection"])
def test_server_asks_for_a_grpc_that_inflates_no_bombs(package: str) -> None:
    (requirement,) = [requirement for requirement in _requirements("touchline-server") if requirement.name == package]

    # test_flooding.py tries the installed one; tried with the same bomb, 1.83.0 took all of it and 1.84.0 refused.
    assert not requirement.specifier.contains("1.83.0")
    assert requirement.specifier.contains("1.84.0")
    assert requirement.specifier.contains(metadata.version(package))
