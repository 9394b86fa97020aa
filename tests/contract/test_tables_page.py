"""The code of docs/tables.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.service_calls import make_config
from support.serving import ServerThread
from touchline import ReplayClient

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


def test_code_for_actors_and_learners_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config = make_config(config={"buffer_size": 1_000, "min_history": 1, "horizon": 3}, tables={"demos": {}, "online": {}})

    with ServerThread(config) as server, ReplayClient(server.address) as client:
        names = {"address": server.address}
        exec(compile(code, str(PAGE), "exec"), names)
        counts = {table: client.counts(table=table).episodes_stored for table in ("", "demos", "online")}

    assert counts == {"": 0, "demos": 4, "online": 5}
    assert names["obs"].shape == (4, 8, 4)  # type: ignore[attr-defined]
    assert capsys.readouterr().out.strip() == code.rpartition("print(error)  # ")[2].strip()
