"""Encoders, embedders and rerankers in GGUF have the vectors and the scores of the folders that they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import encoder_support, tiny_tokenizers
from support.checkpoints import make_gemma3_text, make_qwen3, read_weights, write_weights
from support.encoder_support import load, pooled, run
from support.gguf_families import FAMILIES, write_family
from support.gguf_writer import container, tokenizer_metadata
from support.model_driver import Driver, Sequence
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    NomicBertConfig,
    NomicBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.gguf import gguf_folder
from sensorium.errors import CheckpointError
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
EDGES = ("<s>", "<pad>", "</s>", "<mask>")
TEXTS = ("The quick brown fox", "def main(argv):  42\n", "<mask> Ça va")


def write_edged_tokenizer(folder: Path, pre: str) -> dict[str, Any]:
    """RoBERTa's -> what GGUF says of it"""
    raw = tiny_tokenizers.byte_level()
    raw.add_special_tokens([AddedToken(one, special=True, normalized=False, lstrip=one == "<mask>") for one in EDGES])
    begin, pad, end, mask = (tiny_tokenizers.id_of(raw, one) for one in EDGES)
    raw.post_processor = processors.RobertaProcessing(("</s>", end), ("<s>", begin), add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    tiny_tokenizers.write(folder, raw, **names)
    ids = {"bos": begin, "eos": end, "seperator": end, "padding": pad, "mask": mask}
    flags = {f"tokenizer.ggml.add_{one}_token": True for one in ("bos", "eos", "sep")}
    numbers = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    return {**tokenizer_metadata(folder, pre), **flags, **numbers}


def roberta(size: int) -> RobertaForSequenceClassification:
    own = {"max_position_embeddings": 82, "type_vocab_size": 1, "pad_token_id": 1, "num_labels": 1}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=size, **own, **SHAPE))


def nomic(size: int) -> NomicBertModel:
    return NomicBertModel(NomicBertConfig(vocab_size=size, max_position_embeddings=2048, **SHAPE))


def modern(size: int) -> ModernBertForSequenceClassification:
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    own = {"max_position_embeddings": 80, "local_attention": 8, "num_labels": 1, "classifier_pooling": "mean"}
    shape = {**SHAPE, "num_hidden_layers": 4}
    return ModernBertForSequenceClassification(ModernBertConfig(vocab_size=size, **own, **ids, **shape))


ENCODERS: dict[str, tuple[Callable[[int], Any], str]] = {
    "roberta_classifier": (roberta, "roberta-bpe"),
    "nomic_bert": (nomic, "roberta-bpe"),
    "modernbert_classifier": (modern, "roberta-bpe"),
}


@pytest.mark.parametrize(("family", "kind"), [*((name, "F32") for name in ENCODERS), ("roberta_classifier", "Q8_0")])
def test_an_encoder(tmp_path: Path, family: str, kind: str) -> None:
    make, pre = ENCODERS[family]
    hub = tmp_path / "hub"
    stated = write_edged_tokenizer(hub, pre)
    encoder_support.save(make(len(stated["tokenizer.ggml.tokens"])), hub)
    write_family(hub, tmp_path / "m.gguf", family, stated, kind)
    folder = gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")
    expected, found = load(hub), load(folder)
    tokenizer, own = Tokenizer.from_folder(hub), Tokenizer.from_folder(folder)
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    assert [own.encode(text, add_special_tokens=True) for text in TEXTS] == prompts
    assert found.poolers.keys() == expected.poolers.keys()
    ids = [torch.tensor(one) for one in prompts]
    for task in expected.poolers.keys() & {"embed", "score"}:
        for states, own_states, one in zip(run(expected, ids), run(found, ids), ids, strict=True):
            meant, vector = pooled(expected, task, states, one), pooled(found, task, own_states, one)
            torch.testing.assert_close(vector, meant, atol=1e-5 if kind == "F32" else 0.05, rtol=1e-4)


def test_a_reranker_of_two_rows(tmp_path: Path) -> None:
    """Rows of yes and no become one score; the file's text with places for a query and a document is the template."""
    hub = tmp_path / "hub"
    make_qwen3(hub)
    raw = RawTokenizer.from_file(str(hub / "tokenizer.json"))
    raw.add_tokens([AddedToken(word, normalized=False) for word in ("no", "yes")])
    raw.save(str(hub / "tokenizer.json"))
    rows = read_weights(hub)["lm_head.weight"]
    head = rows[[tiny_tokenizers.id_of(raw, "yes"), tiny_tokenizers.id_of(raw, "no")]]
    pairs = {"tokenizer.chat_templates": ["rerank"], "tokenizer.chat_template.rerank": RERANK, "qwen3.pooling_type": 4}
    stated = {**tokenizer_metadata(hub, "qwen2"), **pairs}
    write_family(hub, tmp_path / "m.gguf", "qwen3", stated, more={"cls.output.weight": head})
    hub = hub.rename(tmp_path / "Qwen3-Reranker-0.6B")
    folder = gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")
    assert open_checkpoint(folder).architecture == "Qwen3ForSequenceClassification"
    scores = []
    for place in (hub, folder):
        model, prompt = load(place), Sequence([5, 300, 7, 42])
        states = Driver(model).step([(prompt, 4)])
        scores.append(pooled(model, "score", states, torch.tensor(prompt.tokens)))
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=1e-5)
    messages = [Message(role, (TextPart(text),)) for role, text in (("query", "a {document}"), ("document", 'b"{{'))]
    texts = [
        LocalTemplate(open_checkpoint(place).chat_template or "", Tokenizer.from_folder(place)).render(messages)
        for place in (hub, folder)
    ]
    assert texts[0] == texts[1]


