"""Loading TD-MPC2's ``.pt`` files, as torch and TensorDict write them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensordict.tensordict
import torch
from tensordict import TensorDict

from support.dataset_cases import assert_same, serve, stored
from support.serving import ServerThread
from touchline import ReplayClient, datasets
from touchline.datasets import DatasetError
from touchline_protos.types.dtypes import BFLOAT16


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


def _multitask(episodes: int, rows: int, seed: int = 0) -> TensorDict:
    """Returns the content of a file like those of TD-MPC2's multi-task data sets."""
    generator = torch.Generator().manual_seed(seed)
    td = TensorDict(
        {
            "obs": torch.randn(episodes, rows, 5, generator=generator),
            "action": torch.randn(episodes, rows, 2, generator=generator),
            "reward": torch.randn(episodes, rows, generator=generator),
            "task": torch.arange(episodes).unsqueeze(1).expand(episodes, rows),
        },
        [episodes, rows],
    )
    td["action"][:, 0] = float("nan")
    td["reward"][:, 0] = float("nan")
    return td


def _episodes_of(td: TensorDict) -> list[dict[str, np.ndarray]]:
    return [{name: td[name][row].numpy() for name in td.keys()} for row in range(len(td))]  # noqa: SIM118


def test_pt_file_of_tdmpc2_is_stored_bit_for_bit(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    td = _multitask(6, 11)
    torch.save(td, tmp_path / "chunk_0.pt")

    report = datasets.load(client, str(tmp_path / "chunk_0.pt"))

    assert (report.read, report.stored, report.duplicates, report.refused, report.steps) == (6, 6, 0, 0, 66)
    assert_same(stored(server), _episodes_of(td))


def test_pt_file_with_terminated_and_nested_obs_is_stored_under_our_names(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    td = _multitask(3, 4)
    td["obs"] = TensorDict({"rgb": torch.randint(0, 255, (3, 4, 2, 2), dtype=torch.uint8), "z": torch.ones(3, 4, 2).bfloat16()}, [3, 4])
    td["terminated"] = torch.zeros(3, 4)
    torch.save(td, tmp_path / "chunk.pt")

    datasets.load(client, str(tmp_path / "chunk.pt"))

    found = stored(server)
    assert set(found[0]) == {"obs.rgb", "obs.z", "action", "reward", "task", "done"}
    assert found[0]["obs.z"].dtype == BFLOAT16
    assert [np.array_equal(episode["obs.rgb"], td["obs", "rgb"][row]) for row, episode in enumerate(found)] == [True] * 3


def test_folder_of_chunks_is_one_source_in_the_order_of_names(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    chunks = [_multitask(2, 3, seed) for seed in range(3)]
    for number, chunk in enumerate(chunks):
        torch.save(chunk, tmp_path / f"chunk_{number}.pt")

    report = datasets.load(client, str(tmp_path), first=1, limit=4)

    assert report.stored == 4
    assert_same(stored(server), [episode for chunk in chunks for episode in _episodes_of(chunk)][1:5])


def test_dict_of_tensors_in_the_layout_of_before_zip_files_is_read(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    td = _multitask(2, 3)
    torch.save(dict(td.items()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    datasets.load(client, str(tmp_path / "old.pt"))

    assert_same(stored(server), _episodes_of(td))


def test_file_of_an_early_tensordict_is_read_without_trust(
    server: ServerThread, client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In older versions the class was in another module, and was pickled like any object: class and attributes."""
    td = _multitask(2, 3)
    early = type("TensorDict", (), {"__module__": "tensordict.tensordict"})
    saved = early()
    saved.__dict__.update(_tensordict=dict(td.items()), _batch_size=torch.Size([2, 3]), _device=None, _is_shared=False, _is_memmap=False)
    with monkeypatch.context() as patch:
        patch.setattr(tensordict.tensordict, "TensorDict", early, raising=False)
        torch.save(saved, tmp_path / "early.pt")

    datasets.load(client, str(tmp_path / "early.pt"))

    assert_same(stored(server), _episodes_of(td))


def test_pt_file_is_read_without_tensordict(tmp_path: Path) -> None:
    """tensordict takes as long to import as torch itself."""
    torch.save(_multitask(2, 3), tmp_path / "chunk.pt")
    code = "import sys; sys.modules['tensordict'] = None; from touchline import datasets; print(datasets.inspect(sys.argv[1])[0].stored)"

    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "chunk.pt")], capture_output=True, text=True, check=False)

    assert found.stdout == "2\n", found.stderr


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _run, (self.marker,)


def _run(marker: str) -> dict[str, torch.Tensor]:
    Path(marker).touch()
    return dict(_multitask(2, 3).items())


def test_pt_file_with_code_in_it_needs_trust(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    torch.save(Payload(str(tmp_path / "ran")), tmp_path / "code.pt")

    with pytest.raises(DatasetError, match=r"it holds .*_run, expected a TensorDict.*--trust-pickle"):
        datasets.load(client, str(tmp_path / "code.pt"))
    ran = (tmp_path / "ran").exists()
    report = datasets.load(client, str(tmp_path / "code.pt"), trust_pickle=True)

    assert not ran
    assert report.stored == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"obs": torch.zeros(2, 3), "reward": torch.zeros(3, 3)}, r"reward: shape \(3, 3\), expected \(2, 3\) episodes and rows"),
        ({"obs": torch.zeros(2)}, r"obs: shape \(2,\), expected \(episodes, rows"),
        ({"obs": 3}, "obs: int, expected a tensor"),
        ({"done": torch.zeros(2, 3), "terminated": torch.zeros(2, 3)}, "done: present together with terminated"),
        (torch.zeros(3), "Tensor, expected a TensorDict"),
        ({}, "no columns"),
    ],
)
def test_pt_file_of_something_else_says_what_it_is(client: ReplayClient, tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")

    with pytest.raises(DatasetError, match=message):
        datasets.load(client, str(tmp_path / "other.pt"))
