"""Bidirectional encoders of BERT's kind: post-norm layers over flat runs of tokens, no KV cache. They embed, classify
and score.

What families differ in is `EncoderConfig`: learnt or rotary positions, biases, a gated MLP. One whose attention is of
another kind gives its layers another `SelfAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.labels import classifier_activation, num_labels
from sensorium.checkpoint.lengths import first_position, token_types
from sensorium.checkpoint.pooling import PoolingKind
from sensorium.checkpoint.text_config import RopeConfig, read_rope
from sensorium.checkpoint.values import epsilon, positive_int, unsupported
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, NeededStates
from sensorium.models.base import Model, Rename
from sensorium.models.layers import Embedding, GateUpLinear, Head, Linear, QKVLinear, activation_name
from sensorium.models.rope import RotaryEmbedding
from sensorium.models.towers.blocks import LayerNorm
from sensorium.pooling.embedding import embedding_poolers, several_outputs, stored_rows
from sensorium.pooling.pooler import ClassifyPooler, TokenPooler, VectorsPooler


def check_heads(hidden_size: int, num_heads: int) -> None:
    """CheckpointError if heads of one size do not fill the hidden states."""
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} attention heads"
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
    positions: int  # rows of the table of positions; 0: there is none
    first_position: int
    type_vocab_size: int  # 0: there are no token types
    rope: RopeConfig | None = None
    rope_positions: int = 0  # from which on the dynamic kind stretches
    embedding_size: int = 0  # of the tables, where it is not hidden_size
    head_size: int = 0  # of the attention; 0: hidden_size / num_heads
    attention_bias: bool = True  # of q, k and v
    output_bias: bool = True  # of the product after the attention
    mlp_bias: bool = True  # of the first product of the MLP
    down_bias: bool = True  # of its last
    is_gated: bool = False  # whether a second projection of the MLP multiplies the activated first one

    @classmethod
    def of(cls, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        """BERT's names in config.json; families with other names have a table of them in the registry."""
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError("config.json: only absolute position_embedding_type is supported")
        if config.get("is_decoder"):
            raise CheckpointError(
                "config.json: is_decoder (attention to earlier tokens only) is not supported for encoders"
            )
        shape = cls(
            vocab_size=positive_int(config, "vocab_size", None),
            hidden_size=positive_int(config, "hidden_size", 768),
            num_layers=positive_int(config, "num_hidden_layers", encoder.num_layers),
            num_heads=positive_int(config, "num_attention_heads", 12),
            intermediate_size=positive_int(config, "intermediate_size", 3072),
            hidden_act=config.get("hidden_act") or "gelu",
            layer_norm_eps=epsilon(config, "layer_norm_eps", 1e-12),
            positions=positive_int(config, "max_position_embeddings", encoder.max_positions),
            first_position=first_position(config, encoder),
            type_vocab_size=token_types(config, encoder),
        )
        check_heads(shape.hidden_size, shape.num_heads)
        return shape

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    def rotary(self, config: dict[str, Any], theta: float, rope: RopeConfig | None = None) -> EncoderConfig:
        """With rotary positions in place of a table; `rope` in place of what config.json says of them."""
        found = rope or read_rope(config, theta, self.positions, self.head_dim)
        if found.kind == "longrope":
            raise unsupported("rope type", found.kind, ("default", "linear", "dynamic", "yarn", "llama3"))
        return replace(self, rope=found, rope_positions=self.rope_positions or self.positions, positions=0)


