"""Uploaded recordings to a model that transcribes: every form of answer, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from openai import AsyncOpenAI
from support.api_support import READY, FakeEngine, Reply, Served, events, raw, request
from support.clips import sound
from support.engine_harness import Bench, bench
from support.whisper import ENGLISH, make_whisper, speech

from sensorium.api.guards.in_flight import InFlightRequest
from sensorium.api.recordings import srt, vtt
from sensorium.api.transport.server import HttpServer, build_app, listen
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig, Limits, LoadConfig, ServeOptions, ServerConfig
from sensorium.media.loader import MediaLoader
from sensorium.models.loading import load_model
from sensorium.serving.catalog import Catalog
from sensorium.serving.model import ServedModel
from sensorium.serving.transcription import Segment
from sensorium.startup.model import media_loader
from sensorium.types import EngineOutput, EngineRequest

BOUNDARY = "x0123456789"
PATHS = {"transcribe": "/v1/audio/transcriptions", "translate": "/v1/audio/translations"}


class Ears:
    """A model, whose engine is asked step by step."""

    def __init__(self, path: Path, **generation: Any) -> None:
        make_whisper(path, seed=6, generation={"max_new_tokens": 12, **generation})
        self.checkpoint = open_checkpoint(path)
        self.model = load_model(self.checkpoint, dtype=torch.float32, device="cpu")
        self.bench: Bench = bench(self.model, max_model_len=64)

    async def script(self, asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        found = self.bench.run(asked)[0]
        assert not found.error
        stop = found.tokens[-1] if found.reason == "stop" and found.tokens else None
        yield EngineOutput(
            asked.id, tuple(found.tokens), found.reason, stop, tuple(found.logprobs), vector=found.vector
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Served]:
        tasks = ("transcribe", *self.model.poolers)
        engine = FakeEngine(script=self.script, ready=replace(READY, tasks=tasks, max_model_len=64))
        config, limits = ServerConfig(port=0), Limits()
        loader = MediaLoader(limits, workers=1)
        made = ServedModel.open(
            self.checkpoint,
            names=("ears",),
            server=config,
            limits=limits,
            loader=loader,
            client=engine,  # type: ignore[arg-type]
        )
        http = HttpServer(build_app(Catalog.of({"ears": made}), config, limits), limits, listen(config))
        await http.start()
        try:
            yield Served(http, engine, http.address[1])
        finally:
            await http.close()
            await made.aclose()


@pytest.fixture(scope="module")
def ears(tmp_path_factory: pytest.TempPathFactory) -> Ears:
    return Ears(tmp_path_factory.mktemp("whisper"))


CLIP = sound(speech(2.513, 3)[None], 16_000)


async def send(served: Served, task: str = "transcribe", **fields: Any) -> Reply:
    pieces = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, given in fields.items()
        for value in (given if isinstance(given, list) else [given])
    ]
    file = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
    body = b"".join([*pieces, file, CLIP, f"\r\n--{BOUNDARY}--\r\n".encode()])
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await raw(served.port, request("POST", PATHS[task], body, headers=headers), timeout_s=120)


async def test_every_form_of_an_answer(ears: Ears) -> None:
    async with ears.serving() as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=120)
        verbose = await client.audio.transcriptions.create(
            model="ears",
            file=("a.wav", CLIP),
            response_format="verbose_json",
            language="de",
            timestamp_granularities=["word", "segment"],
        )
        assert (verbose.language, verbose.to_dict()["task"]) == ("german", "transcribe")
        assert float(verbose.duration) == pytest.approx(2.513, abs=0.01)
        assert verbose.segments and verbose.words
        assert [one.id for one in verbose.segments] == list(range(len(verbose.segments)))
        assert verbose.text == "".join(one.text for one in verbose.segments).strip()
        assert all(0 <= one.start < one.end and one.avg_logprob < 0 < one.no_speech_prob for one in verbose.segments)
        assert "".join(verbose.text.split()) == "".join("".join(one.word.split()) for one in verbose.words)
        long = await send(served, language="German")
        assert long.json["usage"] == {"type": "duration", "seconds": 3}
        subtitles = await send(served, language="de", response_format="srt")
        assert subtitles.body.decode().startswith("1\n00:00:0") and subtitles.body.count(b" --> ") == len(
            verbose.segments
        )
        assert (await send(served, language="de", response_format="vtt")).body.startswith(b"WEBVTT\n\n00:00:0")
        plain = await send(served, language="de", response_format="text")
        assert plain.body.decode() == long.json["text"] + "\n"
        reply = await send(served, language="de", stream="true", stream_include_usage="true")
        found = events(reply.body)
        assert "".join(one["delta"] for one in found[:-2]) == found[-2]["text"] == long.json["text"]
        assert found[-1]["usage"]["completion_tokens"] > 0
        assert not served.engine.active


async def test_what_the_model_is_asked(ears: Ears) -> None:
    async with ears.serving() as served:
        asked = served.engine.requests
        translated = await send(served, "translate", prompt="a cat <|notimestamps|>", temperature="0.4", seed="3")
        assert translated.status == 200, translated.body
        detection, first = asked[:2]
        assert detection.prompt.token_ids.tolist() == [401]
        assert first.sampling is not None
        assert (first.sampling.temperature, first.sampling.seed) == (pytest.approx(0.4), 3)
        tokens = first.prompt.token_ids.tolist()
        assert tokens[0] == 408 and 410 not in tokens[:-1] and 405 in tokens
        assert all(len(one.prompt.media) == 1 for one in asked)


@pytest.mark.parametrize("stream", ["false", "true"])
async def test_every_window_has_the_time_of_a_request(stream: str, ears: Ears) -> None:
    with patch.object(InFlightRequest, "progressed") as progressed:
        async with ears.serving() as served:
            assert (await send(served, language="de", stream=stream)).status == 200
            assert progressed.call_count == len(served.engine.requests) >= 3


@pytest.mark.parametrize(
    ("task", "fields", "param"),
    [
        ("transcribe", {"language": "fr"}, "language"),
        ("transcribe", {"response_format": "diarized_json"}, "response_format"),
        ("transcribe", {"response_format": "srt", "stream": "true"}, "response_format"),
        ("transcribe", {"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ("transcribe", {"timestamp_granularities[]": ["letter"], "response_format": "verbose_json"}, None),
        ("transcribe", {"no_speech_threshold": "2"}, "no_speech_threshold"),
        ("transcribe", {"max_completion_tokens": "64"}, "file"),
        ("translate", {"to_language": "de"}, "to_language"),
    ],
)
async def test_what_is_refused(task: str, fields: dict[str, Any], param: str | None, ears: Ears) -> None:
    async with ears.serving() as served:
        reply = await send(served, task, **fields)
        assert reply.status == 400, reply.body
        assert param is None or reply.error["param"] == param
        assert not served.engine.requests


async def test_other_endpoints_say_what_the_model_can(ears: Ears) -> None:
    async with ears.serving() as served:
        for path, body in (
            ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"Hi"}]}'),
            ("/v1/completions", b'{"prompt":"Hi"}'),
            ("/v1/embeddings", b'{"input":"Hi"}'),
            ("/pooling", b'{"input":"Hi"}'),
        ):
            reply = await raw(served.port, request("POST", path, body))
            assert (reply.status, reply.error["param"]) == (400, "model"), reply.body
            assert "transcribe recordings (/v1/audio/transcriptions" in reply.error["message"]
        reply = await raw(served.port, request("POST", "/tokenize", b'{"prompt":"Hi<|en|>"}'))
        assert reply.json["tokens"][-1] == 402
        reply = await raw(served.port, request("GET", "/v1/models", b""))
        assert reply.status == 200


async def test_english_alone_and_without_heads_that_follow(tmp_path: Path) -> None:
    made = Ears(tmp_path, **ENGLISH, alignment_heads=None)
    async with made.serving() as served:
        assert (await send(served, "translate")).error["param"] == "model"
        assert (await send(served, language="de")).error["param"] == "language"
        words = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
        assert (await send(served, **words)).error["param"] == "timestamp_granularities"
        reply = await send(served, language="en", response_format="verbose_json")
        assert reply.json["language"] == "english"
        assert reply.json["words"] is None


async def test_recordings_may_be_longer_than_what_is_chatted_about() -> None:
    loader = media_loader(ServeOptions(None, LoadConfig(), EngineConfig("m"), ServerConfig(), Limits()))
    assert loader._limits.max_audio_seconds == 600.0
    longer = loader.of_recordings()
    assert longer is loader.of_recordings() and longer._limits.max_audio_seconds == 7200.0
    assert longer._images is loader._images and longer._streams is not loader._streams


def test_subtitles() -> None:
    def segment(start: float, end: float, text: str) -> Segment:
        return Segment(0, start, end, text, (), 0.0, -0.1, 1.0, 0.0)

    found = [segment(0.0, 1.5, " One\n\ntwo"), segment(3661.25, 36000.999, " --> three")]
    assert srt(found) == ("1\n00:00:00,000 --> 00:00:01,500\nOne two\n\n2\n01:01:01,250 --> 10:00:00,999\n-> three\n\n")
    assert vtt(found).splitlines()[:4] == ["WEBVTT", "", "00:00:00.000 --> 00:00:01.500", "One two"]
    assert (srt([]), vtt([])) == ("", "WEBVTT\n\n")
