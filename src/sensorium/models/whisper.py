"""Whisper (Radford et al. 2022): the audio encoder, and a decoder that attends to its own past and to the recording.

Each decoder layer's keys and values of a recording are computed once, by `encoding`: they are the rows that the encoder
cache keeps, shares by content and tenant, and holds as long as a sequence attends to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import TextConfig
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache
from sensorium.models.base import Model, Steps
from sensorium.models.cache import CacheGroup, EncoderGroup, PagedGroup
from sensorium.models.decoder import LOGIT_ROWS
from sensorium.models.layers import Attention, Embedding, LanguageHead, Linear
from sensorium.models.towers.blocks import LayerNorm, activation, weights
from sensorium.models.towers.whisper import LAYER_NORM_EPS, Positions, WhisperConfig, WhisperTower
from sensorium.pooling.align import AlignPooler
from sensorium.pooling.pooler import Pooler
from sensorium.types import Modality, PoolingTask

DEFAULTS: Mapping[str, Any] = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
}
"""What configs that are saved today leave out."""


class Projections(nn.Module):
    """Queries, keys, values and output of one attention. Keys have no bias."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.q_proj = Linear(size, size, bias=True)
        self.k_proj = Linear(size, size)
        self.v_proj = Linear(size, size, bias=True)
        self.out_proj = Linear(size, size, bias=True)
        self.num_heads = num_heads

    def heads(self, project: Linear, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, heads, head_dim]"""
        rows: Tensor = project(x)
        return rows.view(len(x), self.num_heads, -1)


class CrossAttention(Projections):
    """To each sequence's own recording, all of it."""

    def __init__(self, size: int, num_heads: int, aligned_heads: Sequence[int]) -> None:
        super().__init__(size, num_heads)
        self.aligned_heads = list(aligned_heads)
        self.scale = (size // num_heads) ** -0.5

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        q = self.heads(self.q_proj, x)
        attended, start = torch.empty_like(q), 0
        for index, (count, memory) in enumerate(zip(context.query_lens, context.memories, strict=True)):
            keys, values = memory[:, layer, 0], memory[:, layer, 1]  # [rows, heads, head_dim]
            part = slice(start, start + count)
            attended[part] = kernels.run_attention(q[part], keys, values, self.scale)
            if index in context.aligned and self.aligned_heads:
                context.aligned[index].append(self._weights(q[part], keys))
            start += count
        out: Tensor = self.out_proj(attended.flatten(1))
        return out

    def _weights(self, q: Tensor, keys: Tensor) -> Tensor:
        """Of the heads that follow the recording: float32 [heads, queries, rows]."""
        q, keys = (x[:, self.aligned_heads].float() for x in (q, keys))
        scores: Tensor = torch.einsum("qhd,khd->hqk", q, keys) * self.scale
        return scores.softmax(-1)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, index: int, aligned_heads: Sequence[int]) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.index = index
        self.self_attn = Projections(size, heads)
        self.self_attn_layer_norm = LayerNorm(size, LAYER_NORM_EPS)
        self.encoder_attn = CrossAttention(size, heads, aligned_heads)
        self.encoder_attn_layer_norm = LayerNorm(size, LAYER_NORM_EPS)
        self.fc1 = Linear(size, config.intermediate_size, bias=True)
        self.act = activation(config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, size, bias=True)
        self.final_layer_norm = LayerNorm(size, LAYER_NORM_EPS)
        self.attention = Attention(heads, heads, config.head_dim, config.layers[index])

    def forward(self, x: Tensor, cache: LayerCache, context: AttentionContext) -> Tensor:
        own, normed = self.self_attn, self.self_attn_layer_norm(x)
        q, k, v = (own.heads(project, normed) for project in (own.q_proj, own.k_proj, own.v_proj))
        x = x + own.out_proj(self.attention(q, k, v, cache, context))
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), self.index, context)
        out: Tensor = x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: TextConfig, tied_head: Linear | None, aligned: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tied_head)
        self.embed_positions = Positions(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, aligned.get(i, ())) for i in range(config.num_layers))
        self.layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS)

    def cross_attentions(self) -> list[CrossAttention]:
        return [layer.encoder_attn for layer in self.layers if isinstance(layer, DecoderLayer)]

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        hidden = hidden + self.embed_positions.weight[positions]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, layer_cache, context)
        out: Tensor = self.layer_norm(hidden)
        return out


