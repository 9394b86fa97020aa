"""Reading while something else is done with what was read: a thread that is a bounded number of bytes ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self  # the standard library's from Python 3.11 on

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _End:
    """Comes behind the last item."""

    error: BaseException | None


class ReadAhead(Generic[Item]):
    """Items, taken on a thread of its own. A context manager, which begins and ends the thread; iterated once, by one thread.

    Args:
        items: what is read. Only the thread touches it; what it raises is raised behind the last item before.
        size_of: bytes of an item.
        max_bytes: once so many wait to be taken, nothing is read; so one item more than that may wait.
    """

    def __init__(self, items: Iterable[Item], *, size_of: Callable[[Item], int], max_bytes: int) -> None:
        self._items = items
        self._size_of = size_of
        self._max_bytes = max_bytes
        # Not a condition: Ctrl-C at the wrong moment would leave its lock with the thread that was interrupted.
        self._waiting: SimpleQueue[Item | _End] = SimpleQueue()
        self._taken_bytes: SimpleQueue[int] = SimpleQueue()
        self._closed = False
        # A daemon: whoever presses Ctrl-C twice does not wait for a long read.
        self._thread = threading.Thread(target=self._read, name="touchline-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the read that is under way, so that its file can be closed."""
        self._closed = True
        self._taken_bytes.put(0)
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            self._taken_bytes.put(self._size_of(item))
            yield item

    def _read(self) -> None:
        error: BaseException | None = None
        waiting_bytes = 0
        try:
            for item in self._items:
                waiting_bytes += self._size_of(item)
                self._waiting.put(item)
                while waiting_bytes >= self._max_bytes and not self._closed:
                    waiting_bytes -= self._taken_bytes.get()
                if self._closed:
                    break
        except BaseException as raised:
            error = raised
        self._waiting.put(_End(error))
