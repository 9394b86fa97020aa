"""Install commands in messages and pages: each works from a clone, and those of messages also from a wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from touchline.installing import install_command

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for part in ("protos/src", "client/src", "server/src", "examples") for path in (ROOT / part).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])


def project(folder: str) -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]


EXTRAS = project("client")["optional-dependencies"]


# Messages


@pytest.mark.parametrize("extra", EXTRAS)
def test_command_for_an_extra_names_its_packages(extra: str) -> None:
    words = install_command(extra).split()

    assert words[:2] == ["pip", "install"]
    assert {Requirement(word.strip("'")).name for word in words[2:]} == {Requirement(line).name for line in EXTRAS[extra]}


def test_command_for_one_package_of_an_extra_names_only_that_package() -> None:
    assert re.fullmatch(r"pip install 'dm-env>=[\d.]+'", install_command("recorders", "dm-env"))


def texts(path: Path) -> Iterator[str]:
    """Yields the string constants of a module; for an f-string, its fixed parts joined."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_of_a_program_installs_what_no_index_has(path: Path) -> None:
    assert [text for text in texts(path) if re.search(r"pip install '?\"?touchline", text)] == []


@pytest.mark.parametrize(
    ("recorder", "module", "package"),
    [
        ("GymnasiumRecorder", "gymnasium", "gymnasium"),
        ("GymnasiumVectorRecorder", "gymnasium", "gymnasium"),
        ("DmEnvRecorder", "dm_env", "dm-env"),
        ("PettingZooRecorder", "pettingzoo", "pettingzoo"),
    ],
)
def test_recorder_without_its_library_says_what_to_install(recorder: str, module: str, package: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from touchline import recorders; recorders.{recorder}"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert f"{recorder} needs {package} (" in found.stderr
    assert f"pip install '{package}>=" in found.stderr.splitlines()[-1]


# Pages


def commands(page: Path) -> list[str]:
    """Returns the arguments of a page's pip install commands."""
    return re.findall(r"pip install ((?:[\w./\[\],=<>-]+|\"[^\"]*\"|'[^']*'|[ ](?=[^ #]))+)", page.read_text("utf-8"))


def extras_of(place: str) -> list[str]:
    return [extra for extra in place.partition("[")[2].rstrip("]").split(",") if extra]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_install_existing_distributions(page: Path) -> None:
    for command in commands(page):
        places = [word.strip("\"'") for word in command.split() if word.strip("\"'").startswith("./")]
        folders = [place.partition("[")[0] for place in places]
        assert "touchline[" not in command, command
        assert all((ROOT / folder / "pyproject.toml").is_file() for folder in folders), command
        for place, folder in zip(places, folders, strict=True):
            assert set(extras_of(place)) <= set(project(folder).get("optional-dependencies", ())), command
        assert not folders or folders[0] == "./protos", f"{command}: client and server need protos, which no index has"


# Environments


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "tests" / "environments" / f"{name}.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_oldest_environment_has_the_floor_of_every_range() -> None:
    floors: dict[str, set[Version]] = {}
    for folder in ("protos", "client"):
        found = project(folder)
        for line in [*found["dependencies"], *(line for extra in found.get("optional-dependencies", {}).values() for line in extra)]:
            requirement = Requirement(line)
            if not requirement.name.startswith("touchline"):
                floors.setdefault(requirement.name, set()).update(
                    Version(part.version) for part in requirement.specifier if part.operator == ">="
                )

    assert {name: {Version(version)} for name, version in pins("oldest").items()} == floors


def imports_server(path: Path) -> bool:
    """Returns whether a test or a module that it takes from ``support`` imports the server without catching that it is missing."""
    for node in ast.parse(path.read_text("utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            package, _, module = name.partition(".")
            if package == "touchline_server" or (package == "support" and imports_server(ROOT / "tests" / package / f"{module}.py")):
                return True
    return False


def test_tests_of_environments_without_the_server_do_not_import_it() -> None:
    commands = subprocess.run(["make", "--dry-run", "test", "test-newt"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {word for line in commands.splitlines() if "SERVER_PYTHON" in line for word in line.split() if word.endswith(".py")}

    assert "tests/contract/test_golden.py" in files
    assert sorted(file for file in files if imports_server(ROOT / file)) == []


@pytest.mark.parametrize("name", ["tdmpc2", "newt"])
def test_pins_of_users_are_inside_of_the_ranges(name: str) -> None:
    oldest, newest = (
        pins("oldest"),
        dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split() if "==" in line),
    )

    for package, version in pins(name).items():
        assert Version(oldest[package]) <= Version(version) <= Version(newest[package]), package
