"""Recordings for models that chat and have a prompt of their own for them (Qwen3-ASR, Voxtral), and for those that hear
only so much of one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from support.api_support import READY, FakeEngine, Reply, Served, events, raw, request, serving
from support.clips import sound, tone
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from sensorium.processors.base import Processor
from sensorium.processors.qwen2_audio import Qwen2AudioProcessor
from sensorium.processors.qwen3_asr import Qwen3AsrProcessor, TaggedTranscript, split
from sensorium.processors.voxtral import VoxtralProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineOutput, EngineRequest

PATH = "/v1/audio/transcriptions"
CONTEXT = 512
BOUNDARY = "x0123456789"
SPECIAL = (
    *("<|end|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>", "<s>"),
    *("[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]", "[TRANSCRIBE]", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
)


def make_tokenizer() -> Tokenizer:
    """Every byte is a token; the specials come after them, and the tag, which is none."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = RawTokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    made.add_tokens([AddedToken("<asr_text>", special=False, normalized=False)])
    return Tokenizer(made, {"eos_token": "<|end|>", "bos_token": "<s>"})


TOKENIZER = make_tokenizer()


def id_of(text: str) -> int:
    return TOKENIZER.token_to_id(text) or 0


async def say(text: str, asked: EngineRequest) -> AsyncIterator[EngineOutput]:
    tokens = TOKENIZER.encode(text)
    for place, token in enumerate(tokens, 1):
        yield EngineOutput(asked.id, (token,), finish_reason="stop" if place == len(tokens) else None)


