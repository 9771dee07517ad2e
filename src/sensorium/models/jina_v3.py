"""jina-embeddings-v3 (Sturua et al. 2024): XLM-RoBERTa with rotary positions and, in the published files, a low-rank
adapter of every layer for each of five tasks.

A request chooses the task. It reaches the model as the token types of the prompt, for which there is no other use here:
0 stands for no adapter, i for the i-th of config.json's `lora_adaptations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.prompts import adapter_names
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.checkpoint.values import number, positive_int
from sensorium.kernels.context import AttentionContext, KVCache
from sensorium.models.base import Rename
from sensorium.models.encoder import (
    FLASH_PLACES,
    EncoderConfig,
    Groups,
    Layer,
    PostNormEncoder,
    Step,
    head_map,
    prefixes,
)
from sensorium.models.layers import declare

THETA = 20_000.0
STORED = "parametrizations.weight"


def _layer_map() -> tuple[Rename, ...]:
    """With and without adapters, whose files keep the plain weights under another name."""
    rows = []
    for stored, own in FLASH_PLACES.items():
        source, target = f"encoder.layers.{{n}}.{stored}", f"encoder.layer.{{n}}.{own}"
        adapter = f"encoder.layer.{{n}}.adapters.{stored.rpartition('.')[2]}"
        rows += [
            Rename(f"{source}.{STORED}.original", f"{target}.weight"),
            Rename(f"{source}.{STORED}.0.lora_A", f"{adapter}.narrow"),
            Rename(f"{source}.{STORED}.0.lora_B", f"{adapter}.wide"),
            Rename(f"{source}.{{p}}", f"{target}.{{p}}"),
        ]
    return tuple(rows)


def _embedding_map() -> tuple[Rename, ...]:
    rows = []
    for table in ("word_embeddings", "token_type_embeddings"):
        rows += [
            Rename(f"embeddings.{table}.{STORED}.original", f"embeddings.{table}.weight"),
            Rename(f"embeddings.{table}.{STORED}.0.lora_A", f"{table}_adapter.narrow"),
            Rename(f"embeddings.{table}.{STORED}.0.lora_B", f"{table}_adapter.wide"),
        ]
    return tuple(rows)


class Adapter(nn.Module):
    """What a task adds to a linear layer: x -> x narrow^T wide^T * scale."""

    def __init__(self, tasks: int, rank: int, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.narrow = declare(tasks, rank, in_features)
        self.wide = declare(tasks, out_features, rank)
        self.scale = scale

    def add(self, out: Tensor, x: Tensor, groups: Groups) -> Tensor:
        """`out` [n, out] of x [n, in], written over."""
        for rows, task in groups:
            added = x[rows] @ self.narrow[task].t() @ self.wide[task].t()
            out.index_add_(0, rows, added, alpha=self.scale)
        return out


class TableAdapter(nn.Module):
    """The same of a table: row i -> narrow[i] wide * scale."""

    def __init__(self, tasks: int, rank: int, rows: int, size: int, scale: float) -> None:
        super().__init__()
        self.narrow = declare(tasks, rows, rank)
        self.wide = declare(tasks, rank, size)
        self.scale = scale

    def add(self, out: Tensor, ids: Tensor, groups: Groups) -> Tensor:
        for rows, task in groups:
            out.index_add_(0, rows, self.narrow[task][ids[rows]] @ self.wide[task], alpha=self.scale)
        return out


class LayerAdapters(nn.Module):
    """Of a layer's four products, by their stored names."""

    def __init__(self, config: EncoderConfig, tasks: int, rank: int, scale: float) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.Wqkv = Adapter(tasks, rank, size, 3 * size, scale)
        self.out_proj = Adapter(tasks, rank, size, size, scale)
        self.fc1 = Adapter(tasks, rank, size, inner, scale)
        self.fc2 = Adapter(tasks, rank, inner, size, scale)