RERANK = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_dense_layers_behind_the_pooling(tmp_path: Path, kind: str) -> None:
    """EmbeddingGemma's."""
    hub = tmp_path / "hub"
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    make_gemma3_text(hub, query_pre_attn_scalar=16, num_hidden_layers=6, layer_types=layers)
    config = json.loads((hub / "config.json").read_text())
    own = {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True, "sliding_window": 6}
    (hub / "config.json").write_text(json.dumps({**config, **own}))
    write_weights(hub, {key.removeprefix("model."): one for key, one in read_weights(hub).items() if "head" not in key})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense", "4": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{one}"} for path, one in kinds.items()]
    (hub / "modules.json").write_text(json.dumps(modules))
    linear = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    settings = {"1_Pooling": {"pooling_mode_mean_tokens": True}, "2_Dense": linear, "3_Dense": linear}
    dense = {"2_Dense": torch.randn(64, 32) / 6, "3_Dense": torch.randn(32, 64) / 7}
    for place, one in settings.items():
        (hub / place).mkdir()
        (hub / place / "config.json").write_text(json.dumps(one))
    for place, weight in dense.items():
        save_file({"linear.weight": weight}, hub / place / "model.safetensors")
    more = {f"dense_{place[0]}.weight": weight for place, weight in dense.items()}
    write_family(hub, tmp_path / "m.gguf", "embedding_gemma", tokenizer_metadata(hub, "gpt-2"), kind, more=more)
    folder = gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")
    text, own_text = open_checkpoint(hub).text, open_checkpoint(folder).text
    assert text is not None and own_text is not None
    assert replace(own_text, rms_norm_eps=text.rms_norm_eps) == text  # which GGUF has in float32
    expected, found, states = load(hub), load(folder), torch.randn(7, 32)
    meant, vector = (pooled(model, "embed", states, torch.arange(7)) for model in (expected, found))
    torch.testing.assert_close(vector, meant, atol=1e-5 if kind == "F32" else 0.02, rtol=1e-4)
    if kind == "F32":
        weights = dict(expected.named_parameters())
        for name, parameter in found.named_parameters():
            torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "tensors", "said"),
    [
        ("roberta_classifier", {}, {"cls.output.weight": (1, 2)}, "lacks the layer before it"),
        ("llama", {"llama.pooling_type": 4}, {}, "is of the architecture 'llama' is not supported"),
        ("qwen3", {"qwen3.pooling_type": 4}, {}, "has no cls.output.weight is not supported"),
        ("qwen3", {"qwen3.pooling_type": 4}, {"cls.output.weight": (3, 2)}, "has 3 rows; a score is made of two"),
    ],
)
def test_rerankers_that_are_refused(tmp_path: Path, family: str, changes: Any, tensors: Any, said: str) -> None:
    shapes = {"token_embd.weight": (2, 2), "blk.0.a": (1,), "blk.1.a": (1,), **tensors}
    stored = {name: ("F32", shape, bytes(4 * int(np.prod(shape)))) for name, shape in shapes.items()}
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b"]}
    (tmp_path / "m.gguf").write_bytes(container({**FAMILIES[family]["metadata"], **vocabulary, **changes}, stored))
    with pytest.raises(CheckpointError, match=said) as error:
        gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("modernbert_classifier", {"modern-bert.attention.head_count": 3}, "not a multiple of 3 attention heads"),
        ("modernbert_classifier", {"modern-bert.attention.layer_norm_rms_epsilon": -1.0}, "norm_eps must not be below"),
        ("modernbert_classifier", {"modern-bert.rope.freq_base": -1.0}, "rope_theta of -1.0"),
        ("modernbert_classifier", {"modern-bert.rope.freq_base_swa": float("nan")}, "freq_base_swa must be a number"),
        ("modernbert_classifier", {"modern-bert.attention.sliding_window": 1e30}, "local_attention must be a positive"),
        ("nomic_bert", {"nomic-bert.attention.head_count": 3}, "not a multiple of 3 attention heads"),
        ("nomic_bert", {"nomic-bert.attention.layer_norm_epsilon": -1.0}, "layer_norm_eps must not be below"),
        ("nomic_bert", {"nomic-bert.embedding_length": 64}, "the configuration needs"),
        ("roberta_classifier", {"bert.attention.layer_norm_epsilon": float("inf")}, "epsilon must be a number"),
        ("roberta_classifier", {"bert.block_count": 3}, "missing encoder.layer.2"),
    ],
)
def test_mislabelled_encoders(tmp_path: Path, family: str, changes: Any, said: str) -> None:
    """Each ends in one line that names what is wrong, before a product of it fails or is no number."""
    make, pre = ENCODERS[family]
    hub = tmp_path / "hub"
    stated = write_edged_tokenizer(hub, pre)
    encoder_support.save(make(len(stated["tokenizer.ggml.tokens"])), hub)
    write_family(hub, tmp_path / "m.gguf", family, {**stated, **changes})
    with pytest.raises(CheckpointError, match=said) as error:
        load(gguf_folder(tmp_path / "m.gguf", tmp_path / "cache"))
    assert "\n" not in error.value.message
