"""Folders that sentence-transformers has saved, behind a real server: its own vectors and scores are the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from support import server
from support.bert import SHAPE, save, write_tokenizer
from support.checkpoints import make_qwen3
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

TEXTS = ["what is the capital of france ?", "Berlin lies on the Spree.", "a"]
PROMPTS = {"query": "who wrote this : ", "document": "", "passage": "bread and flour "}


def saved(model: Path, folder: Path, mode: Any, *, include_prompt: bool) -> SentenceTransformer:
    transformer = Transformer(str(model), max_seq_length=48)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode, include_prompt=include_prompt)
    made = SentenceTransformer(
        modules=[transformer, pooling], prompts=PROMPTS, default_prompt_name="query", device="cpu"
    )
    made.save(str(folder))
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def check(served: server.Server, oracle: SentenceTransformer) -> None:
    for choice in ({}, {"prompt_name": "query"}, {"prompt_name": "document"}, {"prompt_name": "passage"}):
        expected = oracle.encode(TEXTS, batch_size=1, **choice)
        reply = httpx.post(f"{served.url}/v1/embeddings", json={"input": TEXTS, "use_activation": False, **choice})
        found = [row["embedding"] for row in reply.json()["data"]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    query, documents = oracle.encode_query(TEXTS[0]), oracle.encode_document(TEXTS[1:], batch_size=1)
    expected = torch.nn.functional.cosine_similarity(torch.tensor(query), torch.tensor(documents))
    reply = httpx.post(f"{served.url}/score", json={"queries": TEXTS[0], "documents": TEXTS[1:]})
    np.testing.assert_allclose([row["score"] for row in reply.json()["data"]], expected, atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_an_encoder_with_prompts(tmp_path: Path, include_prompt: bool) -> None:
    tokenizer = write_tokenizer(tmp_path / "m")
    save(BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)), tmp_path / "m")
    oracle = saved(tmp_path / "m", tmp_path / "st", ("cls", "mean", "weightedmean"), include_prompt=include_prompt)
    with server.running(tmp_path, str(tmp_path / "st")) as served:
        check(served, oracle)


def test_a_decoder_with_prompts(tmp_path: Path) -> None:
    make_qwen3(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    del config["chat_template"]  # else a folder that is saved today embeds chats
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))
    oracle = saved(tmp_path / "m", tmp_path / "st", "lasttoken", include_prompt=True)
    for name in ("config.json", "model.safetensors"):  # with the language head, as such models are published
        (tmp_path / "st" / name).unlink()  # the oracle may have it mapped
        shutil.copy(tmp_path / "m" / name, tmp_path / "st" / name)
    with server.running(tmp_path, str(tmp_path / "st")) as served:
        check(served, oracle)


CARD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
TASK = "Given a web search query, retrieve relevant passages that answer the query"


def saved_reranker(folder: Path) -> tuple[Any, Any]:
    """Qwen3-Reranker as it is published, saved again by sentence-transformers -> (tokenizer, causal model)."""
    make_qwen3(folder / "m", tie_word_embeddings=True, max_position_embeddings=1024)
    words = Tokenizer.from_file(str(folder / "m" / "tokenizer.json"))
    words.add_tokens([AddedToken(word, normalized=False) for word in ("yes", "no")])
    words.save(str(folder / "m" / "tokenizer.json"))
    config = json.loads((folder / "m" / "tokenizer_config.json").read_text())
    (folder / "m" / "tokenizer_config.json").write_text(
        json.dumps({**config, "pad_token": "<|endoftext|>", "padding_side": "left", "model_max_length": 1024})
    )
    served = folder / "Qwen3-Reranker-0.6B"
    CrossEncoder(str(folder / "m"), device="cpu", model_kwargs={"dtype": torch.float32}).save_pretrained(str(served))
    return AutoTokenizer.from_pretrained(served), AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)


def test_a_reranker_that_answers_yes_or_no(tmp_path: Path) -> None:
    tokenizer, oracle = saved_reranker(tmp_path)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def prompt_of(document: str, instruction: str = TASK) -> list[int]:
        text = CARD.format(instruction=instruction, query=TEXTS[0], document=document)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def expected(document: str, instruction: str = TASK) -> float:
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt_of(document, instruction)])).logits[0, -1]
        return float((logits[yes] - logits[no]).sigmoid())

    with server.running(tmp_path, str(tmp_path / "Qwen3-Reranker-0.6B")) as served:

        def post(path: str, **body: Any) -> Any:
            return httpx.post(served.url + path, json=body, timeout=60).json()

        for options in ({}, {"instruction": "Find the author."}):
            scores = post("/v1/score", text_1=TEXTS[0], text_2=TEXTS[1:], **options)["data"]
            wanted = [expected(document, *options.values()) for document in TEXTS[1:]]
            np.testing.assert_allclose([row["score"] for row in scores], wanted, atol=1e-5)
        ranked = post("/rerank", query=TEXTS[0], documents=TEXTS[1:])["results"]
        best = np.argsort([-expected(document) for document in TEXTS[1:]]).tolist()
        assert [row["index"] for row in ranked] == best
        raw = post("/score", text_1=TEXTS[0], text_2=TEXTS[1], use_activation=False)["data"][0]["score"]
        assert raw == pytest.approx(float(np.log(expected(TEXTS[1]) / (1 - expected(TEXTS[1])))), abs=1e-4)
        long = "flour " * 500
        cut = post("/score", text_1=TEXTS[0], text_2=long, truncate_prompt_tokens=300)
        tokens = cut["usage"]["prompt_tokens"]
        assert 290 < tokens <= 300
        kept = [long[:end] for end in range(100, 900) if len(prompt_of(long[:end])) == tokens]
        assert min(abs(expected(document) - cut["data"][0]["score"]) for document in kept) < 1e-5
