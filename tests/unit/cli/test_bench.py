"""The load generator against a tiny server that answers at known times."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import pytest

from sensorium.cli import bench
from sensorium.cli.client import Endpoint, Remote, RemoteError
from sensorium.cli.loads import Load, chat_request
from sensorium.config import BenchConfig
from sensorium.errors import StartupError

TTFT_S, GAP_S = 0.05, 0.02


class FakeServer:
    """Speaks just enough HTTP: lists one model, streams `max_tokens` chunks, fails when a test says so."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.connections = 0
        self.in_flight = self.most_in_flight = 0
        self.fail_every = 0
        self.newline = b"\n"
        self.split = False  # cut the stream into single bytes
        self.context = 10_000  # tokens of a prompt that is pooled
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields["Content-Length"]))
                self.keys.append(fields.get("Authorization", ""))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                await self.answer(head.split(b" ")[1].decode(), body, writer)
                self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            self.plain(writer, 200, {"data": [{"id": "fake"}]})
            return
        request = json.loads(body)
        self.bodies.append(request)
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            self.plain(writer, 503, {"error": {"message": "too busy"}})
            return
        if path in ("/v1/embeddings", "/v1/rerank"):
            texts = request.get("input") or [request["query"], *request["documents"]]
            words = sum(len(one.split()) for one in ([texts] if isinstance(texts, str) else texts))
            if 3 + 2 * words > self.context:
                self.plain(writer, 400, {"error": {"message": "too long"}})
                return
            self.plain(writer, 200, {"usage": {"prompt_tokens": 3 + 2 * words, "total_tokens": 3 + 2 * words}})
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(TTFT_S)
        for index in range(request["max_tokens"]):
            if index:
                await asyncio.sleep(GAP_S)
            self.event(writer, {"choices": [{"index": 0, "delta": {"content": f"w{index} "}}]})
        text = str(request["messages"][0]["content"])
        self.event(
            writer,
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 10 + 2 * len(text.split()),
                    "completion_tokens": request["max_tokens"],
                    "prompt_tokens_details": {"cached_tokens": 1},
                },
            },
        )
        self.chunk(writer, b"data: [DONE]" + 2 * self.newline)
        writer.write(b"0\r\n\r\n")

    def plain(self, writer: asyncio.StreamWriter, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    def event(self, writer: asyncio.StreamWriter, content: object) -> None:
        data = b": comment" + self.newline + b"data: " + json.dumps(content).encode() + 2 * self.newline
        for piece in [data[i : i + 1] for i in range(len(data))] if self.split else [data]:
            self.chunk(writer, piece)

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def config(self, **changes: Any) -> BenchConfig:
        base = {
            "base_url": f"http://127.0.0.1:{self.port}",
            "requests": 6,
            "concurrency": 3,
            "output_tokens": 4,
            "input_tokens": 20,
            "warmup": 1,
        }
        return BenchConfig(**{**base, **changes})


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()


async def test_closed_loop_counts_and_times() -> None:
    async with fake_server() as fake:
        figures = await bench.run(fake.config())
    assert (figures["completed"], figures["errors"], figures["output_tokens"]) == (6, {}, 24)
    assert fake.most_in_flight == 3
    assert fake.connections == 3  # kept alive
    assert TTFT_S * 1e3 <= figures["ttft_ms"]["p50"] < 10 * TTFT_S * 1e3
    assert GAP_S * 1e3 * 0.9 <= figures["tpot_ms"]["p50"] < 10 * GAP_S * 1e3
    assert figures["itl_ms"]["max"] >= figures["itl_ms"]["p50"] >= GAP_S * 1e3 * 0.9
    assert figures["e2e_ms"]["p50"] == pytest.approx(figures["ttft_ms"]["p50"] + 3 * figures["tpot_ms"]["p50"], rel=0.3)
    assert figures["output_tokens_per_s"] == pytest.approx(24 / figures["wall_s"], rel=0.01)
    assert figures["total_tokens_per_s"] == pytest.approx((24 + figures["prompt_tokens"]) / figures["wall_s"], rel=0.01)
    assert figures["cached_tokens"] == 6


async def test_prompts_have_the_wanted_length_and_differ() -> None:
    async with fake_server() as fake:
        await bench.run(fake.config(input_tokens=40))
        again = len(fake.bodies)
        await bench.run(fake.config(input_tokens=40))
    texts = [body["messages"][0]["content"] for body in fake.bodies[:again]]
    assert all(len(text.split()) == 20 for text in texts[2:])  # the server counts two tokens a word
    assert len(set(texts)) == len(texts) == 2 + 1 + 6  # calibration, warm-up, load
    assert texts == [body["messages"][0]["content"] for body in fake.bodies[again:]]  # seeded
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in fake.bodies)