class AdaptedLayer(Layer):
    """A layer with adapters of its four products."""

    def __init__(self, config: EncoderConfig, tasks: int, rank: int, scale: float) -> None:
        super().__init__(config)
        self.adapters = LayerAdapters(config, tasks, rank, scale)

    def forward(self, x: Tensor, step: Step, *, first_only: bool = False) -> Tensor:
        attention, (of_tokens, of_firsts) = self.attention, step.adapted
        qkv = self.adapters.Wqkv.add(attention.qkv(x), x, of_tokens)
        attended = attention.mixed(qkv, step, first_only=first_only)
        x, groups = (x[step.first], of_firsts) if first_only else (x, of_tokens)
        joined = attention.output.dense.packed.added(attended, x)
        x = attention.output.LayerNorm(self.adapters.out_proj.add(joined, attended, groups))
        inner = self.adapters.fc1.add(self.intermediate.dense(x), x, groups)
        inner = kernels.activate(inner, self.intermediate.activation)
        joined = self.output.dense.packed.added(inner, x)
        out: Tensor = self.output.LayerNorm(self.adapters.fc2.add(joined, inner, groups))
        return out


class JinaV3Model(PostNormEncoder):
    theta: ClassVar[float] = THETA  # of rotary positions, where config.json does not say it
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("roberta")
    weight_map: ClassVar[tuple[Rename, ...]] = (
        Rename("emb_ln.{p}", "embeddings.LayerNorm.{p}"),
        *_embedding_map(),
        *_layer_map(),
    )
    ignored: tuple[str, ...] = ("position_ids", "inv_freq", "lm_head.", "pooler.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self.tasks = len(adapter_names(config))
        self.rank = positive_int(config, "lora_rank", 4)
        self.scale = number(config, "lora_alpha", 1.0) / self.rank
        super().__init__(checkpoint)
        if self.tasks:
            shape, size = self.config, self.config.hidden_size
            tables = {"word_embeddings": shape.vocab_size, "token_type_embeddings": shape.type_vocab_size}
            for name, rows in tables.items():
                self.add_module(f"{name}_adapter", TableAdapter(self.tasks, self.rank, rows, size, self.scale))

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        plain = {"layer_norm_eps": 1e-5, **config, "position_embedding_type": "absolute"}
        base = config.get("rotary_emb_base")
        rope = None if base is None else RopeConfig(number(config, "rotary_emb_base", self.theta))
        return EncoderConfig.of(plain, encoder).rotary(config, self.theta, rope)

    def _declare_layer(self, index: int) -> nn.Module:
        if not self.tasks:
            return super()._declare_layer(index)
        return AdaptedLayer(self.config, self.tasks, self.rank, self.scale)

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """With adapters the task of each token stands behind its words: [tokens] -> [tokens, hidden + 1]"""
        words = self.embeddings.words(token_ids, None)
        if not self.tasks:
            return words
        chosen = torch.zeros_like(token_ids) if token_types is None else token_types.clamp(0, self.tasks)
        groups = _groups(chosen)
        known = torch.where(token_ids < self.config.vocab_size, token_ids, 0)
        for name, ids in (("word_embeddings", known), ("token_type_embeddings", torch.zeros_like(token_ids))):
            adapter = getattr(self, f"{name}_adapter")
            words = adapter.add(words, ids, groups)
        return torch.cat([words, chosen.unsqueeze(1).to(words.dtype)], dim=1)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        if not self.tasks:
            return super().forward(hidden, positions, cache, context)
        chosen = hidden[:, -1].long()
        step = self._step(positions, context)
        adapted = _groups(chosen), _groups(chosen[step.first])
        return self._states(hidden[:, :-1].contiguous(), replace(step, adapted=adapted), context)


def _groups(chosen: Tensor) -> Groups:
    """By task, from 1 on -> rows and the adapter's number, from 0 on."""
    tasks = sorted(set(chosen.tolist()) - {0})
    return [(torch.nonzero(chosen == task).squeeze(1), task - 1) for task in tasks]


class JinaColBert(JinaV3Model):
    """jina-colbert-v2 (Jha et al. 2024): the same encoder before ColBERT's linear layer."""

    theta: ClassVar[float] = 10_000.0

    def _declare_poolers(self) -> None:
        self._declare_vectors_head()


class JinaV3ForSequenceClassification(JinaV3Model):
    """First token -> dense -> tanh -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        *JinaV3Model.weight_map,
        *head_map("classifier.dense", "classifier.out_proj"),
    )

    def _declare_poolers(self) -> None:
        self._declare_class_head("tanh")


class JinaV3ForTokenClassification(JinaV3Model):
    """Classes of every token."""

    def _declare_poolers(self) -> None:
        self._declare_token_head()
