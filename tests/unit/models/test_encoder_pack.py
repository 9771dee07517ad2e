"""Encoders beside BERT and ModernBERT against transformers' classes: states, classes, other layouts of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights, write_weights
from support.encoder_support import VOCAB, load, pooled, prompts_of, run, save
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models import biased
from sensorium.models.mpnet import bucket

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
}
DISTILBERT = {
    **{"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB},
    "max_position_embeddings": 160,
}
LENGTHS = [1, 7, 150, 3, 40]

EMBEDDERS: dict[str, Callable[[], Any]] = {
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)),
    "distilbert, relu": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT, activation="relu")),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SHAPE)),
    "mpnet, another padding id": lambda: MPNetModel(MPNetConfig(**{**SHAPE, "pad_token_id": 3})),
    "mpnet, more buckets": lambda: MPNetModel(MPNetConfig(**SHAPE, relative_attention_num_buckets=40)),
}
CLASSIFIERS: dict[str, Callable[[int], Any]] = {
    "distilbert": lambda n: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT, num_labels=n)),
    "mpnet": lambda n: MPNetForSequenceClassification(MPNetConfig(**SHAPE, num_labels=n)),
}
TOKEN_CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForTokenClassification(BertConfig(**SHAPE, num_labels=5)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SHAPE, num_labels=5)),
    "distilbert": lambda: DistilBertForTokenClassification(DistilBertConfig(**DISTILBERT, num_labels=5)),
}


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@torch.inference_mode()
def check_states(oracle: Any, folder: Path) -> None:
    """All tokens', and the first ones' where no others are computed."""
    model, prompts = load(folder), prompts_of(LENGTHS)
    first = run(model, prompts, needed_states="first")
    for ids, states, only in zip(prompts, run(model, prompts), first, strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(only[0], expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_states(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biased, "BIAS_ELEMENTS", 20_000)  # a long run's queries in several parts
    check_states(save(EMBEDDERS[name](), tmp_path), tmp_path)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("labels", [1, 3])
@torch.inference_mode()
def test_classifiers(tmp_path: Path, name: str, labels: int) -> None:
    oracle = save(CLASSIFIERS[name](labels), tmp_path)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    assert set(model.poolers) == ({"classify", "score"} if labels == 1 else {"classify"})
    for ids, states in zip(prompts, run(model, prompts, needed_states="first"), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(
            pooled(model, "classify", states, ids, activation=False), logits, atol=2e-5, rtol=1e-5
        )
        expected = logits.sigmoid() if labels == 1 else logits.softmax(-1)
        torch.testing.assert_close(pooled(model, "classify", states, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOKEN_CLASSIFIERS)
@torch.inference_mode()
def test_token_classifiers(tmp_path: Path, name: str) -> None:
    oracle = save(TOKEN_CLASSIFIERS[name](), tmp_path)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    assert set(model.poolers) == {"token_classify"}
    for ids, states in zip(prompts, run(model, prompts), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        raw = pooled(model, "token_classify", states, ids, activation=False)
        torch.testing.assert_close(raw, logits, atol=2e-5, rtol=1e-5)
        scores = pooled(model, "token_classify", states, ids)
        torch.testing.assert_close(scores, logits.softmax(-1), atol=1e-5, rtol=1e-5)


def test_masked_language_models_embed(tmp_path: Path) -> None:
    check_states(save(DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT)), tmp_path).distilbert, tmp_path)


def test_prefixed_as_another_model_stores_it(tmp_path: Path) -> None:
    oracle = save(MPNetModel(MPNetConfig(**SHAPE)), tmp_path)
    write_weights(tmp_path, {f"mpnet.{key}": value for key, value in read_weights(tmp_path).items()})
    check_states(oracle, tmp_path)


def test_names_of_distilberts_config(tmp_path: Path) -> None:
    """transformers takes BERT's names of the same things too."""
    oracle = save(EMBEDDERS["distilbert"](), tmp_path)
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    stated = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, **dict.fromkeys(names), **{new: stated[old] for old, new in names.items()})
    check_states(oracle, tmp_path)


def test_buckets_of_distances() -> None:
    """Distances and rows as transformers' MPNet has them."""
    rows = {-100: 15, -64: 14, -20: 10, -16: 10, -9: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 8: 24, 15: 25, 20: 26}
    rows |= {64: 30, 128: 31}
    assert dict(zip(rows, bucket(torch.tensor(list(rows))).tolist(), strict=True)) == rows


@pytest.mark.parametrize(("name", "length"), [("distilbert", 160), ("mpnet", 158), ("mpnet, another padding id", 158)])
def test_lengths(tmp_path: Path, name: str, length: int) -> None:
    save(EMBEDDERS[name](), tmp_path)
    assert open_checkpoint(tmp_path).max_model_len == length


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets"),
        ("mpnet", {"num_attention_heads": 5}, "5 attention heads"),
        ("distilbert", {"dim": "wide"}, "hidden_size"),
        ("distilbert", {"activation": "mish"}, "mish"),
    ],
)
def test_what_it_cannot_compute_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], said: str) -> None:
    save(EMBEDDERS[name](), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)
