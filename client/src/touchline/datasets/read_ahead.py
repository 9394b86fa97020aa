"""Read items on another thread while earlier ones are being used, up to a limit of bytes ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self  # in the standard library from Python 3.11 on

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _End:
    """Marks the end of the queue."""

    error: BaseException | None
    """What ended the reading; None if the items were exhausted."""


class ReadAhead(Generic[Item]):
    """An iterable whose items are read on a background thread. A context manager, which starts and stops the thread.

    One thread may iterate over it, once.

    Args:
        items: what to read. Only the background thread touches it; an exception from it is raised after the last item before it.
        size_of: a function that returns the size of an item in bytes.
        max_bytes: reading pauses while the items that are not yet taken have this many bytes; they may exceed it by one item.
    """

    def __init__(self, items: Iterable[Item], *, size_of: Callable[[Item], int], max_bytes: int) -> None:
        self._items = items
        self._size_of = size_of
        self._max_bytes = max_bytes
        # Queues and not a condition: Ctrl-C at the wrong moment would leave a condition's lock held by the interrupted thread.
        self._read: SimpleQueue[Item | _End] = SimpleQueue()
        self._taken_bytes: SimpleQueue[int] = SimpleQueue()
        self._closed = False
        # A daemon, so that a second Ctrl-C does not wait for a long read.
        self._thread = threading.Thread(target=self._run, name="touchline-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops the thread after the read in progress, so that the source can be closed."""
        self._closed = True
        self._taken_bytes.put(0)  # wakes the thread if it is paused
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._read.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            self._taken_bytes.put(self._size_of(item))
            yield item

    def _run(self) -> None:
        error: BaseException | None = None
        ahead_bytes = 0
        try:
            for item in self._items:
                ahead_bytes += self._size_of(item)
                self._read.put(item)
                while ahead_bytes >= self._max_bytes and not self._closed:
                    ahead_bytes -= self._taken_bytes.get()
                if self._closed:
                    break
        except BaseException as raised:
            error = raised
        self._read.put(_End(error))