class Whisper(Model):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "model.encoder.": "encoder.",
        "model.decoder.": "model.",
        "proj_out.": "lm_head.",
    }
    quantizable: ClassVar[tuple[str, ...]] = ("model.", "lm_head.")
    task: ClassVar[str] = "transcribe"
    generates = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.text = checkpoint.decoder
        self.num_layers = config.num_layers
        aligned = alignment_heads(checkpoint.generation, config)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        is_tied = config.tie_word_embeddings
        self.tied = {"model.embed_tokens.weight": "lm_head.weight"} if is_tied else {}
        self.encoder = WhisperTower(WhisperConfig.of({**DEFAULTS, **checkpoint.config}))
        if self.encoder.config.hidden_size % self.encoder.config.num_heads:
            raise CheckpointError("config.json: d_model must be a multiple of encoder_attention_heads")
        self.model = Decoder(config, self.lm_head if is_tied else None, aligned)
        heads = sum(map(len, aligned.values()))
        width = positive_int(checkpoint.config, "median_filter_width", 7)
        if width % 2 == 0:
            raise CheckpointError("config.json: median_filter_width must be odd")
        poolers: dict[PoolingTask, Pooler] = {"align": AlignPooler(heads, width)} if heads else {}
        self.poolers = poolers

    def cache_groups(self) -> list[CacheGroup]:
        shape = (tuple(range(self.num_layers)), self.text.num_kv_heads, self.text.head_dim)
        return [PagedGroup(*shape), EncoderGroup(*shape, self.encoder.config.max_positions)]

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        rows: Tensor = self.model.embed_tokens(token_ids)
        return rows

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, frames] of each window -> every decoder layer's keys and values of it."""
        dtype = self.model.layer_norm.weight.dtype
        states = yield from self.encoder.steps([item["mel"].to(dtype) for item in items])
        out = []
        for rows in states:
            out.append((yield from self._memory(rows)))
        return out

    def _memory(self, states: Tensor) -> Steps[Tensor]:
        """[rows, hidden] -> [rows, layers, 2, heads, head_dim], in memory head by head, as steps read them."""
        out = states.new_empty(self.num_layers, 2, self.text.num_kv_heads, len(states), self.text.head_dim)
        for index, attention in enumerate(self.model.cross_attentions()):
            for place, project in enumerate((attention.k_proj, attention.v_proj)):
                yield len(states) * weights(project)
                out[index, place] = attention.heads(project, states).transpose(0, 1)
        return out.permute(3, 0, 1, 2, 4)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        out: Tensor = self.model(hidden, positions, cache, context)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.lm_head(hidden)
        return out

    def activation_bytes(self, tokens: int) -> int:
        config, size = self.text, self.model.layer_norm.weight.element_size()
        per_token = size * (8 * config.hidden_size + 2 * config.intermediate_size)
        scores = 4 * config.num_heads * self.encoder.config.max_positions  # of the attention to a recording
        logits = min(tokens, LOGIT_ROWS) * config.vocab_size * (size + 4)
        return max(tokens * (per_token + scores) + logits, self.encoder.activation_bytes(size))


def alignment_heads(generation: Mapping[str, Any], config: TextConfig) -> dict[int, list[int]]:
    """generation_config.json's heads that follow the recording, by layer; {} if it names none."""
    pairs = generation.get("alignment_heads") or []
    found: dict[int, list[int]] = {}
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(one, int) for one in pair)
            or not (0 <= pair[0] < config.num_layers and 0 <= pair[1] < config.num_heads)
        ):
            raise CheckpointError(f"generation_config.json: alignment_heads has {pair}, which is no [layer, head]")
        found.setdefault(pair[0], []).append(pair[1])
    return found
