"""Fixtures of the media tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from support.media_support import Canary

from sensorium.config import Limits
from sensorium.media.loader import MediaLoader


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    canary = Canary()
    server = await asyncio.start_server(canary.serve, "127.0.0.1", 0)
    canary.port = server.sockets[0].getsockname()[1]
    yield canary
    server.close()


@pytest.fixture(scope="module")
def loader() -> Iterator[MediaLoader]:
    """One decode worker for a module's tests. Not for http: connections belong to one event loop."""
    loader = MediaLoader(Limits(), workers=1)
    yield loader
    asyncio.run(loader.aclose())
