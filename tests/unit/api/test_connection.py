"""Connections at their edges: pipelined, half-closed, old and unread ones. On both event loops, as the server's is not
the tests'."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import uvloop
from support.api_support import (
    ANSWER,
    FakeEngine,
    Served,
    complete,
    events,
    get,
    raw,
    read_reply,
    request,
    serving,
    speak,
    until,
)
from support.connections import slowly

from sensorium.config import Limits
from sensorium.types import EngineOutput, EngineRequest

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")
LIMITS = Limits()
BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
PLAIN = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


async def replies(reader: asyncio.StreamReader) -> list[Any]:
    """Every answer until the end of the connection."""
    found = []
    while True:
        try:
            found.append(await asyncio.wait_for(read_reply(reader), 120))
        except asyncio.IncompleteReadError as error:
            assert not error.partial
            return found


@pytest.mark.parametrize("number", [33, 34, 100, 3000])
async def test_pipelined_requests_are_answered_in_order_and_then_refused(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        first = request("POST", "/v1/completions", BODY)
        writer.write(first + b"".join(request("GET", f"/v1/models/{index}") for index in range(number - 1)))
        if number == 33:
            writer.write_eof()
        found = await replies(reader)
        if number == 33:
            assert [reply.status for reply in found] == [200] + [404] * 32
        else:
            assert [reply.status for reply in found] == [200] + [404] * 32 + [400]
            assert found[-1].error["code"] == "invalid_http"
            assert found[-1].headers["connection"] == "close"
        assert [f"'{index}'" in reply.error["message"] for index, reply in enumerate(found[1:33])] == [True] * 32
        assert (await get(served.port, "/livez")).status == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (b"\x00\x01 nonsense\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET nothing HTTP/1.1\r\n\r\n", 400),
        (request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"}) + b"zz\r\n", 400),
    ],
)
async def test_what_is_refused_does_not_overtake(second: bytes, status: int) -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        for path in ("/v1/completions", "/v1/chat/completions"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request("POST", path, BODY if path == "/v1/completions" else STREAM) + second)
            assert [reply.status for reply in await replies(reader)] == [200, status]
            writer.close()


async def test_nothing_follows_a_request_that_said_close() -> None:
    async with serving() as served:
        for first in (
            request("GET", "/livez", headers={"Connection": "close"}),
            b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(first + request("GET", "/livez"))
            assert [reply.status for reply in await replies(reader)] == [200]
            writer.close()


def chunked(body: bytes) -> bytes:
    return request(
        "POST", "/v1/chat/completions", headers={"Transfer-Encoding": "chunked"}
    ) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize(
    "data",
    [
        request("GET", "/livez"),
        request("POST", "/v1/chat/completions", PLAIN),
        chunked(PLAIN),
        request("POST", "/v1/chat/completions", STREAM),
        chunked(STREAM),
        request("GET", "/livez") * 3,
    ],
)
async def test_who_only_stops_sending_gets_the_answer(data: bytes) -> None:
    """Also after seconds, when a client of HTTP/1.1 has been told that its request is worked on."""
    slow = b"POST" in data and b"chunked" in data
    async with serving(FakeEngine(script=partial(speak, delay_s=2.5 if slow else 0, chunk=30))) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(data)
        writer.write_eof()
        received = await asyncio.wait_for(reader.read(), 120)
        if slow:
            received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b"HTTP/1.1 200 OK\r\n") == (3 if data.count(b"GET") == 3 else 1)
        if b"POST" in data:
            assert b"stop" in received
        assert not served.engine.aborted
        await until(lambda: not served.http._uvicorn.server_state.connections)


async def test_half_a_request_and_an_end_is_nothing() -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        whole = request("POST", "/v1/completions", BODY)
        for data in (whole[:20], whole[:-3], request("POST", "/v1/completions", BODY, headers={"Expect": "a"})[:-1]):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(data)
            writer.write_eof()
            assert b"200" not in await asyncio.wait_for(reader.read(), 120)
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(whole + whole[:-3])
        writer.write_eof()
        assert [reply.status for reply in await replies(reader)] == [200]
        await until(lambda: not served.http._uvicorn.server_state.connections)


@pytest.mark.parametrize("body", [PLAIN, STREAM])
async def test_who_stops_sending_and_then_leaves_is_noticed(body: bytes) -> None:
    async with serving(FakeEngine(script=partial(speak, delay_s=5))) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("POST", "/v1/chat/completions", body))
        await until(lambda: bool(served.engine.active))
        writer.close()
        await until(lambda: not served.engine.active)
        assert served.engine.aborted == [0]


async def test_streams_of_old_clients_are_plain() -> None:
    async with serving() as served:
        head = b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for more in (b"", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(head + more + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM)
            received = await asyncio.wait_for(reader.read(), 120)
            lines, _, body = received.partition(b"\r\n\r\n")
            assert lines.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close" in lines
            assert b"transfer-encoding" not in lines
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(body)) == ANSWER
            writer.close()


async def test_header_and_chunk_floods_stop_at_their_limit() -> None:
    async with serving() as served:
        start_s = time.process_time()
        for flood in (
            b"GET /livez HTTP/1.1\r\n" + b"a:b\r\n" * 400_000,
            b"\r\n" * 1_000_000,
            request("GET", "/livez") * 50_000,
        ):
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(flood)
            assert (await get(served.port, "/livez")).status == 200
            writer.close()
        assert time.process_time() - start_s < 15


async def chatty(request: EngineRequest, *, pause_s: float = 0.0) -> AsyncIterator[EngineOutput]:
    for _ in range(10**6):
        yield EngineOutput(request.id, (40,) * 500)
        await asyncio.sleep(pause_s)


def unread(served: Served, body: bytes, path: str = "/v1/chat/completions") -> socket.socket:
    """A client that asks and does not read."""
    client = socket.create_connection(("127.0.0.1", served.port))
    client.sendall(request("POST", path, body))
    return client


async def test_who_does_not_read_is_disconnected() -> None:
    async with serving(
        FakeEngine(script=partial(chatty, pause_s=0.001)), limits=replace(LIMITS, write_timeout_s=1.0)
    ) as served:
        clients = [unread(served, STREAM) for _ in range(6)]
        await until(lambda: len(served.engine.active) == 6)
        await until(lambda: not served.engine.active, timeout_s=120)
        assert len(served.engine.aborted) == 6
        assert not served.http._uvicorn.server_state.connections
        for client in clients:
            client.close()


async def test_a_whole_answer_that_nobody_reads_is_thrown_away() -> None:
    async with serving(limits=replace(LIMITS, write_timeout_s=1.0)) as served:
        prompt = json.dumps({"prompt": "x" * 400, "max_tokens": 1, "echo": True, "n": 16, "logprobs": 20}).encode()
        client = unread(served, prompt, "/v1/completions")
        connections = served.http._uvicorn.server_state.connections
        await until(lambda: any(cast(Any, one).output.written > 10**6 for one in connections), timeout_s=120)
        await until(lambda: not connections, timeout_s=120)
        client.close()
        assert (await complete(served.port)).status == 200


async def test_who_reads_slowly_but_steadily_lives() -> None:
    async with serving(
        FakeEngine(script=partial(chatty, pause_s=0.001)), limits=replace(LIMITS, write_timeout_s=3.0)
    ) as served:
        client = unread(served, STREAM)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        for _ in range(120):  # the system tells of what was read by up to 128 KiB
            assert await loop.sock_recv(client, 4096)
            await asyncio.sleep(0.05)
        assert len(served.engine.active) == 1
        client.close()
        await until(lambda: not served.engine.active)


async def test_an_idle_reader_of_a_silent_stream_lives() -> None:
    async with serving(
        FakeEngine(script=partial(speak, delay_s=0.8)), limits=replace(LIMITS, write_timeout_s=1.0)
    ) as served:
        reply = await raw(
            served.port,
            request("POST", "/v1/completions", json.dumps({"prompt": "hi", "max_tokens": 4, "stream": True}).encode()),
            timeout_s=120,
        )
        assert [event["choices"][0]["text"] for event in events(reply.body)] == ["G", "r", "ü"]
