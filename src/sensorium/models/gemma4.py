"""Gemma 4: layers of two shapes, the last of which read other layers' keys and values; small embeddings of each token
for each layer; images of any size.

A layer's shape is in its `AttentionSpec`. Experts (26B) are not served, nor are videos and audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import AttentionSpec, TextConfig
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, NeededStates
from sensorium.models.base import Rename, Steps
from sensorium.models.cache import CacheGroup, PagedGroup
from sensorium.models.decoder import DECODER_MAP, MLP, Decoder, DecoderForCausalLM
from sensorium.models.layers import Embedding, Linear, RMSNorm, activation_name, declare
from sensorium.models.rope import RotaryEmbedding
from sensorium.models.towers.blocks import groups, separate
from sensorium.models.towers.gemma4_vit import Gemma4VisionTower, PlainNorm
from sensorium.types import Modality

MEDIA_IDS = {"image_token_id": 258880, "video_token_id": 258884, "audio_token_id": 258881}


class Gemma4Attention(nn.Module):
    """Values are normed like keys, without weights; they may be the keys before their norm, or another layer's."""

    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        size, head_dim, bias = config.hidden_size, spec.head_dim, config.attention_bias
        self.spec = spec
        self.q_proj = Linear(size, config.num_heads * head_dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.o_proj = Linear(config.num_heads * head_dim, size, bias=bias)
        if spec.source is None:
            self.k_proj = Linear(size, spec.num_kv_heads * head_dim, bias=bias)
            self.v_proj = None if spec.keys_are_values else Linear(size, spec.num_kv_heads * head_dim, bias=bias)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.v_norm = PlainNorm(head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: LayerCache, context: AttentionContext
    ) -> Tensor:
        spec = self.spec
        k_cache, v_cache, table = cache
        context = context.by_table(table)
        q = self.q_norm(self._heads(self.q_proj(x)))
        if spec.source is None:
            keys = self._heads(self.k_proj(x))
            values = keys if self.v_proj is None else self._heads(self.v_proj(x))
            v = self.v_norm(values)  # before the keys are rotated in place
            q, k = kernels.rope(q, self.k_norm(keys), *rotation)
            kernels.write_kv(k, v, k_cache, v_cache, context.slots)
        else:
            q, _ = kernels.rope(q, q[:, :0], *rotation)
        visible = context.visible if spec.media_both_ways else None
        attended = kernels.paged_attention(q, k_cache, v_cache, context, spec.scale, spec.window, visible)
        out: Tensor = self.o_proj(attended.flatten(1))
        return out

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], -1, self.spec.head_dim)


class Gemma4Layer(nn.Module):
    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Gemma4Attention(config, spec)
        self.mlp = MLP(replace(config, intermediate_size=spec.intermediate_size))
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.layer_scalar = declare(1)
        self.activation = activation_name(config.hidden_act)
        self.has_own_rows = bool(config.layer_embedding_size)
        if self.has_own_rows:
            self.per_layer_input_gate = Linear(size, config.layer_embedding_size)
            self.per_layer_projection = Linear(config.layer_embedding_size, size)
            self.post_per_layer_input_norm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        own_rows: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache,
        context: AttentionContext,
    ) -> Tensor:
        """`own_rows` [tokens, size]: this layer's embeddings of the tokens."""
        attended = self.self_attn(self.input_layernorm(x), rotation, cache, context)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if own_rows is not None:
            gate = kernels.activate(self.per_layer_input_gate(x), self.activation)
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gate * own_rows))
        return x.mul_(self.layer_scalar)


