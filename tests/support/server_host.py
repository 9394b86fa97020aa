"""Runs servers for the tests of another process that has no server installed; a line in is a request, a line out its answer.

{"start": tables of the configuration} is answered with the address of a new server, {"stop": address} ends it. Exits at the end of
its input.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from touchline_server import Config
from touchline_server.service.app import ServerThread


def answer(servers: dict[str, ExitStack], question: dict[str, Any]) -> Any:
    if "stop" in question:
        return servers.pop(question["stop"]).close()
    with ExitStack() as stack:
        address = stack.enter_context(ServerThread(Config(**question["start"]))).address
        servers[address] = stack.pop_all()
    return address


def main() -> None:
    servers: dict[str, ExitStack] = {}
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # printed lines must not look like answers
    for line in sys.stdin:
        try:
            reply = {"value": answer(servers, json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
    for stack in servers.values():
        stack.close()


if __name__ == "__main__":
    main()
