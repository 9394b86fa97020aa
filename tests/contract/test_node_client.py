"""A client in another language that has only the .proto: what it adds is stored bit for bit, and it samples the stored values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import flatten, make_config, make_episode
from support.store_cases import read_episode
from touchline_protos import Batch
from touchline_server.service.app import ServerThread

HERE = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"
NO_REGISTRY = re.compile(r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENETUNREACH|ERR_SOCKET_TIMEOUT|E40[134]|E5\d\d|ENOTCACHED")
TIMEOUT_S = 300
SEED = 5

DTYPES = {"DTYPE_FLOAT32": np.float32, "DTYPE_FLOAT64": np.float64, "DTYPE_INT64": np.int64}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's program, with its packages installed next to it."""
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        pytest.skip("node and npm are not both installed")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline", "--ignore-scripts"]
    try:
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install took more than {TIMEOUT_S} s: no registry answers")
    if installed.returncode and NO_REGISTRY.search(installed.stderr):
        pytest.skip(f"npm install found no registry: {installed.stderr.strip().splitlines()[0]}")
    assert installed.returncode == 0, installed.stderr
    return folder / "client.mjs"


def assert_same(found: dict[str, Any], expected: Batch) -> None:
    """Asserts that a batch has the values that the client printed; JSON numbers hold float32, float64 and small integers exactly."""
    arrays = {
        name: np.array(tensor["values"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for part in ("columns", "provenance")
        for name, tensor in found[part].items()
    }
    wanted = flatten(expected)
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert arrays[name].dtype == array.dtype, name
        assert np.array_equal(arrays[name], array), name


def test_node_client_adds_asks_and_samples(client: Path) -> None:
    episode = make_episode(30)
    for name in ("action", "reward"):
        episode.columns[name][0] = 0  # JSON has no NaN
    rows = json.dumps({name: column.tolist() for name, column in episode.columns.items()})

    with ServerThread(make_config()) as server:
        result = subprocess.run(
            ["node", str(client), server.address, str(PROTOS), rows, str(SEED)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)

        stored = read_episode(server.buffer.store, server.buffer.store.entries()[0])
        assert stored.keys() == episode.columns.keys()
        for name, column in episode.columns.items():
            assert stored[name].tobytes() == column.tobytes(), name
        assert (answers["added"]["episode_id"], answers["added"]["duplicate"]) == ("0", False)
        assert (answers["again"]["episode_id"], answers["again"]["duplicate"]) == ("0", True)
        assert (answers["refused"]["code"], answers["refused"]["reason"]) == (3, ["invalid-episode"])
        assert answers["refused"]["details"].startswith("obs: missing, expected float32 (4,)")
        ready = answers["ready"]
        assert (ready["can_sample"], ready["min_steps_reached"], ready["min_history"]) == (True, True, "100")
        assert (ready["counts"]["steps_stored"], ready["counts"]["episodes_duplicate"]) == ("30", "1")
        expected = server.buffer.sample(batch_size=6, seed=SEED)
        assert_same(answers["batch"], expected)
        assert answers["batch"]["actors"] == {"0": "Pelé"}
        assert len(answers["streamed"]) == 2
        assert_same(answers["streamed"][0], expected)
        assert [batch["actors"] for batch in answers["streamed"]] == [{"0": "Pelé"}, {}]
        assert server.buffer.counts().episodes_stored == 1
        selection, (read,) = answers["read"]["selection"], answers["read"]["episodes"]
        assert (selection["first_episode_id"], selection["last_episode_id"], selection["episodes"], selection["steps"]) == (
            "0",
            "0",
            "1",
            "30",
        )
        assert (read["id"], read["actor"], read["policy_version"]) == ("0", "Pelé", "12")
        assert read["key"] == {"client_id": "node", "incarnation": "9007199254740993", "sequence": "0"}
        assert list(read["columns"]) == ["obs", "reward"]
        for name, tensor in read["columns"].items():
            assert tensor["shape"] == list(episode.columns[name].shape)
            assert np.array(tensor["values"], np.float32).tobytes() == episode.columns[name].tobytes()
