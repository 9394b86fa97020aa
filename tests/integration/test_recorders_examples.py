"""The short examples of docs/switching.md, as processes of their own and with a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recorder_cases import serve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _run(example: str, *arguments: str, forbidden: str = "") -> list[dict[str, Any]]:
    """Runs an example to its end and returns its lines of JSON; ``forbidden`` is a module that it must do without."""
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(EXAMPLES)!r}); "
    code += f"sys.modules[{forbidden!r}] = None; " if forbidden else ""
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    finished = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def test_numpy_learner_trains_on_what_the_recorder_sent_without_torch() -> None:
    with serve(min_history=500, batch_size=64) as server:
        (totals,) = _run("record_gymnasium.py", "--address", server.address, "--episodes", "5", forbidden="torch")
        assert totals == {"episodes_acknowledged": 5, "steps_acknowledged": 5 * 201}
        assert server.buffer.size == 5 * 201

        reports = _run("train_numpy.py", "--address", server.address, "--updates", "300", forbidden="torch")

    assert [report["update"] for report in reports] == [100, 200, 300]
    assert reports[-1]["loss"] < 0.5 * reports[0]["loss"]
    assert reports[-1]["loss"] < 0.3  # of the variance of the rewards


@pytest.mark.parametrize("place", ["server", "in process"])
def test_trainer_of_tdmpc2s_shape_learns(place: str) -> None:
    with serve(buffer_size=100_000) as server:
        where = ("--in-process",) if place == "in process" else ("--address", server.address)
        reports = _run("train_tdmpc2_style.py", *where, "--episodes", "7")
        stored = server.buffer.num_eps

    assert stored == (0 if place == "in process" else 7)
    assert [report["episodes"] for report in reports] == [3, 4, 5, 6, 7]
    assert reports[-1]["reward_error"] < 0.3 * reports[0]["reward_error"]
