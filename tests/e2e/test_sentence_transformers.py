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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from support import server
from support.bert import SHAPE, save, write_tokenizer
from support.checkpoints import make_qwen3
from transformers import BertConfig, BertModel

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
        expected = oracle.encode(TEXTS, batch_size=1, **choice)  # type: ignore[arg-type]
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
