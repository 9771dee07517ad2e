"""Large requests in parts: small messages and other tenants' requests go in between, and each arrives as it was."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from sensorium.ipc import messages, transfers
from sensorium.ipc.channel import Channel
from sensorium.ipc.messages import Kind, ProtocolError
from sensorium.ipc.transfers import Arriving, Outgoing
from sensorium.types import EngineRequest, MediaFeatures, Prompt, SamplingParams


def with_image(request_id: int, size: int) -> EngineRequest:
    pixels = np.frombuffer(random.Random(request_id).randbytes(size), np.uint8)
    prompt = Prompt(np.array([1, 2], np.int32), (MediaFeatures("image", b"key", 1, {"pixels": pixels}),))
    return EngineRequest(request_id, prompt, SamplingParams(1), turn=b"%d" % (request_id // 10))


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, Channel(theirs)


def add(outgoing: Outgoing, request: EngineRequest) -> None:
    outgoing.add_request(request.id, messages.encode_request(request), request.turn)


def arrived(channel: Channel, ours: socket.socket, outgoing: Outgoing, steps: int) -> list[tuple[int, memoryview]]:
    """What has arrived whole after so many writes."""
    found = []
    ours.setblocking(True)
    for _ in range(steps):
        if not outgoing:
            break
        for piece in outgoing.next():
            ours.sendall(piece)
        if (message := channel._next()) is not None:
            found.append(message)
    return found


def test_small_messages_and_other_tenants_pass_a_large_request(
    monkeypatch: pytest.MonkeyPatch, wire: tuple[socket.socket, Channel]
) -> None:
    monkeypatch.setattr(transfers, "PART_BYTES", 4096)
    ours, channel = wire
    outgoing = Outgoing()
    large, second, other = with_image(1, 900_000), with_image(2, 300_000), with_image(11, 70_000)
    add(outgoing, large)
    assert not arrived(channel, ours, outgoing, 30)
    add(outgoing, second)
    add(outgoing, other)
    outgoing.add(messages.encode_abort([5]))
    [(kind, payload)] = arrived(channel, ours, outgoing, 1)
    assert (kind, messages.decode_abort(payload)) == (Kind.ABORT, (5,))
    [(_, payload)] = arrived(channel, ours, outgoing, 60)  # twice its own parts
    assert messages.decode_request(payload).id == 11
    for expected, (kind, payload) in zip((large, second), arrived(channel, ours, outgoing, 400), strict=True):
        found = messages.decode_request(payload)
        assert (kind, found.id, found.turn) == (Kind.REQUEST, expected.id, b"0")
        assert np.array_equal(found.prompt.media[0].arrays["pixels"], expected.prompt.media[0].arrays["pixels"])
    assert not outgoing and not channel._arriving._views


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_what_is_taken_back_is_never_seen(
    monkeypatch: pytest.MonkeyPatch, wire: tuple[socket.socket, Channel], steps: int
) -> None:
    monkeypatch.setattr(transfers, "PART_BYTES", 4096)
    ours, channel = wire
    outgoing = Outgoing()
    add(outgoing, with_image(1, 100_000))
    add(outgoing, with_image(2, 100_000))
    arrived(channel, ours, outgoing, steps)
    assert outgoing.take_back(1)
    assert not outgoing.take_back(1)
    assert not outgoing.take_back(3)
    [(_, payload)] = arrived(channel, ours, outgoing, 1000)
    assert messages.decode_request(payload).id == 2
    assert not outgoing and not channel._arriving._views and not channel._arriving._missing


def test_parts_that_make_no_sense() -> None:
    arriving = Arriving()

    def begin() -> None:
        arriving.begin(memoryview(messages.encode_begin(1, 10)[messages.HEAD_BYTES :]))

    begin()

    def nothing(part: memoryview) -> None: ...

    for wrong in (lambda: arriving.fill(2, 1, nothing), lambda: arriving.fill(1, 11, nothing), begin):
        with pytest.raises(ProtocolError):
            wrong()
    with pytest.raises(ProtocolError):
        arriving.drop(memoryview(b"short"))
