"""The Llama-like decoder: Llama, Mistral, Yi, Qwen2, Qwen3, Phi-3, and the text half of every multimodal model here.

What differs between them (biases, norms of q and k, window, rope, tied head) is data of `TextConfig`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.state_layers import DeltaNetSpec
from sensorium.checkpoint.text_config import AttentionSpec, TextConfig
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, NeededStates
from sensorium.kernels.reference.attention import GATHER_ELEMENTS, MASK_ELEMENTS
from sensorium.models.base import Model, Rename
from sensorium.models.cache import CacheGroup, PagedGroup, StateGroup, StatePart
from sensorium.models.delta_net import DeltaNet
from sensorium.models.experts import EXPERT_MAP, RoutedMLP, routed_elements
from sensorium.models.layers import (
    MLP,
    Attention,
    Embedding,
    LanguageHead,
    Linear,
    PlainNorm,
    QKVLinear,
    RMSNorm,
    SplitInputs,
    activation_name,
    declare,
)
from sensorium.models.rope import RotaryEmbedding, query_scales
from sensorium.models.short_conv import ShortConv, StateMixer
from sensorium.parallel.ranks import Ranks
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
    *EXPERT_MAP,
)


@functools.cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """As a tensor of this type holds it."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def whole(parts: Iterable[kernels.DecoderLayerParts | None]) -> list[kernels.DecoderLayerParts] | None:
    """Those of all layers; None if a layer has none."""
    found: list[kernels.DecoderLayerParts] = []
    for one in parts:
        if one is None:
            return None
        found.append(one)
    return found


def _norm(config: TextConfig, size: int | None = None) -> RMSNorm:
    return RMSNorm(size or config.hidden_size, config.rms_norm_eps, config.norm_offset)


