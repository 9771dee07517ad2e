"""Bytes that arrive: too many, too slowly, in too many pieces, or lying about themselves (S18, S22, S42, S61-S63)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import pytest
from support.api_support import chat, get, post, raw, read_reply, request, serving
from support.connections import flood

from sensorium.api.transport.asgi import ClientGone
from sensorium.api.transport.body import receive_body
from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, RequestTimeoutError
from sensorium.units import MiB

LIMITS = Limits()
BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()


async def healthy(port: int) -> None:
    assert (await post(port, "/v1/completions", BODY)).status == 200


async def test_large_headers(port: int) -> None:
    header = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
    reply, _ = await flood(port, header + b"X-Long: ", [b"a" * 65536] * 80)
    assert reply is None or reply.status == 431
    reply, _ = await flood(port, header, [b"X-%d: y\r\n" % index for index in range(20_000)])
    assert reply is None or reply.status == 431
    many = {f"X{index}": "a" for index in range(99)}
    for fields, status in (
        ({"X": "a" * 33_000}, 431),
        ({**many, "Y": "a", "Z": "a"}, 431),
        ({"X": "a" * 30_000}, 200),
        (many, 200),
    ):
        reply = await get(port, "/livez", headers=fields)
        assert reply.status == status
        if status != 200:
            assert reply.error["code"] == "headers_too_large"
    await healthy(port)


async def test_long_request_lines(port: int) -> None:
    reply, _ = await flood(port, b"GET /", [b"a" * 65536] * 16)
    assert reply is None or reply.status == 414
    assert (await get(port, "/livez?" + "a" * 9000)).error["code"] == "url_too_long"
    assert (await get(port, "/livez?" + "a" * 8000)).status == 200
    await healthy(port)


async def test_a_connection_goes_on_when_the_rest_of_an_unwanted_body_has_come(port: int) -> None:
    """Clients send head and body in two pieces, and the answer to a wrong path may come between them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for path in ("/v1/moderations", "/v1/files"):
        writer.write(request("POST", path, headers={"Content-Length": str(len(BODY))}))
        assert (await read_reply(reader)).status == 404
        await asyncio.sleep(0.05)
        writer.write(BODY[:3])
        await asyncio.sleep(0.05)
        writer.write(BODY[3:] + request("GET", "/livez"))
        assert (await read_reply(reader)).status == 200
    writer.close()


async def test_a_connection_ends_when_the_rest_of_an_unwanted_body_does_not_come(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("POST", "/v1/moderations", headers={"Content-Length": "1000"}))
    assert (await read_reply(reader)).status == 404
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof() and time.monotonic() - started < 60:  # a byte now and then is not coming either
            writer.write(b"x")
            await asyncio.sleep(0.1)
    assert await reader.read() == b""
    assert time.monotonic() - started < 50
    writer.close()


async def test_body_by_its_word_and_by_its_bytes() -> None:
    limits = replace(LIMITS, max_body_bytes=100_000)
    async with serving(limits=limits) as served:
        start_s = time.perf_counter()
        head = request("POST", "/v1/completions", headers={"Content-Length": str(10 * 2**30)})
        reply = await raw(served.port, head)
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        assert time.perf_counter() - start_s < 60  # it does not wait for the body
        chunked = request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"})
        refused, sent = await flood(served.port, chunked, [b"%x\r\n%b\r\n" % (65536, b"a" * 65536)] * 3000)
        assert refused is not None
        assert refused.status == 413
        assert sent < 50 * MiB
        await healthy(served.port)


