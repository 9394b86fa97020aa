"""Health checks of a server whose disk is full or has failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.failing_disk import Fault, failing_disk
from support.store_cases import make_config, plain_columns
from touchline import OverLimitError, ReplayClient, UnavailableError
from touchline_server.service.app import ServerThread
from touchline_server.service.healthcheck import check_at


@pytest.mark.parametrize(
    ("full", "said"),
    [(True, "full"), (False, "disk I/O error")],
    ids=["full disk", "failed fsync"],
)
def test_health_check_of_a_server_that_cannot_store_says_why_while_sampling_goes_on(full: bool, said: str, tmp_path: Path) -> None:
    """Once the disk has space again, health says so without a restart."""
    config = make_config(1000, storage={"data_dir": str(tmp_path), "durability": "sync"}, server={"port": 0})
    with failing_disk() as disk, ServerThread(config) as server, ReplayClient(server.address, timeout_s=1) as client:
        client.add(plain_columns(10))
        assert check_at(server.address) == (True, f"{server.address}: SERVING")

        disk.fail(Fault("write" if full else "sync", "-wal", full=full))
        with pytest.raises((OverLimitError, UnavailableError)):
            client.add(plain_columns(10))
        finding = check_at(server.address)

        assert not finding.serving
        assert finding.text.startswith(f"{server.address}: NOT_SERVING: adding is refused: ")
        assert said in finding.text
        assert np.asarray(client.sample().obs).shape == (4, 8, 2)

        disk.mend()
        if full:
            client.add(plain_columns(10))
        assert check_at(server.address).serving == full
