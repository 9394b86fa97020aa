"""Work that threads do for the event loop. Who leaves before it is done knows when no thread has to do with it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work. Lives in the event loop.

    Args:
        pool: whose threads do it.
        work: what is done.
        arguments: that it takes.
    """

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> None:
        self._work: Future[T] = pool.submit(work, *arguments)
        self.result: asyncio.Future[T] = asyncio.wrap_future(self._work)
        """What it returns or raises."""

    async def leave(self) -> None:
        """Waits until no thread does it, however often the waiter is cancelled; what none has begun is not done at all.

        What the work uses (room in a budget, a turn, a message) may be another's only after this.
        """
        consume_exception(self.result)
        if self._work.cancel() or self._work.done():
            return
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def tell(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(over.set_result, None)

        self._work.add_done_callback(tell)
        while not over.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((over,))


def consume_exception(result: asyncio.Future[Any]) -> None:
    """Takes what a future brings, for nobody: neither is it waited for any more, nor is it told that nobody looked."""
    if not result.cancel() and not result.cancelled():
        result.exception()


async def run(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Returns what the work returns. Where it is cancelled it ends only once no thread does the work; see :meth:`Job.leave`."""
    job = Job(pool, work, *arguments)
    try:
        return await job.result
    finally:
        await job.leave()