class SelfAttention(nn.Module):
    """Of a layer that reads another one's keys and values, queries alone."""

    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        heads, head_dim = config.num_heads, spec.head_dim or config.head_dim
        kv_heads = spec.num_kv_heads or config.num_kv_heads
        q_heads = 2 * heads if config.gates_attention else heads  # each query has its gate behind it
        self.kinds = "q" if spec.source is not None else "qk" if spec.keys_are_values else "qkv"
        self.qkv_proj = QKVLinear(
            config.hidden_size, q_heads, kv_heads, head_dim, bias=config.attention_bias, kinds=self.kinds
        )
        self.o_proj = Linear(heads * head_dim, config.hidden_size, bias=config.output_bias)
        self.norms_whole = config.norms_whole_qk
        q_size, k_size = (heads * head_dim, kv_heads * head_dim) if self.norms_whole else (head_dim, head_dim)
        self.q_norm = _norm(config, q_size) if config.qk_norm else None
        self.k_norm = _norm(config, k_size) if config.qk_norm and spec.source is None else None
        self.v_norm = PlainNorm(head_dim, config.rms_norm_eps) if config.norms_values else None
        self.sinks = declare(heads) if config.has_sinks else None
        self.attention = Attention(heads, kv_heads, head_dim, spec)
        self.widths = [q_heads, kv_heads, kv_heads][: len(self.kinds)]
        self.is_gated = config.gates_attention
        self.is_paired = config.pairs_rope
        self.head_dim = head_dim
        self.heads = slice(None)  # which of the model's are here

    def split(self, ranks: Ranks) -> None:
        """Have some of the heads; all of them where a norm needs them together."""
        if self.norms_whole:
            return
        first, heads = ranks.part(self.attention.num_heads)
        first_kv, kv_heads = ranks.part_or_copy(self.attention.num_kv_heads)
        size, each = self.head_dim, self.head_dim * (1 + self.is_gated)
        kv = first_kv * size, kv_heads * size
        parts = {"q": (first * each, heads * each), "k": kv, "v": kv}
        self.qkv_proj.keep(**{kind: parts[kind] for kind in self.kinds})
        self.o_proj = SplitInputs(self.o_proj, ranks, first * size, heads * size)
        self.attention = Attention(heads, kv_heads, size, self.attention.spec)
        self.widths = [heads * (1 + self.is_gated), kv_heads, kv_heads][: len(self.kinds)]
        self.heads = slice(first, first + heads)

    def _separate(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; none of those that the layer has not."""
        q, *rest = parts
        k = rest[0] if rest else q[:, :0]
        return q, k, rest[1] if len(rest) > 1 else k

    def _normed(self, states: Tensor, norm: RMSNorm) -> Tensor:
        """[tokens, heads, head_dim], each head on its own or all together."""
        states = states.contiguous()
        normed: Tensor = norm(states.flatten(1) if self.norms_whole else states)
        return normed.view(states.shape)

    @functools.cached_property
    def sink_scores(self) -> Tensor | None:
        """float32 [heads], once the weights are there."""
        return None if self.sinks is None else self.sinks[self.heads].float()

    def parts(self) -> dict[str, Any]:
        """What `kernels.DecoderLayerParts` has of it, by field."""
        spec = self.attention.spec
        return {
            "qkv": self.qkv_proj.packed,
            "q_norm": None if self.q_norm is None else self.q_norm.weight,
            "k_norm": None if self.k_norm is None else self.k_norm.weight,
            "o": self.o_proj.packed,
            "sliding_window": spec.window,
            "media_both_ways": spec.media_both_ways,
            "sinks": self.sink_scores,
            "is_gated": self.is_gated,
            "is_paired": self.is_paired,
        }

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
        adapters = context.adapters
        qkv: Tensor = self.qkv_proj.adapted(x, adapters)
        heads = qkv.view(x.shape[0], -1, self.head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
        q, k, v = self._separate(torch.split(heads, self.widths, dim=1))
        gates = q[:, 1::2] if self.is_gated else None
        if gates is not None:
            q = q[:, ::2]
        if self.v_norm is not None:
            v = self.v_norm(v.contiguous())  # before keys that are values are rotated in place
        q, k = (
            states if norm is None else self._normed(states, norm)
            for states, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        if self.is_paired:
            q, k = (_parted(states, cos.shape[1]) for states in (q, k))
        q, k = kernels.rope(q, k, cos, sin)
        if context.query_scales is not None:
            q = q * context.query_scales.to(q.dtype)
        attended = self.attention(q, k, v, cache, context, self.sink_scores)
        if gates is not None:
            attended *= gates.flatten(1).sigmoid()
        return self.o_proj.adapted(attended if rows is None else attended[rows], adapters)


def _parted(states: Tensor, pairs: int) -> Tensor:
    """[tokens, heads, head_dim], whose first dimensions are rotated in pairs, with the first of each pair before the
    second ones. Products of queries and keys do not change by it."""
    rotated = states[..., : 2 * pairs].reshape(*states.shape[:-1], pairs, 2).transpose(-1, -2).flatten(-2)
    return torch.cat([rotated, states[..., 2 * pairs :]], dim=-1)


Mixer: TypeAlias = SelfAttention | StateMixer
"""What mixes the tokens of a layer."""


def make_mixer(config: TextConfig, spec: AttentionSpec) -> Mixer:
    if isinstance(spec.state, DeltaNetSpec):
        return DeltaNet(config.hidden_size, spec.state, config.rms_norm_eps)
    return SelfAttention(config, spec) if spec.state is None else ShortConv(config.hidden_size, spec.state)


def make_mlp(config: TextConfig, index: int) -> MLP | RoutedMLP:
    """Of layer `index`."""
    if config.routing is not None and index in config.routing.layers:
        return RoutedMLP(config, config.routing)
    return MLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)


class DecoderLayer(nn.Module):
    """`self_attn` mixes tokens; of some layers it is none (`AttentionSpec.state`).

    With norms behind attention and MLP (Gemma) `post_attention_layernorm` is one of these two, elsewhere it is the
    one before the MLP: the names are those of checkpoints."""

    def __init__(self, config: TextConfig, spec: AttentionSpec, mlp: MLP | RoutedMLP) -> None:
        super().__init__()
        self.self_attn = make_mixer(config, spec)
        self.mlp = mlp
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
            return self.mlp(x, context.adapters), residual
        x, residual = self.pre_feedforward_layernorm.add(self.post_attention_layernorm(x), residual)
        return self.post_feedforward_layernorm(self.mlp(x, context.adapters)), residual

    def split(self, ranks: Ranks) -> list[nn.Module]:
        """Have a part of it, but of a mixer with a state all; returns the modules that are other ranks' alone."""
        if isinstance(self.self_attn, SelfAttention):
            self.self_attn.split(ranks)
        return self.mlp.split(ranks)

    def parts(self, rotation: int) -> kernels.DecoderLayerParts | None:
        """`rotation`: number of its table of rotary positions. None of a layer that the stack does not know."""
        mixer, mlp = self.self_attn, self.mlp
        routed = mlp.parts() if isinstance(mlp, RoutedMLP) else None
        if not isinstance(mlp, MLP) and routed is None:
            return None
        before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        return kernels.DecoderLayerParts(
            input_norm=self.input_layernorm.weight,
            attended_norm=None if before_mlp is None else self.post_attention_layernorm.weight,
            mlp_norm=(before_mlp or self.post_attention_layernorm).weight,
            gate_up=mlp.gate_up_proj.packed if isinstance(mlp, MLP) else None,
            down=mlp.down_proj.packed if isinstance(mlp, MLP) else None,
            after_norm=None if after_mlp is None else after_mlp.weight,
            rotation=rotation,
            routed=routed,
            **mixer.parts(),
        )


class Decoder(nn.Module):
    """Embedding, layers and last norm. `embed_tokens` reads the head's rows when the two are tied."""

    def __init__(self, config: TextConfig, tied_head: Linear | None = None) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tied_head)
        self.layers = nn.ModuleList(
            DecoderLayer(config, spec, make_mlp(config, index)) for index, spec in enumerate(config.layers)
        )
        self.norm = _norm(config)
        ropes = list(dict.fromkeys(spec.rope for spec in config.layers))
        self.rotaries = nn.ModuleList(
            RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings) for rope in ropes
        )
        self.rotation_of = [ropes.index(spec.rope) for spec in config.layers]
        self.shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.scale = config.layers[0].scale
        self.rope = config.rope
        self.is_causal = config.is_causal
        self.is_split = False
        self.activation = activation_name(config.hidden_act)
        self.norms_whole_qk = config.norms_whole_qk

    def split(self, ranks: Ranks) -> list[nn.Module]:
        """Have a part of every layer and of the table; returns the modules that are other ranks' alone."""
        self.is_split = True
        self.embed_tokens.split(ranks)
        return [module for layer in self.layers if isinstance(layer, DecoderLayer) for module in layer.split(ranks)]

    @functools.cached_property
    def stack(self) -> kernels.DecoderStack | None:
        """The layers as one call, once their weights are there; None where sums of all ranks stand between them."""
        if not self.is_causal or self.is_split:
            return None
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        parts = whole(layer.parts(rotation) for layer, rotation in zip(layers, self.rotation_of, strict=True))
        if parts is None:
            return None
        return kernels.decoder_stack(
            parts,
            self.norm.weight,
            **self.shape,
            scale=self.scale,
            eps=self.norm.eps,
            norm_offset=self.norm.offset,
            activation=self.activation,
            norms_whole_qk=self.norms_whole_qk,
        )

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        rotations = [one(positions, context.long_context, context.rope_lengths) for one in self.rotaries]
        is_partial = context.needed_states == "last" and len(context.query_lens) < len(hidden)
        added = context.layer_rows
        if added is not None and added.values.shape[1] >= len(self.layers):
            is_partial = False
        rows = context.query_start[1:].long() - 1 if is_partial else None  # all that the last layer has to compute
        stack = self.stack if added is None and context.adapters is None else None
        takes_scales = stack is not None and stack.scales_queries
        longest = max(context.context_lens) if self.rope.query_beta and not takes_scales else None
        scales = query_scales(self.rope, positions, longest)
        if scales is not None:
            context = replace(context, query_scales=scales.view(-1, 1, 1))
        if stack is not None and (scales is None or takes_scales):
            return stack(hidden, rotations, cache, context, rows)
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
        shared: dict[tuple[int, int, int | None], list[tuple[int, int]]] = {}
        states: dict[tuple[StatePart, ...], list[int]] = {}
        for index, layer in enumerate(self.model.layers):
            mixer = layer.self_attn
            if isinstance(mixer, SelfAttention):
                attention = mixer.attention
                shape = (attention.num_kv_heads, attention.head_dim, attention.spec.window)
                layers.setdefault(shape, [])
                if attention.spec.source is None:
                    layers[shape].append(index)
                else:
                    shared.setdefault(shape, []).append((index, attention.spec.source))
            elif isinstance(mixer, StateMixer):
                states.setdefault(mixer.state_parts, []).append(index)
        return [
            *(PagedGroup(tuple(own), *shape, tuple(shared.get(shape, ()))) for shape, own in layers.items()),
            *(StateGroup(tuple(places), parts) for parts, places in states.items()),
        ]

    def split(self, ranks: Ranks) -> None:
        """Beside the decoder, towers are everybody's, and scores rank 0's where there are none."""
        self.elsewhere = self.model.split(ranks)
        for name, module in self.named_children():
            if isinstance(module, LanguageHead):
                module.split(ranks)
            elif ranks.rank and name != "model" and not self.modalities:
                self.elsewhere.append(module)

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        rows: Tensor = self.model.embed_tokens(token_ids)
        scale = self.text.embedding_scale
        # Rounded to the weights' type first, as the models were trained: in bfloat16 the root of 2560 is 50.5.
        return rows if scale == 1.0 else rows * rounded(scale, rows.dtype)

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
        q_heads = config.num_heads * (1 + config.gates_attention)
        rotated = (q_heads + 2 * config.num_kv_heads) * config.head_dim
        attention = 2 * rotated + config.num_heads * config.head_dim
        mlp = 3 * config.intermediate_size
        if config.routing is not None:
            mlp = max(mlp, routed_elements(config, config.routing))
        mixers = (layer.self_attn for layer in self.model.layers)
        states = [one.token_bytes(size) for one in mixers if isinstance(one, StateMixer)]
        per_token = (
            size * (4 * config.hidden_size + max(attention, mlp)) + 16 * config.head_dim + max(states, default=0)
        )
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
