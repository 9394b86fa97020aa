"""Which package may import which: the packages of each distribution, as docs/design.md names them, and no import cycle between files."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"touchline_protos": "protos/src", "touchline": "client/src", "touchline_server": "server/src"}

VALUES = {"errors", "types"}
MAY_IMPORT = {
    # Values know nothing; the bytes of messages know the values.
    "touchline_protos": {
        "": {"types"},
        "types": set(),
        "codec": {"types", "v1"},
        "shm": {"types", "log_lines"},
        "gather": {"log_lines"},
        "files": set(),
        "log_lines": set(),
        "tracing": set(),
        "v1": set(),
    },
    # What users import knows the client, the client knows its two sides, and those know the calls; nothing the other way.
    "touchline": {
        "": {"client", "writer", "_learner", "_rpc", *VALUES},
        "__main__": {"_cli"},
        "_cli": {"datasets", "_spool", "_actor", "_rpc", "client", "installing", *VALUES},
        "datasets": {"client", "_actor", "_rpc", "_tdmpc2", "installing", *VALUES},
        "recorders": {"writer", "client", "_actor", "_rpc", "installing", *VALUES},
        "tdmpc2": {"client", "_tdmpc2", "_learner", "_rpc", "installing", *VALUES},
        "newt": {"client", "_tdmpc2", "_learner", "_rpc", "installing", *VALUES},
        "torchrl": {"client", "_learner", "_rpc", "installing", *VALUES},
        "_tdmpc2": {"client", "_rpc", *VALUES},
        "writer": {"client", "_spool", "_actor", "_rpc", *VALUES},
        "_spool": {"client", "_actor", "_rpc", *VALUES},
        "client": {"_actor", "_learner", "_rpc", *VALUES},
        "_actor": {"_rpc", *VALUES},
        "_learner": {"_rpc", "installing", *VALUES},
        "_rpc": VALUES,
        "types": {"errors"},
        "errors": set(),
        "installing": set(),
    },
    "touchline_server": {
        "": {"buffer", "config", "errors"},
        "__main__": {"cli"},
        "cli": {"", "service", "durability", "config", "errors"},
        "service": {"", "http", "buffer", "metrics", "tables", "durability", "store", "selectors", "limiters", "config", "errors"},
        "http": {"tables", "store", "config", "errors"},
        "buffer": {"torchrl", "tables", "durability", "store", "selectors", "config", "errors"},
        "tables": {"durability", "store", "selectors", "limiters", "config", "errors"},
        "torchrl": {"tables", "store", "selectors", "errors"},
        "durability": {"metrics", "store", "selectors", "config", "errors"},
        "store": {"selectors", "config", "errors"},
        "selectors": {"errors"},
        "limiters": {"metrics", "errors"},
        "metrics": {"errors"},
        "config": {"selectors"},
        "errors": set(),
    },
}
"""Packages (or modules) that each package of a distribution may import; "" is the distribution's own ``__init__``."""

LIBRARIES = {
    ("touchline_server", "grpc"): {"service", "cli"},
    ("touchline", "grpc"): {"_rpc"},
    ("touchline_protos", "grpc"): {"v1"},
    ("touchline_server", "torchrl"): {"torchrl", "buffer"},
    ("touchline_server", "sqlite3"): {"durability"},
    ("touchline", "sqlite3"): {"_spool"},
    ("touchline_protos", "sqlite3"): {"files"},
    ("touchline", "typer"): {"_cli"},
    ("touchline_server", "typer"): {"cli"},
    ("touchline_server", "starlette"): {"http"},
    ("touchline_server", "uvicorn"): {"http"},
    ("touchline_server", "prometheus_client"): {"http"},
    ("touchline_protos", "triton"): {"gather"},
    ("touchline", "triton"): set(),
    ("touchline_server", "triton"): {"store"},
}
"""Packages that may import a library, at run time or for its types; no other may."""


@dataclass(frozen=True)
class Module:
    """A module's name and what it imports, including lazily and for its types."""

    name: str
    imports: frozenset[str]

    @property
    def distribution(self) -> str:
        return self.name.partition(".")[0]

    @property
    def package(self) -> str:
        return _package(self.name)


def _package(module: str) -> str:
    return [*module.split("."), ""][1]


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_modules(sources: Mapping[str, str]) -> list[Module]:
    """Returns the modules of these sources, by name. An import of a name from a module counts as an import of the module."""

    def known(name: str) -> str:
        parent = name.rpartition(".")[0]
        return name if name in sources or parent not in sources else parent

    return [Module(name, frozenset(map(known, _imported(source))) - {name}) for name, source in sources.items()]


def faults_of(modules: list[Module]) -> list[str]:
    """Returns a line for each import that is not allowed, and one for an import cycle."""
    faults = []
    for module in modules:
        packages = MAY_IMPORT[module.distribution]
        if module.package not in packages:
            faults.append(f"{module.name}: unknown package; add {module.package!r} to MAY_IMPORT and docs/design.md")
            continue
        for imported in sorted(module.imports):
            distribution, package = imported.partition(".")[0], _package(imported)
            if distribution == module.distribution and package not in packages[module.package] | {module.package}:
                faults.append(
                    f"{module.name} imports {imported}: {module.package or '__init__'} may import {sorted(packages[module.package])}"
                )
            allowed = LIBRARIES.get((module.distribution, distribution))
            if allowed is not None and module.package not in allowed:
                faults.append(f"{module.name} imports {imported}: only {sorted(allowed)} may")
    try:
        TopologicalSorter({module.name: module.imports for module in modules}).prepare()
    except CycleError as error:
        faults.append("an import cycle: " + " -> ".join(error.args[1]))
    return faults


def sources() -> dict[str, str]:
    found = {}
    for distribution, folder in SOURCES.items():
        for file in (ROOT / folder / distribution).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith("touchline_protos.v1."):
                found[name] = file.read_text("utf-8")
    return found


def test_every_import_is_allowed_and_no_files_import_in_a_cycle() -> None:
    assert faults_of(read_modules(sources())) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("touchline_server.store.schema", "from touchline_server.durability import journal", "store may import"),
        ("touchline_server.store.index", "import grpc", "only ['cli', 'service'] may"),
        ("touchline_server.durability.plan", "from touchline_server.service.app import ReplayServer", "durability may import"),
        ("touchline_server.store.columns", "def f():\n    from touchline_server.torchrl import internals", "store may import"),
        ("touchline._actor.rows", "from touchline.client import ReplayClient", "_actor may import"),
        ("touchline._learner.stream", "if TYPE_CHECKING:\n    from touchline import ReplayClient", "_learner may import"),
        ("touchline.datasets.npz", "from touchline._cli.terminal import print_line", "datasets may import"),
        ("touchline_protos.types.batch", "from touchline_protos.codec import wire", "types may import"),
        ("touchline_server.store.schema", "from touchline_server.store import columns", "an import cycle"),
        ("touchline.corner.utils", "", "unknown package"),
    ],
)
def test_planted_import_is_found(module: str, line: str, expected: str) -> None:
    texts = sources()

    faults = faults_of(read_modules(texts | {module: f"{texts.get(module, '')}\n{line}\n"}))

    assert any(expected in fault for fault in faults), faults
