"""Batches that were drawn on a device, against the buffer's own index and columns."""

from __future__ import annotations

import numpy as np
import torch

from support.store_cases import traced
from touchline_server import Batch, ReplayBuffer
from touchline_server.selectors.entries import ACTOR, FIRST_ROW, ID, LENGTH, POLICY_VERSION
from touchline_server.store.pinned_draw import physical_rows

DRAWN_BY_KEY_7 = ([28, 23, 20, 23], [2, 2, 18, 2])
"""Ids and starts of a batch of 4 by the law ``episode``, drawn with the key 7 from the last of 30 episodes of :func:`fill` in 150 rows."""


def fill(buffer: ReplayBuffer, episodes: int, *, begin: int = 0) -> None:
    """Adds traced episodes of 2 to 30 rows."""
    for number in range(begin, begin + episodes):
        buffer.add_episode(traced(number, 2 + number * 7 % 29))


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor's values, bfloat16 by its bits."""
    tensor = tensor.cpu()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def check_drawn(buffer: ReplayBuffer, batch: Batch, horizon: int) -> None:
    """Asserts that a batch holds the rows of stored episodes that its provenance names, by the columns themselves."""
    entries, columns = buffer.store.entries(), buffer.store.columns
    assert columns is not None
    position = np.searchsorted(entries[:, ID], on_host(batch.episode_id))
    drawn, start = entries[position], on_host(batch.start)
    assert (drawn[:, ID] == on_host(batch.episode_id)).all()
    assert (drawn[:, ACTOR] == on_host(batch.actor)).all()
    assert (drawn[:, POLICY_VERSION] == on_host(batch.policy_version)).all()
    last = drawn[:, LENGTH] - 1 - start
    assert (start >= 0).all() and (last >= (horizon if batch.valid is None else 1)).all()
    if batch.valid is not None:
        assert (on_host(batch.valid)[:, :, 0] == (np.arange(1, horizon + 1)[:, None] <= last)).all()
    rows = physical_rows((drawn[:, FIRST_ROW] + start)[None], horizon + 1, columns.capacity, last=last[None])[0]
    for name, found in batch.extra.items():
        assert (on_host(found) == on_host(columns.tensors[name])[rows]).all(), name
    transitions = rows[1:] if buffer.store.incoming else rows[:-1]
    assert (on_host(batch.action) == on_host(columns.tensors["action"])[transitions]).all()
