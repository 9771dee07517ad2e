"""Embeddings, pooling, classes, scores and rankings as clients see them, over a scripted engine (S37, S38, R3)."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import string
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from support.api_support import (
    CONTEXT,
    LEAKS,
    TOKENIZER,
    VOCAB_SIZE,
    Reply,
    Served,
    get,
    post,
    raw,
    request,
    serving,
    until,
)
from support.pooling_engine import ALL, SIZE, engine_of, pool, vector_of
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from sensorium.config import Limits
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineOutput, EngineRequest

CLASSIFIER = ("classify", "token_classify", "embed", "token_embed")
CROSS = ("classify", "score")
LABELS = {"id2label": {"0": "Default", "1": "Spoiled"}}


def embedder(**options: Any) -> Any:
    return serving(engine_of(*ALL), **options)


def classifier(config: Mapping[str, Any] = LABELS, **options: Any) -> Any:
    return serving(engine_of(*CLASSIFIER), model={"config": config}, **options)


def bert_tokenizer() -> Tokenizer:
    """One letter, one token; pairs as BERT has them."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw_tokenizer = RawTokenizer(models.BPE(vocab, []))
    raw_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw_tokenizer.decoder = decoders.ByteLevel()
    raw_tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("[CLS]", "[SEP]")])
    ids = [(text, raw_tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    raw_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return Tokenizer(raw_tokenizer, {})


BERT = bert_tokenizer()
CROSS_ENCODER = {
    "architecture": "BertForSequenceClassification",
    "tokenizer": BERT,
    "config": {"type_vocab_size": 2, "num_labels": 1},
}


def texts_of(served: Served, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The prompts that the engine was given."""
    return [
        tokenizer.decode(one.prompt.token_ids.tolist(), skip_special_tokens=False) for one in served.engine.requests
    ]


# Embeddings


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi", "you", "hi"], ["hi", "you", "hi"]),
        ([72, 73], [[72, 73]]),
        ([[72], [73, 74]], [[72], [73, 74]]),
    ],
)
async def test_embeddings_of_every_form_of_input(given: Any, prompts: list[Any]) -> None:
    ids = [np.array(TOKENIZER.encode(one) if isinstance(one, str) else one) for one in prompts]
    async with embedder() as served:
        reply = await post(served.port, "/v1/embeddings", {"model": "tiny", "input": given})
    assert reply.status == 200, reply.body
    body = reply.json
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    assert (body["object"], body["model"], body["id"][:5]) == ("list", "tiny", "embd-")
    assert body["data"] == [
        {"index": place, "object": "embedding", "embedding": vector_of(one).tolist()} for place, one in enumerate(ids)
    ]
    tokens = sum(map(len, ids))
    assert body["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


async def test_the_official_client_reads_both_encodings() -> None:
    async with embedder() as served:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
        packed = await client.embeddings.create(model="tiny", input=["a", "bc"])  # asks for base64 by itself
        plain = await client.embeddings.create(model="tiny", input=["a", "bc"], encoding_format="float")
        assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
        body = {"input": "a", "encoding_format": "base64"}
        text = (await post(served.port, "/api/v1/embeddings", body)).json["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == plain.data[0].embedding


async def test_all_inputs_are_sent_before_the_first_is_answered() -> None:
    engine = engine_of(*ALL)

    async def together(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        await until(lambda: len(engine.requests) == 300)
        async for output in pool(asked):
            yield output

    engine.script = together
    async with serving(engine) as served:
        reply = await post(served.port, "/v1/embeddings", {"input": [f"text {i}" for i in range(300)]})
    assert [row["index"] for row in reply.json["data"]] == list(range(300))
    assert [row["embedding"][0] for row in reply.json["data"]] == [6.0] * 10 + [7.0] * 90 + [8.0] * 200


async def test_embeddings_of_chats() -> None:
    one = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    async with embedder() as served:
        await post(served.port, "/v1/embeddings", {"messages": one})
        await post(served.port, "/v1/embeddings", {"messages": one, "add_generation_prompt": True})
        reply = await post(served.port, "/v1/embeddings", {"messages": [one, [*one, *one]]})
        texts = texts_of(served)
    turn = "<|start|>user\nWhat?<|end|>\n"
    assert texts == [turn, f"{turn}<|start|>assistant\n", turn, turn + turn]
    assert len(reply.json["data"]) == 2


async def test_parts_of_chats_are_named_in_errors() -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}
    async with embedder() as served:
        for messages, where in (
            ([picture], "messages[0]"),
            ([[picture]], "messages[0][0]"),
            ([[{"role": "user", "content": "x"}], [picture]], "messages[1][0]"),
        ):
            error = (await post(served.port, "/v1/embeddings", {"messages": messages})).error
            assert error["param"] == f"{where}.content[0].image_url.url"
            assert error["code"] == "unsupported_modality"


@pytest.mark.parametrize(
    ("model", "flag", "wanted", "status"),
    [
        ({}, (), 4, 400),
        ({}, (), SIZE, 200),
        ({}, (), SIZE + 1, 400),
        ({"matryoshka_dimensions": [2, 4]}, (), SIZE, 200),
        ({"is_matryoshka": True}, (), 4, 200),
        ({"is_matryoshka": True}, (), SIZE + 1, 400),
        ({"matryoshka_dimensions": [2, 4]}, (), 4, 200),
        ({"matryoshka_dimensions": [2, 4]}, (), 3, 400),
        ({}, (4,), 4, 200),
        ({}, (4,), 5, 400),
        ({}, (0,), 5, 200),
        ({"is_matryoshka": True}, (), 0, 400),
        ({"folder": "Qwen3-Embedding-0.6B"}, (), 3, 200),
        ({"folder": "models--Qwen--Qwen3-Embedding-8B/snapshots/0a1b"}, (), 3, 200),
        ({"folder": "models--google--embeddinggemma-300m/snapshots/0a1b"}, (), 3, 400),
    ],
)
async def test_dimensions_only_where_they_mean_something(
    model: Any, flag: tuple[int, ...], wanted: int, status: int
) -> None:
    model = dict(model)
    folder = Path(model.pop("folder", "tiny"))
    async with embedder(model={"config": model, "folder": folder}, matryoshka_dimensions=flag) as served:
        reply = await post(served.port, "/v1/embeddings", {"input": "a", "dimensions": wanted})
    assert reply.status == status
    if status == 200:
        assert len(reply.json["data"][0]["embedding"]) == wanted
    else:
        assert reply.error["param"] == "dimensions"
    if status == 400 and not model and not flag and folder.name == "tiny":
        assert "Matryoshka" in reply.error["message"]


# Prompts before texts


PROMPTS = {
    "prompts": {"query": "Q: ", "passage": "P: ", "Clustering": "C: ", "bare": None},
    "default_prompt_name": "query",
}


def prompted(
    folder: Path, settings: Any = PROMPTS, *, include_prompt: bool = True, tasks: tuple[str, ...] = ALL, **model: Any
) -> Any:
    """A folder of sentence-transformers that pools the mean of BERT's kind of prompts."""
    (folder / "1_Pooling").mkdir()
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(
        json.dumps([{"type": "st.Transformer", "path": ""}, {"type": "st.Pooling", "path": "1_Pooling"}])
    )
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode": "mean", "include_prompt": include_prompt})
    )
    return serving(engine_of(*tasks), model={"folder": folder, "tokenizer": BERT, **model})


@pytest.mark.parametrize(
    ("choice", "before"),
    [
        ({}, "Q: "),
        ({"prompt_name": "query"}, "Q: "),
        ({"prompt_name": "passage"}, "P: "),
        ({"prompt_name": "bare"}, ""),
        ({"prompt_name": None}, "Q: "),
        ({"input_type": "query"}, "Q: "),
        ({"input_type": "search_query"}, "Q: "),
        ({"input_type": "document"}, "P: "),
        ({"input_type": "search_document"}, "P: "),
        ({"input_type": "passage"}, "P: "),
        ({"input_type": "clustering"}, "C: "),
        ({"input_type": "CLUSTERING"}, "C: "),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
async def test_prompts_stand_before_texts(tmp_path: Path, choice: dict[str, Any], before: str, path: str) -> None:
    async with prompted(tmp_path) as served:
        reply = await post(served.port, path, {"input": ["a", "bc"], **choice})
        assert reply.status == 200, reply.body
        assert texts_of(served, BERT) == [f"[CLS]{before}a[SEP]", f"[CLS]{before}bc[SEP]"]
        assert {one.pooling.prompt_tokens for one in served.engine.requests} == {0}


@pytest.mark.parametrize(
    ("settings", "choice", "words"),
    [
        (PROMPTS, {"prompt_name": "Query"}, "query, passage, Clustering, bare"),
        (PROMPTS, {"prompt_name": ""}, "query, passage, Clustering, bare"),
        (PROMPTS, {"input_type": "classification"}, "query, passage, Clustering, bare"),
        (PROMPTS, {"input_type": "classify"}, "search_query"),
        (PROMPTS, {"input_type": "query", "prompt_name": "query"}, "one of them"),
        ({"prompts": {"s2p_query": "S: "}}, {"input_type": "query"}, "s2p_query"),
        ({}, {"prompt_name": "query"}, "It has none"),
        ({}, {"input_type": "nonsense"}, "It has none"),
    ],
)
async def test_unknown_prompts_are_listed(tmp_path: Path, settings: Any, choice: dict[str, str], words: str) -> None:
    async with prompted(tmp_path, settings) as served:
        reply = await post(served.port, "/v1/embeddings", {"input": "a", **choice})
    assert (reply.status, reply.error["param"]) == (400, next(iter(choice)))
    assert words in reply.error["message"]


async def test_without_prompts_every_known_type_is_the_bare_text(tmp_path: Path) -> None:
    async with prompted(tmp_path, {}) as served:
        for word in ("query", "search_document", "classification"):
            assert (await post(served.port, "/v1/embeddings", {"input": "a", "input_type": word})).status == 200
        assert texts_of(served, BERT) == ["[CLS]a[SEP]"] * 3


async def test_ids_and_chats_have_no_prompt(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    async with prompted(tmp_path) as served:
        for body in ({"input": [72]}, {"input": [[72], [73]]}, chat):
            assert (await post(served.port, "/v1/embeddings", body)).status == 200
            assert (await post(served.port, "/v1/embeddings", {**body, "input_type": "query"})).error[
                "param"
            ] == "input_type"
        assert not any("Q: " in text for text in texts_of(served, BERT))


@pytest.mark.parametrize("add", [True, False])
async def test_prompts_that_are_not_pooled_are_counted(tmp_path: Path, add: bool) -> None:
    async with prompted(tmp_path, include_prompt=False) as served:
        for choice in ({}, {"prompt_name": "bare"}):
            await post(served.port, "/v1/embeddings", {"input": "abc", "add_special_tokens": add, **choice})
        await post(served.port, "/v1/embeddings", {"input": [72]})
        assert [one.pooling.prompt_tokens for one in served.engine.requests] == [4 if add else 3, 0, 0]


async def test_the_two_sides_of_a_comparison_have_their_prompts(tmp_path: Path) -> None:
    async with prompted(tmp_path, include_prompt=False) as served:
        assert (await post(served.port, "/rerank", {"query": "a", "documents": ["b", "c"]})).status == 200
        assert (await post(served.port, "/score", {"text_1": "a", "text_2": "b"})).status == 200
        assert texts_of(served, BERT) == [
            "[CLS]Q: a[SEP]",
            "[CLS]P: b[SEP]",
            "[CLS]P: c[SEP]",
            "[CLS]Q: a[SEP]",
            "[CLS]P: b[SEP]",
        ]
        assert {one.pooling.prompt_tokens for one in served.engine.requests} == {4}
        error = (await post(served.port, "/score", {"text_1": "a", "text_2": "b", "prompt_name": "query"})).error
        assert error["param"] == "prompt_name"


@pytest.mark.parametrize(
    ("names", "model", "server", "status"),
    [
        (("tiny",), {}, {}, 400),
        (("tiny",), {"task": "score"}, {}, 400),
        (("tiny",), {"task": "embed"}, {}, 200),
        (("tiny",), {"pooling": "mean"}, {}, 200),
        (("org/tiny-Embedding-0.6B",), {}, {}, 200),
        (("/data/embedders/tiny",), {}, {}, 400),
        (("MrLight/dse-qwen2-2b",), {}, {}, 200),
        (("tiny",), {}, {"chat_template": "template_dse_qwen2_vl.jinja"}, 200),
        (("tiny",), {}, {"chat_template": "llava"}, 400),
    ],
)
async def test_a_chat_model_does_not_score_by_angles(
    names: tuple[str, ...], model: Any, server: Any, status: int
) -> None:
    async with serving(engine_of(*ALL), names=names, model={"pooling": "auto", **model}, **server) as served:
        for path, body in (("/rerank", {"query": "a", "documents": ["b"]}), ("/score", {"text_1": "a", "text_2": "b"})):
            reply = await post(served.port, path, body)
            assert reply.status == status
            if status == 400:
                assert (reply.error["param"], reply.error["code"]) == ("model", "unsupported_task")
                assert "--pooling" in reply.error["message"] and "Qwen3-Reranker" in reply.error["message"]
        assert (await post(served.port, "/v1/embeddings", {"input": "a"})).status == 200


async def test_a_cross_encoders_default_prompt_stands_before_the_query(tmp_path: Path) -> None:
    async with prompted(tmp_path, tasks=CROSS, config={"num_labels": 1}) as served:
        await post(served.port, "/rerank", {"query": "a", "documents": ["b"]})
        assert texts_of(served, BERT) == ["[CLS]Q: a[SEP]b[SEP]"]


async def test_sparse_vectors_and_several_tasks_of_one_pass() -> None:
    async with serving(engine_of("embed", "sparse"), model={"task": "embed"}) as served:
        sparse = [{"index": token, "value": 2.0} for token in TOKENIZER.encode("a")]
        assert (await post(served.port, "/embed_sparse", {"inputs": ["aa"]})).json == [sparse]
        alone = (await post(served.port, "/pooling", {"input": "aa", "task": "sparse"})).json
        assert alone["data"] == [{"index": 0, "object": "pooling", "data": sparse}]
        both = (await post(served.port, "/pooling", {"input": ["aa", "b"], "task": "embed&sparse"})).json["data"]
        assert [set(row["data"]) for row in both] == [{"embed", "sparse"}] * 2
        assert both[0]["data"] == {"embed": vector_of(np.array(TOKENIZER.encode("aa"))).tolist(), "sparse": sparse}
        assert len(served.engine.requests) == 4
        for field, body in (
            ("task", {"task": "embed&embed"}),
            ("task", {"task": "embed&token_embed"}),
            ("task", {"task": "align"}),
            ("task", {"task": "embed&"}),
            ("encoding_format", {"task": "sparse", "encoding_format": "base64"}),
            ("encoding_format", {"task": "embed&sparse", "encoding_format": "bytes"}),
        ):
            reply = await post(served.port, "/pooling", {"input": "a", **body})
            assert (reply.status, reply.error["param"]) == (400, field)
        assert (await post(served.port, "/embed_sparse", {"inputs": "a", "normalize": True})).error[
            "param"
        ] == "normalize"


COLBERT = {"architecture": "HF_ColBERT", "tokenizer": BERT, "config": {"architectures": ["HF_ColBERT"]}}


async def test_late_interaction_compares_tokens() -> None:
    def rows(text: str, *, document: bool = False) -> np.ndarray[Any, Any]:
        ids = BERT.encode(text, add_special_tokens=True)
        skipped = {BERT.token_to_id(mark) for mark in string.punctuation} if document else set()
        kept = [i for i, token in enumerate(ids) if token not in skipped]
        return np.array([[i, ids[i]] for i in kept], np.float32)

    async with serving(engine_of("token_embed"), model=COLBERT) as served:
        ranked = (await post(served.port, "/rerank", {"query": "q", "documents": ["a?", "zz"]})).json["results"]
        assert texts_of(served, BERT) == ["[CLS][unused0] q[SEP]", "[CLS][unused1] a?[SEP]", "[CLS][unused1] zz[SEP]"]
        query = rows("[unused0] q")
        scores = {
            index: float((query @ rows(f"[unused1] {text}", document=True).T).max(1).sum())
            for index, text in enumerate(("a?", "zz"))
        }
        assert {row["index"]: row["relevance_score"] for row in ranked} == pytest.approx(scores)
        scored = (await post(served.port, "/score", {"text_1": ["q", "q"], "text_2": ["a?", "zz"]})).json["data"]
        assert [row["score"] for row in scored] == pytest.approx([scores[0], scores[1]])
        for body, prompt, removes in (
            ({"input": "a?"}, "[unused1] a?", True),
            ({"input": "a?", "input_type": "query"}, "[unused0] a?", False),
            ({"input": "a?", "input_type": "passage"}, "[unused1] a?", True),
        ):
            data = (await post(served.port, "/pooling", body)).json["data"][0]["data"]
            assert data == rows(prompt, document=removes).tolist()
        for path, refused, param in (
            ("/rerank", {"query": "q", "documents": ["a"], "instruction": "x"}, "instruction"),
            ("/pooling", {"input": "a", "input_type": "clustering"}, "input_type"),
            ("/v1/embeddings", {"input": "a"}, "model"),
        ):
            reply = await post(served.port, path, refused)
            assert (reply.status, reply.error["param"]) == (400, param)


async def test_an_instruction_needs_a_place(tmp_path: Path) -> None:
    """It takes the task's place in a prompt like Qwen3-Embedding's; elsewhere it is refused, not lost."""
    body = {"query": "a", "documents": ["b"], "instruction": "Find it."}
    instruct = {"prompts": {"query": "Instruct: Given a question,\nfind answers\nQuery:", "document": ""}}
    async with prompted(tmp_path, instruct) as served:
        assert (await post(served.port, "/rerank", body)).status == 200
        assert texts_of(served, BERT) == ["[CLS]Instruct: Find it.\nQuery:a[SEP]", "[CLS]b[SEP]"]
    for maker in (embedder, cross_encoder):
        async with maker() as served:
            reply = await post(served.port, "/rerank", body)
            assert (reply.status, reply.error["param"], "Leave it out" in reply.error["message"]) == (
                400,
                "instruction",
                True,
            )


async def test_other_tasks_take_no_prompt(tmp_path: Path) -> None:
    async with prompted(tmp_path, tasks=CLASSIFIER, config=LABELS) as served:
        assert (await post(served.port, "/classify", {"input": "a"})).status == 200
        assert texts_of(served, BERT) == ["[CLS]a[SEP]"]
        for path, body in (("/classify", {}), ("/pooling", {"task": "classify"})):
            error = (await post(served.port, path, {"input": "a", "input_type": "query", **body})).error
            assert error["param"] == "input_type"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, None),
        ({"truncate_prompt_tokens": -1}, "[CLS]" + "a" * (CONTEXT - 2) + "[SEP]"),
        ({"truncate_prompt_tokens": 6}, "[CLS]aaaa[SEP]"),
        ({"truncate_prompt_tokens": 6, "truncation_side": "left"}, "[CLS]aaab[SEP]"),
        ({"truncate_prompt_tokens": 6, "add_special_tokens": False}, "aaaaaa"),
        ({"truncate_prompt_tokens": 1}, "[CLS]"),
        ({"truncate_prompt_tokens": CONTEXT + 1}, None),
        ({"truncate_prompt_tokens": 0}, None),
    ],
)
async def test_long_texts_are_refused_or_cut_as_asked(options: dict[str, Any], text: str | None) -> None:
    async with embedder(model={"tokenizer": BERT}) as served:
        reply = await post(served.port, "/v1/embeddings", {"input": ["a", "a" * CONTEXT + "b"], **options})
        if text is None:
            param = "truncate_prompt_tokens" if options else "input[1]"
            assert (reply.status, reply.error["param"]) == (400, param)
        else:
            assert texts_of(served, BERT)[1] == text
            many = await post(served.port, "/v1/embeddings", {"input": "a" * 3_000_000, **options})
            assert many.status == 200  # what is cut is not tokenized first


@pytest.mark.parametrize("activation", [None, False])
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 2 * CONTEXT + 100])
async def test_long_texts_in_chunks(length: int, activation: bool | None) -> None:
    ids = (np.arange(length, dtype=np.int32) * 7) % 200
    chunks = [ids[start : start + CONTEXT] for start in range(0, length, CONTEXT)]
    mean = sum(len(chunk) * vector_of(chunk).astype(np.float64) for chunk in chunks) / length
    expected = mean / (np.linalg.norm(mean) if activation is None and len(chunks) > 1 else 1)
    async with embedder(embed_in_chunks=True) as served:
        body = {"input": [[5], ids.tolist(), [6]], "use_activation": activation}
        reply = (await post(served.port, "/v1/embeddings", body)).json
        prompts = [one.prompt.token_ids.tolist() for one in served.engine.requests]
    assert prompts == [[5], *(chunk.tolist() for chunk in chunks), [6]]
    assert reply["data"][1]["embedding"] == pytest.approx(expected, rel=1e-5)
    assert [row["embedding"] for row in reply["data"][::2]] == [vector_of(np.array([one])).tolist() for one in (5, 6)]
    assert reply["usage"]["prompt_tokens"] == length + 2


