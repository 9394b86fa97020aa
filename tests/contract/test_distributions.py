"""The wheels and sdists that ``make dist`` builds: what is in them, and that they work in environments without the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from support.service_calls import make_config, make_episode
from support.serving import ServerThread
from touchline import ReplayClient, __version__

ROOT = Path(__file__).parents[2]
FOLDERS = {"touchline_protos": "protos", "touchline": "client", "touchline_server": "server"}
PYTHON = {"touchline_protos": "<3.14,>=3.10", "touchline": "<3.14,>=3.10", "touchline_server": "<3.14,>=3.11"}
MAX_CLIENT_BYTES = 1_500_000
"""Limit of the client on a robot's disk, without its protos, its dependencies and compiled files."""
SOURCES = {"touchline_protos": ["src", "touchline"], "touchline": ["src"], "touchline_server": ["src"]}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what make dist builds; the wheels are built from the sdists."""
    out = tmp_path_factory.mktemp("dist")
    for folder in FOLDERS.values():
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT / folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return out


def wheel(dist: Path, package: str) -> Path:
    return dist / f"{package}-{__version__}-py3-none-any.whl"


def sources(package: str) -> set[str]:
    """Returns the files of a distribution in the tree, relative to its folder."""
    folder = ROOT / FOLDERS[package]
    files = {path for part in SOURCES[package] for path in (folder / part).rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)) for path in files if "__pycache__" not in path.parts}


# Content


def test_dist_has_a_wheel_and_an_sdist_of_each(dist: Path) -> None:
    expected = {name for package in FOLDERS for name in (wheel(dist, package).name, f"{package}-{__version__}.tar.gz")}

    assert {path.name for path in dist.iterdir()} - {".gitignore"} == expected


@pytest.mark.parametrize("package", FOLDERS)
def test_wheel_has_the_sources_and_nothing_else(dist: Path, package: str) -> None:
    about = f"{package}-{__version__}.dist-info/"
    scripts = set() if package == "touchline_protos" else {"entry_points.txt"}
    expected = {name.removeprefix("src/") for name in sources(package) if name.startswith("src/")}
    if package == "touchline_protos":
        expected.add("touchline_protos/v1/replay.proto")

    with zipfile.ZipFile(wheel(dist, package)) as archive:
        names = archive.namelist()

    assert len(names) == len(set(names))
    assert {name for name in names if not name.startswith(about)} == expected
    assert {name.removeprefix(about) for name in names if name.startswith(about)} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "licenses/LICENSE",
    } | scripts
    assert f"{package}/py.typed" in names


def test_wheels_have_what_is_not_python(dist: Path) -> None:
    proto = (ROOT / "protos/touchline/v1/replay.proto").read_bytes()
    configuration = (ROOT / "cfg/default.toml").read_bytes()

    with zipfile.ZipFile(wheel(dist, "touchline_protos")) as archive:
        assert archive.read("touchline_protos/v1/replay.proto") == proto
        assert "touchline_protos/v1/replay_pb2.pyi" in archive.namelist()
    with zipfile.ZipFile(wheel(dist, "touchline_server")) as archive:
        assert archive.read("touchline_server/config/default.toml") == configuration


@pytest.mark.parametrize("package", FOLDERS)
def test_sdist_has_the_sources_and_nothing_else(dist: Path, package: str) -> None:
    with tarfile.open(dist / f"{package}-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert names == sources(package) | {"PKG-INFO", "README.md", "LICENSE", "pyproject.toml", ".gitignore"}


@pytest.mark.parametrize("package", FOLDERS)
def test_metadata_is_complete(dist: Path, package: str) -> None:
    metadata = read_metadata(wheel(dist, package))

    assert (metadata["Name"], metadata["Version"]) == (package.replace("_", "-"), __version__)
    assert metadata["Requires-Python"] == PYTHON[package]
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Summary"] and metadata["Summary"].endswith(".")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    requires = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("touchline-protos")]
    minor = ".".join(__version__.split(".")[:2])
    assert requires == ([] if package == "touchline_protos" else [f"touchline-protos<{next_minor(minor)},>={__version__}"])


def read_metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def next_minor(version: str) -> str:
    major, minor = version.split(".")
    return f"{major}.{int(minor) + 1}"


@pytest.mark.parametrize("package", FOLDERS)
def test_readme_renders_and_leads_nowhere_outside(dist: Path, package: str) -> None:
    metadata = read_metadata(wheel(dist, package))
    text = metadata.get_payload()
    assert isinstance(text, str)

    page = MarkdownIt("commonmark").enable("table").render(text)

    assert metadata["Description-Content-Type"] == "text/markdown"
    assert page.startswith(f"<h1>{metadata['Name']}</h1>")
    assert re.findall(r'(?:href|src)="(?!https://)', page) == [], "a page of an index has no files beside it"


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_licence_of_a_distribution_is_the_projects(folder: str) -> None:
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


# Installed


class Environment:
    """A virtual environment without pip; the pip of the tests installs into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))

    def install(self, *wheels: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python"]
        command = [*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", *wheels]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        assert result.returncode == 0, result.stdout + result.stderr
        result = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False, cwd=self.folder)
        names = tuple(f"{Path(wheel).name.partition('-')[0].replace('_', '-')} " for wheel in wheels)
        assert [line for line in result.stdout.splitlines() if line.startswith(names)] == []

    def run(self, *words: str) -> tuple[int, str]:
        """Runs a program of the environment; returns its exit status and output."""
        command = [self.folder / "bin" / words[0], *words[1:]]
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        assert "Traceback" not in found.stderr, found.stderr
        return found.returncode, found.stdout + found.stderr

    def python(self, code: str) -> str:
        status, output = self.run("python", "-W", "ignore", "-c", code)
        assert status == 0, output
        return output.strip()


@pytest.fixture(scope="module")
def client_only(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("client"))
    environment.install(wheel(dist, "touchline_protos"), wheel(dist, "touchline"))
    return environment


@pytest.mark.slow
def test_client_alone_brings_three_packages_and_is_small(client_only: Environment) -> None:
    names = "from importlib.metadata import distributions; print(*{each.name for each in distributions()})"
    installed = set(client_only.python(names).split())
    sizes = {name: size_of(client_only.packages / name) for name in ("touchline", "touchline_protos")}
    seconds = client_only.python("import time; start = time.perf_counter(); import touchline; print(time.perf_counter() - start)")

    assert installed == {"touchline", "touchline-protos", "numpy", "protobuf", "grpcio", "typing_extensions"}
    assert sizes["touchline"] < MAX_CLIENT_BYTES
    print(f"client {sizes['touchline']:,} bytes, protos {sizes['touchline_protos']:,}; import touchline: {float(seconds):.2f} s")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


@pytest.mark.slow
def test_client_alone_adds_and_samples(client_only: Environment) -> None:
    code = """
        import numpy as np, sys, touchline
        columns = {"obs": np.zeros((20, 4), np.float32), "action": np.zeros((20, 2), np.float32), "reward": np.zeros(20, np.float32)}
        columns["action"][0] = np.nan
        with touchline.ReplayClient(ADDRESS) as client:
            client.add(columns)
            print(touchline.__version__, client.info().version, client.sample(batch_size=4).obs.shape, "torch" in sys.modules)
    """
    with ServerThread(make_config()) as server:
        printed = client_only.python(textwrap.dedent(code).replace("ADDRESS", repr(server.address)))

    assert printed == f"{__version__} {__version__} (4, 4, 4) False"


@pytest.mark.slow
def test_client_without_extras_says_what_is_missing(client_only: Environment, dist: Path) -> None:
    status, output = client_only.run("touchline", "--help")
    assert status == 1 and "pip install 'plotext" in output and "'rich>=13' 'typer>=0.16'" in output

    client_only.install(f"{wheel(dist, 'touchline')}[cli]")
    for name in ("a.pt", "a.h5"):
        (client_only.folder / name).touch()
    (client_only.folder / "spool").mkdir()

    assert "spool" in client_only.run("touchline", "--help")[1]
    with ServerThread(make_config()) as server, ReplayClient(server.address) as client:
        client.add(make_episode().columns)
        for words, missing in (
            (("load", "a.pt"), "torch"),
            (("load", "a.h5"), "h5py"),
            (("export", "b.h5"), "h5py"),
            (("load", "minari:a-v0"), "minari[hdf5]"),
        ):
            status, output = client_only.run("touchline", *words, "--address", server.address)
            assert status == 1 and "pip install '" in output and f"'{missing}>=" in output, (words, output)
    status, output = client_only.run("touchline", "spool", "show", "spool")
    assert "needs" not in output, output


@pytest.mark.slow
def test_server_beside_its_dependencies_samples_and_serves(dist: Path, tmp_path: Path) -> None:
    """Only Touchline is installed: pip finds that the tests' own packages, torch among them, satisfy the wheel."""
    environment = Environment(tmp_path)
    (environment.packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path), "utf-8")
    environment.install(wheel(dist, "touchline_protos"), wheel(dist, "touchline_server"))

    code = """
        import torch, touchline_protos, touchline_server
        from tensordict import TensorDict
        buffer = touchline_server.ReplayBuffer(touchline_server.read_cfg())
        action = torch.full((9, 2), torch.nan).index_fill(0, torch.arange(1, 9), 0)
        buffer.add(TensorDict({"obs": torch.zeros(9, 4), "action": action, "reward": torch.zeros(9)}, batch_size=[9]))
        print(touchline_server.__file__, touchline_protos.__file__, tuple(buffer.sample().obs.shape))
    """
    printed = environment.python(textwrap.dedent(code)).splitlines()[-1]
    status, output = environment.run("touchline-server", "--version")

    own = environment.packages
    assert printed == f"{own}/touchline_server/__init__.py {own}/touchline_protos/__init__.py (4, 256, 4)"
    assert (status, output.strip()) == (0, f"touchline-server {__version__}")
