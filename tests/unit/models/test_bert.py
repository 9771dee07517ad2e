"""Encoders against transformers' classes: states, poolings, classifiers and cross-encoders, alone and together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_weights, write_weights
from support.encoder_support import VOCAB, load, pooled, prompts_of, run, save
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
}
LENGTHS = [1, 7, 38, 3]


@pytest.mark.parametrize("prefix", ["", "bert."])
@torch.inference_mode()
def test_bert_states(tmp_path: Path, prefix: str) -> None:
    oracle = save(BertModel(BertConfig(**SHAPE)), tmp_path)
    if prefix:  # as a masked language model stores it
        weights = {prefix + key: value for key, value in read_weights(tmp_path).items()}
        write_weights(tmp_path, {**weights, "cls.predictions.bias": torch.zeros(120)})
    prompts = prompts_of(LENGTHS)
    types = [(torch.arange(len(ids)) >= 2).long() for ids in prompts]
    for ids, kinds, states in zip(prompts, types, run(load(tmp_path), prompts, types), strict=True):
        expected = oracle(ids.unsqueeze(0), token_type_ids=kinds.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_first_tokens_alone(tmp_path: Path) -> None:
    """The last layer computes no more than is read of it."""
    oracle = save(BertModel(BertConfig(**SHAPE)), tmp_path)
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(load(tmp_path), prompts, needed_states="first"), strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0, 0]
        torch.testing.assert_close(states[0], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_old_names_of_norms(tmp_path: Path) -> None:
    save(BertModel(BertConfig(**SHAPE)), tmp_path)
    expected = run(load(tmp_path), prompts_of(LENGTHS))
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    write_weights(tmp_path, {_renamed(key, names): value for key, value in read_weights(tmp_path).items()})
    for old, new in zip(run(load(tmp_path), prompts_of(LENGTHS)), expected, strict=True):
        torch.testing.assert_close(old, new, atol=0, rtol=0)


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


@torch.inference_mode()
def test_roberta_positions_start_after_padding(tmp_path: Path) -> None:
    oracle = save(
        RobertaModel(RobertaConfig(**SHAPE, type_vocab_size=1, pad_token_id=1), add_pooling_layer=False), tmp_path
    )
    assert open_checkpoint(tmp_path).max_model_len == SHAPE["max_position_embeddings"] - 2
    for ids, states in zip(prompts_of(LENGTHS), run(load(tmp_path), prompts_of(LENGTHS)), strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("labels", [1, 2, 5])
@torch.inference_mode()
def test_classifiers(tmp_path: Path, family: str, labels: int) -> None:
    config_class, model_class = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
        "xlm-roberta": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
    }[family]
    oracle = save(model_class(config_class(**SHAPE, num_labels=labels)), tmp_path)
    model = load(tmp_path)
    assert set(model.poolers) == ({"classify", "score"} if labels == 1 else {"classify"})
    assert not model.generates
    for ids, states in zip(prompts_of(LENGTHS), run(model, prompts_of(LENGTHS)), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        raw = pooled(model, "classify", states, ids, activation=False)
        torch.testing.assert_close(raw, logits, atol=1e-5, rtol=1e-5)
        scores = pooled(model, "classify", states, ids)
        expected = logits.sigmoid() if labels == 1 else logits.softmax(-1)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_looks_back_only_is_refused(tmp_path: Path) -> None:
    """transformers computes a BERT with `is_decoder` causally."""
    save(BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1, is_decoder=True)), tmp_path)
    with pytest.raises(CheckpointError, match="is_decoder"):
        load(tmp_path)


def test_activation_named_by_the_config(tmp_path: Path) -> None:
    save(BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sbert_ce_default_activation_function"] = "torch.nn.modules.linear.Identity"
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    states, ids = run(model, prompts_of(LENGTHS))[1], prompts_of(LENGTHS)[1]
    raw = pooled(model, "score", states, ids, activation=False)
    torch.testing.assert_close(pooled(model, "score", states, ids), raw)
    config["sbert_ce_default_activation_function"] = "os.system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load(tmp_path)


@torch.inference_mode()
def test_embeddings_follow_the_module_files(tmp_path: Path) -> None:
    oracle = save(BertModel(BertConfig(**SHAPE)), tmp_path)
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, path) in enumerate(kinds)
            ]
        )
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 38}')
    model = load(tmp_path)
    assert open_checkpoint(tmp_path).max_model_len == 38
    for ids, states in zip(prompts_of(LENGTHS), run(model, prompts_of(LENGTHS)), strict=True):
        expected = nn.functional.normalize(oracle(ids.unsqueeze(0)).last_hidden_state[0].mean(0), dim=-1)
        torch.testing.assert_close(pooled(model, "embed", states, ids), expected, atol=1e-5, rtol=1e-5)
