"""Work on many things at once: coroutines whose results come in order, and threads that tenants share fairly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sensorium.media.turns import Turns

T = TypeVar("T")
LARGE_TEXT = 256 * 1024


class PromptThreads:
    """Threads for what holds a CPU too long for the event loop: tokenizing, hashing, processing media."""

    def __init__(self, count: int) -> None:
        """One tenant never has all `count` of them."""
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="prompt")
        self._turns = Turns(count, count - 1)
        self._large = Turns(1, 1)

    async def run(self, inline: bool, work: Callable[[], T], tenant: bytes = b"", *, characters: int = 0) -> T:
        """Do the work at once if it is short (`inline`), else in a thread, when it is the tenant's turn. Texts of many
        `characters` come one after the other: tokenizing one takes a hundred bytes for each."""
        if inline:
            return work()
        if characters < LARGE_TEXT:
            return await self._turns.run(self._threads, tenant, work)
        async with self._large.taken(tenant):
            return await self._turns.run(self._threads, tenant, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


async def all_in_order(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is the one that is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await ended(tasks)
        raise
    finally:
        tasks.clear()  # a task keeps its error, the error this frame: such a circle would hold the request's media


async def ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels what is not done yet and waits for it; errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
