"""Plays torch's part of copies to a CUDA device: its device is host memory, and a copy is made when it is waited for, not before."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import torch


class LateTorch:
    """Torch with a device in host memory: a copy is remembered, and made when an event that was recorded after it is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.queued: list[Any] = []
        self.lock = threading.Lock()
        """Held while copies are made: the learner and the thread that stages may wait for the same one."""
        self.block_type = _block_type(self)
        self.current = SimpleNamespace(wait_event=lambda event: event.synchronize())
        self.cuda = SimpleNamespace(
            Stream=lambda device: "side",
            Event=lambda: Event(self),
            stream=lambda stream: contextlib.nullcontext(),
            device=lambda device: contextlib.nullcontext(),
            current_stream=lambda device: self.current,
            cudart=lambda: SimpleNamespace(
                cudaHostRegister=lambda address, size_bytes, flags: self.log.append("register") or 0,
                cudaHostUnregister=lambda address: self.log.append("unregister"),
            ),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: Any, pin_memory: bool = False, device: Any = None) -> Any:
        return torch.empty(size, dtype=dtype) if pin_memory else torch.empty(size, dtype=dtype).as_subclass(self.block_type)


class Event:
    def __init__(self, owner: LateTorch) -> None:
        self._owner = owner
        self._copies: list[Any] = []

    def record(self, stream: str) -> None:
        assert stream == "side"
        self._copies = list(self._owner.queued)

    def query(self) -> bool:
        return not any(copy in self._owner.queued for copy in self._copies)

    def synchronize(self) -> None:
        with self._owner.lock:
            for copy in self._copies:
                if copy in self._owner.queued:
                    copy.make()
                    self._owner.queued.remove(copy)


class Copy:
    def __init__(self, target: Any, source: Any) -> None:
        self._target, self._source = target, source

    def make(self) -> None:
        self._target.as_subclass(torch.Tensor).copy_(self._source)


def _block_type(owner: LateTorch) -> Any:
    """Returns the class of tensors on the device."""

    class Block(torch.Tensor):  # type: ignore[misc, name-defined]
        def copy_(self, source: Any, non_blocking: bool = False) -> Any:
            assert non_blocking
            owner.queued.append(Copy(self, source))
            return self

        def record_stream(self, stream: Any) -> None:
            assert stream is owner.current
            owner.log.append("record_stream")

    return Block
