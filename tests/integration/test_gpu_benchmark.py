"""``make bench-gpu``: complete without a device, and robust: no failing subject takes others with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.device_tests import files_with_device_tests, summarize
from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.report import BARS, GPU_FILE, GPU_REPORT, write_gpu_report
from benchmarks.gpu.session import TESTS_SHARE
from benchmarks.gpu.suite import SECTIONS
from benchmarks.processes import ProcessGroup
from benchmarks.protocol import REPOSITORY

WORKER = """
import os, threading
from benchmarks.protocol import serve
slices = dict.fromkeys(("steady", "breaks", "wrong", "ends", "hangs"), 0)

def make(name):
    if name == "impossible":
        raise ValueError("no such subject")
    return {"made": name} if name == "steady" else None

def run(name, seconds):
    slices[name] += 1
    if slices[name] == 3:
        if name == "breaks":
            raise RuntimeError("out of memory")
        if name == "wrong":
            raise RuntimeError("WrongDataError: reward differs")
        if name == "ends":
            os._exit(9)
        if name == "hangs":
            threading.Event().wait()
    return {"batches_per_s": 100.0}

serve({"make": make, "run": run})
"""


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroup]:
    (tmp_path / "scripted_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ProcessGroup() as group:
        yield group


def measure(processes: ProcessGroup, names: list[str], *, rounds: int = 5, deadline_s: float = 60.0) -> Measurement:
    """Measures subjects of one scripted process and a steady one of another."""
    measurement = Measurement("S", rounds, time.monotonic() + deadline_s, processes)
    workers = [processes.worker("scripted_worker") for _ in range(2)]

    def make(worker: Any, name: str) -> None:
        if measurement.make([name], worker, "make", name=name):
            measurement.add(name, worker, 0.0)

    measurement.prepare([lambda: make(workers[0], "steady"), lambda: [make(workers[1], name) for name in names]])  # type: ignore[arg-type, list-item]
    measurement.run(seed=1, advance=lambda text: None)
    return measurement


def test_measurement_subject_that_cannot_be_made_is_left_out_with_its_reason(processes: ProcessGroup) -> None:
    found = measure(processes, ["impossible"]).found()

    assert found["rounds"] == 5 and list(found["slices"]) == ["steady"]
    assert list(found["failures"]) == ["impossible"] and "no such subject" in found["failures"]["impossible"]
    assert found["facts"] == {"steady": {"made": "steady"}}


@pytest.mark.parametrize(("name", "reason"), [("breaks", "out of memory"), ("ends", "ended with status 9")])
def test_measurement_subject_that_fails_keeps_its_rounds_and_ends_no_other(processes: ProcessGroup, name: str, reason: str) -> None:
    found = measure(processes, [name]).found()

    assert {subject: len(slices) for subject, slices in found["slices"].items()} == {"steady": 5, name: 2}
    assert reason in found["failures"][name]


def test_measurement_wrong_data_voids_all_that_the_subject_measured(processes: ProcessGroup) -> None:
    found = measure(processes, ["wrong"]).found()

    assert list(found["slices"]) == ["steady"] and "WrongDataError" in found["failures"]["wrong"]


def test_measurement_process_that_hangs_is_killed(processes: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.measurement.ANSWER_S", 0.5)

    found = measure(processes, ["hangs"]).found()

    assert {subject: len(slices) for subject, slices in found["slices"].items()} == {"steady": 5, "hangs": 2}
    assert "was killed" in found["failures"]["hangs"]


def test_measurement_past_its_deadline_begins_no_round(processes: ProcessGroup) -> None:
    found = measure(processes, [], deadline_s=-1.0).found()

    assert found["rounds"] == 0 and found["slices"] == {}


def test_shares_of_tests_and_sections_are_the_whole_time() -> None:
    assert TESTS_SHARE + sum(section.share for section in SECTIONS.values()) == pytest.approx(1.0)


# Tests that need a device.


def test_device_test_files_are_those_with_marked_tests() -> None:
    files = files_with_device_tests()

    assert "tests/gpu/test_cuda_store.py" in files
    assert "tests/unit/test_benchmarks.py" not in files


def test_summarize_counts_outcomes_and_names_failures() -> None:
    text = (
        "tests/gpu/test_a.py::test_one[ring-1] PASSED   [ 33%]\n"
        "tests/gpu/test_a.py::test_two FAILED           [ 66%]\n"
        "tests/gpu/test_b.py::test_three SKIPPED (needs) [100%]\n"
        "FAILED tests/gpu/test_a.py::test_two - AssertionError\n"
    )

    assert summarize(text) == {"outcomes": {"passed": 1, "failed": 1, "skipped": 1}, "failed": ["tests/gpu/test_a.py::test_two"]}


# The report.


def test_report_of_the_docs_is_what_their_results_give(tmp_path: Path) -> None:
    docs = REPOSITORY / "docs" / "benchmarks"
    shutil.copy(docs / GPU_FILE, tmp_path)

    assert write_gpu_report(tmp_path).read_text() == (docs / GPU_REPORT).read_text()


def test_report_without_any_slice_says_what_failed_and_what_fills_the_rows(tmp_path: Path) -> None:
    section = {"rounds": 0, "slices": {}, "failures": {"device cuda": "Traceback\nRuntimeError: no card"}, "facts": {}}
    results = {"machine": {"commit": "abc"}, "settings": "", "sections": {"W1": section}, "failures": {"W2": "OSError: no memory"}}
    (tmp_path / GPU_FILE).write_text(json.dumps(results))

    text = write_gpu_report(tmp_path).read_text()

    assert text.count("not measured |") == len(BARS) and "`make bench-gpu`" in text
    assert "- **W1: device cuda**: RuntimeError: no card" in text and "- **W2**: OSError: no memory" in text


def test_dry_run_runs_every_subject_and_writes_results_and_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--dry-run", "--only", "W1,updates", "--output", str(tmp_path)]

    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / GPU_FILE).read_text())
    assert not results["failures"] and not any(section["failures"] for section in results["sections"].values())
    report = (tmp_path / GPU_REPORT).read_text()
    for bar in BARS:
        if bar.section != "W2":  # the same code as W1, with bodies that take a CPU longer
            assert {bar.over, bar.under} <= set(results["sections"][bar.section]["slices"]), bar.text
            assert f"| {bar.text} |" in report
    assert report.count("not measured |") == sum(bar.section == "W2" for bar in BARS)
