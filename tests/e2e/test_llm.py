"""`LLM` and `AsyncLLM`: the same answers as over HTTP, from the program's own objects."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support import server
from support.adapters import make_adapter, merge
from support.bert import make_colbert
from support.checkpoints import make_llama
from support.engine_harness import bench
from support.whisper import make_whisper, speech

import sensorium
from sensorium import LLM, AsyncLLM, LoRARequest, PoolingParams, SamplingParams, types
from sensorium.api.transport.server import build_app
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.cli.batch import form_of
from sensorium.cli.in_process import AppCaller
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError, SensoriumError, StartupError
from sensorium.llm.results import Transcript
from sensorium.models.loading import load_model
from sensorium.serving.catalog import Catalog
from sensorium.types import EngineRequest, Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SIZES: dict[str, Any] = {"kv_cache_memory": "96MiB", "threads": 1}


def drawing(*, shift: int = 0) -> Image.Image:
    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((20 + shift, 30, 70 + shift, 80), fill="red")
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def asked(part: Any, words: str = "What is in the picture?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": words}]}]


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def tone() -> np.ndarray[Any, Any]:
    return (0.3 * np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)).astype(np.float32)


def wav(samples: np.ndarray[Any, Any]) -> bytes:
    """16 bits, as a client would send it."""
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SIZES) as found:
        yield found


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        server.running(tmp_path_factory.mktemp("http"), "--kv-cache-memory", "96MiB", "--threads", "1") as found,
        httpx.Client(base_url=found.url, timeout=120) as client,
    ):
        yield client


def over_http(http: httpx.Client, messages: Any) -> tuple[str, list[int]]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, "return_token_ids": True}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    return choice["message"]["content"], choice["token_ids"]


def test_the_program_s_objects_are_answered_as_files_are_over_http(
    llm: LLM, http: httpx.Client, tmp_path: Path
) -> None:
    image, sound = drawing(), tone()
    (tmp_path / "a.png").write_bytes(png(image))
    cases = [
        ([{"role": "user", "content": "Who are you?"}], [{"role": "user", "content": "Who are you?"}]),
        *(
            (asked({"type": "image_url", "image_url": {"url": url(png(image), "image/png")}}), asked(part))
            for part in (
                {"type": "image", "image": image},
                {"type": "image_pil", "image_pil": image},
                {"type": "image", "image": np.asarray(image)},
                {"type": "image", "image": tmp_path / "a.png"},
                {"type": "image", "image": png(image)},
            )
        ),
        (
            asked(
                {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(sound)).decode()}}, "What is it?"
            ),
            asked({"type": "audio", "audio": ((sound * 32767).round() / 32768, 16_000)}, "What is it?"),
        ),
    ]
    answers = llm.chat([own for _, own in cases], GREEDY)
    for (sent, _), answer in zip(cases, answers, strict=True):
        (output,) = answer.outputs
        assert (output.text, output.token_ids) == over_http(http, sent)
        assert answer.finished and output.finish_reason in ("stop", "length")
    assert "red circle" in answers[1].outputs[0].text


def test_frames_are_a_video(llm: LLM) -> None:
    clip = np.stack([np.asarray(drawing(shift=shift)) for shift in range(0, 40, 5)])
    several, arrays = (
        llm.chat(asked({"type": "video", "video": one}, "What happens?"), GREEDY)
        for one in ([Image.fromarray(frame) for frame in clip], clip)
    )
    assert several[0].prompt_token_ids == arrays[0].prompt_token_ids
    assert several[0].outputs[0].text == arrays[0].outputs[0].text
    assert "right" in arrays[0].outputs[0].text


def test_prompts_are_answered_in_order_each_with_its_params(llm: LLM, http: httpx.Client) -> None:
    prompts: list[Any] = ["hello", [5, 6, 7], {"prompt": "a red"}, {"prompt_token_ids": [9, 8]}]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 2, 3, 4)]
    found = llm.generate(prompts, params)
    assert [len(one.outputs[0].token_ids) for one in found] == [1, 2, 3, 4]
    assert [one.prompt for one in found] == ["hello", None, "a red", None]
    for given, one in zip(("hello", [5, 6, 7], "a red", [9, 8]), found, strict=True):
        count = len(one.outputs[0].token_ids)
        body = {"prompt": given, "temperature": 0, "max_tokens": count, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == one.outputs[0].text
    (one,) = llm.generate("hello", SamplingParams(n=2, seed=1, max_tokens=3, logprobs=2, ignore_eos=True))
    assert [len(output.logprobs or ()) for output in one.outputs] == [3, 3]
    first = one.outputs[0]
    assert first.cumulative_logprob == pytest.approx(
        sum(place[token].logprob for place, token in zip(first.logprobs or (), first.token_ids, strict=True))
    )


def test_a_prompt_s_own_placeholders_take_media(llm: LLM) -> None:
    words = "<|vision_bos|><|IMAGE|><|vision_eos|>"
    chat = llm.chat(asked({"type": "image", "image": drawing()}), GREEDY)[0]
    text = llm._llm.model.tokenizer.decode(chat.prompt_token_ids, skip_special_tokens=False)
    pad = text.partition("<|vision_bos|>")[2].partition("<|vision_eos|>")[0]
    prompt = text.replace(f"<|vision_bos|>{pad}<|vision_eos|>", words)
    (one,) = llm.generate({"prompt": prompt, "multi_modal_data": {"image": drawing()}}, GREEDY)
    assert one.outputs[0].text == chat.outputs[0].text
    with pytest.raises(RequestError, match=r"multi_modal_data.image\[0\]"):
        llm.generate({"prompt": prompt, "multi_modal_data": {"image": 3}})


def test_vectors_are_those_of_http(llm: LLM, http: httpx.Client) -> None:
    texts = ["a red circle", "a blue star", "hello"]
    theirs = [one["embedding"] for one in http.post("/v1/embeddings", json={"input": texts}).json()["data"]]
    found = llm.embed(texts)
    for ours, wanted in zip(found, theirs, strict=True):
        np.testing.assert_allclose(ours.outputs.embedding, wanted, atol=1e-6)
    (pictured,) = llm.embed(asked({"type": "image", "image": drawing()}))
    assert pictured.outputs.embedding.shape == found[0].outputs.embedding.shape
    (raw,) = llm.embed("hello", PoolingParams(use_activation=False))
    assert np.linalg.norm(raw.outputs.embedding) != pytest.approx(1, abs=0.01)
    (tokens,) = llm.encode("a red circle", pooling_task="token_embed")
    assert tokens.outputs.data.shape == (len(tokens.prompt_token_ids), len(raw.outputs.embedding))


def test_tokens_of_late_interaction_are_those_that_are_compared(tmp_path: Path) -> None:
    """Each side with its own mark and length; a document's punctuation is left out, as over HTTP."""
    make_colbert(tmp_path)
    queries, documents = ["paris ?", "bread"], ["Paris, the capital of France.", "bread . , flour ?"]
    with LLM(str(tmp_path), threads=1) as llm:
        sides = [
            [one.outputs.data for one in llm.encode(texts, PoolingParams(input_type=kind), pooling_task="token_embed")]
            for texts, kind in ((queries, "query"), (documents, "document"))
        ]
        assert [len(vectors) for vectors in sides[0]] == [16, 16]  # filled up to the length of queries
        (unsaid,) = llm.encode(documents[1], pooling_task="token_embed")
        np.testing.assert_allclose(unsaid.outputs.data, sides[1][1], atol=1e-6)
        assert len(unsaid.outputs.data) == len(unsaid.prompt_token_ids) - 3
        scores = [one.outputs.score for one in llm.score(queries, documents)]
        wanted = [(query @ document.T).max(1).sum() for query, document in zip(*sides, strict=True)]
        np.testing.assert_allclose(scores, wanted, rtol=1e-4)
        with pytest.raises(RequestError, match="neither"):
            llm.encode("a", PoolingParams(input_type="clustering"), pooling_task="token_embed")


