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
    fewest, among equals to the one that was served longest ago.

    One turn may take several places at once, such as bytes of memory. Nobody passes who needs less than the next one.
    """

    def __init__(self, size: int, per_tenant: int) -> None:
        self._free = size
        self._per_tenant = per_tenant
        self._held: Counter[bytes] = Counter()
        self._waiting: dict[bytes, deque[tuple[asyncio.Future[None], int]]] = {}  # in the order of service

    @asynccontextmanager
    async def taken(self, tenant: bytes, places: int = 1) -> AsyncIterator[None]:
        await self.take(tenant, places)
        try:
            yield
        finally:
            self.give_back(tenant, places)

    async def run(self, executor: Executor, tenant: bytes, work: Callable[[], T]) -> T:
        """Work in a thread. The place is held until the thread is done with it, and a caller who is cancelled waits for
        that, holding what else the thread uses."""
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
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([waiting])
            raise
        finally:
            del (
                future,
                waiting,
            )  # they keep the error, the error this frame: such a circle would hold the request's media

    async def take(self, tenant: bytes, places: int = 1) -> None:
        """Wait for so many places, at most a tenant's. They must be given back."""
        if places > self._per_tenant:
            raise ValueError(places)
        if not self._waiting and places <= self._free and self._held[tenant] + places <= self._per_tenant:
            self._grant(tenant, places)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append((turn, places))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(tenant, places)
            else:
                self._serve()  # those behind it may have waited for it alone
            raise

    def give_back(self, tenant: bytes, places: int = 1) -> None:
        self._free += places
        self._held[tenant] -= places
        if not self._held[tenant]:
            del self._held[tenant]
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            self._forget_cancelled()
            able = [one for one, queue in self._waiting.items() if self._held[one] + queue[0][1] <= self._per_tenant]
            following = min(able, key=self._held.__getitem__, default=None)
            if following is None or self._waiting[following][0][1] > self._free:
                return
            queue = self._waiting.pop(following)
            turn, places = queue.popleft()
            if queue:
                self._waiting[following] = queue  # at the end
            self._grant(following, places)
            turn.set_result(None)

    def _grant(self, tenant: bytes, places: int) -> None:
        self._free -= places
        self._held[tenant] += places

    def _forget_cancelled(self) -> None:
        for tenant, queue in list(self._waiting.items()):
            while queue and queue[0][0].done():
                queue.popleft()
            if not queue:
                del self._waiting[tenant]
