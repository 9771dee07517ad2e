"""BERT, RoBERTa and XLM-RoBERTa: bidirectional encoders that embed, classify and score. No KV cache.

Devlin et al. 2018; Liu et al. 2019 (positions start after the padding id). Post-norm layers, absolute positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.labels import classifier_activation, num_labels
from sensorium.checkpoint.lengths import first_position
from sensorium.checkpoint.pooling import PoolingKind
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, NeededStates
from sensorium.models.base import Model, Rename
from sensorium.models.layers import Embedding, Head, Linear, QKVLinear, activation_name
from sensorium.models.towers.blocks import LayerNorm
from sensorium.pooling.embedding import embedding_poolers
from sensorium.pooling.pooler import ClassifyPooler

ENCODER_MAP = (
    Rename("{a}.LayerNorm.gamma", "{a}.LayerNorm.weight"),
    Rename("{a}.LayerNorm.beta", "{a}.LayerNorm.bias"),
    Rename("encoder.layer.{n}.{a}.output.LayerNorm.gamma", "encoder.layer.{n}.{a}.output.LayerNorm.weight"),
    Rename("encoder.layer.{n}.{a}.output.LayerNorm.beta", "encoder.layer.{n}.{a}.output.LayerNorm.bias"),
    Rename("encoder.layer.{n}.output.LayerNorm.gamma", "encoder.layer.{n}.output.LayerNorm.weight"),
    Rename("encoder.layer.{n}.output.LayerNorm.beta", "encoder.layer.{n}.output.LayerNorm.bias"),
    Rename("encoder.layer.{n}.attention.self.query.{p}", "encoder.layer.{n}.attention.qkv.{p}", "q"),
    Rename("encoder.layer.{n}.attention.self.key.{p}", "encoder.layer.{n}.attention.qkv.{p}", "k"),
    Rename("encoder.layer.{n}.attention.self.value.{p}", "encoder.layer.{n}.attention.qkv.{p}", "v"),
)


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """`first_position` is 0 for BERT and pad_token_id + 1 for the RoBERTas, whose table has that many rows more."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    positions: int
    first_position: int
    type_vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError("config.json: only absolute position_embedding_type is supported")
        if config.get("is_decoder"):
            raise CheckpointError(
                "config.json: is_decoder (attention to earlier tokens only) is not supported for encoders"
            )
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config.get("hidden_size", 768),
            num_layers=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            intermediate_size=config.get("intermediate_size", 3072),
            hidden_act=config.get("hidden_act", "gelu"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            positions=config.get("max_position_embeddings", 512),
            first_position=first_position(config, encoder),
            type_vocab_size=config.get("type_vocab_size", 2),
        )


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.positions, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class Output(nn.Module):
    """Dense, residual, norm: the end of both halves of a layer."""

    def __init__(self, config: EncoderConfig, inner: int) -> None:
        super().__init__()
        self.dense = Linear(inner, config.hidden_size, bias=True)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense.packed.added(x, residual))
        return out


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.qkv = QKVLinear(config.hidden_size, config.num_heads, config.num_heads, self.head_dim, bias=True)
        self.output = Output(config, config.hidden_size)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor, lengths: list[int], first: Tensor | None) -> Tensor:
        """[tokens, hidden] -> the same, or [runs, hidden] of the rows `first` alone"""
        q, k, v = self.qkv(x).view(len(x), 3, -1, self.head_dim).unbind(1)  # [tokens, heads, head_dim] each
        if first is None:
            attended = kernels.varlen_attention(q, k, v, lengths, self.scale)
        else:
            attended, x = kernels.first_attention(q[first], k, v, lengths, self.scale), x[first]
        out: Tensor = self.output(attended.reshape(len(x), -1), x)
        return out


class Intermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.activation = activation_name(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense.packed.activated(x, self.activation)


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, x: Tensor, lengths: list[int], first: Tensor | None = None) -> Tensor:
        x = self.attention(x, lengths, first)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Encoder(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class EncoderModel(Model):
    """What all encoders share: no KV cache, and poolers in place of a language head."""

    partial_states: ClassVar[NeededStates] = "first"

    def _embeds(self, size: int) -> None:
        self.poolers, self.dense = embedding_poolers(self.checkpoint.folder, "cls", size, self.checkpoint.pooling)

    def _classifies(self, head: Callable[[Tensor], Tensor], kind: PoolingKind = "cls") -> None:
        config = self.checkpoint.config
        labels, act = num_labels(config), classifier_activation(self.checkpoint.folder, config)
        self.poolers = {"classify": ClassifyPooler(kind, head, labels, act)}
        if labels == 1:
            self.poolers["score"] = self.poolers["classify"]


class BertModel(EncoderModel):
    """The encoder as an embedder."""

    weight_prefixes: ClassVar[Mapping[str, str]] = {"bert.": "", "roberta.": ""}
    weight_map: ClassVar[tuple[Rename, ...]] = ENCODER_MAP
    ignored: tuple[str, ...] = ("position_ids", "cls.", "lm_head.", "pooler.", "bert.pooler.", "roberta.pooler.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config = EncoderConfig.of(checkpoint.config, checkpoint.family.encoder or EncoderDefaults())
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config)
        self._declare_poolers()

    def _declare_poolers(self) -> None:
        self._embeds(self.config.hidden_size)

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Words and segments; the positions are added by `forward`. [tokens] -> [tokens, hidden]"""
        types = torch.zeros_like(token_ids) if token_types is None else token_types
        out: Tensor = self.embeddings.word_embeddings(token_ids) + self.embeddings.token_type_embeddings(types)
        return out

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        hidden = hidden + self.embeddings.position_embeddings(positions + self.config.first_position)
        hidden = self.embeddings.LayerNorm(hidden)
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden = layer(hidden, context.query_lens)
        if context.needed_states == "all":
            out: Tensor = last(hidden, context.query_lens)
            return out
        first = context.query_start[:-1].long()
        return hidden.index_copy_(0, first, last(hidden, context.query_lens, first))

    def activation_bytes(self, tokens: int) -> int:
        size = self.embeddings.LayerNorm.weight.element_size()
        return tokens * size * (6 * self.config.hidden_size + 2 * self.config.intermediate_size)


class BertPooler(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense = Head(size, size, bias=True)


class BertForSequenceClassification(BertModel):
    """First token -> dense -> tanh -> classes; with one class a cross-encoder's score."""

    ignored: tuple[str, ...] = ("position_ids",)

    def _declare_poolers(self) -> None:
        self.pooler = BertPooler(self.config.hidden_size)
        self.classifier: nn.Module = Head(self.config.hidden_size, num_labels(self.checkpoint.config), bias=True)
        self._classifies(lambda state: self.classifier(torch.tanh(self.pooler.dense(state))))


class RobertaHead(nn.Module):
    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.dense = Head(size, size, bias=True)
        self.out_proj = Head(size, labels, bias=True)

    def forward(self, state: Tensor) -> Tensor:
        out: Tensor = self.out_proj(torch.tanh(self.dense(state)))
        return out


class RobertaForSequenceClassification(BertForSequenceClassification):
    ignored: tuple[str, ...] = (*BertForSequenceClassification.ignored, "roberta.pooler.")

    def _declare_poolers(self) -> None:
        self.classifier = RobertaHead(self.config.hidden_size, num_labels(self.checkpoint.config))
        self._classifies(self.classifier)
