"""Dockerfile and compose files agree with each other and with what they take from elsewhere; needs no engine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from touchline_server import Config
from touchline_server.service.healthcheck import CONTAINER_TIMEOUT_S

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text("utf-8")
GPU = (ROOT / "docker-compose.gpu.yml").read_text("utf-8")


def _keys_named_in(text: str) -> set[str]:
    found = re.findall(r"\bTOUCHLINE_([A-Z]+)__([A-Z_]+)", text)
    return {f"{table}.{key}".lower() for table, key in found}


def _all_keys() -> set[str]:
    return {f"{table}.{key}" for table, keys in Config().model_dump().items() for key in keys}


def test_every_key_named_by_image_and_gpu_file_exists() -> None:
    named = _keys_named_in(DOCKERFILE) | _keys_named_in(GPU)

    assert named
    assert named <= _all_keys()


def test_torch_of_the_image_is_the_pinned_one() -> None:
    pins = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)

    assert re.findall(r"^ARG TORCH=(.+)$", DOCKERFILE, re.MULTILINE) == pins


def test_the_server_gets_longer_to_stop_than_to_drain() -> None:
    service = COMPOSE.partition("\n  replay:\n")[2].partition("\n  actor:\n")[0]
    drain_s = tomllib.loads((ROOT / "cfg/demo.toml").read_text("utf-8"))["server"].get("drain_timeout_s", Config().server.drain_timeout_s)

    (grace_s,) = re.findall(r"stop_grace_period: (\d+)s", service)

    assert int(grace_s) > drain_s


def test_compose_keeps_the_episodes_on_the_servers_volume() -> None:
    service = COMPOSE.partition("\n  replay:\n")[2].partition("\n  actor:\n")[0]

    # With `-` instead of `:-`, since set but empty has to turn it off.
    (data_dir,) = re.findall(r"- TOUCHLINE_STORAGE__DATA_DIR=\$\{TOUCHLINE_STORAGE__DATA_DIR-(.+)\}", service)
    (volume, mount) = re.findall(r"- ([a-z-]+):(/data)\b", service)[0]

    assert Path(data_dir).parent == Path(mount)
    assert f"\n  {volume}:\n" in COMPOSE[COMPOSE.index("\nvolumes:\n") :]
    assert Config.model_validate({"storage": {"data_dir": ""}}).storage.data_dir == Config().storage.data_dir == ""


def test_health_check_waits_for_a_large_store_to_be_read() -> None:
    (start_s,) = re.findall(r"HEALTHCHECK .*--start-period=(\d+)s", DOCKERFILE)

    # Seconds a GiB, rounded up from docs/guarantees.md, for a store of 128 GiB.
    assert int(start_s) >= 4 * 128
    assert "start_period" not in COMPOSE + GPU


def test_every_file_that_is_copied_exists() -> None:
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in lines for source in line.split()]

    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("image", ["client", "learner"])
def test_images_with_the_touchline_command_have_what_it_requires(image: str) -> None:
    (places,) = re.findall(rf"requirements.py (.+) > /requirements/{image}.txt", DOCKERFILE)
    extras = tomllib.loads((ROOT / "client/pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    command = [sys.executable, "docker/requirements.py", *shlex.split(places)]

    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    assert extras["cli"]
    assert set(extras["cli"]) <= set(printed)


def test_health_check_waits_for_the_container_check_and_names_a_module_that_runs() -> None:
    timeout_s, command = re.findall(r"HEALTHCHECK .*--timeout=(\d+)s .*CMD (\[.+\])", DOCKERFILE)[0]

    assert int(timeout_s) > CONTAINER_TIMEOUT_S
    assert json.loads(command) == ["python", "-m", "touchline_server.service.healthcheck"]


@pytest.mark.parametrize(
    ("places", "required", "left_out"),
    [
        (["protos", "client"], {"numpy", "grpcio", "protobuf"}, {"torch", "tensordict", "typer"}),
        (["protos", "client[cli]"], {"numpy", "grpcio", "protobuf", "typer", "rich"}, {"torch", "tensordict"}),
        (["protos", "client[torch]"], {"numpy", "grpcio", "protobuf", "torch", "tensordict"}, {"torchrl"}),
        (["protos", "server"], {"torch", "torchrl", "grpcio-health-checking", "typer"}, set()),
    ],
)
def test_requirements_of_an_image_are_those_of_its_distributions(places: list[str], required: set[str], left_out: set[str]) -> None:
    command = [sys.executable, "docker/requirements.py", *places]

    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in printed.splitlines()}
    assert required <= names
    assert names & (left_out | {"touchline", "touchline-protos", "touchline-server"}) == set()
