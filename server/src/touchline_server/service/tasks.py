"""Work that a thread does for the event loop, cancelled so that the thread has finished with it before anyone else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work on a thread. Lives in the event loop.

    Args:
        pool: the threads.
        work: the function that a thread calls.
        arguments: arguments of ``work``.
    """

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> None:
        self._work: Future[T] = pool.submit(work, *arguments)
        self.result: asyncio.Future[T] = asyncio.wrap_future(self._work)
        """Outcome of the work: its result or its error."""

    async def cancel_and_join(self) -> None:
        """Cancels the job if it has not started, otherwise waits for it; survives cancellation of the waiter.

        Only afterwards may anyone else have what the work uses: bytes of a budget, a turn, a message.
        """
        consume_exception(self.result)
        if self._work.cancel() or self._work.done():
            return
        loop = asyncio.get_running_loop()
        finished = loop.create_future()

        def note_finished(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed, so no coroutine waits any more
                loop.call_soon_threadsafe(finished.set_result, None)

        self._work.add_done_callback(note_finished)
        while not finished.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((finished,))


def consume_exception(result: asyncio.Future[Any]) -> None:
    """Cancels a future that is not needed any more, and marks its exception as retrieved so that asyncio does not log it."""
    if not result.cancel() and not result.cancelled():
        result.exception()


async def run(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Returns what the work returns. If it is cancelled, it ends once no thread does the work: see :meth:`Job.cancel_and_join`."""
    job = Job(pool, work, *arguments)
    try:
        return await job.result
    finally:
        await job.cancel_and_join()
