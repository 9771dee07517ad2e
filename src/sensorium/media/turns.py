"""Places that tenants take in turn, so that one who asks for much waits for himself. Used on the event loop only."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """`size` places, of which one tenant holds at most `per_tenant`. A free place goes to the tenant that holds the
    fewest, among equals to the one that was served longest ago."""

    def __init__(self, size: int, per_tenant: int) -> None:
        self._free = size
        self._per_tenant = per_tenant
        self._held: Counter[bytes] = Counter()
        self._waiting: dict[bytes, deque[asyncio.Future[None]]] = {}  # in the order of service

    @asynccontextmanager
    async def taken(self, tenant: bytes) -> AsyncIterator[None]:
        await self.take(tenant)
        try:
            yield
        finally:
            self.give_back(tenant)

    async def run(self, executor: Executor, tenant: bytes, work: Callable[[], T]) -> T:
        """Work in a thread. The place is held until the thread is done with it, also if nobody waits any more."""
        await self.take(tenant)
        loop = asyncio.get_running_loop()

        def done(_future: object) -> None:
            with suppress(RuntimeError):  # the loop has ended before the thread
                loop.call_soon_threadsafe(self.give_back, tenant)

        try:
            future = executor.submit(work)
        except BaseException:
            self.give_back(tenant)
            raise
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    async def take(self, tenant: bytes) -> None:
        """Wait for a place. It must be given back."""
        if self._free and self._held[tenant] < self._per_tenant:
            self._grant(tenant)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(tenant)
            raise

    def give_back(self, tenant: bytes) -> None:
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        while self._free and (following := self._next()) is not None:
            queue = self._waiting.pop(following)
            turn = queue.popleft()
            if queue:
                self._waiting[following] = queue  # at the end
            if not turn.done():
                self._grant(following)
                turn.set_result(None)

    def _grant(self, tenant: bytes) -> None:
        self._free -= 1
        self._held[tenant] += 1

    def _next(self) -> bytes | None:
        able = [tenant for tenant in self._waiting if self._held[tenant] < self._per_tenant]
        return min(able, key=self._held.__getitem__, default=None)
