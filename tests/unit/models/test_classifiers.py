"""Classifiers and reward models on decoders, against transformers' classes and, where it has none, a composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.checkpoints import make_qwen2, read_weights, write_weights
from support.model_driver import Driver, Sequence
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.types import PoolingParams

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "mistral": (MistralConfig, MistralForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
}
PROMPTS = [[5, 9, 3], [7], [11, 2, 6, 4, 9, 119, 33]]


def load(folder: Path) -> Model:
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")


def states_of(model: Model) -> list[Tensor]:
    """All prompts in one batch."""
    hidden = Driver(model).step([(Sequence(list(ids)), len(ids)) for ids in PROMPTS])
    return list(torch.split(hidden, [len(ids) for ids in PROMPTS]))


def pooled(model: Model, task: str, states: Tensor, ids: list[int], **options: Any) -> Tensor:
    pooler = model.poolers[task]  # type: ignore[index]
    kept = states if pooler.all_tokens else states[-1:]
    with torch.inference_mode():
        return pooler(kept, PoolingParams(task, **options), np.array(ids, np.int32))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("labels", [1, 2, 3])
def test_sequence_classification(tmp_path: Path, family: str, labels: int) -> None:
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    oracle = model_class(config_class(**SHAPE, num_labels=labels)).eval()
    oracle.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert not model.generates
    assert ("score" in model.poolers) == (labels == 1)
    for ids, states in zip(PROMPTS, states_of(model), strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(
            pooled(model, "classify", states, ids, activation=False), expected, atol=1e-5, rtol=1e-5
        )
        scores = expected.sigmoid() if labels == 1 else expected.softmax(-1)
        torch.testing.assert_close(pooled(model, "classify", states, ids), scores, atol=1e-5, rtol=1e-5)
        assert pooled(model, "token_classify", states, ids).shape == (len(ids), labels)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_regression_answers_with_its_numbers(tmp_path: Path, labels: int) -> None:
    config_class, model_class = CLASSES["qwen2"]
    torch.manual_seed(0)
    config = config_class(**SHAPE, num_labels=labels, problem_type="regression")
    oracle = model_class(config).eval()
    torch.nn.init.normal_(oracle.score.weight, std=2.0)
    oracle.save_pretrained(tmp_path)
    model = load(tmp_path)
    for ids, states in zip(PROMPTS, states_of(model), strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(pooled(model, "classify", states, ids), expected, atol=1e-5, rtol=1e-5)
        assert (expected - expected.sigmoid()).abs().max() > 0.1


def test_the_true_last_token_counts_also_if_it_is_the_padding(tmp_path: Path) -> None:
    """A prompt that really ends with `<|endoftext|>` is pooled there, though it is also this model's padding."""
    config_class, model_class = CLASSES["qwen2"]
    model_class(config_class(**SHAPE, num_labels=2)).save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = [5, 9, 0]
    states = Driver(model).step([(Sequence(list(ids)), 3)])
    direct = torch.nn.functional.linear(states[-1], cast(Any, model.score).weight)
    torch.testing.assert_close(pooled(model, "classify", states, ids, activation=False), direct)


def reward_checkpoint(folder: Path, architecture: str, labels: int) -> dict[str, Tensor]:
    make_qwen2(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    size = config["hidden_size"]
    head = {
        "score.0.weight": torch.randn(size, size),
        "score.0.bias": torch.randn(size),
        "score.2.weight": torch.randn(labels, size),
        "score.2.bias": torch.randn(labels),
    }
    write_weights(folder, {**read_weights(folder), **head})
    return head


def rewards(head: dict[str, Tensor], states: Tensor) -> Tensor:
    inner = nn.functional.linear(states, head["score.0.weight"], head["score.0.bias"]).relu()
    return nn.functional.linear(inner, head["score.2.weight"], head["score.2.bias"])


def test_reward_model_rewards_every_token(tmp_path: Path) -> None:
    head = reward_checkpoint(tmp_path, "Qwen2ForRewardModel", 1)
    model = load(tmp_path)
    for ids, states in zip(PROMPTS, states_of(model), strict=True):
        torch.testing.assert_close(
            pooled(model, "token_classify", states, ids), rewards(head, states), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_process_reward_model_judges_every_step(tmp_path: Path, file: str) -> None:
    head = reward_checkpoint(tmp_path, "Qwen2ForProcessRewardModel", 2)
    with pytest.raises(CheckpointError, match="<extra_0>"):
        load(tmp_path)
    settings = json.loads((tmp_path / file).read_text())
    if file == "tokenizer.json":
        settings["added_tokens"].append({"id": 9, "content": "<extra_0>"})
        (tmp_path / "tokenizer_config.json").write_text("{}")  # as it is saved today: it tells no ids
    else:
        settings["added_tokens_decoder"] = {**settings.get("added_tokens_decoder", {}), "9": {"content": "<extra_0>"}}
    (tmp_path / file).write_text(json.dumps(settings))
    model = load(tmp_path)
    for ids, states in zip(PROMPTS, states_of(model), strict=True):
        steps = [i for i, token in enumerate(ids) if token == 9]
        expected = rewards(head, states)[steps].softmax(-1)
        torch.testing.assert_close(pooled(model, "token_classify", states, ids), expected, atol=1e-5, rtol=1e-5)


def test_decoders_embed_with_their_last_token(tmp_path: Path) -> None:
    oracle = make_qwen2(tmp_path)
    model = load(tmp_path)
    assert model.generates
    for ids, states in zip(PROMPTS, states_of(model), strict=True):
        with torch.inference_mode():
            expected = nn.functional.normalize(oracle.model(torch.tensor([ids])).last_hidden_state[0, -1], dim=-1)
        torch.testing.assert_close(pooled(model, "embed", states, ids), expected, atol=1e-5, rtol=1e-5)
        cut = pooled(model, "embed", states, ids, dimensions=8)
        torch.testing.assert_close(cut, nn.functional.normalize(expected[:8], dim=-1), atol=1e-5, rtol=1e-5)
