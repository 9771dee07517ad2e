"""What an embedder's folder says beside its weights: the longest text, and how states become a vector."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_qwen2
from transformers import BertConfig, BertForSequenceClassification, BertModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.loading import Engine, load_engine
from sensorium.errors import StartupError
from sensorium.types import PoolingParams

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 50,
}


def load(folder: Path, **options: Any) -> Engine:
    return load_engine(EngineConfig(str(folder), kv_cache_memory=1 << 20, device="cpu", **options))


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(("told", "length"), [(None, 64), (40, 40), (1000, 64), (int(1e30), 64)])
def test_an_encoders_tokenizer_bounds_its_texts(tmp_path: Path, told: int | None, length: int) -> None:
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"model_max_length": told})
    assert open_checkpoint(tmp_path).max_model_len == length
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 32})
    assert open_checkpoint(tmp_path).max_model_len == 32


def test_a_decoders_only_where_it_is_an_embedder(tmp_path: Path) -> None:
    make_qwen2(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"model_max_length": 40})
    assert open_checkpoint(tmp_path).max_model_len == 512
    write(tmp_path, "modules.json", [{"type": "st.Transformer", "path": ""}])
    assert open_checkpoint(tmp_path).max_model_len == 40
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 30})
    assert open_checkpoint(tmp_path).max_model_len == 30


def test_an_encoders_guess_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "first token's states, normalised; --pooling" in caplog.text
    caplog.clear()
    load(tmp_path, pooling="cls")
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    write(
        tmp_path, "modules.json", [{"type": "st.Transformer", "path": ""}, {"type": "st.Pooling", "path": "1_Pooling"}]
    )
    load(tmp_path)
    assert "pool" not in caplog.text


def test_the_operator_says_how_to_pool(tmp_path: Path) -> None:
    make_qwen2(tmp_path)
    states = torch.randn(3, 32)
    for wanted, expected in (("auto", states[-1]), ("mean", states.mean(0)), ("cls", states[0])):
        pooler = load(tmp_path, pooling=wanted).runner._poolers["embed"]
        found = pooler(states, PoolingParams("embed", normalize=False), np.zeros(3, np.int32))
        torch.testing.assert_close(found, expected)


def test_a_model_without_embeddings_pools_nothing(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="--pooling mean: this model makes no embeddings"):
        load(tmp_path, pooling="mean")


def test_a_folder_whose_texts_are_chats_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_qwen2(tmp_path)
    methods = {"text": {"method": "forward"}}
    for config, said in ((methods, False), ({**methods, "message": {"method": "forward"}}, True)):
        write(tmp_path, "sentence_bert_config.json", {"modality_config": config})
        caplog.clear()
        load(tmp_path)
        assert ("send them as `messages`" in caplog.text) == said
