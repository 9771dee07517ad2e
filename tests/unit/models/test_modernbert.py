"""ModernBERT against transformers' classes: both dialects of its config, windows of all kinds, heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoder_support import VOCAB, load, pooled, prompts_of, run, save
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification, ModernBertModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.modernbert import ModernBertModel as Ours

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 300,
    "local_attention": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "reference_compile": False,
}
LENGTHS = [1, 9, 8, 250, 40, 3]  # shorter than a window, as long, longer; blocks that hold several and parts


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def check_states(oracle: Any, model: Any) -> None:
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(model, prompts), strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"local_attention": 128},
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
        {"hidden_activation": "silu"},
    ],
)
@torch.inference_mode()
def test_states(tmp_path: Path, options: dict[str, Any]) -> None:
    check_states(save(ModernBertModel(ModernBertConfig(**{**SHAPE, **options})), tmp_path), load(tmp_path))


@torch.inference_mode()
def test_config_as_on_the_hub(tmp_path: Path) -> None:
    config = ModernBertConfig(**SHAPE, global_attn_every_n_layers=2, global_rope_theta=5000.0, local_rope_theta=90.0)
    oracle = save(ModernBertModel(config), tmp_path)
    edit_config(
        tmp_path,
        layer_types=None,
        rope_parameters=None,
        global_attn_every_n_layers=2,
        global_rope_theta=5000.0,
        local_rope_theta=90.0,
    )
    model = load(tmp_path)
    assert isinstance(model, Ours)
    assert model.config.is_local == (False, True, False, True)
    assert (model.config.global_theta, model.config.local_theta) == (5000.0, 90.0)
    check_states(oracle, model)


def test_defaults(tmp_path: Path) -> None:
    save(ModernBertModel(ModernBertConfig(**SHAPE)), tmp_path)
    edit_config(tmp_path, layer_types=None, rope_parameters=None, max_position_embeddings=None, local_attention=None)
    model = load(tmp_path)
    assert isinstance(model, Ours)
    assert model.config.is_local == (False, True, True, False)
    assert (model.config.global_theta, model.config.local_theta, model.config.window) == (160_000.0, 10_000.0, 64)
    assert open_checkpoint(tmp_path).max_model_len == 8192


@torch.inference_mode()
def test_masked_language_model_embeds(tmp_path: Path) -> None:
    oracle = save(ModernBertForMaskedLM(ModernBertConfig(**SHAPE)), tmp_path)
    model = load(tmp_path)
    check_states(oracle.model, model)
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(model, prompts), strict=True):  # without module files: first token, normalised
        expected = torch.nn.functional.normalize(oracle.model(ids.unsqueeze(0)).last_hidden_state[0, 0], dim=0)
        torch.testing.assert_close(pooled(model, "embed", states, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"classifier_pooling": "cls", "num_labels": 1},
        {"classifier_pooling": "mean", "num_labels": 3},
        {"classifier_bias": True, "norm_bias": True, "classifier_activation": "silu", "num_labels": 2},
    ],
)
@torch.inference_mode()
def test_classifiers(tmp_path: Path, options: dict[str, Any]) -> None:
    oracle = save(ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, **options)), tmp_path)
    model = load(tmp_path)
    assert set(model.poolers) == ({"classify", "score"} if options["num_labels"] == 1 else {"classify"})
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(model, prompts), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(
            pooled(model, "classify", states, ids, activation=False), logits, atol=1e-5, rtol=1e-5
        )
        expected = logits.sigmoid() if options["num_labels"] == 1 else logits.softmax(-1)
        torch.testing.assert_close(pooled(model, "classify", states, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("last", ["full_attention", "sliding_attention"])
@torch.inference_mode()
def test_first_tokens_alone(tmp_path: Path, last: str) -> None:
    """The last layer computes no more than is read of it."""
    layers = ["sliding_attention", "full_attention", "sliding_attention", last]
    oracle = save(ModernBertModel(ModernBertConfig(**SHAPE, layer_types=layers)), tmp_path)
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(load(tmp_path), prompts, needed_states="first"), strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0, 0]
        torch.testing.assert_close(states[0], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    save(ModernBertModel(ModernBertConfig(**SHAPE)), tmp_path)
    prompts = prompts_of(LENGTHS)
    narrow, wide = run(load(tmp_path, torch.bfloat16), prompts), run(load(tmp_path), prompts)
    for a, b in zip(narrow, wide, strict=True):
        assert torch.nn.functional.cosine_similarity(a.float(), b, dim=-1).min() > 0.99


def test_what_it_cannot_compute_is_refused(tmp_path: Path) -> None:
    save(ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, num_labels=1)), tmp_path)
    original = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"hidden_activation": "mish"}, "mish"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(original))
        edit_config(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path)
