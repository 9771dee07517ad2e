"""Requests from their first to their last moment: clients that leave, errors at every stage, full queues, shutting down
(R8, R9, R13, R15, R19, R20, S76)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import openai
import pytest
from openai import AsyncOpenAI
from support.api_support import (
    ANSWER,
    READY,
    FakeEngine,
    chat,
    complete,
    events,
    free_port,
    get,
    make_model,
    post,
    raw,
    read_reply,
    request,
    serving,
    speak,
    until,
)

from sensorium.api import docs_page
from sensorium.api.guards.in_flight import InFlightRequests
from sensorium.api.transport.asgi import Message
from sensorium.api.transport.server import listen, serve
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestTimeoutError, StartupError, UnavailableError
from sensorium.serving.catalog import Catalog
from sensorium.types import EngineOutput, EngineReady, EngineRequest

LIMITS = Limits()
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
slowly = partial(speak, delay_s=0.03, ends=False)


async def forever(request: EngineRequest) -> AsyncIterator[EngineOutput]:
    await asyncio.sleep(60)
    yield EngineOutput(request.id)


async def failing(request: EngineRequest, *, after: int) -> AsyncIterator[EngineOutput]:
    for token in range(40, 40 + after):
        yield EngineOutput(request.id, (token,))
    yield EngineOutput(request.id, finish_reason="error", error="The step that computed this request failed.")


async def lost(request: EngineRequest, *, after: int) -> AsyncIterator[EngineOutput]:
    for token in range(40, 40 + after):
        yield EngineOutput(request.id, (token,))
    raise UnavailableError("The engine was lost.")


async def broken(request: EngineRequest) -> AsyncIterator[EngineOutput]:
    yield EngineOutput(request.id, (40,))
    raise RuntimeError("secret at /usr/lib/python3/site-packages 0xdeadbeef")


async def open_request(port: int, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("POST", "/v1/chat/completions", json.dumps({**CHAT, **fields}).encode()))
    return reader, writer


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_leaves_before_the_first_token(fields: dict[str, Any], reset: bool) -> None:
    async with serving(FakeEngine(script=forever)) as served:
        _, writer = await open_request(served.port, **fields)
        count = fields.get("n", 1)
        await until(lambda: len(served.engine.active) == count)
        if reset:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: not served.engine.active)
        assert len(served.engine.aborted) == count


async def test_a_client_that_leaves_in_the_middle_of_a_stream() -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        reader, writer = await open_request(served.port, stream=True)
        for _ in range(3):
            await reader.readuntil(b"\n\n")
        writer.close()
        await until(lambda: not served.engine.active)
        assert served.engine.aborted == [0]
        page = (await get(served.port, "/metrics")).body.decode()
        assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0' in page


async def test_openai_client_closing_a_stream() -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="tiny", stream=True, **CHAT)  # type: ignore[call-overload]
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: not served.engine.active)


async def test_many_clients_that_leave_take_everything_with_them() -> None:
    engine = FakeEngine(script=slowly)
    engine.config = replace(engine.config, max_num_seqs=64)
    async with serving(engine) as served:

        async def visit() -> None:
            reader, writer = await open_request(served.port, stream=True)
            await reader.readuntil(b"\n\n")
            writer.transport.abort()

        await asyncio.gather(*(visit() for _ in range(60)))
        await until(lambda: not engine.active)
        context = served.http._app.context
        await until(lambda: len(context.in_flight) == 0)
        admission = context.at_the_edge("tiny").admission
        assert (admission.sequences, admission.prompt_tokens) == (0, 0)
        assert (await complete(served.port, max_tokens=1)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [(partial(failing, after=0), 500, "engine_error"), (partial(lost, after=0), 503, "unavailable")],
)
async def test_errors_before_the_first_token_have_a_status(script: Any, status: int, code: str, stream: bool) -> None:
    async with serving(FakeEngine(script=script)) as served:
        for n in (1, 2):
            reply = await chat(served.port, stream=stream, n=n)
            assert (reply.status, reply.error["code"]) == (status, code)
            assert reply.headers["content-type"] == "application/json"
            assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("script", "code"),
    [(partial(failing, after=3), "engine_error"), (partial(lost, after=3), "unavailable"), (broken, "internal_error")],
)
async def test_errors_in_the_middle_are_events(script: Any, code: str, n: int) -> None:
    async with serving(FakeEngine(script=script)) as served:
        reply = await chat(served.port, stream=True, n=n)
        assert reply.status == 200
        found = events(reply.body)
        assert found[-1]["error"]["code"] == code
        assert set(found[-1]["error"]) == {"message", "type", "param", "code"}
        assert "secret" not in reply.body.decode()
        assert sum("error" in event for event in found) == 1
        assert not served.engine.active
        assert (await get(served.port, "/livez")).status == 200


async def test_the_client_raises_on_an_error_event() -> None:
    async with serving(FakeEngine(script=partial(failing, after=3))) as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="tiny", stream=True, **CHAT)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="step"):
            async for _ in stream:
                pass


async def test_what_is_not_ours_is_hidden_behind_an_id(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeEngine(script=broken)) as served:
        reply = await chat(served.port)
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert reply.headers["x-request-id"] in reply.error["message"]
        assert reply.headers["x-request-id"] in caplog.text


async def test_a_full_queue_refuses_at_once() -> None:
    limits = replace(LIMITS, max_waiting=2)
    async with serving(FakeEngine(script=slowly), limits=limits) as served:
        running = [asyncio.create_task(chat(served.port, max_tokens=20)) for _ in range(6)]
        await until(lambda: len(served.engine.active) == 6)
        used_s = time.process_time()
        reply = await chat(served.port, messages=[{"role": "user", "content": "x" * 10**6}])
        assert time.process_time() - used_s < 5
        assert (reply.status, reply.error["code"]) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert [(await task).status for task in running] == [200] * 6
        assert (await chat(served.port, max_tokens=1)).status == 200
        assert (await chat(served.port, max_tokens=1, n=16)).status == 200  # alone, it may be larger than the queue
        assert 'reason="queue_full"' in (await get(served.port, "/metrics")).body.decode()


async def test_waiting_prompt_tokens_are_bounded() -> None:
    engine = FakeEngine(script=slowly, ready=replace(READY, kv_tokens=100))
    engine.config = replace(engine.config, max_num_seqs=64)
    async with serving(engine) as served:
        long = [{"role": "user", "content": "x" * 450}]
        running = [asyncio.create_task(chat(served.port, max_tokens=20, messages=long)) for _ in range(8)]
        statuses = sorted([(await task).status for task in running])
        assert statuses[0] == 200
        assert statuses[-1] == 503
        assert (await chat(served.port, max_tokens=1)).status == 200


async def test_all_bodies_together_are_bounded() -> None:
    limits = replace(LIMITS, max_pending_bytes=300_000, body_timeout_s=1.0)
    async with serving(limits=limits) as served:
        data = json.dumps({**CHAT, "user": "u", "x": "y" * 200_000}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("POST", "/v1/chat/completions", data)[:-10])
        await until(lambda: served.http._app.context.pending.total > 190_000)
        reply = await post(served.port, "/v1/chat/completions", data)
        assert (reply.status, reply.error["code"]) == (503, "overloaded")
        assert "retry-after" in reply.headers
        assert (await chat(served.port)).status == 200
        writer.close()
        await until(lambda: served.http._app.context.pending.total == 0)
        assert (await post(served.port, "/v1/chat/completions", data)).status == 200
        assert served.http._app.context.pending.total == 0


async def test_bodies_are_not_held_while_tokens_come() -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        running = asyncio.create_task(chat(served.port, max_tokens=10, x="y" * 100_000))
        await until(lambda: len(served.engine.active) == 1)
        assert served.http._app.context.pending.total == 0
        assert (await running).status == 200


async def test_leaving_while_the_prompt_is_made_ends_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def fetching(*args: Any, **options: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with serving() as served:
        monkeypatch.setattr(served.http._app.context.catalog.find(None).model.prompts, "prepare_chat", fetching)
        _, writer = await open_request(served.port)
        await until(lambda: len(served.http._app.context.in_flight) == 1)
        writer.close()
        await until(lambda: bool(ended))
        await until(lambda: served.http._app.context.at_the_edge("tiny").admission.sequences == 0)
        assert not served.engine.requests


async def test_one_key_cannot_take_everything() -> None:
    limits = replace(LIMITS, max_concurrency_per_key=2)
    async with serving(FakeEngine(script=slowly), limits=limits, api_key=("a", "b")) as served:

        async def ask(key: str) -> int:
            reply = await post(
                served.port,
                "/v1/chat/completions",
                {**CHAT, "max_tokens": 10},
                headers={"Authorization": f"Bearer {key}"},
            )
            if reply.status == 429:
                assert reply.error["type"] == "rate_limit_error"
                assert "retry-after" in reply.headers
            return reply.status

        assert sorted(await asyncio.gather(*(ask("a") for _ in range(4)), ask("b"))) == [200, 200, 200, 429, 429]
        assert await ask("a") == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_end_in_time(stream: bool) -> None:
    limits = replace(LIMITS, request_timeout_s=0.3)
    async with serving(FakeEngine(script=slowly), limits=limits) as served:
        reply = await chat(served.port, stream=stream)
        if stream:
            assert events(reply.body)[-1]["error"]["code"] == "request_timeout"
        else:
            assert (reply.status, reply.error["code"]) == (408, "request_timeout")
        assert not served.engine.active


async def test_the_time_begins_anew_with_every_part() -> None:
    async def receive() -> Message:
        return await asyncio.Future()

    now, limit = asyncio.get_running_loop().time, 1000.0
    with pytest.raises(RequestTimeoutError, match="A part of the request took longer than 1000 seconds"):
        async with InFlightRequests().open(receive, limit) as opened:
            opened._timeout.reschedule(now() + limit / 2)  # half of it has passed
            opened.progressed()
            assert (opened._timeout.when() or 0.0) > now() + limit / 2
            opened._timeout.reschedule(now())
            await asyncio.Future()
    async with InFlightRequests().open(receive, None) as endless:
        endless.progressed()
        assert endless._timeout.when() is None


async def test_silence_is_filled_with_comments() -> None:
    async def pausing(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(request.id, (40,))
        await asyncio.sleep(0.5)
        yield EngineOutput(request.id, (41,), finish_reason="length")

    async with serving(FakeEngine(script=pausing), limits=replace(LIMITS, keep_alive_comment_s=0.1)) as served:
        reply = await chat(served.port, stream=True)
        assert 2 <= reply.body.count(b": keep-alive\n\n") <= 5
        assert len(events(reply.body)) == 3
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="tiny", stream=True, **CHAT)  # type: ignore[call-overload]
        assert len([chunk async for chunk in stream]) == 3


async def test_a_reader_that_stops_costs_little_and_stops_nobody() -> None:
    async def chatty(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        for _ in range(3000):
            yield EngineOutput(request.id, (40,) * 1000)
            await asyncio.sleep(0)
        yield EngineOutput(request.id, (40,), finish_reason="length")

    async with serving(FakeEngine(script=chatty)) as served:
        _, writer = await open_request(served.port, stream=True)
        await until(lambda: len(served.engine.active) == 1)
        await asyncio.sleep(0.3)
        connection = next(iter(served.http._uvicorn.server_state.connections))
        assert connection.transport.get_write_buffer_size() < 1_000_000
        assert (await get(served.port, "/v1/models")).status == 200
        writer.transport.abort()
        await until(lambda: not served.engine.active)


async def test_health_follows_the_engine() -> None:
    engine = FakeEngine(state="loading", ready=None)
    async with serving(engine) as served:
        for state, ready in (("loading", 503), ("ready", 200), ("restarting", 503), ("ready", 200), ("failed", 503)):
            engine.state = state
            engine.ready = None if state == "loading" else READY
            for path in ("/readyz", "/health", "/v1/models"):
                reply = await get(served.port, path)
                assert reply.status == ready, (state, path)
                assert ("retry-after" in reply.headers) == (ready == 503)
            assert (await chat(served.port)).status == ready
            assert (await post(served.port, "/tokenize", {"prompt": "a"})).status == ready
            for path in ("/livez", "/metrics", "/version", "/docs", "/openapi.json"):
                assert (await get(served.port, path)).status == 200


async def test_draining_lets_streams_end_and_nothing_in() -> None:
    async with serving(FakeEngine(script=slowly)) as served:
        streams = [asyncio.create_task(chat(served.port, stream=True, max_tokens=15)) for _ in range(4)]
        await until(lambda: len(served.engine.active) == 4)
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(served.http.drain())
        await asyncio.sleep(0.05)
        reply = await chat(served.port)
        assert reply.status == 503
        assert "retry-after" in reply.headers
        assert (await get(served.port, "/readyz")).status == 503
        assert (await get(served.port, "/livez")).status == 200
        await draining
        for stream in streams:
            assert events((await stream).body)[-1]["choices"][0]["finish_reason"] == "length"


async def test_what_does_not_end_in_time_is_told_so() -> None:
    async with serving(FakeEngine(script=slowly), limits=replace(LIMITS, drain_timeout_s=0.2)) as served:
        stream = asyncio.create_task(chat(served.port, stream=True))
        plain = asyncio.create_task(chat(served.port))
        await until(lambda: len(served.engine.active) == 2)
        await asyncio.sleep(0.1)
        await served.http.drain()
        assert events((await stream).body)[-1]["error"]["code"] == "server_shutting_down"
        assert (await plain).error["code"] == "server_shutting_down"
        assert not served.engine.active


async def run_serve(engine: FakeEngine, port: int) -> tuple[asyncio.Task[int], list[str]]:
    config, limits = ServerConfig(port=port), replace(LIMITS, drain_timeout_s=1.0)
    model = make_model(engine, config, limits)
    urls: list[str] = []
    return asyncio.create_task(
        serve(Catalog.of({"tiny": model}), config, limits, urls.append, listener=listen(config))
    ), urls


async def test_sigterm_drains_and_exits_with_zero() -> None:
    port = free_port()
    task, urls = await run_serve(FakeEngine(script=slowly), port)
    await until(lambda: bool(urls))
    assert urls == [f"http://127.0.0.1:{port}"]
    stream = asyncio.create_task(chat(port, stream=True, max_tokens=15))
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert (await chat(port)).status == 503
    assert events((await stream).body)[-1]["choices"][0]["finish_reason"] == "length"
    assert await asyncio.wait_for(task, 120) == 0
    with pytest.raises(OSError):
        await get(port, "/livez")


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 0), ((signal.SIGTERM, signal.SIGINT), 0)],
)
async def test_a_second_signal_or_an_interrupt_ends_at_once(signals: tuple[int, ...], code: int) -> None:
    port = free_port()
    engine = FakeEngine(script=forever)
    task, urls = await run_serve(engine, port)
    await until(lambda: bool(urls))
    waiting = asyncio.create_task(chat(port))
    await until(lambda: bool(engine.active))
    start_s = time.perf_counter()
    for number in signals:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.02)
    assert await asyncio.wait_for(task, 120) == code
    assert time.perf_counter() - start_s < 25  # those that run may take thirty
    assert (await waiting).error["code"] == "server_shutting_down"


async def test_serving_starts_before_the_model_is_there() -> None:
    port = free_port()
    engine = FakeEngine(state="loading", ready=None)
    task, urls = await run_serve(engine, port)
    await asyncio.sleep(0.2)
    reply = await chat(port)
    assert reply.status == 503
    assert "retry-after" in reply.headers
    assert not urls
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(task, 120) == 0


async def test_a_model_that_cannot_be_loaded_is_a_startup_error() -> None:
    class Unloadable(FakeEngine):
        async def wait_ready(self) -> EngineReady:
            raise StartupError("The file model.safetensors is truncated.")

    task, _ = await run_serve(Unloadable(state="loading", ready=None), free_port())
    with pytest.raises(StartupError, match="truncated"):
        await asyncio.wait_for(task, 120)


async def test_an_engine_that_is_lost_for_good_ends_the_server() -> None:
    engine = FakeEngine()
    task, urls = await run_serve(engine, free_port())
    await until(lambda: bool(urls))
    engine.state = "failed"
    assert await asyncio.wait_for(task, 120) == 1


def test_a_taken_port_is_a_startup_error() -> None:
    first = listen(ServerConfig(port=0))
    port = first.getsockname()[1]
    with pytest.raises(StartupError, match=str(port)):
        listen(ServerConfig(port=port))
    first.close()


async def test_a_taken_metrics_port_is_a_startup_error_too() -> None:
    taken = listen(ServerConfig(port=0))
    config = ServerConfig(port=0, metrics_port=taken.getsockname()[1])
    model = make_model(FakeEngine(), config, LIMITS)
    with pytest.raises(StartupError, match=str(config.metrics_port)):
        await serve(Catalog.of({"tiny": model}), config, LIMITS, lambda url: None)
    taken.close()


async def test_the_metrics_port_answers_figures_and_health_without_a_key_and_nothing_else() -> None:
    port, metrics_port = free_port(), free_port()
    config = ServerConfig(port=port, metrics_port=metrics_port, api_key=("secret",))
    model, urls = make_model(FakeEngine(), config, LIMITS), []  # type: ignore[var-annotated]
    task = asyncio.create_task(serve(Catalog.of({"tiny": model}), config, LIMITS, urls.append))
    await until(lambda: bool(urls))
    try:
        assert (await get(port, "/metrics")).status == 401
        for path in ("/metrics", "/livez", "/readyz", "/health"):
            assert (await get(metrics_port, path)).status == 200
        for path in ("/v1/models", "/version", "/docs", "/openapi.json", "/", "/load", "/tokenizer_info"):
            assert (await get(metrics_port, path)).status == 404
        assert (await chat(metrics_port)).status == 404
        assert (await post(metrics_port, "/v1/models/unload", {"model": "tiny"})).status == 404
        foreign = b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        assert (await raw(metrics_port, foreign)).status == 403
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(task, 120) == 0
    with pytest.raises(OSError):
        await get(metrics_port, "/metrics")


async def test_the_metrics_page() -> None:
    async with serving() as served:
        await chat(served.port, n=2)
        await complete(served.port, stream=True, max_tokens=3)
        await chat(served.port, n=0)
        page = (await get(served.port, "/metrics")).body.decode()
        labels = 'engine="0",model_name="tiny"'
        tokens = len(ANSWER.encode()) + 1
        for line in (
            f"vllm:num_requests_running{{{labels}}} 1.0",
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.6",
            f"vllm:generation_tokens_total{{{labels}}} {2 * tokens + 3}.0",
            f"vllm:e2e_request_latency_seconds_count{{{labels}}} 2.0",
            f"vllm:time_to_first_token_seconds_count{{{labels}}} 3.0",
            f"vllm:inter_token_latency_seconds_count{{{labels}}} {2 * (tokens - 1) + 2}.0",
            'http_requests_total{code="400",handler="/v1/chat/completions",method="POST",status="4xx"} 1.0',
        ):
            assert line in page
        assert "# TYPE vllm:time_to_first_token_seconds histogram" in page


async def test_the_description() -> None:
    async with serving(api_key=("k",), root_path="/x") as served:
        headers = {"Authorization": "Bearer k"}
        with patch.object(docs_page, "description", wraps=docs_page.description) as made:
            replies = await asyncio.gather(*(get(served.port, "/openapi.json", headers=headers) for _ in range(4)))
        assert made.call_count == 1  # it takes half a second
        document = replies[0].json
        assert document["openapi"] == "3.1.0"
        assert document["servers"] == [{"url": "/x"}]
        references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
        assert references <= set(document["components"]["schemas"])
        reply = await get(served.port, "/docs", headers=headers)
        page = reply.body.decode()
        assert "/v1/chat/completions" in page
        assert "temperature" in page
        assert "<script" not in page
        assert "://" not in page
        assert "default-src 'none'" in reply.headers["content-security-policy"]


async def test_old_clients_of_http() -> None:
    async with serving(host="0.0.0.0") as served:
        assert (await raw(served.port, b"GET /livez HTTP/1.0\r\n\r\n")).status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("HEAD", "/v1/models"))
        reply = await read_reply(reader, head=True)
        assert (reply.status, int(reply.headers["content-length"]) > 0) == (200, True)
        writer.write(request("GET", "/livez"))  # had there been a body, this answer would not be read as one
        assert (await read_reply(reader)).json == {"status": "alive"}
        writer.close()
