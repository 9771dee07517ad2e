"""What the media tests share: a loopback canary that counts who connects, and loading with checked refusals."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from sensorium.errors import MediaError
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource
from sensorium.types import MediaItem, Modality

PARAM = "messages[0].content[1].image_url.url"
DENIED_TEXT = re.compile(r"0x[0-9a-f]{6,}|/usr|/home|site-packages|Traceback|File \"|<[^<>]* object at")


class Canary:
    """A loopback HTTP server. `answer` gets the request's head and the writer; `requests` is what it saw."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.connections = 0
        self.sent_bytes = 0
        self.answer: Callable[[str, asyncio.StreamWriter], Awaitable[None]] = self.plain(b"hello")
        self.port = 0

    def plain(self, body: bytes, status: str = "200 OK", headers: str = "") -> Callable[..., Awaitable[None]]:
        async def answer(_head: str, writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

        return answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            await self.answer(self.requests[-1], writer)
            await writer.drain()
        writer.close()


async def load(loader: MediaLoader, url: str, kind: Modality = "image") -> MediaItem:
    raw = await loader.fetch(MediaSource(kind, PARAM, url=url))
    loader.probe(raw)
    return await loader.decode(raw)


async def refusal(awaitable: Awaitable[object]) -> MediaError:
    """The error that a load ends with; its text is one that a client may read."""
    with pytest.raises(MediaError) as caught:
        await awaitable
    error = caught.value
    assert not DENIED_TEXT.search(error.message), error.message
    assert "{" not in error.message
    assert error.status == 400
    assert error.param == PARAM
    return error
