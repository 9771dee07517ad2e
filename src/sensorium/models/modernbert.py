"""ModernBERT (Warner et al. 2024): pre-norm encoder layers with rotary positions, most of which see only a window.

Two dialects of config.json: the hub's (`global_attn_every_n_layers`, `global_rope_theta`, `local_rope_theta`) and
transformers' newer one (`layer_types`, `rope_parameters` by layer type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.labels import num_labels
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.checkpoint.values import epsilon, number, positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache
from sensorium.kernels.reference.attention import window_queries
from sensorium.models.encoder import EncoderModel, check_heads, seen_attention
from sensorium.models.layers import Embedding, Head, Linear, activation_name, declare
from sensorium.models.rope import RotaryEmbedding

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: 160_000.0, _SLIDING: 10_000.0}


@dataclass(frozen=True, slots=True)
class ModernBertConfig:
    """`window` is how many tokens a token of a local layer sees on either side of itself."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    activation: kernels.Activation
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    window: int
    is_local: tuple[bool, ...]  # by layer
    global_theta: float
    local_theta: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModernBertConfig:
        thetas = {kind: _theta(config, kind) for kind in (_FULL, _SLIDING)}
        hidden_size, num_heads = (
            positive_int(config, key, default) for key, default in (("hidden_size", 768), ("num_attention_heads", 12))
        )
        check_heads(hidden_size, num_heads)
        return cls(
            vocab_size=positive_int(config, "vocab_size", 50368),
            hidden_size=hidden_size,
            num_heads=num_heads,
            intermediate_size=positive_int(config, "intermediate_size", 1152),
            activation=activation_name(config.get("hidden_activation", "gelu")),
            norm_eps=epsilon(config, "norm_eps", 1e-5),
            norm_bias=bool(config.get("norm_bias", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            window=positive_int(config, "local_attention", 128) // 2,
            is_local=_local_layers(config),
            global_theta=thetas[_FULL],
            local_theta=thetas[_SLIDING],
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def _theta(config: Mapping[str, Any], kind: str) -> float:
    if config.get("rope_scaling"):
        raise CheckpointError("config.json: rope_scaling is not supported for ModernBERT")
    parameters = (config.get("rope_parameters") or {}).get(kind) or {}
    if parameters.get("rope_type", "default") != "default":
        raise CheckpointError(f"config.json: rope type {parameters['rope_type']!r} is not supported for ModernBERT")
    old = config.get("global_rope_theta" if kind == _FULL else "local_rope_theta")
    theta = number({"rope_theta": parameters.get("rope_theta") or old}, "rope_theta", _THETA[kind])
    if theta <= 0:
        raise CheckpointError(f"config.json: a rope_theta of {theta!r} turns nothing")
    return theta


def _local_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    count = config.get("num_hidden_layers", 22)
    kinds = config.get("layer_types")
    if kinds is None:
        every = config.get("global_attn_every_n_layers", 3)
        return tuple(i % every != 0 for i in range(count))
    unknown = set(kinds) - {_FULL, _SLIDING}
    if unknown or len(kinds) != count:
        raise CheckpointError(f"config.json: layer_types must name {_FULL} or {_SLIDING} for each of {count} layers")
    return tuple(kind == _SLIDING for kind in kinds)


class Norm(nn.Module):
    """Layer norm; ModernBERT's have no bias unless the config says so."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.weight = declare(config.hidden_size)
        self.bias = declare(config.hidden_size) if config.norm_bias else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.norm = Norm(config)


@dataclass(frozen=True, slots=True)
class Rotation:
    cos: Tensor  # float32 [tokens, head_dim / 2]
    sin: Tensor


class Attention(nn.Module):
    def __init__(self, config: ModernBertConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5
        self.window = window
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, x: Tensor, residual: Tensor, rotation: Rotation, context: AttentionContext, first: Tensor | None
    ) -> Tensor:
        """[tokens, hidden] -> the same, or [runs, hidden] of the rows `first` alone"""
        q, k, v = self.Wqkv(x).view(len(x), 3, -1, self.head_dim).unbind(1)  # [tokens, heads, head_dim] each
        q, k = kernels.rope(q, k, rotation.cos, rotation.sin)
        if first is None:
            attended = seen_attention(q, k, v, context.query_lens, context.unseen, self.scale, self.window)
        else:
            attended = kernels.first_attention(q[first], k, v, context.query_lens, self.scale, self.window)
            residual = residual[first]
        return self.Wo.packed.added(attended.reshape(len(residual), -1), residual)


class Mlp(nn.Module):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.Wo.packed.added(kernels.gated(self.Wi(x), self.activation), residual)


class Layer(nn.Module):
    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        self.is_local = config.is_local[index]
        self.attn_norm = Norm(config) if index else None  # the embeddings are normed already
        self.attn = Attention(config, config.window if self.is_local else None)
        self.mlp_norm = Norm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, rotation: Rotation, context: AttentionContext, first: Tensor | None = None) -> Tensor:
        x = self.attn(x if self.attn_norm is None else self.attn_norm(x), x, rotation, context, first)
        out: Tensor = self.mlp(self.mlp_norm(x), x)
        return out


class ModernBertModel(EncoderModel):
    """The encoder as an embedder."""

    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.": ""}
    ignored: tuple[str, ...] = ("head.", "decoder.", "classifier.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config = ModernBertConfig.of(checkpoint.config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.is_local)))
        self.final_norm = Norm(config)
        self.global_rotary = RotaryEmbedding(RopeConfig(theta=config.global_theta), config.head_dim)
        self.local_rotary = RotaryEmbedding(RopeConfig(theta=config.local_theta), config.head_dim)
        self._declare_poolers()

    def _declare_poolers(self) -> None:
        self._embeds(self.config.hidden_size)

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """It has no segments: a pair is told apart by its separators."""
        out: Tensor = self.embeddings.norm(self.embeddings.tok_embeddings(token_ids))
        return out

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        everywhere, near = Rotation(*self.global_rotary(positions)), Rotation(*self.local_rotary(positions))
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, near if layer.is_local else everywhere, context)
        rotation = near if last.is_local else everywhere
        if context.needed_states == "all":
            out: Tensor = self.final_norm(last(hidden, rotation, context))
            return out
        first = context.query_start[:-1].long()
        return hidden.index_copy_(0, first, self.final_norm(last(hidden, rotation, context, first)))

    def activation_bytes(self, tokens: int) -> int:
        config, size = self.config, self.final_norm.weight.element_size()
        windows = tokens * 5 * (2 * config.window + window_queries(config.window))  # the masks of local attention
        return tokens * size * (7 * config.hidden_size + 3 * config.intermediate_size) + windows


class PredictionHead(nn.Module):
    """Dense, activation, norm; in float32."""

    def __init__(self, config: ModernBertConfig, act: kernels.Activation, *, bias: bool) -> None:
        super().__init__()
        self.dense = Head(config.hidden_size, config.hidden_size, bias=bias)
        self.norm = Norm(config)
        self.activation = act

    def forward(self, state: Tensor) -> Tensor:
        norm = self.norm
        bias = None if norm.bias is None else norm.bias.float()
        wide = kernels.activate(self.dense(state), self.activation)
        return kernels.layer_norm(wide, norm.weight.float(), bias, norm.eps)


class ModernBertForSequenceClassification(ModernBertModel):
    """First token or mean -> head -> classes; with one class a cross-encoder's score."""

    ignored: tuple[str, ...] = ()

    def _declare_poolers(self) -> None:
        raw = self.checkpoint.config
        pooling = raw.get("classifier_pooling", "cls")
        if pooling not in ("cls", "mean"):
            raise CheckpointError(f"config.json: classifier_pooling {pooling!r} is neither cls nor mean")
        self.head = PredictionHead(
            self.config,
            activation_name(raw.get("classifier_activation", "gelu")),
            bias=bool(raw.get("classifier_bias", False)),
        )
        self.classifier = Head(self.config.hidden_size, num_labels(raw), bias=True)
        self._classifies(lambda state: self.classifier(self.head(state)), pooling)
