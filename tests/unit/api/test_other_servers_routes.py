"""text-embeddings-inference's and Cohere's routes, over a scripted engine."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.api_support import CONTEXT, TOKENIZER, Served, get, post, serving
from support.pooling_engine import ALL, SIZE, engine_of, vector_of

LABELS = {"id2label": {"0": "Default", "1": "Spoiled"}}
CLASSES = {"task": "auto", "config": LABELS}


def embedder(**options: Any) -> Any:
    return serving(engine_of(*ALL), **options)


def classifier() -> Any:
    return serving(engine_of("classify", "token_classify"), model={"config": LABELS})


def reranker() -> Any:
    return serving(engine_of("classify", "score"), model={"config": {"num_labels": 1}})


def vector(text: str, size: int = SIZE) -> list[float]:
    found: list[float] = vector_of(np.array(TOKENIZER.encode(text)))[:size].tolist()
    return found


def texts_of(served: Served) -> list[str]:
    return [
        TOKENIZER.decode(one.prompt.token_ids.tolist(), skip_special_tokens=False) for one in served.engine.requests
    ]


# text-embeddings-inference


@pytest.mark.parametrize("path", ["/embed", "/", "/invocations"])
async def test_embed(path: str) -> None:
    async with embedder() as served:
        assert (await post(served.port, path, {"inputs": "ab"})).json == [vector("ab")]
        assert (await post(served.port, path, {"inputs": ["ab", "c"]})).json == [vector("ab"), vector("c")]
        ids = (await post(served.port, path, {"inputs": [TOKENIZER.encode("ab")]})).json
        assert ids == [vector("ab")]
        whole = await post(served.port, path, {"inputs": "a", "normalize": False, "dimensions": SIZE})
        assert whole.json == [vector("a")]
        params = served.engine.requests[-1].pooling
        assert params is not None and (params.normalize, params.dimensions) == (False, SIZE)


async def test_embed_cuts_where_it_is_told() -> None:
    long = "a" * CONTEXT + "b"
    async with embedder() as served:
        for direction, end in ((None, "a"), ("Right", "a"), ("Left", "b"), ("left", "b")):
            body = {"inputs": long, "truncate": True, "truncation_direction": direction}
            assert (await post(served.port, "/embed", body)).status == 200
            assert (len(texts_of(served)[-1]), texts_of(served)[-1][-1]) == (CONTEXT, end)
        refused = await post(served.port, "/embed", {"inputs": ["a", long]})
        assert (refused.status, refused.error["param"]) == (400, "inputs[1]")


async def test_embed_all_has_a_vector_for_every_token() -> None:
    async with embedder() as served:
        found = (await post(served.port, "/embed_all", {"inputs": ["ab", "c"]})).json
        assert [len(rows) for rows in found] == [2, 1]
        assert found[0][1] == [1.0, TOKENIZER.encode("b")[0]]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/embed", {}, "inputs"),
        ("/embed", {"inputs": ""}, "inputs"),
        ("/embed", {"inputs": ["a", ""]}, "inputs[1]"),
        ("/embed", {"inputs": 5}, "inputs"),
        ("/embed", {"inputs": "a", "truncate": "yes"}, "truncate"),
        ("/embed", {"inputs": "a", "truncation_direction": "Up"}, "truncation_direction"),
        ("/embed", {"inputs": "a", "dimensions": 3}, "dimensions"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, "prompt_name"),
        ("/embed_all", {"inputs": "a", "dimensions": SIZE}, "dimensions"),
        ("/embed_sparse", {"inputs": "a"}, "model"),
        ("/predict", {"inputs": "a"}, "model"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "texts": ["b"], "documents": ["b"]}, "documents"),
        ("/rerank", {"query": "a", "texts": [""]}, "texts[0]"),
        ("/rerank", {"query": "a", "texts": []}, "texts"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, "inputs.sentences"),
        ("/similarity", {"inputs": {"source_sentence": "", "sentences": ["a"]}}, "inputs.source_sentence"),
    ],
)
async def test_bad_bodies_are_named(path: str, body: dict[str, Any], param: str | None) -> None:
    async with embedder() as served:
        reply = await post(served.port, path, body)
        assert (reply.status, reply.error["param"]) == (400, param), reply.body


async def test_predict() -> None:
    even = [{"score": 0.75, "label": "Default"}, {"score": 0.25, "label": "Spoiled"}]
    odd = [{"score": 0.75, "label": "Spoiled"}, {"score": 0.25, "label": "Default"}]
    async with classifier() as served:
        for path in ("/predict", "/"):
            assert (await post(served.port, path, {"inputs": "ab"})).json == even
            assert (await post(served.port, path, {"inputs": [["abc"], ["ab"]]})).json == [odd, even]
        assert (await post(served.port, "/predict", {"inputs": ["a", "bc"], "raw_scores": True})).json == odd
        assert texts_of(served)[-1] == "abc"
        params = served.engine.requests[-1].pooling
        assert params is not None and params.activation is False
        refused: tuple[list[list[str]], ...] = ([["a"], ["a", "b"]], [], [[""]], [["a", "b", "c"]], [[]])
        for inputs in refused:
            reply = await post(served.port, "/predict", {"inputs": inputs})
            assert (reply.status, reply.error["param"].partition("[")[0]) == (400, "inputs"), inputs


async def test_rerank_of_texts() -> None:
    async with reranker() as served:
        body = {"query": "q", "texts": ["aaa", "a", "aa"]}
        found = (await post(served.port, "/rerank", body)).json
        assert found == [{"index": i, "score": pytest.approx(1 / (n + 1))} for i, n in ((1, 1), (2, 2), (0, 3))]
        shown = (await post(served.port, "/", {**body, "return_text": True, "raw_scores": True})).json
        assert [row["text"] for row in shown] == ["a", "aa", "aaa"]
        params = served.engine.requests[-1].pooling
        assert params is not None and params.activation is False
        cut = await post(served.port, "/rerank", {"query": "q", "texts": ["a" * 2000], "truncate": True})
        assert cut.status == 200
        assert (await post(served.port, "/rerank", {"query": "q", "texts": ["a" * 2000]})).status == 400


async def test_similarity_is_the_angle() -> None:
    async with embedder() as served:
        body = {"inputs": {"source_sentence": "ab", "sentences": ["ab", "xyz"]}}
        one, other = np.array(vector("ab")), np.array(vector("xyz"))
        angle = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert (await post(served.port, "/similarity", body)).json == [pytest.approx(1), pytest.approx(angle)]


async def test_info_says_what_the_model_is() -> None:
    for opened, kind in ((embedder(), "embedding"), (classifier(), "classifier"), (reranker(), "reranker")):
        async with opened as served:
            found = (await get(served.port, "/info")).json
            assert list(found["model_type"]) == [kind]
            assert (found["model_id"], found["max_input_length"]) == ("tiny", CONTEXT)
            if kind == "classifier":
                assert found["model_type"][kind] == {**LABELS, "label2id": {"Default": 0, "Spoiled": 1}}


@pytest.mark.parametrize(
    ("architecture", "pooling", "said"),
    [
        ("LlamaForCausalLM", "auto", "last"),
        ("BertModel", "auto", "cls"),
        ("LlamaForCausalLM", "mean", "mean"),
        ("BertModel", "mean", "mean"),
    ],
)
async def test_info_says_what_embeddings_are_made_of(architecture: str, pooling: str, said: str) -> None:
    async with embedder(model={"architecture": architecture, "pooling": pooling}) as served:
        found = (await get(served.port, "/info")).json
        assert found["model_type"] == {"embedding": {"pooling": said}}


async def test_what_is_sent_to_the_page_s_path_needs_a_key() -> None:
    async with embedder(api_key=("k",)) as served:
        assert (await get(served.port, "/")).status == 200
        assert (await post(served.port, "/", {"inputs": "a"})).status == 401
        allowed = await post(served.port, "/", {"inputs": "a"}, headers={"Authorization": "Bearer k"})
        assert allowed.status == 200


# Cohere


async def test_cohere_embeds_texts_in_every_type() -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    async with embedder() as served:
        body = {"model": "tiny", "texts": ["ab", "c"], "embedding_types": types, "request_id": "r"}
        answer = (await post(served.port, "/v2/embed", body)).json
    assert set(answer) == {"id", "texts", "embeddings", "meta", "response_type"}
    assert (answer["id"], answer["texts"], answer["response_type"]) == ("embd-r", ["ab", "c"], "embeddings_by_type")
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 3}}
    assert list(answer["embeddings"]) == types
    assert answer["embeddings"]["float"] == [vector("ab"), vector("c")]
    packed = [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in answer["embeddings"]["base64"]]
    assert packed == answer["embeddings"]["float"]
    assert answer["embeddings"]["ubinary"] == [[255], [255]]
    assert answer["embeddings"]["binary"] == [[127], [127]]
    assert max(answer["embeddings"]["int8"][0]) == 127
    assert max(answer["embeddings"]["uint8"][0]) == 255


async def test_cohere_s_first_version_has_one_type_alone() -> None:
    async with embedder() as served:
        floats = (await post(served.port, "/v1/embed", {"texts": ["ab"]})).json
        assert (floats["embeddings"], floats["response_type"]) == ([vector("ab")], "embeddings_floats")
        assert floats["meta"]["api_version"] == {"version": "1"}
        typed = (await post(served.port, "/v1/embed", {"texts": ["ab"], "embedding_types": ["float"]})).json
        assert typed["embeddings"] == {"float": [vector("ab")]}
        plain = (await post(served.port, "/v2/embed", {"texts": ["ab"]})).json
        assert plain["embeddings"] == {"float": [vector("ab")]}
        content = [{"content": [{"type": "text", "text": "ab"}]}]
        assert (await post(served.port, "/v2/embed", {"inputs": content})).json["embeddings"] == plain["embeddings"]


async def test_cohere_s_texts_have_their_prompts_and_are_cut(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "Q: ", "document": "D: "}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    async with embedder(model={"folder": tmp_path, "config": {"is_matryoshka": True}}) as served:
        for fields, text in (
            ({"input_type": "search_query"}, "Q: abcd"),
            ({"input_type": "search_document"}, "D: abcd"),
            ({}, "abcd"),
            ({"max_tokens": 2}, "ab"),
            ({"max_tokens": 2, "truncate": "START"}, "cd"),
            ({"max_tokens": 10_000}, "abcd"),
            ({"truncate": "NONE"}, "abcd"),
        ):
            assert (await post(served.port, "/v2/embed", {"texts": ["abcd"], **fields})).status == 200
            assert texts_of(served)[-1] == text
        long = {"texts": ["a" * 2000]}
        assert (await post(served.port, "/v2/embed", long)).status == 200
        refused = await post(served.port, "/v2/embed", {**long, "truncate": "NONE"})
        assert (refused.status, refused.error["param"]) == (400, "texts[0]")
        short = await post(served.port, "/v2/embed", {"texts": ["a"], "output_dimension": 4})
        assert short.json["embeddings"]["float"] == [vector("a", 4)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "texts"),
        ({"texts": ["a"], "images": ["data:,x"]}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": [""]}, "texts[0]"),
        ({"texts": "a"}, "texts"),
        ({"texts": ["a"], "embedding_types": ["fp8"]}, "embedding_types[0]"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ({"texts": ["a"], "truncate": "NONE", "max_tokens": 2}, "max_tokens"),
        ({"texts": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"texts": ["a"], "output_dimension": 3}, "output_dimension"),
        ({"texts": ["a"], "input_type": "nonsense"}, "input_type"),
        ({"images": ["data:image/png;base64,AAAA"]}, "images[0].image"),
        ({"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, "inputs[0].content[0]"),
        ({"inputs": [{}]}, "inputs[0]"),
    ],
)
async def test_cohere_s_bad_bodies_are_named(fields: dict[str, Any], param: str) -> None:
    async with embedder() as served:
        reply = await post(served.port, "/v2/embed", fields)
        assert (reply.status, reply.error["param"][: len(param)]) == (400, param), reply.body


async def test_cohere_s_rerank_has_its_meta() -> None:
    async with reranker() as served:
        body = {"query": "q", "documents": ["aaa", {"text": "a"}], "top_n": 1, "return_documents": False}
        answer = (await post(served.port, "/v2/rerank", body)).json
        assert answer["results"] == [{"index": 1, "relevance_score": pytest.approx(1 / 2)}]
        assert answer["meta"]["api_version"] == {"version": "2"}
        assert "meta" not in (await post(served.port, "/v1/rerank", body)).json