class Gemma4Decoder(Decoder):
    def __init__(self, config: TextConfig, tied_head: Linear | None = None) -> None:
        nn.Module.__init__(self)
        size, own = config.hidden_size, config.layer_embedding_size
        self.embed_tokens = Embedding(config.vocab_size, size, tied_head)
        self.layers = nn.ModuleList(Gemma4Layer(config, spec) for spec in config.layers)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        tables = list(dict.fromkeys((spec.rope, spec.head_dim) for spec in config.layers))
        self.rotaries = nn.ModuleList(RotaryEmbedding(*table, config.max_position_embeddings) for table in tables)
        self.rotation_of = [tables.index((spec.rope, spec.head_dim)) for spec in config.layers]
        self.size, self.own_size = size, own
        self.pad_id, self.media_ids = 0, torch.empty(0, dtype=torch.int64, device="cpu")
        if own:
            self.embed_tokens_per_layer = Embedding(config.layer_vocab_size, config.num_layers * own)
            self.per_layer_model_projection = Linear(size, config.num_layers * own)
            self.per_layer_projection_norm = RMSNorm(own, config.rms_norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        rotations = [one(positions, context.long_context, context.rope_lengths) for one in self.rotaries]
        own = self._own_rows(hidden, context) if self.own_size else [None] * len(self.layers)
        for layer, rows, place, layer_cache in zip(self.layers, own, self.rotation_of, cache, strict=True):
            hidden = layer(hidden, rows, rotations[place], layer_cache, context)
        out: Tensor = self.norm(hidden)
        return out

    def _own_rows(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
        """Of each layer, what it adds of the tokens themselves [tokens, own size]: half from a table, in which media
        are the padding token, half from the embeddings."""
        ids = context.token_ids
        if ids is None:
            raise ValueError("the batch does not say its tokens, which Gemma 4's layers look up")
        ids = torch.where(torch.isin(ids, self.media_ids.to(ids.device)), self.pad_id, ids)
        table = self.embed_tokens_per_layer(ids)
        table = table * torch.tensor(self.own_size**0.5, dtype=table.dtype, device=table.device)
        shape = (len(ids), len(self.layers), self.own_size)
        projected = self.per_layer_model_projection(hidden) * self.size**-0.5
        rows: Tensor = (self.per_layer_projection_norm(projected.view(shape)) + table.view(shape)) * 2**-0.5
        return rows.unbind(1)


class Gemma4ForCausalLM(DecoderForCausalLM):
    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.language_model.": "model."}
    weight_map: ClassVar[tuple[Rename, ...]] = tuple(row for row in DECODER_MAP if ".mlp." in row.source)
    partial_states: ClassVar[NeededStates] = "all"
    decoder: ClassVar[type[Decoder]] = Gemma4Decoder
    model: Gemma4Decoder

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if not self.text.is_causal:
            raise CheckpointError("config.json: a Gemma 4 whose attention goes both ways is not supported")
        text = checkpoint.config.get("text_config") or checkpoint.config
        ids = [positive_int(checkpoint.config, name, default) for name, default in MEDIA_IDS.items()]
        self.model.media_ids = torch.tensor(ids, device="cpu")
        self.model.pad_id = text.get("pad_token_id") or 0
        shared = [i for i, spec in enumerate(self.text.layers) if spec.source is not None]
        unused = [f"model.layers.{i}.self_attn.{part}" for i in shared for part in ("k_proj.", "v_proj.", "k_norm.")]
        self.ignored = (*self.ignored, *unused)

    def cache_groups(self) -> list[CacheGroup]:
        shapes: dict[tuple[int, int, int | None], tuple[list[int], list[tuple[int, int]]]] = {}
        for index, spec in enumerate(self.text.layers):
            own, shared = shapes.setdefault((spec.num_kv_heads, spec.head_dim, spec.window), ([], []))
            if spec.source is None:
                own.append(index)
            else:
                shared.append((index, spec.source))
        return [
            PagedGroup(tuple(own), heads, head_dim, window, tuple(shared))
            for (heads, head_dim, window), (own, shared) in shapes.items()
        ]

    def activation_bytes(self, tokens: int) -> int:
        own = 4 * self.text.num_layers * self.text.layer_embedding_size * self.model.norm.weight.element_size()
        return super().activation_bytes(tokens) + tokens * own


class Gemma4(Gemma4ForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "model.language_model.": "model.",
        "model.vision_tower.": "vision_tower.",
        "model.embed_vision.embedding_projection.": "vision_projection.",
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        vision = checkpoint.config.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError("config.json: a Gemma 4 without vision_config is not supported")
        self.vision_tower = Gemma4VisionTower(vision)
        self.vision_norm = PlainNorm(self.vision_tower.size, self.vision_tower.eps)
        self.vision_projection = Linear(self.vision_tower.size, self.text.hidden_size)
        self.ignored = (*self.ignored, "model.audio_tower.", "model.embed_audio.", "vision_tower.encoder.rotary_emb.")

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`pixels` [patches, 3 * side * side] from 0 to 1 and `grid` (lines, columns) of each image."""
        grids = [tuple(item["grid"].tolist()) for item in items]
        kernel = self.vision_tower.kernel
        rows: list[Tensor] = []
        for part in groups([lines * columns for lines, columns in grids], self.vision_tower.group_rows):
            states = yield from self.vision_tower.steps([item["pixels"] for item in items[part]], grids[part])
            yield states.numel() * self.text.hidden_size
            projected = self.vision_projection(self.vision_norm(states))
            rows += separate(projected, [lines * columns // kernel**2 for lines, columns in grids[part]])
        return rows

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.vision_tower.activation_bytes(size))