async def test_chunks_have_bounds_and_are_for_embeddings() -> None:
    long = {"input": "a" * (CONTEXT + 1)}
    async with embedder(embed_in_chunks=True, max_embed_len=1000) as served:
        assert (await post(served.port, "/v1/embeddings", long)).status == 200
        assert (await post(served.port, "/pooling", {**long, "task": "embed"})).status == 200
        cut = await post(served.port, "/v1/embeddings", {**long, "truncate_prompt_tokens": -1})
        assert cut.json["usage"]["prompt_tokens"] == CONTEXT
        for path, body in (
            ("/v1/embeddings", {"input": "a" * 1001}),
            ("/pooling", {**long, "task": "token_embed"}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": long["input"]}]}),
        ):
            reply = await post(served.port, path, body)
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    async with serving(engine_of(*CLASSIFIER), embed_in_chunks=True) as served:
        assert (await post(served.port, "/classify", long)).status == 400
    async with embedder() as served:
        assert (await post(served.port, "/v1/embeddings", long)).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "fields", "cut"),
    [
        ("/v1/embeddings", {"input": "LONG"}, {"truncate_prompt_tokens": -1}),
        ("/pooling", {"input": "LONG", "task": "embed"}, {"truncate_prompt_tokens": -1}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "LONG"}]}, {"truncate_prompt_tokens": -1}),
        ("/score", {"text_1": "a", "text_2": "LONG"}, {"truncate_prompt_tokens": -1}),
        ("/rerank", {"query": "a", "texts": ["LONG"]}, {"truncate_prompt_tokens": -1}),
        ("/embed", {"inputs": "LONG"}, {"truncate": True}),
        ("/embed_all", {"inputs": "LONG"}, {"truncate": True}),
        ("/similarity", {"inputs": {"source_sentence": "LONG", "sentences": ["a"]}}, {"truncate_prompt_tokens": -1}),
        ("/api/embed", {"input": "LONG", "truncate": False}, {"truncate": True}),
        ("/api/embeddings", {"prompt": "LONG", "truncate": False}, {"truncate": True}),
        ("/v2/embed", {"texts": ["LONG"], "truncate": "NONE"}, {"truncate": "END"}),
    ],
)
async def test_too_long_inputs_are_told_how_they_are_cut(
    path: str, fields: dict[str, Any], cut: dict[str, Any]
) -> None:
    """The error names the field and the value that mend the request."""
    body = {"model": "tiny", **json.loads(json.dumps(fields).replace("LONG", "a" * (CONTEXT + 1)))}
    async with serving(engine_of(*ALL), model={"task": "embed"}) as served:
        reply = await post(served.port, path, body)
        said = reply.json["error"]
        [(name, value)] = cut.items()
        word = value if isinstance(value, str) else json.dumps(value)
        assert reply.status == 400 and f"`{name}`: {word} " in (said if isinstance(said, str) else said["message"])
        assert (await post(served.port, path, {**body, **cut})).status == 200


