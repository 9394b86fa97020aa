"""Raw clients in a process of their own, whose end closes their sockets. In a test's process, gRPC closes a channel's connection only when
the last object of its calls is collected, so whether a server still holds the connection would depend on everything that the process does.

    python -m support.leaving_clients come_and_go ADDRESS COUNT
    python -m support.leaving_clients hold ADDRESS IDLE ACTIVE
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import grpc

from support.service_calls import CHANNEL_OPTIONS, DEADLINE_S, SERVICE, Caller
from support.tcp_proxy import TcpProxy
from touchline_protos.codec import BatchDecoder
from touchline_protos.v1 import replay_pb2 as pb

ROUNDS = 5
"""Times that each active stream asks for batches."""


def come_and_go(address: str, count: int) -> None:
    """Runs clients in a process until they have connected ``count`` times and left, in five ways, and the process has ended."""
    command = [sys.executable, "-m", "support.leaving_clients", "come_and_go", address, str(count)]
    subprocess.run(command, cwd=Path(__file__).parents[1], timeout=DEADLINE_S + count, check=True)


@contextmanager
def held(address: str, *, idle: int, active: int) -> Iterator[Iterator[str]]:
    """A process that holds streams, each on a connection of its own; killed at the end.

    Yields:
        What it has done: ``read 0`` to ``read 4`` after each round of the active streams, ``all read`` once each idle stream has read a
        batch, too, and ``half closed`` once every second stream has ended with OK. It goes on only when it is asked for the next.
    """
    command = [sys.executable, "-m", "support.leaving_clients", "hold", address, str(idle), str(active)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None and process.stdout is not None

    def done(lines: IO[str], go_on: IO[str]) -> Iterator[str]:
        for line in lines:
            yield line.strip()
            go_on.write("\n")

    try:
        yield done(process.stdout, process.stdin)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def polite(address: str) -> None:
    with Caller(address) as caller:
        stream = caller.stream().open(credits=1)
        stream.close()
        assert len(stream.rest()) == 1


def abrupt(address: str) -> None:
    """Disconnects with unused credits and batches in flight."""
    with Caller(address) as caller:
        caller.stream().open(credits=20, max_batches_per_frame=1).read(1)


def idle(address: str) -> None:
    """Opens a stream, grants no credits and disconnects."""
    with Caller(address) as caller:
        caller.stream().open(credits=0)
        caller.counts()


def reset(address: str) -> None:
    """Is cut off in the middle of a batch."""
    with TcpProxy(address) as proxy, Caller(proxy.address) as caller:
        caller.stream().open(credits=20, max_batches_per_frame=1).read(1)
        proxy.cut()


def wordless(address: str) -> None:
    """Connects and disconnects after half of HTTP/2's greeting."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"PRI * HTTP/2")


LEAVERS: list[Callable[[str], None]] = [polite, abrupt, idle, reset, wordless]


class AsyncLearner:
    """A client with a channel of its own and an open sampling stream; hundreds of them run in one thread."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._call = self._channel.stream_stream(SERVICE + "SampleStream")()
        self._decoder = BatchDecoder()

    async def open(self, credits: int) -> None:
        await self._call.write(pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=credits)).SerializeToString())

    async def grant(self, batches: int) -> None:
        await self._call.write(pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=batches)).SerializeToString())

    async def read(self, batches: int) -> None:
        while batches > 0:
            batches -= len(self._decoder.feed(await self._call.read()))
        assert batches == 0

    async def close(self) -> None:
        """Half-closes and waits for the server's OK."""
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF
        assert await self._call.code() == grpc.StatusCode.OK


def done(what: str) -> None:
    """Prints what has been done and waits for permission to go on; ends the process if the test is gone."""
    print(what, flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


async def hold(address: str, idle_count: int, active_count: int) -> None:
    """See :func:`held`."""
    learners = [AsyncLearner(address) for _ in range(idle_count + active_count)]
    idle, active = learners[:idle_count], learners[idle_count:]
    await asyncio.gather(*(learner.open(0) for learner in learners))
    for number in range(ROUNDS):
        await asyncio.gather(*(learner.grant(2) for learner in active))
        await asyncio.gather(*(learner.read(2) for learner in active))
        done(f"read {number}")
    # Each idle stream still works: it gets the batches that it asks for.
    await asyncio.gather(*(learner.grant(1) for learner in idle))
    await asyncio.gather(*(learner.read(1) for learner in idle))
    done("all read")
    await asyncio.gather(*(learner.close() for learner in learners[::2]))
    done("half closed")


if __name__ == "__main__":
    what, address, *counts = sys.argv[1:]
    if what == "hold":
        asyncio.run(hold(address, *map(int, counts)))
    else:
        for number in range(int(counts[0])):
            LEAVERS[number % len(LEAVERS)](address)
