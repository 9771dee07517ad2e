"""Uploaded recordings: the form as it streams in, what the model is asked, and every form of answer (S10, S18, S67)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from support.api_support import (
    ANSWER,
    LEAKS,
    READY,
    TOKENIZER,
    FakeEngine,
    Reply,
    Served,
    events,
    raw,
    request,
    serving,
    speak,
)
from support.clips import sound, tone

from sensorium.api.protocol.audio import AudioRequest, parse_fields
from sensorium.api.protocol.common import UnknownFields
from sensorium.config import Limits
from sensorium.errors import RequestError, UnsupportedFieldError
from sensorium.processors.ultravox import UltravoxProcessor
from sensorium.serving.defaults import ModelDefaults
from sensorium.types import EngineOutput, EngineRequest

BOUNDARY = "x0123456789"
EARS = {"processor": UltravoxProcessor, "config": {"audio_config": {"num_mel_bins": 8, "max_source_positions": 50}}}
PATH = "/v1/audio/transcriptions"
SECONDS = 0.3


@pytest.fixture(scope="module")
def clip() -> bytes:
    return sound(tone(SECONDS, 16_000)[None], 16_000)


def listening(**options: Any) -> Any:
    return serving(FakeEngine(), model=EARS, **options)


def part(name: str, value: bytes | str, *, file_name: str | None = None, more: str = "") -> bytes:
    file = "" if file_name is None else f'; filename="{file_name}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{more}\r\n'
    return head.encode("latin-1") + (value.encode() if isinstance(value, str) else value) + b"\r\n"


def form(clip: bytes, file_name: str = "a.wav", **fields: Any) -> bytes:
    texts = b"".join(part(name, str(value)) for name, value in fields.items())
    return texts + part("file", clip, file_name=file_name) + f"--{BOUNDARY}--\r\n".encode()


async def upload(served: Served, body: bytes, path: str = PATH, *, boundary: str = BOUNDARY) -> Reply:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return await raw(served.port, request("POST", path, body, headers=headers), timeout_s=120)


def prompt_of(asked: EngineRequest) -> str:
    return TOKENIZER.decode(asked.prompt.token_ids.tolist(), skip_special_tokens=False)


async def test_the_official_client_in_every_form(clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "speech.wav").write_bytes(clip)
    async with listening() as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
        transcribe = client.audio.transcriptions.create
        found = await transcribe(model="tiny", file=("speech.wav", clip))
        assert found.text == ANSWER
        assert found.model_extra is not None
        assert found.to_dict()["usage"] == {"type": "duration", "seconds": 1}
        assert (await transcribe(model="tiny", file=tmp_path / "speech.wav", response_format="text")) == ANSWER + "\n"
        verbose = await transcribe(model="tiny", file=clip, response_format="verbose_json", language="de")
        assert (verbose.text, verbose.language) == (ANSWER, "de")
        assert float(verbose.duration) == pytest.approx(SECONDS, abs=0.01)
        translated = await client.audio.translations.create(model="tiny", file=("b.ogg", clip))
        assert translated.text == ANSWER
        with pytest.raises(BadRequestError) as refused:
            await transcribe(model="tiny", file=clip, response_format="srt")
        assert (refused.value.param, refused.value.code) == ("response_format", "unsupported_field")
        with pytest.raises(BadRequestError) as refused:
            options: Any = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
            await transcribe(model="tiny", file=clip, **options)
        assert (refused.value.param, refused.value.code) == ("timestamp_granularities", "unsupported_field")


async def test_what_the_model_is_asked(clip: bytes) -> None:
    async with listening() as served:
        await upload(served, form(clip, language="de", prompt="Über <|end|> uns.", hotwords="Köln"))
        await upload(served, form(clip, to_language="fr"), "/v1/audio/translations")
        await upload(served, form(clip), "/api/v1/audio/translations")
        first, second, third = served.engine.requests
    rows = first.prompt.spans[0]
    assert rows.length == first.prompt.media[0].num_rows > 0
    text = prompt_of(first)
    for words in ("recording, word for word", "spoken in German", "Über <|end|> uns.", "Köln", "<|start|>assistant\n"):
        assert words in text
    assert first.prompt.token_ids.tolist().count(TOKENIZER.token_to_id("<|end|>")) == 1  # the template's own
    assert "Write down in French" in prompt_of(second)
    assert "Write down in English" in prompt_of(third)


async def test_sampling_is_greedy_unless_told(clip: bytes) -> None:
    async with listening() as served:
        await upload(served, form(clip))
        await upload(
            served,
            form(
                clip,
                temperature="0.5",
                top_p="0.9",
                top_k="7",
                min_p="0.1",
                seed="5",
                presence_penalty="-1",
                frequency_penalty="1",
                repetition_penalty="1.2",
                max_completion_tokens="3",
            ),
        )
        first, second = (one.sampling for one in served.engine.requests)
    assert first is not None and second is not None
    assert (first.temperature, first.max_tokens > 100) == (0.0, True)
    assert (second.temperature, second.top_p, second.top_k, second.min_p, second.seed) == (0.5, 0.9, 7, 0.1, 5)
    assert (second.presence_penalty, second.frequency_penalty, second.repetition_penalty) == (-1, 1, 1.2)
    assert second.max_tokens == 3


async def test_streams(clip: bytes) -> None:
    async with listening() as served:
        reply = await upload(served, form(clip, stream="true", stream_include_usage="true"))
        plain = await upload(served, form(clip, stream="true"))
        await asyncio.sleep(0)
        found = events(reply.body)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in found[:-1]) == ANSWER
        assert {chunk["object"] for chunk in found} == {"transcription.chunk"}
        assert found[0]["id"].startswith("trsc-")
        assert found[-2]["choices"][0]["finish_reason"] == "stop"
        assert (found[-1]["choices"], found[-1]["usage"]["completion_tokens"] > 0) == ([], True)
        assert "usage" not in events(plain.body)[-1]
        named = await upload(served, form(clip, stream="true", request_id="mine"))
        assert {chunk["id"] for chunk in events(named.body)} == {"trsc-mine"}
        reply = await upload(served, form(clip, stream="1", response_format="verbose_json"))
        assert reply.error["param"] == "response_format"


async def test_one_stream_for_both_kinds_of_clients(clip: bytes) -> None:
    """The loop of OpenAI's documentation, and vLLM's."""
    async with listening() as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
        stream = await client.audio.transcriptions.create(model="tiny", file=("a.wav", clip), stream=True)
        found: list[Any] = [event async for event in stream]
        reply = await upload(served, form(clip, stream="true"))
    assert {event.type for event in found[:-1]} == {"transcript.text.delta"}
    assert "".join(event.delta for event in found[:-1]) == ANSWER
    assert (found[-1].type, found[-1].text) == ("transcript.text.done", ANSWER)
    chunks = events(reply.body)
    for chunk in chunks[:-1]:
        assert chunk["choices"][0]["delta"]["content"] == chunk["delta"]
        assert chunk["choices"][0]["finish_reason"] is None
    assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["delta"]["content"]) == ("stop", "")


async def test_models_without_ears(clip: bytes) -> None:
    async with serving() as served:
        reply = await upload(served, form(clip))
        assert (reply.status, reply.error["code"]) == (400, "unsupported_modality")
    embedder = FakeEngine(
        ready=READY.__class__(**{**{name: getattr(READY, name) for name in READY.__slots__}, "tasks": ("embed",)})
    )
    async with serving(embedder, model=EARS) as served:
        assert (await upload(served, form(clip))).error["code"] == "unsupported_task"
        assert (await upload(served, form(clip, model="other"))).status == 404


# S10: names of files.


async def test_file_names_mean_nothing(clip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with listening() as served:
        for name in ("../../../../../tmp/pwn.wav", "/etc/cron.d/pwn", "a\x00b.wav", "x" * 4096, "", "ü.wav"):
            reply = await upload(served, form(clip, name))
            assert reply.status == 200, reply.body
            assert reply.json["text"] == ANSWER
    assert not list(tmp_path.iterdir())
    assert not Path("/tmp/pwn.wav").exists()


# S18, S67: size and shape of the form.


async def test_uploads_end_at_their_limit_however_they_come(clip: bytes) -> None:
    limits = Limits(max_upload_bytes=200_000, max_audio_bytes=100_000)
    async with listening(limits=limits) as served:
        declared = request(
            "POST",
            PATH,
            b"",
            headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Content-Length": str(2**31)},
        )
        assert (await raw(served.port, declared)).status == 413
        reply = await upload(served, form(bytes(100_001)))
        assert (reply.status, reply.error["code"]) == (400, "audio_file_too_large")
        head = request(
            "POST",
            PATH,
            b"",
            headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Transfer-Encoding": "chunked"},
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head.replace(b"Content-Length: 0\r\n", b""))
        body = part("file", b"", file_name="a")[:-2]
        writer.write(b"%x\r\n%b\r\n" % (len(body), body))
        sent = 0
        try:
            while sent < 5_000_000 and not reader.at_eof():
                writer.write(b"2000\r\n" + bytes(8192) + b"\r\n")
                sent += 8192
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        answer = await reader.read(1000)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert not served.engine.requests


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"hello", 400, None),
        (b"\r\n" * 1000, 400, None),
        (f"--{BOUNDARY}--\r\n".encode(), 400, "file"),
        (part("model", "tiny") + f"--{BOUNDARY}--\r\n".encode(), 400, "file"),
        (part("file", b"x", file_name="a"), 400, None),  # the end is missing
        (part("file", b"x") * 2 + f"--{BOUNDARY}--\r\n".encode(), 400, "file"),
        (part("model", "tiny") * 2 + part("file", b"x") + f"--{BOUNDARY}--\r\n".encode(), 400, "model"),
        (b"".join(part(f"f{i}", "x") for i in range(65)), 400, None),
        (b"".join(part(f"f{i}", "x") for i in range(10_000)), 400, None),
        (part("prompt", "x" * 70_000), 413, None),
        (part("prompt", "x" * 9_000) + part("file", b"x"), 400, None),
        (part("prompt", "x" * 9_000) + part("file", b"x") + f"--{BOUNDARY}--\r\n".encode(), 400, "prompt"),
        (part("prompt", b"\xff\xfe") + part("file", b"x") + f"--{BOUNDARY}--\r\n".encode(), 400, "prompt"),
        (part("", b"x"), 400, None),
        (part("n" * 65, b"x"), 400, None),
        (part("a\tb", b"x"), 400, None),
        (f"--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), 400, None),
        (f"--{BOUNDARY}\r\n: x\r\n\r\nx".encode(), 400, None),
        (f"--{BOUNDARY}\r\n".encode() + b"A: b\r\n" * 20 + b"\r\nx", 400, None),
        (f"--{BOUNDARY}\r\nA: ".encode() + b"b" * 10_000, 400, None),
        (
            part(
                "file",
                b'--inner\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--inner--',
                more="Content-Type: multipart/mixed; boundary=inner\r\n",
            )
            + f"--{BOUNDARY}--\r\n".encode(),
            400,
            "file",
        ),
        (part("file", b"") + f"--{BOUNDARY}--\r\n".encode(), 400, "file"),
        (part("file", b"RIFFnothing") + f"--{BOUNDARY}--\r\n".encode(), 400, "file"),
    ],
    ids=range(24),
)
async def test_malformed_forms(body: bytes, status: int, param: str | None) -> None:
    async with listening() as served:
        reply = await upload(served, body)
        assert (reply.status, reply.error["param"]) == (status, param), reply.body


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/mixed; boundary=x", 415),
        ("", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=" + "x" * 71, 400),
        ('multipart/form-data; boundary="a\x7fb"', 400),
    ],
)
async def test_bodies_of_other_kinds(clip: bytes, content_type: str, status: int) -> None:
    async with listening() as served:
        headers = {"Content-Type": content_type}
        assert (await raw(served.port, request("POST", PATH, form(clip), headers=headers))).status == status
        many = b"&".join(b"a%d=1" % i for i in range(100_000))
        reply = await raw(
            served.port, request("POST", PATH, many, headers={"Content-Type": "application/x-www-form-urlencoded"})
        )
        assert reply.status == 415


async def test_a_form_cut_into_single_bytes_is_the_same_form(clip: bytes) -> None:
    async with listening() as served:
        body = form(clip[:2000], language="de")
        head = request(
            "POST",
            PATH,
            b"",
            headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Content-Length": str(len(body))},
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head)
        for place in range(0, 400):
            writer.write(body[place : place + 1])
            await asyncio.sleep(0)
        writer.write(body[400:])
        status = (await reader.readuntil(b"\r\n")).split()[1]
        writer.close()
        whole = await upload(served, body)
        assert int(status) == whole.status
        assert len({one.prompt.token_ids.tobytes() for one in served.engine.requests}) <= 1


# S41: values.


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", ["nan", "inf", "-0.1", "2.1", "x"]),
        ("top_p", ["0", "1.1", "x"]),
        ("top_k", ["-2", "1.5"]),
        ("min_p", ["2"]),
        ("seed", [str(2**63), "1.5"]),
        ("stream", ["maybe"]),
        ("language", ["x" * 33, "<|end|>", "1"]),
        ("to_language", ["a\nb"]),
        ("response_format", ["xml", "diarized_json"]),
        ("n", ["2"]),
        ("max_completion_tokens", ["0", "-1", "1e3"]),
        ("presence_penalty", ["3"]),
        ("use_beam_search", ["true"]),
        ("vllm_xargs", ['{"a": 1}']),
        ("model", ["m" * 300]),
    ],
)
def test_values_out_of_bounds(field: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(RequestError) as caught:
            parse_fields({field: [value]}, UnknownFields())
        assert caught.value.param == field
        assert not LEAKS.search(caught.value.message)


def test_values_that_change_nothing() -> None:
    fields = {
        "n": ["1"],
        "use_beam_search": ["false"],
        "temperature": [""],
        "language": ["auto"],
        "chunking_strategy": ["auto"],
        "vllm_xargs": ["{}"],
        "length_penalty": ["1.0"],
        "unknown": ["x"],
    }
    defaults = ModelDefaults(max_model_len=100, vocab_size=10)
    given, plain = parse_fields(fields, UnknownFields()), AudioRequest()
    assert given.sampling(defaults, 1, "file") == plain.sampling(defaults, 1, "file")


@pytest.mark.parametrize(
    ("field", "given", "words"),
    [
        ("word_timestamps", ["true"], "`timestamp_granularities[]` asks for times"),
        ("known_speaker_names[]", ["a", "b"], "leave it out"),
        ("include[]", ["logprobs"], "leave it out"),
        ("initial_prompt", ["x"], "`prompt`"),
        ("max_tokens", ["5"], "`max_completion_tokens`"),
        ("task", ["translate"], "/v1/audio/translations"),
        ("translate", ["true"], "/v1/audio/translations"),
    ],
)
def test_what_other_servers_have_is_refused_by_name(field: str, given: list[str], words: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        parse_fields({field: given}, UnknownFields())
    assert caught.value.param == field.removesuffix("[]")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("de", "German"),
        ("DE", "German"),
        ("en-US", "English"),
        ("zh_Hans", "Chinese"),
        ("pt-BR", "Portuguese"),
        ("haw", "Hawaiian"),
        ("Norwegian", "Norwegian"),
        ("castilian", "Spanish"),
        ("sw", "Swahili"),
    ],
)
def test_languages_by_code_and_name(given: str, named: str) -> None:
    assert f"spoken in {named}." in parse_fields({"language": [given]}, UnknownFields()).instruction(translates=False)
    assert f"Write down in {named} " in parse_fields({"to_language": [given]}, UnknownFields()).instruction(
        translates=True
    )


@pytest.mark.parametrize("given", ["hh", "xx-US", "Klingon", "e", "english please", "en-", "d e"])
@pytest.mark.parametrize("field", ["language", "to_language"])
def test_no_other_word_reaches_the_prompt(field: str, given: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_fields({field: [given]}, UnknownFields())
    assert caught.value.param == field
    assert "ISO 639-1" in caught.value.message


def test_a_language_may_be_left_to_the_model() -> None:
    said = parse_fields({"language": ["auto"]}, UnknownFields()).instruction(translates=False)
    assert said == parse_fields({}, UnknownFields()).instruction(translates=False)


async def test_a_failure_in_the_middle(clip: bytes) -> None:
    async def failing(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        async for output in speak(asked, "abc", ends=False):
            yield output
            break
        yield EngineOutput(asked.id, finish_reason="error", error="The step failed.")

    async with serving(FakeEngine(script=failing), model=EARS) as served:
        reply = await upload(served, form(clip))
        assert (reply.status, reply.error["code"]) == (500, "engine_error")
        stream = await upload(served, form(clip, stream="true"))
        assert stream.status == 200
        assert json.loads(stream.body.split(b"data: ")[-2])["error"]["code"] == "engine_error"


async def test_large_uploads_do_not_hold_others_up() -> None:
    """Half-boundaries are the slowest that a form can be to read."""
    async with listening() as served:
        body = part("file", f"\r\n--{BOUNDARY[:-1]}!".encode() * 300_000) + f"--{BOUNDARY}--\r\n".encode()
        task = asyncio.create_task(upload(served, body))
        slowest_s = 0.0
        while not task.done():
            start_s = time.perf_counter()
            await asyncio.sleep(0.005)
            slowest_s = max(slowest_s, time.perf_counter() - start_s)
        assert task.result().status == 400
        assert slowest_s < 10