async def test_too_long_inputs_are_told_which_flag_takes_them() -> None:
    """Where the flag changes it: of texts that are embedded, not of pairs and chats."""
    long = "a" * (CONTEXT + 1)
    async with embedder() as served:
        told = await post(served.port, "/v1/embeddings", {"input": long})
        assert "--embed-in-chunks" in told.error["message"]
        for path, body in (
            ("/v1/embeddings", {"messages": [{"role": "user", "content": long}]}),
            ("/pooling", {"input": long, "task": "token_embed"}),
        ):
            assert "--embed-in-chunks" not in (await post(served.port, path, body)).error["message"]
    for longest, flag in ((1000, "--max-embed-len"), (None, "--max-embedding-tokens")):
        async with embedder(embed_in_chunks=True, max_embed_len=longest) as served:
            told = await post(served.port, "/v1/embeddings", {"input": "a" * 300_001})
            assert "in chunks is" in told.error["message"] and flag in told.error["message"]


async def test_token_ids_and_chats_are_cut_too() -> None:
    async with embedder() as served:
        cut = {"truncate_prompt_tokens": 2}
        await post(served.port, "/v1/embeddings", {"input": [[1, 2, 3]], **cut})
        await post(served.port, "/v1/embeddings", {"input": [[1, 2, 3]], **cut, "truncation_side": "left"})
        await post(
            served.port,
            "/v1/embeddings",
            {"messages": [{"role": "user", "content": "x"}], **cut, "truncation_side": "left"},
        )
        assert [one.prompt.token_ids.tolist() for one in served.engine.requests[:2]] == [[1, 2], [2, 3]]
        assert texts_of(served)[2] == "<|end|>\n"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([""], "input[0]"),
        (["a", ""], "input[1]"),
        ([[]], "input[0]"),
        (None, "input"),
        ([-1], "input[0]"),
        ([VOCAB_SIZE], "input"),
        ([[1], [VOCAB_SIZE]], "input[1]"),
        ([2**63], "input[0]"),
        ([1.5], "input[0]"),
        (["a", [1]], "input[1]"),
        (5, "input"),
        ([True], "input[0]"),
        (["a"] * 9, "input"),
        ([[1]] * 100_000, "input"),
        (["x" * 60] * 5, "input"),
    ],
)
async def test_inputs_of_a_wrong_form_or_size(given: Any, param: str) -> None:
    limits = Limits(max_embedding_inputs=8, max_embedding_tokens=200)
    async with serving(engine_of(*ALL), limits=limits) as served:
        for path in ("/v1/embeddings", "/pooling"):
            reply = await post(served.port, path, {"input": given})
            assert (reply.status, reply.error["param"]) == (400, param)
        assert not served.engine.requests


