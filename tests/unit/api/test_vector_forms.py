"""How vectors are written and what inputs may look like: vLLM's bytes, Jina's and llama.cpp's objects."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.api_support import TOKENIZER, Served, post, serving
from support.pooling_engine import ALL, SIZE, engine_of, vector_of

from sensorium.api.numbers import packed

PROMPTS = {"prompts": {"retrieval.query": "Q: ", "retrieval.passage": "P: ", "classification": "C: "}}


def embedder(**options: Any) -> Any:
    return serving(engine_of(*ALL), **options)


def expected(*texts: str) -> list[np.ndarray]:
    return [vector_of(np.array(TOKENIZER.encode(text))) for text in texts]


def texts_of(served: Served) -> list[str]:
    return [
        TOKENIZER.decode(one.prompt.token_ids.tolist(), skip_special_tokens=False) for one in served.engine.requests
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("endianness", ["native", "little", "big"])
async def test_raw_bytes(dtype: str, endianness: str) -> None:
    vectors = expected("a", "bcd")
    wanted = [packed(vector, dtype, endianness) for vector in vectors]
    body = {"input": ["a", "bcd"], "embed_dtype": dtype, "endianness": endianness, "request_id": "r"}
    async with embedder() as served:
        only = await post(served.port, "/v1/embeddings", {**body, "encoding_format": "bytes_only"})
        told = await post(served.port, "/v1/embeddings", {**body, "encoding_format": "bytes"})
        text = await post(served.port, "/v1/embeddings", {**body, "encoding_format": "base64"})
        rows = await post(served.port, "/pooling", {**body, "encoding_format": "bytes", "task": "token_embed"})
    assert only.headers["content-type"] == told.headers["content-type"] == "application/octet-stream"
    assert only.body == told.body == b"".join(wanted)
    assert "metadata" not in only.headers
    metadata = json.loads(told.headers["metadata"])
    size = len(wanted[0])
    common = {"embed_dtype": dtype, "endianness": endianness, "shape": [SIZE]}
    assert metadata["data"] == [
        {"index": index, "start": index * size, "end": (index + 1) * size, **common} for index in range(2)
    ]
    assert (metadata["id"], metadata["model"], metadata["usage"]["prompt_tokens"]) == ("embd-r", "tiny", 4)
    assert [base64.b64decode(row["embedding"]) for row in text.json["data"]] == wanted
    assert [row["shape"] for row in json.loads(rows.headers["metadata"])["data"]] == [[1, 2], [3, 2]]


async def test_a_header_that_no_client_takes_is_refused() -> None:
    body = {"input": ["a"] * 1000, "encoding_format": "bytes"}
    async with embedder() as served:
        reply = await post(served.port, "/v1/embeddings", body)
        assert (reply.status, reply.error["param"]) == (400, "encoding_format")
        short = await post(served.port, "/v1/embeddings", {**body, "encoding_format": "bytes_only"})
        assert (short.status, len(short.body)) == (200, 1000 * SIZE * 4)


async def test_embedding_types_of_jina() -> None:
    [vector] = expected("a")
    bits = np.packbits(vector > 0)
    codes = np.rint(vector / vector.max() * 127).astype(int)
    async with embedder() as served:
        for form, wanted in (
            ("float", vector.tolist()),
            ("ubinary", bits.tolist()),
            ("binary", (bits.astype(int) - 128).tolist()),
            ("int8", codes.tolist()),
            ("uint8", (codes + 128).tolist()),
            ("base64", base64.b64encode(vector.astype("<f4").tobytes()).decode()),
        ):
            for given in (form, [form], [form, form]):
                reply = await post(served.port, "/v1/embeddings", {"input": "a", "embedding_type": given})
                assert reply.json["data"][0]["embedding"] == wanted, given
        several = await post(served.port, "/v1/embeddings", {"input": "a", "embedding_type": ["float", "int8"]})
        assert several.status == 400 and "/v2/embed" in several.error["message"]


@pytest.mark.parametrize(
    ("fields", "before", "normalize"),
    [
        ({"task": "retrieval.query", "normalized": True}, "Q: ", True),
        ({"task": "retrieval.passage", "normalized": False}, "P: ", False),
        ({"task": "classification"}, "C: ", None),
        ({"input_type": "query"}, "Q: ", None),
        ({"late_chunking": False}, "", None),
    ],
)
async def test_tasks_of_jina_choose_prompts(
    tmp_path: Path, fields: dict[str, Any], before: str, normalize: bool | None
) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    async with embedder(model={"folder": tmp_path}) as served:
        assert (await post(served.port, "/v1/embeddings", {"input": [{"text": "a"}], **fields})).status == 200
        assert texts_of(served) == [before + "a"]
        params = served.engine.requests[0].pooling
        assert params is not None and params.normalize is normalize


async def test_what_says_the_same_excludes_each_other() -> None:
    pairs: dict[str, dict[str, Any]] = {
        "task": {"input_type": "query", "task": "retrieval.query"},
        "normalized": {"use_activation": True, "normalized": True},
        "truncate": {"truncate": True, "truncate_prompt_tokens": 5},
        "embedding_type": {"encoding_format": "float", "embedding_type": "float"},
    }
    async with embedder() as served:
        for param, fields in pairs.items():
            reply = await post(served.port, "/v1/embeddings", {"input": "a", **fields})
            assert (reply.status, reply.error["param"]) == (400, param)
        assert (await post(served.port, "/v1/embeddings", {"input": "a" * 2000, "truncate": True})).status == 200
        assert (await post(served.port, "/v1/embeddings", {"input": "a" * 2000, "truncate": False})).status == 400


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"text": "a"}, ["a"]),
        ([{"text": "a"}, {"text": "b"}], ["a", "b"]),
        (["a", {"text": "b"}, "c"], ["a", "b", "c"]),
        ([{"text": "a"}, "b"], ["a", "b"]),
        ([{"content": [{"type": "text", "text": "a"}]}], ["a"]),
    ],
)
async def test_inputs_that_are_objects(given: Any, texts: list[str]) -> None:
    async with embedder() as served:
        for path in ("/v1/embeddings", "/pooling"):
            reply = await post(served.port, path, {"input": given})
            assert reply.status == 200, reply.body
            assert len(reply.json["data"]) == len(texts)
        assert texts_of(served) == texts * 2


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([{}], "input[0]"),
        ([{"text": "a"}, {"image": ""}], "input[1].image"),
        ([{"text": ""}], "input[0]"),
        ({"text": ""}, "input"),
        ([{"text": "a", "content": [{"type": "text", "text": "b"}]}], "input[0]"),
        ([{"content": []}], "input[0].content"),
        ([{"text": 5}], "input[0].text"),
        (["a", 5, {"text": "a"}], "input[1]"),
        ([5, {"text": "a"}], "input[1]"),
        ([{"image": "https://example.org/a.png"}], "input[0].image"),
        ({"video": "data:,x"}, "input.video"),
        ([{"content": [{"type": "image_url", "image_url": "data:,x"}]}], "input[0].content[0].image_url"),
    ],
)
async def test_bad_objects_are_named(given: Any, param: str) -> None:
    """The model hears and sees nothing."""
    async with embedder() as served:
        reply = await post(served.port, "/v1/embeddings", {"input": given})
        assert (reply.status, reply.error["param"]) == (400, param), reply.body
