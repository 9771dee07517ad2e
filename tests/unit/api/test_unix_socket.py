"""--uds: a socket file with the right permissions, replaced when it is stale, removed at the end."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.api_support import FakeEngine, serving, until
from support.connections import slowly

from sensorium.api.transport.server import listen
from sensorium.config import ServerConfig
from sensorium.errors import StartupError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o600), (0o077, 0o600), (0o007, 0o660), (0, 0o666)])
def test_the_umask_says_who_may_connect(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "api.sock"
    with umask(mask):
        listener = listen(ServerConfig(uds=str(path)))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    listener.close()


async def test_everything_is_served_there_and_the_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with serving(FakeEngine(script=slowly), uds=str(path), api_key=("k",)):
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://some.name") as client:
            assert (await client.get("/livez")).json() == {"status": "alive"}
            assert (await client.get("/v1/models")).status_code == 401
            client.headers["Authorization"] = "Bearer k"
            reply = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
            assert reply.text.endswith("data: [DONE]\n\n")
            evil = await client.post("/v1/completions", json={"prompt": "hi"}, headers={"Origin": "http://evil"})
            assert evil.status_code == 403
    assert not path.exists()


async def test_who_leaves_a_unix_socket_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with serving(FakeEngine(script=slowly), uds=str(path)) as served:
        body = b'{"prompt":"hi","stream":true,"max_tokens":400,"ignore_eos":true}'
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            await until(lambda: bool(served.engine.active))
        await until(lambda: bool(served.engine.aborted))


def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    first = listen(ServerConfig(uds=str(path)))
    with pytest.raises(StartupError, match="another server"):
        listen(ServerConfig(uds=str(path)))
    first.close()
    path.unlink()
    path.write_text("mine")
    with pytest.raises(StartupError, match="there is a file"):
        listen(ServerConfig(uds=str(path)))
    assert path.read_text() == "mine"
    for bad in (tmp_path / "no" / "folder.sock", tmp_path / ("x" * 120)):
        with pytest.raises(StartupError, match="Cannot listen"):
            listen(ServerConfig(uds=str(bad)))