async def test_input_and_messages_exclude_each_other() -> None:
    async with embedder() as served:
        for body in ({}, {"input": "a", "messages": [{"role": "user", "content": "x"}]}):
            assert (await post(served.port, "/v1/embeddings", body)).error["param"] == "input"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalize", True),
        ("encoding_format", "hex"),
        ("embed_dtype", "float64"),
        ("endianness", "middle"),
        ("embedding_type", "fp8"),
        ("embedding_type", ["float", "base64"]),
        ("embedding_type", ["float", "float", "float", "float", "float", "float", "float"]),
        ("embedding_type", []),
        ("task", "retrieval.nothing"),
        ("normalized", "yes"),
        ("late_chunking", True),
        ("padding", "max_length"),
        ("truncation_side", "up"),
        ("dimensions", -1),
        ("dimensions", "4"),
        ("priority", 2**40),
        ("use_activation", 1),
        ("mm_processor_kwargs", {"fps": 1}),
        ("chat_template", "{{ 1 }}"),
        ("media_io_kwargs", {"a": 1}),
    ],
)
async def test_fields_that_are_refused(field: str, value: Any) -> None:
    async with embedder() as served:
        reply = await post(served.port, "/v1/embeddings", {"input": "a", field: value})
        assert (reply.status, reply.error["param"]) == (400, field)
        harmless = {
            "embed_dtype": "float32",
            "endianness": "little",
            "padding": "do_not_pad",
            "request_id": "x",
            "normalize": None,
            "user": "u",
            "priority": 3,
            "cache_salt": "s",
        }
        assert (await post(served.port, "/v1/embeddings", {"input": "a", **harmless})).status == 200
    assert served.engine.requests[0].priority == 3
    assert served.engine.requests[0].salt


