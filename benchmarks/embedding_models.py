"""Embedders of published shapes with random weights, for `embeddings.py`: encoders as bge has them, and a decoder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Qwen3Config, Qwen3Model

VOCABULARY, POSITIONS = 30522, 512
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "<|endoftext|>"


def words() -> list[str]:
    """Made-up words, one token each."""
    rng = random.Random(1)
    found: dict[str, None] = {}
    while len(found) < VOCABULARY - len(SPECIAL):
        syllables = rng.choice((2, 3, 3, 4))
        found["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))] = None
    return list(found)


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, contents in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(contents, indent=1))


def module_files(hidden: int, pooling: str, positions: int) -> dict[str, Any]:
    """What sentence-transformers reads. `pooling`: cls or lasttoken."""
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modes = {"cls": "cls_token", "lasttoken": "lasttoken", "mean": "mean_tokens", "max": "max_tokens"}
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden,
            **{f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()},
        },
    }


def word_pieces(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def make_encoder(folder: Path, layers: int, hidden: int, heads: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def rows(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.04

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.LayerNorm.weight": 1 + rows(hidden), f"{name}.LayerNorm.bias": rows(hidden)}

    tensors = {
        f"embeddings.{name}_embeddings.weight": rows(size, hidden)
        for name, size in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2))
    }
    tensors |= norm("embeddings")
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        sizes = {f"{at}.attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        sizes |= {
            f"{at}.attention.output.dense": (hidden, hidden),
            f"{at}.intermediate.dense": (inner, hidden),
            f"{at}.output.dense": (hidden, inner),
        }
        for name, size in sizes.items():
            tensors |= {f"{name}.weight": rows(*size), f"{name}.bias": rows(size[0])}
        tensors |= norm(f"{at}.attention.output") | norm(f"{at}.output")
    tensors |= {"pooler.dense.weight": rows(hidden, hidden), "pooler.dense.bias": rows(hidden)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "dtype": "float32",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": POSITIONS,
            "do_lower_case": True,
            **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
        },
    }
    write(folder, {**files, **module_files(hidden, "cls", POSITIONS)})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words()))}
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = word_pieces(vocabulary)
    tokenizer.add_special_tokens(list(SPECIAL))
    ends = (("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_decoder(folder: Path, **shape: int) -> None:
    """Qwen3-Embedding's kind: the vector is the state of the end token behind the text. bfloat16."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, END, *words()))}
    end = vocabulary[END]
    config = Qwen3Config(
        **shape,
        vocab_size=151_936,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(1)
    Qwen3Model(config).bfloat16().save_pretrained(folder)
    write(
        folder,
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.max_position_embeddings,
                "padding_side": "left",
                **{"pad_token": END, "eos_token": END, "unk_token": "[UNK]"},
            },
            **module_files(config.hidden_size, "lasttoken", POSITIONS),
        },
    )
    tokenizer = word_pieces(vocabulary)
    tokenizer.add_special_tokens([*SPECIAL, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


SHAPES: dict[str, Callable[[Path], None]] = {
    "base": partial(make_encoder, layers=12, hidden=768, heads=12, inner=3072),
    "small": partial(make_encoder, layers=12, hidden=384, heads=12, inner=1536),
    "qwen3-0.6b": partial(
        make_decoder,
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def make_checkpoint(folder: Path, shape: str) -> None:
    SHAPES[shape](folder)
