"""The soak itself, for a few seconds: the load runs, the table and the picture exist, the exit status reports the finding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.fault_tally import long

ROOT = Path(__file__).parents[2]


@long
@pytest.mark.parametrize(("bound", "status"), [("500", 0), ("-500", 1)])
def test_soak_prints_its_table_and_tells_growth_by_its_exit_status(bound: str, status: int, tmp_path: Path) -> None:
    picture = tmp_path / "soak.png"
    arguments = ["--minutes", "0.3", "--every-s", "5", "--growth-mib", bound, "--out", str(picture)]

    ended = subprocess.run([sys.executable, "-m", "benchmarks.soak", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    header, *lines, verdict = ended.stdout.splitlines()
    assert ended.returncode == status, ended.stderr
    assert header.count("p99 ms") == 3 and len(lines) >= 2
    assert all(len(line.split("|")) == 6 for line in lines)
    assert verdict.startswith("memory grew by ") and ("MORE THAN" in verdict) == (status == 1)
    assert picture.stat().st_size > 1000
