"""One server per test file for tests that leave no trace; tests that change something start their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from support.api_support import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server without keys, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    manager = serving()
    yield asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result(10)
    asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def port(served: Served) -> int:
    return served.port