Groups: TypeAlias = Sequence[tuple[Tensor, int]]
"""Rows that one adapter is for, int64 [n], and its number."""


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share. `first` are the rows of the runs' first tokens."""

    lengths: list[int]
    first: Tensor  # int64 [runs]
    rotation: tuple[Tensor, Tensor] | None = None  # cos and sin, float32 [tokens, head_dim / 2]
    shared: Sequence[Tensor] = ()  # what a family's own attention needs
    unseen: Sequence[int] | None = None  # of `AttentionContext`
    adapted: tuple[Groups, Groups] = ((), ())  # which tokens, and which runs, have which adapters

    @property
    def seen(self) -> list[int]:
        """Of each run, how many tokens the others attend to: all but those at its end that are unseen."""
        hidden = self.unseen or [0] * len(self.lengths)
        return [length - none for length, none in zip(self.lengths, hidden, strict=True)]


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, size)
        self.position_embeddings = Embedding(config.positions, size) if config.positions else None
        self.token_type_embeddings = Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        self.embed_proj = None if size == config.hidden_size else Linear(size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def words(self, token_ids: Tensor, token_types: Tensor | None) -> Tensor:
        """Without positions. [tokens] -> [tokens, embedding size]"""
        words: Tensor = self.word_embeddings(token_ids)
        if self.token_type_embeddings is None:
            return words
        types = torch.zeros_like(token_ids) if token_types is None else token_types
        out: Tensor = words + self.token_type_embeddings(types)
        return out


class Output(nn.Module):
    """Dense, residual, norm: the end of both halves of a layer."""

    def __init__(self, config: EncoderConfig, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.dense = Linear(inner, config.hidden_size, bias=bias)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense.packed.added(x, residual))
        return out


def seen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    unseen: Sequence[int] | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`varlen_attention`, where nobody attends to the last `unseen` tokens of a run (what fills up ColBERT's queries).

    q, k, v [tokens, heads, head_dim] -> [tokens, heads, head_dim]
    """
    out = kernels.varlen_attention(q, k, v, lengths, scale, window).view(q.shape)
    start = 0
    for length, hidden in zip(lengths, unseen or (), strict=False):
        if hidden:
            rows, seen = slice(start, start + length), slice(start, start + length - hidden)
            places = torch.arange(length, device=q.device)
            near = (places[:, None] - places[None, : length - hidden]).abs() <= (length if window is None else window)
            queries, keys, values = (x.transpose(0, 1) for x in (q[rows], k[seen], v[seen]))
            attended = nn.functional.scaled_dot_product_attention(queries, keys, values, near, scale=scale)
            out[rows] = attended.transpose(0, 1)
        start += length
    return out


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = config.num_heads
        self.qkv = QKVLinear(config.hidden_size, heads, heads, self.head_dim, bias=config.attention_bias)
        self.output = Output(config, heads * self.head_dim, bias=config.output_bias)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor, step: Step, *, first_only: bool) -> Tensor:
        """[tokens, hidden] -> the same, or [runs, hidden] of the runs' first tokens alone"""
        attended = self.mixed(self.qkv(x), step, first_only=first_only)
        out: Tensor = self.output(attended, x[step.first] if first_only else x)
        return out

    def mixed(self, qkv: Tensor, step: Step, *, first_only: bool) -> Tensor:
        """Queries, keys and values [tokens, 3 * heads * head_dim] -> what is attended to, [tokens, heads * head_dim] or
        [runs, …]"""
        q, k, v = qkv.view(len(qkv), 3, -1, self.head_dim).unbind(1)  # [tokens, heads, head_dim] each
        if step.rotation is not None:
            q, k = kernels.rope(q, k, *step.rotation)
        if first_only:
            q = q[step.first]
        attended = self.attended(q, k, v, step, first_only=first_only)
        return attended.reshape(len(q), -1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step, *, first_only: bool) -> Tensor:
        """q [tokens, heads, head_dim], or [runs, …] with `first_only` -> the same"""
        if first_only:
            return kernels.first_attention(q, k, v, step.lengths, self.scale)
        return seen_attention(q, k, v, step.lengths, step.unseen, self.scale)


class Intermediate(nn.Module):
    """Gated: the activated gate times the other projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        linear = GateUpLinear if config.is_gated else Linear
        self.dense = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.activation = activation_name(config.hidden_act)
        self.is_gated = config.is_gated

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            return kernels.gated(self.dense(x), self.activation)
        return self.dense.packed.activated(x, self.activation)


class Layer(nn.Module):
    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = self.attention_class(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size, bias=config.down_bias)

    def forward(self, x: Tensor, step: Step, *, first_only: bool = False) -> Tensor:
        x = self.attention(x, step, first_only=first_only)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Encoder(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class ClassHead(nn.Module):
    """Dense, activation, classes; in float32."""

    def __init__(self, size: int, labels: int, activation: str) -> None:
        super().__init__()
        self.dense = Head(size, size, bias=True)
        self.out = Head(size, labels, bias=True)
        self.activation = activation_name(activation)

    def forward(self, state: Tensor) -> Tensor:
        out: Tensor = self.out(kernels.activate(self.dense(state), self.activation))
        return out


class EncoderModel(Model):
    """What all encoders share: no KV cache, and poolers in place of a language head."""

    partial_states: ClassVar[NeededStates] = "first"

    def _embeds(self, size: int) -> None:
        folder = self.checkpoint.folder
        poolers, self.dense = embedding_poolers(folder, "cls", size, self.checkpoint.pooling)
        more, self.more = several_outputs(folder, size, self.checkpoint.tokenizer_config)
        self.poolers = {**poolers, **more}

    def _classifies(self, head: Callable[[Tensor], Tensor], kind: PoolingKind = "cls") -> None:
        config = self.checkpoint.config
        labels, act = num_labels(config), classifier_activation(self.checkpoint.folder, config)
        self.poolers = {"classify": ClassifyPooler(kind, head, labels, act)}
        if labels == 1:
            self.poolers["score"] = self.poolers["classify"]

    def _labels_tokens(self, head: Callable[[Tensor], Tensor]) -> None:
        config = self.checkpoint.config
        labels, act = num_labels(config), classifier_activation(self.checkpoint.folder, config)
        self.poolers = {"token_classify": TokenPooler(labels, head=head, activation=act)}


class PostNormEncoder(EncoderModel):
    """An encoder of BERT's kind; the plain one is an embedder. Its parameters have BERT's names."""

    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config = self._read(checkpoint.config, checkpoint.family.encoder or EncoderDefaults())
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder([self._declare_layer(index) for index in range(self.config.num_layers)])
        self.rotary: RotaryEmbedding | None = None
        if self.config.rope is not None:
            self.rotary = RotaryEmbedding(self.config.rope, self.config.head_dim, self.config.rope_positions)
        self._declare_poolers()

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        return EncoderConfig.of(config, encoder)

    def _declare_layer(self, index: int) -> nn.Module:
        return self.layer_class(self.config)

    def _declare_poolers(self) -> None:
        self._embeds(self.config.hidden_size)

    def _declare_class_head(self, activation: str) -> None:
        self.head = ClassHead(self.config.hidden_size, num_labels(self.checkpoint.config), activation)
        self._classifies(self.head)

    def _declare_token_head(self) -> None:
        self.classifier = Head(self.config.hidden_size, num_labels(self.checkpoint.config), bias=True)
        self._labels_tokens(self.classifier)

    def _declare_vectors_head(self) -> None:
        """ColBERT's: a vector of every token, through one linear layer."""
        size = stored_rows(self.checkpoint.weight_files, "linear.weight")
        self.linear = Head(self.config.hidden_size, size, bias=False)
        self.poolers = {"token_embed": VectorsPooler(size, normalize=True, head=self.linear)}

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Words and segments; positions are added by `forward`. [tokens] -> [tokens, hidden]"""
        return self.embeddings.words(token_ids, token_types)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        if self.embeddings.position_embeddings is not None:
            hidden = hidden + self.embeddings.position_embeddings(positions + self.config.first_position)
        if self.embeddings.embed_proj is not None:
            hidden = self.embeddings.embed_proj(hidden)
        return self._states(hidden, self._step(positions, context), context)

    def _states(self, hidden: Tensor, step: Step, context: AttentionContext) -> Tensor:
        """Of embeddings with all that belongs to them, not yet normed."""
        hidden = self.embeddings.LayerNorm(hidden)
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden = layer(hidden, step)
        if context.needed_states == "all":
            out: Tensor = last(hidden, step)
            return out
        return hidden.index_copy_(0, step.first, last(hidden, step, first_only=True))

    def _step(self, positions: Tensor, context: AttentionContext) -> Step:
        first = context.query_start[:-1].long()
        if self.rotary is None:
            return Step(context.query_lens, first, unseen=context.unseen)
        lengths = None
        if max(context.query_lens) > self.config.rope_positions:
            each = torch.tensor(context.query_lens, device=positions.device)
            lengths = torch.repeat_interleave(each, each)
        return Step(context.query_lens, first, self.rotary(positions, lengths=lengths), unseen=context.unseen)

    def activation_bytes(self, tokens: int) -> int:
        config, size = self.config, self.embeddings.LayerNorm.weight.element_size()
        inner = (2 + config.is_gated) * config.intermediate_size
        return tokens * size * (6 * config.hidden_size + inner)


def separate_qkv(query: str, key: str, value: str) -> tuple[Rename, ...]:
    """Rows of a weight map: the three products of every layer's attention become one. The names are relative to
    `encoder.layer.{n}`."""
    target = "encoder.layer.{n}.attention.qkv.{p}"
    return tuple(
        Rename(f"encoder.layer.{{n}}.{name}.{{p}}", target, shard)
        for name, shard in zip((query, key, value), "qkv", strict=True)
    )


FLASH_PLACES: Mapping[str, str] = {
    "mixer.Wqkv": "attention.qkv",
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Parts of a layer in the files of jina's XLM-RoBERTas, and as here."""
FLASH_MAP = (
    Rename("emb_ln.{p}", "embeddings.LayerNorm.{p}"),
    *(
        Rename(f"encoder.layers.{{n}}.{stored}.{{p}}", f"encoder.layer.{{n}}.{own}.{{p}}")
        for stored, own in FLASH_PLACES.items()
    ),
)
"""Rows of a weight map for such files."""


def head_map(dense: str, out: str) -> tuple[Rename, ...]:
    """The same of a classifier's two layers."""
    return Rename(f"{dense}.{{p}}", "head.dense.{p}"), Rename(f"{out}.{{p}}", "head.out.{p}")


def prefixes(*names: str) -> Mapping[str, str]:
    """Prefixes of an encoder's own tensors in files of models that have more than it."""
    return {f"{name}.": "" for name in names}