async def test_an_upload_that_nobody_reads_is_cut_off(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("POST", "/nope", headers={"Content-Length": str(10 * 2**30)}))
    assert (await read_reply(reader)).status == 404
    start_s = time.perf_counter()
    with pytest.raises(ConnectionError):
        while time.perf_counter() - start_s < 60:
            writer.write(b"x" * 65536)
            await writer.drain()
            await asyncio.sleep(0.01)
    assert time.perf_counter() - start_s < 50


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Length": str(len(BODY)), "Transfer-Encoding": "chunked"}, b"0\r\n\r\n"),
        ({"Content-Length": "-1"}, b""),
        ({"Content-Length": "1e3"}, b""),
        ({"Content-Length": "+5"}, b""),
        ({"Content-Length": "9" * 30}, b""),
        ({"Transfer-Encoding": "gzip"}, b"x"),
        ({"Transfer-Encoding": "chunked"}, b"zz\r\n"),
        ({"Transfer-Encoding": "chunked"}, b"-5\r\nabc\r\n"),
    ],
)
async def test_contradictory_lengths(port: int, headers: dict[str, str], body: bytes) -> None:
    reply = await raw(port, request("POST", "/v1/completions", headers=headers) + body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    await healthy(port)


async def test_two_lengths(port: int) -> None:
    data = request("POST", "/v1/completions", BODY).replace(b"Content-Length", b"Content-Length: 3\r\nContent-Length")
    assert (await raw(port, data)).status == 400


async def test_a_length_that_is_too_short_leaves_no_smuggled_request(port: int) -> None:
    data = request(
        "POST", "/v1/completions", BODY + b"GET /livez HTTP/1.1\r\n", headers={"Content-Length": str(len(BODY))}
    )
    assert (await raw(port, data)).status == 200


async def test_a_length_that_is_too_long_ends_in_time() -> None:
    async with serving(limits=replace(LIMITS, body_timeout_s=0.3)) as served:
        start_s = time.perf_counter()
        reply = await raw(served.port, request("POST", "/v1/completions", BODY, headers={"Content-Length": "1000"}))
        assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert 0.25 < time.perf_counter() - start_s < 60


async def test_slow_clients_are_cut_off_and_others_served() -> None:
    limits = replace(LIMITS, header_timeout_s=0.5, body_timeout_s=0.7)
    async with serving(limits=limits) as served:

        async def closes(first: bytes, drip: bytes = b"") -> tuple[float, bytes]:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            start_s = time.perf_counter()
            writer.write(first)
            read = asyncio.create_task(reader.read())
            while not read.done() and time.perf_counter() - start_s < 60:
                await asyncio.wait([read], timeout=0.1)
                if drip and not read.done():
                    writer.write(drip)
            writer.close()
            return time.perf_counter() - start_s, await read

        half = b"GET /livez HTTP/1.1\r\nHost: loc"
        upload = request("POST", "/v1/completions", headers={"Content-Length": "5000"})
        ended = asyncio.gather(
            *(
                closes(*case)
                for case in (
                    (b"",),
                    (half,),
                    (half, b"x"),
                    (upload, b"{"),
                    (b"\r\n", b"\r\n"),
                    (request("GET", "/livez") + half,),
                    *[(b"",)] * 200,
                )
            )
        )
        start_s = time.perf_counter()
        await healthy(served.port)
        assert time.perf_counter() - start_s < 60
        found = await ended
        assert all(took_s < 50 for took_s, _ in found)  # none of them had to be given up
        assert b"408" in found[1][1]
        assert b"408" in found[3][1]
        assert b"200 OK" in found[5][1]
        assert b"408" in found[5][1]
        await healthy(served.port)


async def test_keep_alive_and_pipelining(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(request("POST", "/v1/completions", BODY))
        assert (await read_reply(reader)).status == 200
    writer.write(request("GET", "/livez") + request("POST", "/v1/completions", BODY) + request("GET", "/nope"))
    assert [(await read_reply(reader)).status for _ in range(3)] == [200, 200, 404]
    writer.close()


async def test_a_body_in_very_many_pieces(port: int) -> None:
    pieces = b"".join(b"6\r\n      \r\n" for _ in range(1000))
    used_s = time.process_time()
    lag = asyncio.create_task(worst_lag(port))
    head = request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"})
    reply, _ = await flood(port, head, [pieces] * 500)
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert time.process_time() - used_s < 10
    assert await lag < 20
    ok = [b"%x\r\n%b\r\n" % (len(BODY[i : i + 8]), BODY[i : i + 8]) for i in range(0, len(BODY), 8)]
    data = request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"}) + b"".join(ok) + b"0\r\n\r\n"
    assert (await raw(port, data)).status == 200


async def worst_lag(port: int) -> float:
    worst = 0.0
    for _ in range(10):
        start_s = time.perf_counter()
        await get(port, "/livez")
        worst = max(worst, time.perf_counter() - start_s)
    return worst


async def received(messages: Iterable[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    for message in messages:
        yield message


async def body_of(*pieces: bytes, limits: Limits = LIMITS, ends: bool = True) -> bytes:
    messages = received(
        [
            {"type": "http.request", "body": piece, "more_body": not ends or place < len(pieces) - 1}
            for place, piece in enumerate(pieces)
        ]
    )

    async def receive() -> Any:
        async for message in messages:
            return message
        return {"type": "http.disconnect"}

    body = bytearray()
    await receive_body(receive, limits.max_body_bytes, limits, body.extend)
    return bytes(body)


async def test_reading_a_body() -> None:
    assert await body_of(b"a", b"", b"bc") == b"abc"
    assert await body_of(b"") == b""
    small = replace(LIMITS, max_body_bytes=5, max_body_messages=10)
    with pytest.raises(BodyTooLargeError):
        await body_of(b"abc", b"def", b"more", limits=small)
    with pytest.raises(BodyTooLargeError):
        await body_of(*[b""] * 12, limits=small)
    large = replace(LIMITS, max_body_messages=10)
    assert len(await body_of(*[b"x" * 1000] * 100, limits=large)) == 100_000
    with pytest.raises(ClientGone):
        await body_of(b"abc", ends=False)

    async def never() -> Any:
        await asyncio.sleep(10)

    with pytest.raises(RequestTimeoutError):
        await receive_body(never, 5, replace(LIMITS, body_timeout_s=0.01), bytearray().extend)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;charset=UTF-8", 200),
        ("application/json; charset=latin-1", 400),
        ("application/json; charset=utf-16", 400),
        ("text/plain", 415),
        ("", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
    ],
)
async def test_content_types(port: int, kind: str, status: int) -> None:
    reply = await post(port, "/v1/completions", BODY, headers={"Content-Type": kind})
    assert reply.status == status
    if status != 200:
        assert reply.error["type"] == "invalid_request_error"


async def test_other_encodings_of_a_body(port: int) -> None:
    no_type = request("POST", "/v1/completions", BODY).replace(b"Content-Type: application/json\r\n", b"")
    assert (await raw(port, no_type)).status == 415
    reply = await post(port, "/v1/completions", BODY, headers={"Content-Encoding": "gzip"})
    assert reply.status == 415
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        for body in (b"", b"[" * 100_000, b'"\\ud800"', "{}".encode("utf-16"), b'{"a":NaN}', b"{} {}"):
            reply = await post(port, path, body)
            assert reply.status == 400
            assert reply.error["type"] == "invalid_request_error"


async def test_upgrades_and_strange_targets(port: int) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert (await get(port, "/v1/models", headers=upgrade)).status == 200
    h2c = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    data = request("POST", "/v1/completions", BODY, headers=h2c)
    for cut in (len(data), len(data) - 5, len(data) - len(BODY), 20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data[:cut])
        await asyncio.sleep(0.02)
        writer.write(data[cut:])
        reply = await read_reply(reader)
        assert reply.status == 200
        assert reply.json["usage"]["completion_tokens"] == 2
        assert await reader.read() == b""  # the parser is of no more use: the connection ends
    chunked = {**h2c, "Transfer-Encoding": "chunked"}
    assert (await raw(port, request("POST", "/v1/completions", headers=chunked) + b"0\r\n\r\n")).status == 400
    for target in ("http://evil/v1/models", "*", "v1/models"):
        assert (await raw(port, request("GET", target))).status in (400, 404)
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        with contextlib.suppress(asyncio.IncompleteReadError):  # closing without a word is as good
            assert (await raw(port, junk)).status == 400
    await healthy(port)


async def test_trailers_and_chunk_extensions(port: int) -> None:
    head = request("POST", "/v1/completions", headers={"Transfer-Encoding": "chunked"})
    chunk = b"%x\r\n%b\r\n" % (len(BODY), BODY)
    reply = await raw(port, head + chunk + b"0\r\nX-Request-Id: trailer\r\nContent-Type: text/plain\r\n\r\n")
    assert reply.status == 200
    assert reply.headers["x-request-id"] != "trailer"
    for endless in (b"0\r\nX-Long: ", b"1;name="):
        refused, _ = await flood(port, head + chunk + endless, [b"a" * 65536] * 80)
        assert refused is not None
        assert refused.status == 431
    await healthy(port)


async def test_many_pipelined_requests(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("GET", "/livez") * 2000)
    received = await asyncio.wait_for(reader.read(), 120)
    assert received.count(b"HTTP/1.1") < 200
    writer.close()
    await healthy(port)


async def test_expecting_a_continue(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = request("POST", "/v1/completions", headers={"Content-Length": str(len(BODY)), "Expect": "100-continue"})
    writer.write(head)
    assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
    writer.write(BODY)
    assert (await read_reply(reader)).status == 200
    writer.close()


async def test_headers_of_answers(port: int) -> None:
    reply = await chat(port)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "server" not in reply.headers
    stream = await chat(port, stream=True)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
