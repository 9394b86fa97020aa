"""A real Prometheus scrapes a server under load: every query of the dashboard returns data, and no alert fires."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.pages import request
from support.prometheus import DEPLOY, ask, dashboard_queries, has_data
from support.service_calls import eventually, make_config
from support.serving import ServerThread
from touchline import EpisodeWriter, InvalidEpisodeError, ReplayClient

PROMETHEUS = shutil.which("prometheus")


class Load:
    """An actor with a spool, a learner by ring, one by messages, and one refused episode, until it is closed."""

    def __init__(self, address: str, spool: Path) -> None:
        self._stopping = threading.Event()
        self._client = ReplayClient(address, client_id="load")
        self._spool = spool
        with pytest.raises(InvalidEpisodeError):
            self._client.add({"obs": np.zeros((5, 3), np.float32), "action": np.zeros((4, 1), np.float32)})
        self._threads = [threading.Thread(target=one) for one in (self._play, lambda: self._learn(True), lambda: self._learn(False))]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _play(self) -> None:
        with EpisodeWriter(self._client, actor="anna", spool_dir=self._spool) as writer:
            while not self._stopping.wait(0.02):
                writer.policy_version += 1
                for _ in range(20):
                    writer.append({"obs": np.zeros(3, np.float32), "action": np.zeros(1, np.float32), "reward": np.float32(1)})
                writer.end_episode()

    def _learn(self, ring: bool) -> None:
        self._client.wait_until_ready(min_steps=20)
        with self._client.batches(batch_size=8, horizon=3, ring=ring) as batches:
            while not self._stopping.wait(0.01):
                next(batches)


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """Runs Prometheus with the project's alert rules on one target; yields its address."""
    assert PROMETHEUS is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for old, new in (
        ("replay:8080", target),
        ("interval: 5s", "interval: 1s"),
        ("interval: 15s", "interval: 1s"),
        ("- alerts.yml", f"- {DEPLOY}/prometheus/alerts.yml"),
    ):
        assert old in config
        config = config.replace(old, new)
    file = folder / "prometheus.yml"
    file.write_text(config)
    command = [PROMETHEUS, f"--config.file={file}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield address
        finally:
            process.terminate()


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed: Debian has it in the package prometheus")
def test_prometheus_scrapes_a_server_and_every_query_of_the_dashboard_has_data(tmp_path: Path) -> None:
    config = make_config(
        http={"port": 0}, storage={"data_dir": str(tmp_path / "data")}, rate={"samples_per_insert": 1000, "tolerance": 1e6}
    )
    with ServerThread(config, http=True) as server:
        load = Load(server.address, tmp_path / "spool")
        try:
            with prometheus(server.http_address, tmp_path) as address:
                eventually(lambda: has_data(address, "up == 1"), "Prometheus has scraped the server", every_s=0.5)
                for query in dashboard_queries(interval="5s"):
                    eventually(lambda query=query: has_data(address, query), f"data for {query}", every_s=0.5)  # type: ignore[misc]
                alerts = ask(address, "alerts")["alerts"]
                assert [one["labels"]["alertname"] for one in alerts if one["state"] == "firing"] == []
                unhealthy = [rule for group in ask(address, "rules")["groups"] for rule in group["rules"] if rule["health"] != "ok"]
                assert unhealthy == []
        finally:
            load.close()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: Debian has it in the package prometheus")
def test_promtool_accepts_the_metrics_of_a_live_server(tmp_path: Path) -> None:
    with ServerThread(make_config(http={"port": 0}), http=True) as server:
        metrics = request(server.http_address, "/metrics")
    assert metrics.status == 200
    result = subprocess.run(["promtool", "check", "metrics"], input=metrics.body, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
