"""A batch behaves like the tuple that it unpacks into, on every path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from support.serving import ServerThread
from touchline import Batch, ReplayClient
from touchline_server import Config, ReplayBuffer

PATHS = ["in process", "unary", "stream", "ring", "device"]

SHARED = {"device": "cpu", "share_columns": "on"}


def draw(path: str, buffer: ReplayBuffer, client: ReplayClient) -> Batch:
    if path == "in process":
        return buffer.sample()
    if path == "unary":
        return client.sample()
    with client.batches(transport=path) as batches:
        return next(batches)


@pytest.fixture(params=[False, True], ids=["without task", "with task"])
def filled(request: pytest.FixtureRequest) -> Iterator[tuple[ReplayBuffer, ReplayClient]]:
    buffer = ReplayBuffer(
        Config(config={"buffer_size": 100, "batch_size": 4, "horizon": 2, "min_history": 0}, server={"port": 0}, storage=SHARED)
    )
    columns = {"obs": np.zeros((5, 2), np.float32), "action": np.full((5, 1), np.nan), "reward": np.zeros(5, np.float32)}
    columns["action"][1:] = 0.5
    buffer.add(columns | ({"task": np.zeros(5, np.int64)} if request.param else {}))
    with ExitStack() as stack:
        server = stack.enter_context(ServerThread(buffer.config, buffer))
        yield buffer, stack.enter_context(ReplayClient(server.address))


USES: dict[str, Callable[[Batch], Any]] = {
    "an index": lambda batch: [batch[0], batch[1], batch[2], batch[3]],
    "an index from the end": lambda batch: [batch[-4], batch[-3], batch[-2], batch[-1]],
    "an index of numpy": lambda batch: [batch[np.int64(number)] for number in range(4)],  # type: ignore[call-overload]
    "a slice": lambda batch: [*batch[:2], *batch[2:]],
    "steps": lambda batch: [*batch[::-1]][::-1],
    "a star": lambda batch: (lambda first, *rest: [first, *rest])(*batch),
    "unpacking": lambda batch: (lambda obs, action, reward, done: [obs, action, reward, done])(*batch),
    "tuple": tuple,
    "reversed": lambda batch: list(reversed(batch))[::-1],  # type: ignore[call-overload]
    "zip": lambda batch: [value for _, value in zip(range(len(batch)), batch, strict=True)],
}


@pytest.mark.parametrize("path", PATHS)
def test_batch_is_used_as_a_tuple_of_four(path: str, filled: tuple[ReplayBuffer, ReplayClient]) -> None:
    batch = draw(path, *filled)
    expected = [batch.obs, batch.action, batch.reward, batch.done]

    assert len(batch) == 4 and bool(batch)
    for name, use in USES.items():
        found = use(batch)
        assert [value is other for value, other in zip(found, expected, strict=True)] == [True] * 4, name
    first, *rest = batch
    assert first is batch.obs and len(rest) == 3
    assert isinstance(batch[1:3], tuple)
    for index in (4, -5):
        with pytest.raises(IndexError):
            batch[index]
    with pytest.raises(TypeError):
        batch["obs"]  # type: ignore[call-overload]
