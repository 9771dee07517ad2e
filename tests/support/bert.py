"""Tiny BERT checkpoints and their tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from support.checkpoints import read_weights, write_weights

WORDS = (
    "paris is the capital of france berlin lies on spree bread made flour what a cat and dog sit under table . ? "
    ", who wrote this book"
).split()


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocab = {
        word: index
        for index, word in enumerate(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                *WORDS,
                *"abcdefghijklmnopqrstuvwxyz",
                *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
            ]
        )
    }
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save(model: PreTrainedModel, folder: Path) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return model


MARKS = ("[MASK]", "[unused0]", "[unused1]", "[Q] ", "[D] ", *string.punctuation)


def write_marked_tokenizer(folder: Path) -> int:
    """A BERT's tokenizer with its marks and punctuation as whole tokens -> the size of its vocabulary."""
    raw = write_tokenizer(folder).backend_tokenizer
    state = json.loads(raw.to_str())
    vocab = state["model"]["vocab"]
    for mark in MARKS:
        vocab.setdefault(mark, len(vocab))
    raw = Tokenizer.from_str(json.dumps(state))
    raw.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("[MASK]", "[Q] ", "[D] ")])
    marks = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    }
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **marks).save_pretrained(folder)
    return len(vocab)


def make_marked(folder: Path) -> None:
    """A BERT with such a tokenizer."""
    size = write_marked_tokenizer(folder)
    save(BertModel(BertConfig(vocab_size=size, **SHAPE)), folder)


def make_colbert(folder: Path, **metadata: Any) -> None:
    """As Stanford's library saves it. `metadata` are other settings of its own file."""
    make_marked(folder)
    weights = {f"bert.{key}": value for key, value in read_weights(folder).items()}
    write_weights(folder, {**weights, "linear.weight": torch.randn(24, int(SHAPE["hidden_size"]))})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    settings = {"query_maxlen": 16, "doc_maxlen": 30, "query_token_id": "[unused0]", "doc_token_id": "[unused1]"}
    (folder / "artifact.metadata").write_text(json.dumps({**settings, **metadata}))
