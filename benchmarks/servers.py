"""Touchline's server as a user runs it: ``touchline-server serve``, as a module, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from benchmarks.protocol import REPOSITORY, WorkerError, child_environment, wait_readable
from benchmarks.workloads import Workload


class ServerProcess:
    """A server for one workload. A context manager that ends it.

    Args:
        workload: the workload that it stores.
        tuned: whether it runs with :data:`~benchmarks.protocol.MALLOC_TUNING`.
        device: ``storage.device``.
        data_dir: ``storage.data_dir``; empty for none.
        durability: ``storage.durability``.
        keys: other keys of the configuration, by the names of their environment variables.
        start_s: longest time that it may take to start.

    Raises:
        WorkerError: it did not start.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        tuned: bool = True,
        device: str = "cpu",
        data_dir: str = "",
        durability: str = "batch",
        keys: Mapping[str, str] = MappingProxyType({}),
        start_s: float = 120.0,
    ) -> None:
        environment = child_environment(tuned=tuned) | {
            "TOUCHLINE_CONFIG__BUFFER_SIZE": str(workload.rows),
            "TOUCHLINE_CONFIG__BATCH_SIZE": str(workload.batch_size),
            "TOUCHLINE_CONFIG__HORIZON": str(workload.horizon),
            "TOUCHLINE_CONFIG__MIN_HISTORY": "1",
            "TOUCHLINE_STORAGE__DEVICE": device,
            "TOUCHLINE_STORAGE__DATA_DIR": data_dir,
            "TOUCHLINE_STORAGE__DURABILITY": durability,
            "TOUCHLINE_SAMPLING__LAW": workload.law,
            "TOUCHLINE_SAMPLING__SEED": "1",
            **keys,
        }
        command = [sys.executable, "-m", "touchline_server", "serve", "--port", "0", "--log-level", "error"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment, text=True)
        assert self._process.stdout is not None
        if not wait_readable(self._process.stdout, start_s):
            self._process.kill()
        for line in self._process.stdout:
            if line.startswith("listening on "):
                self.address = line.split()[-1]
                # The page's address is on the next line if there is a page for sure.
                self.page_url = next(self._process.stdout).split()[-1] if keys.get("TOUCHLINE_HTTP__ENABLED") == "on" else ""
                return
        raise WorkerError(f"touchline-server ended with status {self._process.wait()}")

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """Drains the server and waits for its end."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
