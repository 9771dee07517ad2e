"""`LLM` and `AsyncLLM`: the same answers as over HTTP, from the program's own objects."""

from __future__ import annotations

import base64
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from support import server

import sensorium
from sensorium import LLM, AsyncLLM, PoolingParams, SamplingParams
from sensorium.errors import RequestError, SensoriumError, StartupError

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
    prompts = ["hello", [5, 6, 7], {"prompt": "a red"}, {"prompt_token_ids": [9, 8]}]
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
        texts = [one.outputs[0].text async for one in llm.chat([{"role": "user", "content": "Who are you?"}], GREEDY)]
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


def test_the_package_names_them_and_loads_nothing_heavy() -> None:
    assert {"LLM", "AsyncLLM", "SamplingParams", "PoolingParams"} <= set(sensorium.__all__)
    with pytest.raises(AttributeError):
        sensorium.Nothing  # noqa: B018
