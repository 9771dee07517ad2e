"""The Llama-like decoder: Llama, Mistral, Yi, Qwen2, Qwen3, Phi-3, and the text half of every multimodal model here.

What differs between them (biases, norms of q and k, window, rope, tied head) is data of `TextConfig`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import AttentionSpec, TextConfig
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, NeededStates
from sensorium.kernels.reference.attention import GATHER_ELEMENTS, MASK_ELEMENTS
from sensorium.models.base import Model, Rename
from sensorium.models.cache import CacheGroup, PagedGroup
from sensorium.models.layers import (
    Attention,
    Embedding,
    GateUpLinear,
    LanguageHead,
    Linear,
    QKVLinear,
    RMSNorm,
    activation_name,
)
from sensorium.models.rope import RotaryEmbedding
from sensorium.pooling.embedding import embedding_poolers
from sensorium.pooling.pooler import Pooler
from sensorium.types import PoolingTask

BARE_PREFIXES = {"embed_tokens.": "model.embed_tokens.", "layers.": "model.layers.", "norm.": "model.norm."}
"""Of decoders that were saved without what holds them, as embedders are."""
LOGIT_ROWS = 256  # rows of logits that `activation_bytes` allows for

DECODER_MAP = (
    Rename("model.layers.{n}.self_attn.q_proj.{p}", "model.layers.{n}.self_attn.qkv_proj.{p}", "q"),
    Rename("model.layers.{n}.self_attn.k_proj.{p}", "model.layers.{n}.self_attn.qkv_proj.{p}", "k"),
    Rename("model.layers.{n}.self_attn.v_proj.{p}", "model.layers.{n}.self_attn.qkv_proj.{p}", "v"),
    Rename("model.layers.{n}.mlp.gate_proj.{p}", "model.layers.{n}.mlp.gate_up_proj.{p}", "gate"),
    Rename("model.layers.{n}.mlp.up_proj.{p}", "model.layers.{n}.mlp.gate_up_proj.{p}", "up"),
)


def _norm(config: TextConfig, size: int | None = None) -> RMSNorm:
    return RMSNorm(size or config.hidden_size, config.rms_norm_eps, config.norm_offset)


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVLinear(config.hidden_size, heads, kv_heads, head_dim, bias=config.attention_bias)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = _norm(config, head_dim) if config.qk_norm else None
        self.k_norm = _norm(config, head_dim) if config.qk_norm else None
        self.attention = Attention(heads, kv_heads, head_dim, spec)
        self.widths = [heads, kv_heads, kv_heads]
        self.head_dim = head_dim

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Of the tokens `rows` int64 [n], or of all."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
        q, k, v = heads.split(self.widths, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k = kernels.rope(q, k, cos, sin)
        attended = self.attention(q, k, v, cache, context)
        out: Tensor = self.o_proj(attended if rows is None else attended[rows])
        return out


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = activation_name(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(kernels.gated(self.gate_up_proj(x), self.activation))
        return out


class DecoderLayer(nn.Module):
    """With norms behind attention and MLP (Gemma) `post_attention_layernorm` is one of these two, elsewhere it is the
    one before the MLP: the names are those of checkpoints."""

    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, spec)
        self.mlp = MLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        self.pre_feedforward_layernorm = _norm(config) if config.has_sublayer_norms else None
        self.post_feedforward_layernorm = _norm(config) if config.has_sublayer_norms else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(last layer's output, sum of all before it) -> the same pair, of the tokens `rows` if they are given; every
        sum is taken with the norm after it."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, cos, sin, cache, context, rows)
        if rows is not None:
            residual = residual[rows]
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x, residual = self.post_attention_layernorm.add(x, residual)
            return self.mlp(x), residual
        x, residual = self.pre_feedforward_layernorm.add(self.post_attention_layernorm(x), residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual

    def parts(self, rotation: int) -> kernels.DecoderLayerParts:
        """`rotation`: number of its table of rotary positions."""
        attention, mlp, spec = self.self_attn, self.mlp, self.self_attn.attention.spec
        before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        return kernels.DecoderLayerParts(
            input_norm=self.input_layernorm.weight,
            qkv=attention.qkv_proj.packed,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            o=attention.o_proj.packed,
            attended_norm=None if before_mlp is None else self.post_attention_layernorm.weight,
            mlp_norm=(before_mlp or self.post_attention_layernorm).weight,
            gate_up=mlp.gate_up_proj.packed,
            down=mlp.down_proj.packed,
            after_norm=None if after_mlp is None else after_mlp.weight,
            sliding_window=spec.window,
            media_both_ways=spec.media_both_ways,
            rotation=rotation,
        )


class Decoder(nn.Module):
    """Embedding, layers and last norm. `embed_tokens` reads the head's rows when the two are tied."""

    def __init__(self, config: TextConfig, tied_head: Linear | None = None) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tied_head)
        self.layers = nn.ModuleList(DecoderLayer(config, spec) for spec in config.layers)
        self.norm = _norm(config)
        ropes = list(dict.fromkeys(spec.rope for spec in config.layers))
        self.rotaries = nn.ModuleList(
            RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings) for rope in ropes
        )
        self.rotation_of = [ropes.index(spec.rope) for spec in config.layers]
        self.is_causal = config.is_causal
        self.activation = activation_name(config.hidden_act)

    @functools.cached_property
    def stack(self) -> kernels.DecoderStack | None:
        """The layers as one call, once their weights are there."""
        if not self.is_causal:
            return None
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        attention = layers[0].self_attn.attention
        return kernels.decoder_stack(
            [layer.parts(rotation) for layer, rotation in zip(layers, self.rotation_of, strict=True)],
            self.norm.weight,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            scale=attention.spec.scale,
            eps=self.norm.eps,
            norm_offset=self.norm.offset,
            activation=self.activation,
        )

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        rotations = [one(positions, context.long_context, context.rope_lengths) for one in self.rotaries]
        is_partial = context.needed_states == "last" and len(context.query_lens) < len(hidden)
        added = context.layer_rows
        if added is not None and added.values.shape[1] >= len(self.layers):
            is_partial = False
        rows = context.query_start[1:].long() - 1 if is_partial else None  # all that the last layer has to compute
        if self.stack is not None and added is None and not context.others:  # it knows one block table
            return self.stack(hidden, rotations, cache, context, rows)
        residual: Tensor | None = None
        caches = cache if self.is_causal else [None] * len(self.layers)
        for index, (layer, layer_cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            only = rows if index == len(self.layers) else None
            cos, sin = rotations[self.rotation_of[index - 1]]
            hidden, residual = layer(hidden, residual, cos, sin, layer_cache, context, only)
            if added is not None and index <= added.values.shape[1]:
                hidden.index_add_(0, added.tokens, added.values[:, index - 1])
        if residual is None:
            return hidden
        normed, _ = self.norm.add(hidden, residual)
        if rows is None:
            return normed
        return normed.new_empty(positions.shape[-1], normed.shape[1]).index_copy_(0, rows, normed)


class DecoderModel(Model):
    """A decoder that pools its states. What stands on top of it is its subclasses' business; by itself it is a base
    model, which embeds."""

    weight_prefixes: ClassVar[Mapping[str, str]] = BARE_PREFIXES
    weight_map: ClassVar[tuple[Rename, ...]] = DECODER_MAP
    quantizable: ClassVar[tuple[str, ...]] = ("model.", "lm_head.")
    partial_states: ClassVar[NeededStates] = "last"
    decoder: ClassVar[type[Decoder]] = Decoder
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq", "lm_head.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.text = checkpoint.decoder
        self.generates = type(self).generates and config.is_causal and config.has_head
        self.model = self.decoder(config, self._declare_head(config))
        self.poolers = self._make_poolers()
        self.long_context_from, self.stretched_from = config.long_context_from, config.stretched_from
        self.media_both_ways = any(spec.media_both_ways for spec in config.layers)

    def _declare_head(self, config: TextConfig) -> Linear | None:
        """Declare what follows the decoder; returns the linear layer whose rows are also the embedding, if one is."""
        return None

    def _make_poolers(self) -> Mapping[PoolingTask, Pooler]:
        """Last token, normalised, unless sentence-transformers' files in the folder say otherwise."""
        poolers, self.dense = embedding_poolers(
            self.checkpoint.folder, "last", self.text.hidden_size, self.checkpoint.pooling
        )
        return poolers

    def cache_groups(self) -> list[CacheGroup]:
        if not self.text.is_causal:
            return []  # what comes later changes what was before
        layers: dict[tuple[int, int, int | None], list[int]] = {}
        attentions = [module.attention for module in self.model.modules() if isinstance(module, SelfAttention)]
        for index, attention in enumerate(attentions):
            shape = (attention.num_kv_heads, attention.head_dim, attention.spec.window)
            layers.setdefault(shape, []).append(index)
        return [PagedGroup(tuple(places), *shape) for shape, places in layers.items()]

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        rows: Tensor = self.model.embed_tokens(token_ids)
        scale = self.text.embedding_scale
        # Rounded to the weights' type first, as the models were trained: in bfloat16 the root of 2560 is 50.5.
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        if (
            self.long_context_from is not None
            and context.long_context is None
            and max(context.context_lens) > self.long_context_from
        ):
            raise ValueError("the batch does not say which sequences use the long rope frequencies")
        if (
            self.stretched_from is not None
            and context.rope_lengths is None
            and max(context.context_lens) > self.stretched_from
        ):
            raise ValueError("the batch does not say for which lengths the rope frequencies are made")
        out: Tensor = self.model(hidden, positions, cache, context)
        return out

    def activation_bytes(self, tokens: int) -> int:
        config, size = self.text, self.model.norm.weight.element_size()
        rotated = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        attention = 2 * rotated + config.num_heads * config.head_dim
        mlp = 3 * config.intermediate_size
        per_token = size * (4 * config.hidden_size + max(attention, mlp)) + 16 * config.head_dim
        longest = config.max_len * config.num_kv_heads * config.head_dim
        gathered = 2 * 2 * max(GATHER_ELEMENTS, longest) * size + 5 * MASK_ELEMENTS  # of keys and values, and the masks
        logits = min(tokens, LOGIT_ROWS) * config.vocab_size * (size + 4)
        return tokens * per_token + gathered + logits


class DecoderForCausalLM(DecoderModel):
    """A decoder with its language head: text models as they are, and the base of multimodal ones."""

    generates = True
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def _declare_head(self, config: TextConfig) -> Linear | None:
        if not config.has_head:
            return None
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        if not config.tie_word_embeddings:
            return None
        self.tied = {"model.embed_tokens.weight": "lm_head.weight"}
        return self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.lm_head(hidden)
        cap = self.text.logit_cap
        return out if cap is None else (out / cap).tanh_().mul_(cap)
