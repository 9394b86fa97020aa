"""The process of a Reverb server."""

from __future__ import annotations

from typing import Any

import portpicker  # type: ignore[import-untyped]
import reverb  # type: ignore[import-not-found]

from benchmarks.peers.reverb_tables import item_signature
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS


class Server:
    """One Reverb server."""

    def __init__(self) -> None:
        self._server: reverb.Server | None = None

    def start(self, *, workload: str, tables: dict[str, dict[str, Any]]) -> str:
        """Serves tables, each with ``max_size`` items and ``packed`` columns or not; returns the address."""
        made = [
            reverb.Table(
                name,
                sampler=reverb.selectors.Uniform(),
                remover=reverb.selectors.Fifo(),
                max_size=table["max_size"],
                rate_limiter=reverb.rate_limiters.MinSize(1),
                signature=item_signature(WORKLOADS[workload], packed=table["packed"]),
            )
            for name, table in tables.items()
        ]
        self._server = reverb.Server(made, port=portpicker.pick_unused_port())
        return f"127.0.0.1:{self._server.port}"

    def sizes(self) -> dict[str, int]:
        """Returns how many items each table holds."""
        assert self._server is not None
        info = reverb.Client(f"127.0.0.1:{self._server.port}").server_info()
        return {name: table.current_size for name, table in info.items()}


if __name__ == "__main__":
    server = Server()
    serve({"start": server.start, "sizes": server.sizes})