def listening(processor: type[Processor], marker: str, text: str = "ja") -> Any:
    audio = {"max_source_positions": 50, "num_mel_bins": 8}
    model = {
        **{"processor": processor, "tokenizer": TOKENIZER, "context": CONTEXT},
        "config": {"audio_config": audio, "audio_token_id": id_of(marker)},
        "source": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    return serving(FakeEngine(partial(say, text), ready=READY), model=model)


asr = partial(listening, Qwen3AsrProcessor, "<|audio_pad|>")
voxtral = partial(listening, VoxtralProcessor, "[AUDIO]")


async def upload(served: Served, path: str = PATH, *, seconds: float = 0.6, **fields: Any) -> Reply:
    clip = sound(tone(seconds, 16_000)[None], 16_000)

    def part(name: str, more: str, value: bytes) -> bytes:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        return head.encode() + value + b"\r\n"

    texts = b"".join(part(name, "", str(value).encode()) for name, value in fields.items())
    body = texts + part("file", '; filename="a.wav"', clip) + f"--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await raw(served.port, request("POST", path, body, headers=headers), timeout_s=120)


def prompt_of(asked: EngineRequest) -> str:
    """Its text, with the rows of audio as one marker."""
    ids = asked.prompt.token_ids.tolist()
    span = asked.prompt.spans[0]
    del ids[span.offset + 1 : span.offset + span.length]
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def refusal(reply: Reply) -> tuple[int, str, str]:
    error = json.loads(reply.body)["error"]
    return reply.status, error["param"], error["message"]


ASR_TURN = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"


async def test_qwen3_asr_is_asked_as_its_package_asks() -> None:
    async with asr() as served:
        await upload(served)
        await upload(served, language="de", prompt="Köln <|im_end|> <asr_text>", hotwords="Dom")
        await upload(served, language="Cantonese")
        first, second, third = served.engine.requests
    assert prompt_of(first) == f"<|im_start|>system\n<|im_end|>\n{ASR_TURN}"
    assert first.prompt.spans[0].length == first.prompt.media[0].num_rows == 7 + 1
    told = f"<|im_start|>system\nDom Köln <|im_end|> <asr_text><|im_end|>\n{ASR_TURN}language German<asr_text>"
    assert prompt_of(second) == told
    ids = second.prompt.token_ids.tolist()
    assert (ids.count(id_of("<|im_end|>")), ids.count(id_of("<asr_text>"))) == (2, 1), "a client's text is text"
    assert prompt_of(third).endswith("assistant\nlanguage Cantonese<asr_text>")
    assert first.sampling is not None and (first.sampling.temperature, first.sampling.max_tokens > 300) == (0.0, True)


async def test_qwen3_asr_tells_the_language_and_not_the_tag() -> None:
    async with asr("language German<asr_text>Guten Tag") as served:
        assert json.loads((await upload(served)).body)["text"] == "Guten Tag"
        assert (await upload(served, response_format="text")).body == b"Guten Tag\n"
        verbose = json.loads((await upload(served, response_format="verbose_json")).body)
        assert (verbose["text"], verbose["language"]) == ("Guten Tag", "german")
        assert verbose["segments"] is None
        forced = json.loads((await upload(served, response_format="verbose_json", language="en")).body)
        assert (forced["text"], forced["language"]) == ("language German<asr_text>Guten Tag", "english")
        found = events((await upload(served, stream="true")).body)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == "Guten Tag"
        assert found[-1]["text"] == "Guten Tag"
    async with asr("language None<asr_text>") as served:
        silent = json.loads((await upload(served, response_format="verbose_json")).body)
        assert (silent["text"], silent["language"]) == ("", None)


async def test_qwen3_asr_refuses_what_it_cannot_do() -> None:
    async with asr() as served:
        status, param, message = refusal(await upload(served, "/v1/audio/translations"))
        assert (status, param) == (400, "model") and "does not translate" in message
        status, param, message = refusal(await upload(served, language="la"))
        assert (status, param) == (400, "language") and "does not know Latin" in message and "fil" in message
        for form in ("srt", "vtt"):
            assert refusal(await upload(served, response_format=form))[:2] == (400, "response_format")
        granular: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
        assert refusal(await upload(served, **granular))[:2] == (400, "timestamp_granularities")
        assert not served.engine.requests


async def test_voxtral_is_asked_to_transcribe_and_chats_to_translate() -> None:
    async with voxtral(" Bonjour. ") as served:
        assert json.loads((await upload(served)).body)["text"] == "Bonjour."
        verbose = json.loads((await upload(served, language="pt-BR", response_format="verbose_json")).body)
        assert verbose["language"] == "portuguese"
        await upload(served, "/v1/audio/translations")
        first, second, third = served.engine.requests
        assert refusal(await upload(served, prompt="Köln"))[:2] == (400, "prompt")
        assert refusal(await upload(served, response_format="vtt"))[:2] == (400, "response_format")
    assert prompt_of(first) == "<s>[INST][BEGIN_AUDIO][AUDIO][/INST][TRANSCRIBE]"
    assert prompt_of(second) == "<s>[INST][BEGIN_AUDIO][AUDIO][/INST]lang:pt[TRANSCRIBE]"
    assert "Write down in English" in prompt_of(third)


async def test_what_a_model_would_cut_is_refused() -> None:
    async with listening(Qwen2AudioProcessor, "<|AUDIO|>") as served:
        assert (await upload(served, seconds=1.0)).status == 200
        status, param, message = refusal(await upload(served, seconds=1.2))
    assert (status, param) == (400, "file") and "first 1 s" in message and "1.2 s" in message


async def test_a_recording_beyond_the_context_is_refused() -> None:
    async with asr() as served:
        status, _, message = refusal(await upload(served, seconds=45.0))
    assert status == 400 and str(CONTEXT) in message


@pytest.mark.parametrize(
    ("completion", "language", "text"),
    [
        ("language English<asr_text>Hello.", "en", "Hello."),
        ("language Cantonese<asr_text> a <asr_text> b", "yue", "a <asr_text> b"),
        ("language None<asr_text>", None, ""),
        ("no tag at all", None, "no tag at all"),
        ("<asr_text>x", None, "x"),
        ("\nLANGUAGE french\nmore<asr_text>x", "fr", "x"),
        ("language Klingon<asr_text>x", "Klingon", "x"),
        ("language <asr_text>x", None, "x"),
        ("", None, ""),
    ],
)
def test_completions_of_qwen3_asr(completion: str, language: str | None, text: str) -> None:
    assert split(completion) == (language, text)
    transcript = TaggedTranscript(None)
    assert (transcript.whole(completion), transcript.language) == (text, language)
    for size in (1, 3, 100):
        streamed = TaggedTranscript(None)
        pieces = [streamed.push(completion[i : i + size]) for i in range(0, len(completion), size)]
        assert ("".join(pieces) + streamed.finish()).strip() == text
        assert streamed.language == language
    assert TaggedTranscript("en").push("language ") == "language "


def test_a_text_that_only_begins_like_a_header_is_not_held_back_for_ever() -> None:
    transcript = TaggedTranscript(None)
    text = "Language is a system of signs which people use to tell each other what they know and want."
    shown = "".join(transcript.push(letter) for letter in text[:70])
    assert shown == text[:70]
