"""Two bodies on a CUDA device in which a stream's batches come in turn, at the same addresses for as long as the stream lives.

A graph that was recorded with a batch reads fixed addresses, and so does code that was compiled with ``mode="reduce-overhead"``. A body is
written while the learner has the batch in the other one; three rules keep a batch whole:

1. Writes to bodies are queued only within the learner's :meth:`CudaSource.take`, which means that it is done with the batch before.
2. What writes a body waits, on the device, for the work that the learner's current stream had been given by then.
3. A body that was written stays until its batch was handed out.
"""

from __future__ import annotations

import threading
from typing import Any

from touchline._learner.torch_batch import map_batch
from touchline.errors import TouchlineError
from touchline_protos import Batch

BODIES = 2
"""Number of bodies."""

_Layout = list[tuple[Any, tuple[int, ...], tuple[int, ...], int]]
"""Dtype, shape, strides and first element of each tensor of a batch, in the order of :func:`map_batch`."""


class FixedBodies:
    """The bodies of one stream. They are made for its first batch. For the thread that takes, unless stated otherwise."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        """Memory of each body, [n] uint8."""
        self._layout: _Layout = []
        self._tensors: list[list[Any]] = []
        """The tensors in each body: the same objects each time, since marks of the learner's compiler are attributes of them."""
        self._written: set[int] = set()
        """Bodies whose batches were not handed out yet."""
        self._last = BODIES - 1
        """Body of the batch that was handed out last."""
        self._thread = 0
        """Learner's thread."""

    def begin_take(self) -> None:
        """Makes the calling thread the learner's, which is done with the batch before."""
        self._thread = threading.get_ident()

    def fits(self, batch: Batch, block: Any) -> bool:
        """Returns whether batches like this one, of tensors that lie in a block of memory, can be written straight into the bodies.

        Without bodies yet, makes them so that it fits. From any thread.
        """
        layout = _layout_of(batch, block)
        if not self.blocks:
            self._layout = layout
            self.blocks = [block.new_empty(block.numel()) for _ in range(BODIES)]
            self._tensors = [_views(block, layout) for block in self.blocks]
        return layout == self._layout and block.numel() <= self.blocks[0].numel()

    def claim(self) -> int | None:
        """Returns the number of a body to write the next batch into, after the work that the current stream has been given.

        None if there is none, or if the calling thread is not the learner's: only the learner's stream says when a body may be written.
        From any thread.
        """
        if threading.get_ident() != self._thread:
            return None
        free = [index for index in _in_turn(self._last) if index not in self._written]
        if not free:
            return None
        self._written.add(free[0])
        return free[0]

    def release(self, *indices: int) -> None:
        """Releases claimed bodies, whose batches are handed out now, or never; without numbers, all of them. From any thread."""
        self._written.difference_update(indices or range(BODIES))

    def place(self, batch: Batch, block: Any, stream: Any) -> Batch:
        """Returns the batch in one of the bodies: as it is if it was written there, otherwise after a copy.

        Args:
            batch: batch of tensors on the device.
            block: memory that they lie in, if there are no bodies yet.
            stream: the learner's current stream, which makes the copy.

        Raises:
            TouchlineError: its tensors differ from those of the first batch.
        """
        if not self.blocks:
            self.fits(batch, block)
        index = next((index for index in range(BODIES) if _is_in(self.blocks[index], batch.episode_id)), None)
        if index is None:
            index = next(index for index in _in_turn(self._last) if index not in self._written)
            self._copy(batch, self._tensors[index])
            # It may have been allocated on another stream; see sync_to_current_stream.
            self.blocks[index].record_stream(stream)
        self._last = index
        tensors = iter(self._tensors[index])
        return map_batch(batch, lambda _: next(tensors))

    def _copy(self, batch: Batch, targets: list[Any]) -> None:
        import torch

        sources: list[Any] = []
        map_batch(batch, sources.append)
        expected = [(dtype, shape) for dtype, shape, *_ in self._layout]
        found = [(source.dtype, tuple(source.shape)) for source in sources]
        if found != expected:
            before, now = _text(expected, found), _text(found, expected)
            raise TouchlineError(f"reuse: the server's batches have changed from {before} to {now}: open another stream")
        torch._foreach_copy_(targets, sources)


def _in_turn(last: int) -> list[int]:
    """Returns the numbers of the bodies, that of the batch handed out last at the end."""
    return [(last + 1 + step) % BODIES for step in range(BODIES)]


def _layout_of(batch: Batch, block: Any) -> _Layout:
    tensors: list[Any] = []
    map_batch(batch, tensors.append)
    begin = block.data_ptr()
    # An empty tensor has no address.
    return [
        (tensor.dtype, tuple(tensor.shape), tensor.stride(), (tensor.data_ptr() - begin) // tensor.element_size() if tensor.numel() else 0)
        for tensor in tensors
    ]


def _views(block: Any, layout: _Layout) -> list[Any]:
    import torch

    return [torch.as_strided(block.view(dtype), shape, strides, at) for dtype, shape, strides, at in layout]


def _is_in(block: Any, tensor: Any) -> bool:
    return bool(0 <= tensor.data_ptr() - block.data_ptr() < block.numel())


def _text(tensors: list[Any], others: list[Any]) -> str:
    """Returns the tensors that are not among the others, in words."""
    different = [f"{dtype} {list(shape)}" for dtype, shape in tensors if (dtype, shape) not in others]
    return ", ".join(different) or f"{len(tensors)} tensors"