async def test_activation_of_an_embedding_is_its_normalisation() -> None:
    async with embedder() as served:
        for path in ("/v1/embeddings", "/pooling"):
            for value in (None, True, False):
                await post(served.port, path, {"input": "a", "use_activation": value})
                params = served.engine.requests[-1].pooling
                assert params is not None
                assert (params.task, params.normalize, params.activation) == ("embed", value, None)


# What goes wrong in the engine


async def test_a_vector_that_is_not_a_number_fails_its_request_only() -> None:
    async def sick(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        async for output in pool(asked):
            if len(asked.prompt.token_ids) == 3:
                assert output.vector is not None
                output.vector[1] = np.nan if asked.id % 2 else np.inf
            yield output

    async with serving(engine_of(*ALL, script=sick)) as served:
        for given in ("abc", ["a", "abc", "b"]):
            reply = await post(served.port, "/v1/embeddings", {"input": given})
            assert (reply.status, reply.error["code"]) == (500, "engine_error")
        assert (await post(served.port, "/v1/embeddings", {"input": ["a", "b"]})).status == 200
        assert not served.engine.active


async def test_what_the_engine_refuses_ends_the_rest() -> None:
    async def failing(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        if asked.id == 1:
            yield EngineOutput(asked.id, finish_reason="error", error="The step failed.")
        elif asked.id == 0:
            async for output in pool(asked):
                yield output
        else:
            await asyncio.sleep(60)

    async with serving(engine_of(*ALL, script=failing)) as served:
        reply = await post(served.port, "/v1/embeddings", {"input": ["a", "b", "c", "d"]})
        assert (reply.status, reply.error["message"]) == (500, "The step failed.")
        assert sorted(served.engine.aborted) == [2, 3]
        page = (await get(served.port, "/metrics")).body.decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 1.0' in page
    assert 'vllm:request_success_total{engine="0",finished_reason="error",model_name="tiny"} 3.0' in page


async def test_a_client_that_leaves_takes_its_inputs_with_it() -> None:
    async def never(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        await asyncio.sleep(60)
        yield EngineOutput(asked.id)

    async with serving(engine_of(*ALL, script=never)) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("POST", "/v1/embeddings", json.dumps({"input": ["a"] * 20}).encode()))
        await until(lambda: len(served.engine.active) == 20)
        writer.close()
        await until(lambda: not served.engine.active)
        assert not reader.at_eof() or len(served.engine.aborted) == 20


async def test_many_inputs_wait_beside_one_another() -> None:
    """A request with more inputs than chats may wait is let in although another one is there."""
    gate = asyncio.Event()

    async def gated(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
        await gate.wait()
        async for output in pool(asked):
            yield output

    async with serving(engine_of(*ALL, script=gated)) as served:
        asking = [asyncio.create_task(post(served.port, "/v1/embeddings", {"input": ["a"] * 500})) for _ in range(3)]
        await until(lambda: len(served.engine.active) == 1500)
        gate.set()
        assert [reply.status for reply in await asyncio.gather(*asking)] == [200] * 3


# Pooling and classes


@pytest.mark.parametrize(
    ("tasks", "flag", "expected"),
    [
        (ALL, "auto", "embed"),
        (CLASSIFIER, "auto", "classify"),
        (("token_classify",), "auto", "token_classify"),
        (CLASSIFIER, "embed", "embed"),
        (CLASSIFIER, "reward", "token_classify"),
        (CROSS, "auto", "classify"),
        (CROSS, "score", "score"),
        (ALL, "score", "embed"),
    ],
)
async def test_pooling_does_what_the_model_is_for(tasks: tuple[str, ...], flag: str, expected: str) -> None:
    async with serving(engine_of(*tasks), model={"task": flag}) as served:
        reply = await post(served.port, "/pooling", {"input": "hi"})
        assert reply.status == 200, reply.body
        assert [one.pooling.task for one in served.engine.requests if one.pooling] == [expected]
    data = reply.json["data"][0]
    assert (data["index"], data["object"], reply.json["id"][:8]) == (0, "pooling", "pooling-")
    assert isinstance(data["data"], list)


async def test_pooling_of_tokens_is_a_matrix() -> None:
    async with embedder() as served:
        body = {"input": ["abc", "d"], "task": "token_embed"}
        rows = [row["data"] for row in (await post(served.port, "/pooling", body)).json["data"]]
        packed = (await post(served.port, "/pooling", {**body, "encoding_format": "base64"})).json["data"][0]["data"]
    ids = TOKENIZER.encode("abc")
    assert rows == [[[0.0, ids[0]], [1.0, ids[1]], [2.0, ids[2]]], [[0.0, TOKENIZER.encode("d")[0]]]]
    assert np.frombuffer(base64.b64decode(packed), "<f4").reshape(3, 2).tolist() == rows[0]


async def test_answers_of_tokens_are_bounded() -> None:
    engine = engine_of(*ALL)
    assert engine.ready is not None
    engine.ready = dataclasses.replace(engine.ready, embedding_size=2**15)
    async with serving(engine) as served:
        reply = await post(served.port, "/pooling", {"input": ["a" * 129] * 2, "task": "token_embed"})
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
        assert (await post(served.port, "/pooling", {"input": ["a" * 129] * 2, "task": "embed"})).status == 200


async def test_pooling_in_both_forms_of_the_tutorials() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "vLLM is great!"}]}]
    async with classifier() as served:
        plain = await post(served.port, "/pooling", {"model": "tiny", "input": "vLLM is great!"})
        chatted = await post(served.port, "/pooling", {"model": "tiny", "messages": chat})
        assert plain.json["data"][0]["data"] in ([0.25, 0.75], [0.75, 0.25])
        assert chatted.json["usage"]["prompt_tokens"] > plain.json["usage"]["prompt_tokens"]
        reply = await post(served.port, "/pooling", {"input": "a", "dimensions": 4})
        assert reply.error["param"] == "dimensions"