async def test_open_loop_sends_at_its_rate() -> None:
    async with fake_server() as fake:
        figures = await bench.run(fake.config(requests=10, rate=100.0, output_tokens=2))
    assert fake.most_in_flight > 3  # does not wait for answers
    assert figures["completed"] == 10
    assert figures["load"]["concurrency"] is None
    assert figures["wall_s"] < 10 * (TTFT_S + GAP_S)


async def test_pictures() -> None:
    async with fake_server() as fake:
        await bench.run(fake.config(kind="image", images=2, image_size=(64, 32), requests=2))
    parts = fake.bodies[-1]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    urls = [part["image_url"]["url"] for part in parts[:2]]
    assert urls[0] != urls[1]
    assert all(url.startswith("data:image/jpeg;base64,/9j/") for url in urls)


async def test_failures_are_counted_by_message() -> None:
    async with fake_server() as fake:
        fake.fail_every = 4  # of 2 + 1 + 6 requests: the 4th and the 8th
        figures = await bench.run(fake.config())
    assert figures["errors"] == {"503: too busy": 2}
    assert figures["completed"] == 4
    assert figures["output_tokens"] == 16


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_events_are_cut_wherever_the_bytes_break(newline: bytes) -> None:
    async with fake_server() as fake:
        fake.newline, fake.split = newline, True
        figures = await bench.run(fake.config(requests=2, warmup=0, output_tokens=3))
    assert (figures["completed"], figures["output_tokens"]) == (2, 6)


async def test_a_connection_that_breaks_is_an_error() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Remote(Endpoint.parse(f"http://127.0.0.1:{port}")) as remote:
        sample = await bench.send(remote, chat_request("m", "hello", 4))
        assert "closed before" in sample.error
    server.close()


async def test_silence_ends_with_the_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Remote(Endpoint.parse(f"http://127.0.0.1:{port}"), timeout_s=0.1) as remote:
        with pytest.raises(RemoteError, match=r"within 0\.1 s"):
            await remote.models()
    server.close()


async def test_the_key_is_sent() -> None:
    async with fake_server() as fake:
        await bench.run(fake.config(api_key="secret", requests=1))
    assert set(fake.keys) == {"Bearer secret"}


def requests_of(kind: str, **options: Any) -> list[dict[str, Any]]:
    load = Load(BenchConfig(kind=kind, image_size=(33, 20), input_tokens=6, **options), "m")
    return [json.loads(load.request().body) for _ in range(2)]


def test_recordings_and_clips_are_files_of_their_kind() -> None:
    sounds, clips = requests_of("audio", audio_seconds=0.5), requests_of("video", frames=3)
    for body in sounds:
        part = body["messages"][0]["content"][0]["input_audio"]
        with wave.open(io.BytesIO(base64.b64decode(part["data"]))) as file:
            assert (file.getframerate(), file.getnframes(), part["format"]) == (16_000, 8_000, "wav")
    for body in clips:
        url = body["messages"][0]["content"][0]["video_url"]["url"]
        with av.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), "r") as container:
            frames = list(container.decode(video=0))
        assert [(frame.width, frame.height) for frame in frames] == [(32, 20)] * 3
    for one, other in (sounds, clips):
        assert one["messages"][0]["content"][1]["type"] == "text"
        assert one != other
        assert one["ignore_eos"]


