"""The order of writes to a device's columns and gathers from them, without the host waiting for either.

Work on a device is queued on streams, each of which does its work in order; an event marks a point in a stream, and another stream can be
made to wait for it. Columns are written on a stream of their own:

    gather of rows on any stream  →  event  →  a later write, which may overwrite them
    write                         →  event  →  any later gather, on whichever stream
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Device(Protocol):
    """What the order needs of a device. Streams are hashable."""

    def current_stream(self) -> Any:
        """Returns the calling thread's current stream."""
        ...

    def record(self, stream: Any) -> Any:
        """Returns an event that marks what the stream was given so far."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Makes later work of the stream wait for the event, on the device."""
        ...

    def is_done(self, event: Any) -> bool:
        """Returns whether the event was reached."""
        ...

    def synchronize(self, event: Any | None = None) -> None:
        """Makes the host wait for the event, or for all work of the device."""
        ...


class DeviceOrder:
    """Orders the writes to some columns, by one thread at a time, with gathers by any.

    Args:
        device: the device.
        stream: the stream on which the columns are written.
    """

    def __init__(self, device: Device, stream: Any) -> None:
        self._device = device
        self._stream = stream
        self._lock = threading.Lock()
        self._reads: dict[Any, Any] = {}
        """An event behind the last gather of each stream that gathered since the last write began."""
        self._foreign = False
        self._written: Any = None
        """The event behind the last write; None once it was seen to be done."""

    def note_reads(self) -> None:
        """Makes the next write follow what the current stream was given so far."""
        stream = self._device.current_stream()
        with self._lock:
            # With the lock held, or another thread's later event on the same stream could be replaced by this one.
            self._reads[stream] = self._device.record(stream)

    def note_foreign_reads(self) -> None:
        """Makes the next write follow all work that the device is given before it."""
        self._foreign = True

    def follow_writes(self) -> None:
        """Makes later work of the current stream follow the writes so far."""
        event = self._unfinished()
        if event is not None:
            self._device.wait(self._device.current_stream(), event)

    def wait_written(self) -> None:
        """Makes the host wait for the writes so far."""
        event = self._unfinished()
        if event is not None:
            self._device.synchronize(event)

    @contextmanager
    def writing(self, *, with_current: bool = False) -> Iterator[None]:
        """Makes what the block queues on the stream of the writes follow the noted gathers, and later gathers follow that.

        Args:
            with_current: whether the writes read memory of the current stream: they follow its work so far, and its later work follows
                them.
        """
        with self._lock:
            reads, self._reads = self._reads, {}
            foreign, self._foreign = self._foreign, False
        if foreign:
            self._device.synchronize()
        elif with_current:
            reads[None] = self._device.record(self._device.current_stream())
        for event in reads.values():
            self._device.wait(self._stream, event)
        try:
            yield
        finally:
            # Also after an error: what was queued until then is still to be done.
            event = self._device.record(self._stream)
            with self._lock:
                self._written = event
            if with_current:
                self._device.wait(self._device.current_stream(), event)

    def _unfinished(self) -> Any:
        """Returns the event behind the last write; None if it was reached."""
        with self._lock:
            if self._written is not None and self._device.is_done(self._written):
                self._written = None
            return self._written