async def test_classes_have_their_names() -> None:
    async with classifier() as served:
        reply = await post(served.port, "/classify", {"input": ["abc", "ab"]})
        await post(served.port, "/classify", {"input": "a", "use_activation": False})
        assert served.engine.requests[-1].pooling.activation is False
    assert reply.json["data"] == [
        {"index": 0, "label": "Spoiled", "probs": [0.25, 0.75], "num_classes": 2},
        {"index": 1, "label": "Default", "probs": [0.75, 0.25], "num_classes": 2},
    ]
    assert reply.json["id"].startswith("classify-")
    async with classifier(config={}) as served:  # two labels are what config.json does not say
        assert (await post(served.port, "/classify", {"input": "abc"})).json["data"][0]["label"] == "LABEL_1"


# What a model does not do


@pytest.mark.parametrize(
    ("tasks", "flag", "path", "body", "words"),
    [
        (("embed",), "auto", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "embed"),
        (("embed",), "auto", "/v1/completions", {"prompt": "x"}, "embed"),
        (("generate",), "auto", "/v1/embeddings", {"input": "x"}, "generate text"),
        (("generate",), "auto", "/pooling", {"input": "x"}, "generate text"),
        (("generate",), "auto", "/score", {"text_1": "x", "text_2": "y"}, "generate text"),
        (ALL, "auto", "/classify", {"input": "x"}, "generate text"),
        (ALL, "generate", "/v1/embeddings", {"input": "x"}, "generate text"),
        (ALL, "embed", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "embed tokens"),
        (CLASSIFIER, "auto", "/score", {"text_1": "x", "text_2": "y"}, "one label"),
        (CLASSIFIER, "auto", "/rerank", {"query": "x", "documents": ["y"]}, "one label"),
        (CLASSIFIER, "classify", "/pooling", {"input": "x", "task": "embed"}, "classify"),
    ],
)
async def test_what_it_cannot_do_is_said(tasks: tuple[str, ...], flag: str, path: str, body: Any, words: str) -> None:
    async with serving(engine_of(*tasks), model={"task": flag}) as served:
        reply = await post(served.port, path, body)
        assert (reply.status, reply.error["code"]) == (400, "unsupported_task")
        assert words in reply.error["message"]
        assert not served.engine.requests