def test_scores_compare_vectors_and_rank(llm: LLM) -> None:
    with pytest.raises(RequestError, match="generates text"):
        llm.score("a", "b")
    image = {"type": "image", "image": drawing()}
    with LLM(task="embed", **SIZES) as embedder:
        texts = ["a red circle", "hello", "a blue star"]
        vectors = [one.outputs.embedding for one in embedder.embed(texts)]
        scores = [one.outputs.score for one in embedder.score(texts[0], texts)]
        np.testing.assert_allclose(scores, [vectors[0] @ vector for vector in vectors], atol=1e-5)
        assert [one.outputs.score for one in embedder.score(texts, texts)] == pytest.approx([1, 1, 1], abs=1e-5)
        ranked = embedder.rerank(texts[0], texts, top_n=2)
        assert [one.relevance_score for one in ranked] == pytest.approx(sorted(scores, reverse=True)[:2], abs=1e-5)
        assert ranked[0].index == 0
        assert embedder.score([image], [[image]])[0].outputs.score == pytest.approx(1, abs=1e-5)
        with pytest.raises(RequestError, match="1 and N"):
            embedder.score(["a", "b"], ["a", "b", "c"])
        with pytest.raises(RequestError, match="must not be empty"):
            embedder.rerank("a", [])


async def test_streams_grow_and_end_early() -> None:
    async with AsyncLLM(**SIZES) as llm:
        question: list[Any] = [{"role": "user", "content": "Who are you?"}]
        texts: list[str] = []
        for _ in range(20):  # a reader that gets no time sees an answer at once
            texts = [one.outputs[0].text async for one in llm.chat(question, GREEDY)]
            if len(texts) > 2:
                break
        assert len(texts) > 2
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        stream = llm.generate("hello", SamplingParams(max_tokens=500, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        whole = await llm.complete("hello", SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(whole.outputs[0].token_ids) == 2
        pid = llm.model.client.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(SensoriumError, match="not open"):
        await llm.complete("hello")


TRANSCRIPTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("transcriptions", {}),
    ("transcriptions", {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}),
    ("transcriptions", {"response_format": "srt", "language": "de", "prompt": "before"}),
    ("translations", {"response_format": "verbose_json", "temperature": 0.3, "seed": 4}),
)


async def test_transcripts_are_those_of_http(tmp_path: Path) -> None:
    """The same model behind the application: a file there, a file and the program's samples here."""
    make_whisper(tmp_path / "ears", seed=6, generation={"max_new_tokens": 12})
    samples = speech(2.513, 3)
    async with AsyncLLM(str(tmp_path / "ears"), **SIZES, dtype="float32") as llm:
        app = AppCaller(build_app(Catalog.of({"ears": llm.model}), ServerConfig(), Limits()))
        for name, fields in TRANSCRIPTS:
            reply = await app(f"/v1/audio/{name}", *form_of(fields, wav(samples)))
            asked = {"translates": name == "translations", **fields}
            found = await llm.transcribe(wav(samples), **asked)
            check_transcript(found, reply.body, fields.get("response_format", "json"))
            assert round((await llm.transcribe((samples, 16_000), **asked)).duration_s, 3) == 2.513
        with pytest.raises(RequestError, match="`language`"):
            await llm.transcribe(wav(samples), language="xx")


def check_transcript(found: Transcript, body: bytes, form: str) -> None:
    assert found.text
    if form == "srt":
        assert found.text == body.decode()
        return
    expected = json.loads(body)
    assert found.text == expected["text"]
    if form == "verbose_json":
        assert [one.tokens for one in found.segments] == [tuple(one["tokens"]) for one in expected["segments"]]
        words = [(one.text.strip(), one.start_s, one.end_s) for one in found.words]
        assert words == [(one["word"], one["start"], one["end"]) for one in expected["words"] or ()]


def test_a_chat_model_that_hears_transcribes(llm: LLM, http: httpx.Client) -> None:
    found = llm.transcribe([wav(tone()), wav(tone()[:8000])], language="en")
    for one, samples in zip(found, (tone(), tone()[:8000]), strict=True):
        reply = http.post("/v1/audio/transcriptions", files={"file": wav(samples)}, data={"language": "en"}).json()
        assert (one.text, one.language) == (reply["text"], "en")
    assert [one.duration_s for one in found] == [1.0, 0.5]
    with pytest.raises(RequestError, match="tells no times"):
        llm.transcribe(wav(tone()), response_format="srt")


def test_what_is_wrong_is_told_as_ours(llm: LLM) -> None:
    for bad, word in (
        (SamplingParams(temperature=9), "temperature"),
        (SamplingParams(stop_token_ids=[10**9]), "stop_token_ids"),
        (SamplingParams(structured_outputs={"regex": "("}), "structured_outputs"),
    ):
        with pytest.raises(RequestError) as refused:
            llm.generate("hello", bad)
        assert word in (refused.value.param or "")
    with pytest.raises(RequestError, match="one for each"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError):
        llm.chat([{"role": "user", "content": [{"type": "image", "image": object()}]}])
    with pytest.raises(RequestError, match="does not classify"):
        llm.classify("hello")
    for arguments, words in (
        ({"max_model_lem": 5}, "did you mean --max-model-len"),
        ({"port": 8000}, "no server|for a server"),
        ({"model": "/no/such/folder"}, "no such folder"),
        ({"dtype": "float7"}, "dtype"),
    ):
        with pytest.raises(StartupError, match=words):
            LLM(**arguments)
    assert llm.generate("hello", GREEDY)[0].finished


def said_by(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of a checkpoint, each prompt alone."""
    model = load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    params = types.SamplingParams(max_tokens=count, temperature=0.0)
    made = bench(model, max_model_len=64)
    asked = [EngineRequest(number, Prompt(np.array(ids, np.int32)), params) for number, ids in enumerate(prompts)]
    return [made.run(one)[0].tokens for one in asked]


def test_adapters_by_name_and_by_path(tmp_path: Path) -> None:
    """Each says what its merged model says; one that is loaded on the way stays, one in its place is another."""
    base = tmp_path / "base"
    make_llama(base)
    one, two = (make_adapter(tmp_path / name, base, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    merged = [merge(base, folder, tmp_path / f"m{place}", {"": 2.0}) for place, folder in enumerate((one, two))]
    prompts, greedy = [[5, 9, 11], [7, 3]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def ids(llm: LLM, adapter: LoRARequest | None = None) -> list[list[int]]:
        answers = llm.generate(prompts, greedy, lora_request=adapter)
        return [answer.outputs[0].token_ids for answer in answers]

    expected = [said_by(folder, prompts, 8) for folder in merged]
    with LLM(str(base), dtype="float32", lora=[f"first={one}"], **SIZES) as llm:
        plain = ids(llm)
        assert ids(llm, LoRARequest("first")) == expected[0] != plain
        assert ids(llm, LoRARequest("second", 2, str(two))) == expected[1] != expected[0]
        assert ids(llm, LoRARequest("second")) == expected[1]
        vectors = [
            llm.embed([prompts[0]], lora_request=one)[0].outputs.embedding for one in (None, LoRARequest("second"))
        ]
        assert abs(vectors[0] - vectors[1]).max() > 0.01
        assert ids(llm, LoRARequest("first", 1, str(two))) == expected[1]
        assert ids(llm) == plain
        with pytest.raises(RequestError, match="'third' does not exist"):
            llm.generate("a", lora_request=LoRARequest("third"))
        with pytest.raises(RequestError, match="adapter third: "):
            llm.generate("a", lora_request=LoRARequest("third", 3, str(base)))


def test_the_package_names_them_and_loads_nothing_heavy() -> None:
    assert {"LLM", "AsyncLLM", "SamplingParams", "PoolingParams"} <= set(sensorium.__all__)
    with pytest.raises(AttributeError):
        sensorium.Nothing  # noqa: B018


def test_a_draft_model_changes_no_answer(llm: LLM) -> None:
    prompts = ["The sea is", "Once upon a time"]
    with LLM(draft_model="sensorium-demo", **SIZES) as drafted:
        for params in (GREEDY, SamplingParams(temperature=1, seed=3, max_tokens=24)):
            expected, found = (
                [one.outputs[0].token_ids for one in each.generate(prompts, params)] for each in (llm, drafted)
            )
            assert found == expected
            text = max((one.outputs[0].text for one in llm.generate(prompts, params)), key=len)
            stop = text[len(text) // 2 :][:3]  # amid what several tokens at once have said
            for shown in (False, True):
                stopping = replace(params, stop=stop, include_stop_str_in_output=shown)
                first, second = (each.generate(prompts, stopping) for each in (llm, drafted))
                assert [one.outputs for one in second] == [one.outputs for one in first]
                assert stop in [one.outputs[0].stop_reason for one in first]
        ready, alone = drafted._llm.model.client.ready, llm._llm.model.client.ready
        assert ready is not None
        assert alone is not None
        assert ready.weight_bytes == 2 * alone.weight_bytes
        assert ready.kv_tokens < alone.kv_tokens
