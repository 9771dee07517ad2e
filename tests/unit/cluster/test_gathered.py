"""Pieces of streams that go out together: order, pauses, slow and lost readers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sensorium.api.transport.asgi import Message
from sensorium.cluster import gathered
from sensorium.cluster.gathered import Gathered


def piece(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def test_pieces_that_come_at_once_go_out_in_few_messages_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "GATHER_S", 60.0)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    out = Gathered(send)
    await out({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(10):
        await out(piece(b"%d" % number))
    await out(piece(b"end", more=False))
    out.close()
    assert [one.get("body") for one in sent] == [None, b"0", b"123456789end"]
    assert [one.get("more_body", False) for one in sent] == [False, True, False]


async def test_what_waits_goes_out_without_another_piece() -> None:
    sent: list[bytes] = []
    arrived = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message["body"])
        if b"".join(sent) == b"abc":
            arrived.set()

    out = Gathered(send)
    for one in (b"a", b"b", b"c"):
        await out(piece(one))
    await asyncio.wait_for(arrived.wait(), 30)
    out.close()


async def test_a_reader_that_stands_still_holds_the_writer_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "GATHER_S", 0.0)
    reads, sent = asyncio.Event(), bytearray()

    async def send(message: Message) -> None:
        await reads.wait()
        sent.extend(message["body"])

    async def write(out: Gathered) -> None:
        for number in range(100):
            await out(piece(bytes([number]) * gathered.MOST_BYTES))
        await out(piece(b"", more=False))

    out = Gathered(send)
    writing = asyncio.ensure_future(write(out))
    await asyncio.sleep(0.01)
    assert not writing.done()
    assert len(out._pieces) <= gathered.MOST_BYTES
    reads.set()
    await writing
    assert bytes(sent) == b"".join(bytes([number]) * gathered.MOST_BYTES for number in range(100))


async def test_a_reader_that_is_lost_is_told_to_the_writer() -> None:
    async def send(message: Message) -> None:
        if message["body"] == b"b":
            raise ConnectionError("lost")

    out = Gathered(send)
    await out(piece(b"a"))
    await out(piece(b"b"))  # later, by a task of its own
    with pytest.raises(ConnectionError):
        while True:
            await asyncio.sleep(0.005)
            await out(piece(b""))
    out.close()