async def test_models_say_what_they_do() -> None:
    async with serving(engine_of(*ALL), model={"task": "embed"}) as served:
        row = (await get(served.port, "/v1/models")).json["data"][0]
    assert row["tasks"] == ["embed", "token_embed"]
    assert row["modalities"] == ["text"]


# Scores


def cross_encoder(**options: Any) -> Any:
    return serving(engine_of(*CROSS), model=CROSS_ENCODER, **options)


async def score(served: Served, **body: Any) -> Reply:
    return await post(served.port, "/score", body)


async def test_pairs_are_joined_as_the_tokenizer_has_it() -> None:
    async with cross_encoder() as served:
        reply = await score(served, text_1="ab", text_2=["x", "yz"])
        assert texts_of(served, BERT) == ["[CLS]ab[SEP]x[SEP]", "[CLS]ab[SEP]yz[SEP]"]
        types = served.engine.requests[1].prompt.token_types
        assert types is not None
        assert types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    body = reply.json
    assert body["id"].startswith("score-") and body["object"] == "list"
    assert body["data"] == [
        {"index": 0, "object": "score", "score": pytest.approx(1 / 6)},
        {"index": 1, "object": "score", "score": pytest.approx(1 / 7)},
    ]
    assert body["usage"]["total_tokens"] == 13


async def test_models_without_segments_get_none() -> None:
    model = {**CROSS_ENCODER, "config": {"type_vocab_size": 1}}
    async with serving(engine_of(*CROSS), model=model) as served:
        await score(served, text_1="ab", text_2="x")
        assert served.engine.requests[0].prompt.token_types is None


@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
)
async def test_both_sides_have_several_names_and_shapes(names: tuple[str, str]) -> None:
    async with cross_encoder() as served:
        for left, right, count in (
            ("a", "b", 1),
            ("a", ["b"], 1),
            (["a"], ["b", "c", "d"], 3),
            (["a", "b"], ["c", "d"], 2),
            ({"content": [{"type": "text", "text": "a"}]}, [{"text": "b"}], 1),
        ):
            reply = await post(served.port, "/v1/score", {names[0]: left, names[1]: right})
            assert len(reply.json["data"]) == count
        for one, other, param in (
            (["a", "b"], ["c"], names[0]),
            (["a", "b"], ["c", "d", "e"], names[0]),
            ([], "a", names[0]),
            ("a", [], names[1]),
            ("a", "", names[1]),
            ("a", ["b", ""], f"{names[1]}[1]"),
            (5, "a", names[0]),
        ):
            reply = await post(served.port, "/v1/score", {names[0]: one, names[1]: other})
            assert (reply.status, reply.error["param"]) == (400, param), (one, other)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text_1": "a"},
        {"text_2": "a"},
        {"text_1": "a", "documents": ["b"]},
        {"text_1": "a", "text_2": "b", "queries": "c"},
        {"queries": "a", "documents": "b", "items": "c"},
    ],
)
async def test_two_sides_that_belong_together(body: dict[str, Any]) -> None:
    async with cross_encoder() as served:
        reply = await score(served, **body)
        assert reply.status == 400
        assert "two sides" in reply.error["message"]


