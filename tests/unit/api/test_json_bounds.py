"""Bodies of very many small values: refused while they arrive, by what they are made of and not by their bytes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import from_json
from support.api_support import FakeEngine, Served, get, post, request, serving
from support.connections import flood

from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.protocol.pooling import EmbeddingsRequest
from sensorium.api.protocol.score import RerankRequest, ScoreRequest
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.routes import ROUTES
from sensorium.api.transport import json_bounds
from sensorium.api.transport.json_bounds import JsonBounds
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.system.processes import resident_bytes
from sensorium.units import MiB

LIMITS = Limits()
CHAT = '"messages":[{"role":"user","content":"hi"}]'
OTHER_FORMS = ("/api/", "/v1/messages")
ENDPOINTS = sorted({route.path for route in ROUTES if route.body is not None and route.file is None})


def measured(body: bytes, sizes: Iterator[int] | None = None, limits: Limits = LIMITS) -> tuple[int, int]:
    """Nodes and values of a body that is fed in pieces."""
    bounds = JsonBounds(limits)
    place = 0
    while place < len(body):
        size = next(sizes) if sizes else 65536
        bounds.feed(body[place : place + size])
        if sizes:
            bounds.finish()
        place += size
    bounds.finish()
    return bounds.nodes, bounds.values


def counted_slowly(body: str) -> tuple[int, int]:
    nodes = commas = quotes = 0
    inside = escaped = False
    for letter in body:
        if escaped:
            escaped = False
        elif inside and letter == "\\":
            escaped = True
        elif letter == '"':
            inside = not inside
            quotes += 1
        elif not inside:
            nodes += letter in "[{:"
            commas += letter == ","
    return nodes, max(commas, quotes // 2)


def some_json(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 4 else 3)
    if kind == 0:
        return "".join(draw.choices('\\"[]{}:,a/\n🙂', k=draw.randrange(12)))
    if kind < 3:
        return draw.choice([None, True, 1, -2.5, "", "x"])
    if kind == 3:
        return {
            str(index) + draw.choice(["", '"', "\\", ":"]): some_json(draw, depth + 1)
            for index in range(draw.randrange(5))
        }
    return [some_json(draw, depth + 1) for _ in range(draw.randrange(5))]


def test_counts_are_exact_however_a_body_is_cut() -> None:
    draw = random.Random(3)
    for _ in range(400):
        text = json.dumps(some_json(draw), ensure_ascii=draw.random() < 0.5)
        expected = counted_slowly(text)
        assert measured(text.encode()) == expected
        sizes = iter(lambda: draw.randrange(1, 6), 0)
        assert measured(text.encode(), sizes) == expected, text


def test_what_is_counted_has_its_limit() -> None:
    few = replace(LIMITS, max_json_nodes=10, max_json_values=100, max_embedding_tokens=0)
    measured(b"[" * 10, limits=few)
    measured(b"[" + b"1," * 100, limits=few)
    measured(json.dumps({"text": '[{":,' * 1000}).encode(), limits=few)
    for body in (b"[" * 11, b"[" + b'{"a":' * 6, b"[" + b"1," * 101, b'["' + b'""' * 101):
        with pytest.raises(RequestError):
            measured(body, limits=few)
    measured(b"[" + b"1" * 309 + b"]")
    with pytest.raises(RequestError, match="400 digits"):
        measured(b"[" + b"1234567890" * 41 + b"]")
    with pytest.raises(RequestError, match="escaped"):
        measured(b'"' + b"\\n" * (2**22 + 1))
    with pytest.raises(RequestError, match="digits of numbers"):
        measured(b"[" + b"1234567890," * (2**24 // 10 + 1), limits=replace(LIMITS, max_json_values=2**24))
    with pytest.raises(RequestError, match="digits of numbers"):
        measured(b"[" + (b"1" * 399 + b",") * (2**24 // 399 + 1))
    measured(b'["' + b"1" * (2**24 + 1) + b'"]')
    measured(b'"' + ("\u4e2d" * (2**24 // 3)).encode() + b'"')
    with pytest.raises(RequestError, match="outside ASCII"):
        measured(b'"' + ("\u4e2d" * (2**24 // 3 + 1)).encode() + b'"')
    measured(b'"' + b"\\u4e2d" * 2**20 + b'"')


def test_the_last_field_is_found_however_a_body_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    for _ in range(400):
        fields = {
            f"f{index}" + draw.choice(["", ":", " x"]): some_json(draw, 1) for index in range(draw.randrange(1, 6))
        }
        text = json.dumps(fields, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])).encode()
        monkeypatch.setattr(json_bounds, "_SCANNED_BYTES", draw.choice([1, 2, 3, 7, 65536]))
        assert json_bounds.last_field(text) == [*fields][-1]
        cut = draw.randrange(1, len(text))
        names = [None, *fields]
        whole = len(from_json(text[:cut], allow_partial=True))  # of which the value has begun, and is no number
        assert json_bounds.last_field(text[:cut]) in names[whole : whole + 2], text[:cut]
    assert json_bounds.last_field(b'["a", "b"') is json_bounds.last_field(b"") is None


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 50}] * 50}),
        (ChatRequest, {"messages": [{}] * 50}),
        (ChatRequest, {"messages": [0] * 50}),
        (TokenizeRequest, {"messages": [{"role": "user", "content": [""] * 50}]}),
        (CompletionRequest, {"prompt": [-1] * 50}),
        (CompletionRequest, {"prompt": [["a"] * 50] * 50}),
        (CompletionRequest, {"prompt": ["a"] + [0] * 50}),
        (CompletionRequest, {"prompt": "a", "stop": [0] * 50}),
        (EmbeddingsRequest, {"input": [[None] * 50] * 50}),
        (EmbeddingsRequest, {"messages": [[{}] * 50] * 50}),
        (RerankRequest, {"query": "a", "documents": [{}] * 50}),
        (RerankRequest, {"query": "a", "documents": [0] * 50}),
        (ScoreRequest, {"text_1": [{"content": [{}] * 50}] * 50, "text_2": "a"}),
        (DetokenizeRequest, {"tokens": [""] * 50}),
    ],
)
def test_checking_ends_at_the_first_error(model: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() <= 2, caught.value


def many(piece: str, total_bytes: int) -> bytes:
    """A body whose field `tools` is full of a piece."""
    return b'{%b,"tools":[%b' % (CHAT.encode(), piece.encode() * (total_bytes // len(piece)))


@pytest.mark.parametrize("piece", ["[[[]]],", "[],", "{},", '{"a":1},', '"",', "0,", "null,", "[", '"k":0,', "1.5,"])
async def test_many_small_values_are_refused_while_they_arrive(port: int, piece: str) -> None:
    body = many(piece, 48 * MiB)
    head = request("POST", "/v1/chat/completions", headers={"Content-Length": str(len(body) + 2)})
    reply, sent = await flood(port, head, [body[start : start + 65536] for start in range(0, len(body), 65536)])
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (400, "too_many_values")
    assert reply.error["param"] == "tools"
    assert sent < len(body) - 8 * MiB  # the answer came first, whatever the system had taken in meanwhile


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_every_endpoint_counts(port: int, path: str) -> None:
    for field in ("messages", "input", "documents", "logit_bias", "metadata", "anything"):
        reply = await post(port, path, b'{"%b":[%b]}' % (field.encode(), b",".join([b"[]"] * 70_000)))
        assert reply.status == 400, path
        if path.startswith(OTHER_FORMS):  # their errors have no place for a code or a field
            assert f"the last of them in `{field}`" in reply.body.decode(), path
        else:
            assert (reply.error["code"], reply.error["param"]) == ("too_many_values", field), path


async def worst_answer(port: int, work: asyncio.Task[Any]) -> float:
    worst = 0.0
    while not work.done():
        start_s = time.perf_counter()
        await get(port, "/livez")
        worst = max(worst, time.perf_counter() - start_s)
        await asyncio.sleep(0.01)
    return worst


async def test_others_are_answered_beside_eight_such_clients(served: Served) -> None:
    parts = json.dumps({"role": "user", "content": [{}] * 256})
    bodies = [
        many("[[[]]],", 8 * MiB) + b"0]}",
        many("[],", 8 * MiB) + b"0]}",
        b'{"messages":[%b]}' % ",".join([parts] * 1024).encode(),
        json.dumps({"prompt": [[999] * 500] * 1000}).encode(),
    ] * 2
    before = resident_bytes([os.getpid()])

    async def attack() -> list[int]:
        replies = await asyncio.gather(*(post(served.port, "/v1/completions", body) for body in bodies))
        return [reply.status for reply in replies]

    work = asyncio.create_task(attack())
    assert await worst_answer(served.port, work) < 20  # tens of seconds without bounds; generous for busy machines
    assert set(work.result()) == {400}
    assert served.http._app.context.pending.total == 0
    assert resident_bytes([os.getpid()]) - before < 400 * MiB


async def test_large_bodies_of_few_values_pass() -> None:
    async with serving(FakeEngine()) as served:
        blob = "A" * (16 * MiB)
        reply = await post(served.port, "/v1/completions", {"prompt": "hi", "max_tokens": 1, "metadata": blob})
        assert reply.status == 200
        code = '{"a":[1,2,{"b":"c\\n"}]},' * 100_000
        reply = await post(served.port, "/v1/completions", {"prompt": "hi", "max_tokens": 1, "metadata": code})
        assert reply.status == 200
        ids = [[300] * 128] * 2048  # refused for their number, which the operator can raise, not for the body's form
        reply = await post(served.port, "/tokenize", {"prompt": "hi", "ids": ids})
        assert reply.status == 200
        assert json.loads(reply.body)["count"] == 2
