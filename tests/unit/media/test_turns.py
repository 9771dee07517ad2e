"""Turns: nobody waits for another tenant's queue, and every place comes back."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.media.names import SystemResolver
from sensorium.media.turns import Turns


async def test_tenants_take_turns() -> None:
    turns, order = Turns(1, 1), []

    async def job(tenant: bytes) -> None:
        async with turns.taken(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*(job(tenant) for tenant in (b"a", b"a", b"a", b"a", b"b", b"b", b"c")))
    assert order == [b"a", b"a", b"b", b"c", b"a", b"b", b"a"]


async def test_one_tenant_never_has_every_place() -> None:
    turns = Turns(3, 2)
    await turns.take(b"a")
    await turns.take(b"a")
    third = asyncio.ensure_future(turns.take(b"a"))
    await asyncio.sleep(0)
    assert not third.done()
    await asyncio.wait_for(turns.take(b"b"), 120)
    turns.give_back(b"b")
    await asyncio.sleep(0)
    assert not third.done()
    turns.give_back(b"a")
    await asyncio.wait_for(third, 120)


async def test_a_place_is_held_until_its_thread_is_done() -> None:
    """Cancelling does not let a tenant have more threads."""
    turns, release = Turns(2, 1), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        first = asyncio.ensure_future(turns.run(threads, b"a", release.wait))
        await asyncio.sleep(0.05)
        first.cancel()
        second = asyncio.ensure_future(turns.run(threads, b"a", lambda: 2))
        await asyncio.sleep(0.05)
        assert not second.done()
        assert await asyncio.wait_for(turns.run(threads, b"b", lambda: 3), 120) == 3
        release.set()
        assert await asyncio.wait_for(second, 120) == 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 3), st.booleans()), max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_place_comes_back(jobs: list[tuple[bytes, int, bool]], size: int, per_tenant: int) -> None:
    async def main() -> None:
        turns, active = Turns(size, per_tenant), []

        async def job(tenant: bytes, steps: int) -> None:
            async with turns.taken(tenant):
                active.append(tenant)
                assert len(active) <= size and active.count(tenant) <= per_tenant
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    active.remove(tenant)

        tasks = [asyncio.ensure_future(job(tenant, steps)) for tenant, steps, _ in jobs]
        await asyncio.sleep(0)
        for task, (_, _, is_cancelled) in zip(tasks, jobs, strict=True):
            if is_cancelled and not task.done():
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not any(isinstance(result, AssertionError) for result in results)
        assert turns._free == size and not turns._held and not turns._waiting

    asyncio.run(main())


async def test_slow_names_delay_neither_other_domains_nor_other_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        if host.endswith("slow.example"):
            release.wait(60)
        if host == "missing.example":
            raise socket.gaierror
        return [(0, 0, 0, "", ("203.0.113.7", port))]

    monkeypatch.setattr("sensorium.media.names.socket.getaddrinfo", getaddrinfo)
    resolver = SystemResolver()
    slow = [asyncio.ensure_future(resolver.addresses(f"{number}.slow.example", 80, b"a")) for number in range(40)]
    other = [asyncio.ensure_future(resolver.addresses(f"a.{number}slow.example", 80, b"b")) for number in range(40)]
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(resolver.addresses("good.example", 80, b"a"), 120) == ["203.0.113.7"]
    assert await asyncio.wait_for(resolver.addresses("good.example", 80, b"c"), 120) == ["203.0.113.7"]
    with pytest.raises(OSError):
        await asyncio.wait_for(resolver.addresses("missing.example", 80, b"c"), 120)
    assert not any(lookup.done() for lookup in (*slow, *other))
    release.set()
    assert len(await asyncio.wait_for(asyncio.gather(*slow, *other), 120)) == 80


async def test_turns_of_several_places_wait_for_all_of_them_and_are_not_passed() -> None:
    turns = Turns(10, 10)
    await turns.take(b"a", 6)
    large = asyncio.ensure_future(turns.take(b"b", 8))
    small = asyncio.ensure_future(turns.take(b"c", 1))
    await asyncio.sleep(0)
    assert not large.done() and not small.done()  # who needs little does not pass for ever
    turns.give_back(b"a", 6)
    await asyncio.sleep(0)
    assert large.done() and small.done()
    with pytest.raises(ValueError):
        await turns.take(b"a", 11)
    waiting = [asyncio.ensure_future(turns.take(b"d", places)) for places in (5, 1)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # those behind it waited for it alone
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiting[1].done() and not waiting[1].cancelled()