async def test_the_longer_text_of_a_pair_is_cut() -> None:
    async with cross_encoder() as served:
        long = {"text_1": "ab", "text_2": ["x" * CONTEXT, "yyyy"]}
        reply = await score(served, **long)
        assert (reply.status, reply.error["param"]) == (400, "text_2[0]")
        await score(served, **long, truncate_prompt_tokens=8)
        await score(served, **long, max_tokens_per_doc=2, max_tokens_per_query=1)
        await score(served, **long, truncate_prompt_tokens=-1)
        texts = texts_of(served, BERT)
        assert texts[:4] == ["[CLS]ab[SEP]xxx[SEP]", "[CLS]ab[SEP]yyy[SEP]", "[CLS]a[SEP]xx[SEP]", "[CLS]a[SEP]yy[SEP]"]
        assert len(served.engine.requests[4].prompt.token_ids) == CONTEXT
        assert texts[5] == "[CLS]ab[SEP]yyyy[SEP]"
        await score(served, text_1="a" * 20, text_2="b", truncate_prompt_tokens=8)
        assert texts_of(served, BERT)[-1] == "[CLS]aaaa[SEP]b[SEP]"
        reply = await score(served, text_1="a" * 20, text_2="b", truncate_prompt_tokens=2)
        assert "3 special tokens" in reply.error["message"]


async def test_cross_encoders_take_no_media() -> None:
    picture = {"content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}
    async with cross_encoder() as served:
        error = (await score(served, text_1="a", text_2=[picture])).error
        assert (error["code"], error["param"]) == ("unsupported_modality", "text_2[0]")
    async with embedder() as served:
        error = (await score(served, text_1="a", text_2=[picture])).error
        assert (error["code"], error["param"]) == ("unsupported_modality", "text_2[0].content[0].image_url.url")


async def test_embedders_score_by_the_angle_between_vectors() -> None:
    async with embedder() as served:
        reply = await score(served, text_1="ab", text_2=["ab", "xyz"])
        assert len(served.engine.requests) == 3  # the query once
        chatted = await score(served, text_1="ab", text_2={"content": [{"type": "text", "text": "q"}]})
        assert texts_of(served)[-1] == "<|start|>user\nq<|end|>\n"
    one, other = (vector_of(np.array(TOKENIZER.encode(text))).astype(np.float64) for text in ("ab", "xyz"))
    angle = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert [row["score"] for row in reply.json["data"]] == [pytest.approx(1), pytest.approx(angle)]
    assert chatted.status == 200


async def test_rerank_sorts_and_cuts() -> None:
    documents = ["xxxx", "x", {"text": "xxx"}, {"content": [{"type": "text", "text": "xx"}]}]
    async with cross_encoder() as served:
        replies = [
            await post(served.port, path, {"query": "q", "documents": documents, "top_n": top_n})
            for path, top_n in (("/rerank", 0), ("/v1/rerank", 2), ("/v2/rerank", None), ("/api/v1/rerank", 9))
        ]
        short = await post(served.port, "/rerank", {"query": "q", "documents": ["a"], "return_documents": False})
    results = replies[0].json["results"]
    assert set(replies[0].json) == {"id", "model", "usage", "results"}
    assert replies[0].json["usage"] == {"prompt_tokens": 26, "total_tokens": 26}
    assert [row["index"] for row in results] == [1, 3, 2, 0]
    assert results[0] == {
        "index": 1,
        "document": {"text": "x", "multi_modal": None},
        "relevance_score": pytest.approx(1 / 5),
    }
    assert results[1]["document"] == {"text": None, "multi_modal": {"content": [{"type": "text", "text": "xx"}]}}
    assert [len(reply.json["results"]) for reply in replies] == [4, 2, 4, 4]
    assert set(short.json["results"][0]) == {"index", "relevance_score"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": [""]}, "documents[0]"),
        ({"query": "a", "documents": [5]}, "documents[0]"),
        ({"query": ["a"], "documents": ["a"]}, "query"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ({"query": "a", "documents": "b"}, "documents"),
        ({"query": "a", "documents": ["b"], "instruction": "Judge."}, "instruction"),
        ({"query": "a", "documents": ["b"] * 9}, "documents"),
        ({"query": "a", "documents": [{"content": []}]}, "documents[0].content"),
        ({"query": "a", "documents": [{"content": [{"type": "image_embeds"}]}]}, "documents[0]"),
    ],
)
async def test_rankings_that_are_refused(body: dict[str, Any], param: str) -> None:
    async with cross_encoder(limits=Limits(max_embedding_inputs=8)) as served:
        reply = await post(served.port, "/rerank", body)
        assert (reply.status, (reply.error["param"] or "")) == (400, param)


async def test_every_endpoint_keeps_its_words_to_itself() -> None:
    """Whatever is sent, an answer has OpenAI's form of an error and nothing of a library in it."""
    bodies = [
        b"",
        b"[]",
        b"{",
        b'{"input": "\\ud800"}',
        b'{"input": NaN}',
        b'{"query": {"content": 5}, "documents": [1]}',
    ]
    async with embedder() as served:
        for path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/rerank"):
            for body in bodies:
                reply = await post(served.port, path, body)
                assert reply.status == 400
                assert not LEAKS.search(reply.error["message"])
            form = request("POST", path, b"x=1", headers={"Content-Type": "application/x-www-form-urlencoded"})
            assert (await raw(served.port, form)).status == 415