def test_tools_and_forms_end_by_themselves() -> None:
    tools, forms = requests_of("tools")[0], requests_of("json")[0]
    assert (tools["tools"][0]["function"]["name"], tools["tool_choice"]) == ("get_weather", "required")
    assert forms["response_format"]["json_schema"]["schema"]["required"] == ["title", "words", "count"]
    assert "ignore_eos" not in tools and "ignore_eos" not in forms


def test_texts_and_documents_come_as_many_as_asked() -> None:
    texts, ranking = requests_of("embeddings", inputs=5)[0]["input"], requests_of("rerank", inputs=3)[0]
    assert (len(set(texts)), {len(one.split()) for one in texts}) == (5, {6})
    assert (len(ranking["documents"]), len(ranking["query"].split())) == (3, 8)


@pytest.mark.parametrize("kind", ["embeddings", "rerank"])
async def test_what_is_not_streamed_is_timed_whole(kind: str) -> None:
    async with fake_server() as fake:
        figures = await bench.run(fake.config(kind=kind, inputs=2))
        sent = fake.bodies[-1]
    assert (figures["completed"], figures["output_tokens"], figures["errors"]) == (6, 0, {})
    texts = sent.get("input") or sent["documents"]
    assert {len(one.split()) for one in texts} == {10}  # two tokens a word
    assert figures["prompt_tokens"] == 6 * (3 + 2 * (20 if kind == "embeddings" else 28))
    assert figures["ttft_ms"] == figures["e2e_ms"]
    assert figures["e2e_ms"]["p50"] > 0


async def test_short_contexts_are_measured_too() -> None:
    """CLIP takes 77 tokens: what tells the size of a word must not need more than the load itself."""
    async with fake_server() as fake:
        fake.context = 60
        figures = await bench.run(fake.config(kind="embeddings", inputs=1, input_tokens=40))
        assert (figures["completed"], len(fake.bodies[-1]["input"][0].split())) == (6, 20)
        fake.context = 10
        with pytest.raises(RemoteError, match="too long"):
            await bench.run(fake.config(kind="embeddings", inputs=1, input_tokens=40))


async def test_figures_of_tokens_are_shown_where_there_are_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_server() as fake:
        assert await asyncio.to_thread(bench.bench, fake.config(kind="embeddings")) == 0
    printed = capsys.readouterr().out
    assert "whole request" in printed and "requests/s" in printed
    for word in ("first token", "per output token", "between chunks", "output tok"):
        assert word not in printed


async def test_command_writes_json_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_server() as fake:
        file = tmp_path / "figures.json"
        config = fake.config(json=str(file), api_key="secret")
        assert await asyncio.to_thread(bench.bench, config) == 0
        figures = json.loads(file.read_text())
        assert figures["load"]["model"] == "fake"
        assert "secret" not in file.read_text()
        printed = capsys.readouterr().out
        assert "time to first token" in printed
        assert "output tok/s" in printed
        fake.fail_every = 4
        fake.bodies.clear()
        assert await asyncio.to_thread(bench.bench, fake.config()) == 1
        assert "2 failed: 503: too busy" in capsys.readouterr().out


def test_no_server_is_one_clear_line() -> None:
    with pytest.raises(StartupError, match=r"cannot connect to 127\.0\.0\.1:1"):
        bench.bench(BenchConfig(base_url="http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("url", "prefix", "port"),
    [("http://h:1", "/v1", 1), ("http://h:1/v1/", "/v1", 1), ("h:1", "/v1", 1), ("https://h/api/v1", "/api/v1", 443)],
)
def test_addresses(url: str, prefix: str, port: int) -> None:
    endpoint = Endpoint.parse(url)
    assert (endpoint.prefix, endpoint.port) == (prefix, port)


@pytest.mark.parametrize("url", ["ftp://x", "http://", ""])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(RemoteError):
        Endpoint.parse(url)


def test_percentiles() -> None:
    assert [bench.percentile([4, 1, 3, 2], p) for p in (0, 50, 100)] == [1, 2.5, 4]
    assert bench.percentile([], 50) == 0
    assert bench.percentile([7], 99) == 7
