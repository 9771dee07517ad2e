"""Bounds what a server says before its answer's status: interim responses (1xx) without end would occupy the parser,
which is written in Python, and with it the event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
from httpcore import SOCKET_OPTION, AsyncNetworkStream

MAX_HEAD_BYTES = 32 * 1024
_READ_BYTES = 1024


class HeadStream(AsyncNetworkStream):
    """Reads little at a time, and not too much in all, until `head_is_here`."""

    def __init__(self, stream: AsyncNetworkStream) -> None:
        self._stream = stream
        self._head_bytes = 0
        self.head_is_here = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.head_is_here:
            return await self._stream.read(max_bytes, timeout)
        if self._head_bytes >= MAX_HEAD_BYTES:
            raise httpcore.RemoteProtocolError("the response's head has no end")
        await asyncio.sleep(0)  # data that is there already would be read without others' having a turn
        piece = await self._stream.read(min(max_bytes, _READ_BYTES), timeout)
        self._head_bytes += len(piece)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> AsyncNetworkStream:
        return HeadStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class HeadBackend(httpcore.AnyIOBackend):
    """Connections whose heads are bounded."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> AsyncNetworkStream:
        return HeadStream(await super().connect_tcp(host, port, timeout, local_address, socket_options))


class HeadTrace:
    """A request's `trace` extension: tells its connection when the head is here."""

    def __init__(self) -> None:
        self._stream: HeadStream | None = None

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        made = info.get("return_value")
        if isinstance(made, HeadStream):
            self._stream = made
        elif name == "http11.receive_response_headers.complete" and self._stream is not None:
            self._stream.head_is_here = True


class HeadTransport(httpx.AsyncHTTPTransport):
    """httpx's transport over such connections. None is kept: a kept TLS connection was verified for one name and would
    be reused for another on the same address. Nothing is taken from the environment."""

    def __init__(self, context: ssl.SSLContext | bool) -> None:
        super().__init__(verify=context, trust_env=False)
        made = httpx.create_ssl_context(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=made, max_connections=None, max_keepalive_connections=0, network_backend=HeadBackend()
        )
