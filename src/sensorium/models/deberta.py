"""DeBERTa v2 and v3 (He et al. 2021): BERT's layers whose attention also compares contents with relative positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.values import count, positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext
from sensorium.models.base import Rename
from sensorium.models.biased import BiasedAttention, BiasedEncoder
from sensorium.models.encoder import EncoderConfig, Layer, SelfAttention, Step, head_map, prefixes, separate_qkv
from sensorium.models.layers import Linear, activation_name, declare
from sensorium.models.towers.blocks import LayerNorm

UNUSED = ("position_ids", "cls.", "lm_predictions.", "mask_predictions.")


@dataclass(frozen=True, slots=True)
class Relative:
    """How relative positions enter. The table of their embeddings has 2 * span rows, the middle one for distance 0."""

    span: int  # 0: they do not
    farthest: int  # tokens from which on all distances are one bucket
    is_bucketed: bool  # whether distances of more than half the span share rows, the wider the farther
    by_content: bool  # what a query's content makes of a key's position
    by_position: bool  # what a key's content makes of the query's position
    shares_keys: bool  # whether positions are projected by the contents' own matrices
    is_normed: bool  # whether the table is normed before use

    @classmethod
    def of(cls, config: dict[str, Any]) -> Relative:
        stated = config.get("pos_att_type") or []
        kinds = [one.strip() for one in stated.lower().split("|")] if isinstance(stated, str) else stated
        if set(kinds) - {"c2p", "p2c", "none", ""}:
            raise CheckpointError(f"config.json: pos_att_type {stated!r} is not supported; supported are c2p and p2c")
        farthest, buckets = (
            _unless_negative(config, "max_relative_positions"),
            _unless_negative(config, "position_buckets"),
        )
        farthest = farthest or positive_int(config, "max_position_embeddings", 512)
        return cls(
            span=(buckets or farthest) if config.get("relative_attention") else 0,
            farthest=farthest,
            is_bucketed=buckets > 0,
            by_content="c2p" in kinds,
            by_position="p2c" in kinds,
            shares_keys=bool(config.get("share_att_key", False)),
            is_normed="layer_norm"
            in [one.strip() for one in str(config.get("norm_rel_ebd", "none")).lower().split("|")],
        )

    @property
    def is_used(self) -> bool:
        return bool(self.span) and (self.by_content or self.by_position)

    def rows(self, longest: int, device: torch.device) -> Tensor:
        """Row of the table by distance from key to query, int64 [2 * longest - 1], from 1 - longest on."""
        distance = torch.arange(1 - longest, longest, device=device)
        if self.is_bucketed:
            distance = self._bucket(distance)
        return (distance + self.span).clamp(0, 2 * self.span - 1)

    def _bucket(self, distance: Tensor) -> Tensor:
        # In float32 as in the published code: where a distance lies on a border, rounding decides.
        half = self.span // 2
        far = torch.where(distance.abs() < half, half - 1, distance.abs())
        widest = torch.log(torch.tensor((self.farthest - 1) / half, device=distance.device))
        wide = torch.ceil(torch.log(far / half) / widest * (half - 1)) + half
        return torch.where(far <= half, distance, (wide * distance.sign()).long())


def _unless_negative(config: dict[str, Any], name: str) -> int:
    """A number that -1 stands for the lack of: 0 then."""
    stated = config.get(name)
    return 0 if isinstance(stated, int) and stated < 0 else count(config, name, 0)


class DisentangledAttention(BiasedAttention):
    def __init__(self, config: EncoderConfig, relative: Relative) -> None:
        super().__init__(config)
        self.relative = relative
        self.scale = (self.head_dim * (1 + relative.by_content + relative.by_position)) ** -0.5
        inner, separate = config.num_heads * self.head_dim, bool(relative.span) and not relative.shares_keys
        self.pos_key_proj = Linear(config.hidden_size, inner, bias=True) if separate and relative.by_content else None
        self.pos_query_proj = (
            Linear(config.hidden_size, inner, bias=True) if separate and relative.by_position else None
        )

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step, *, first_only: bool) -> Tensor:
        if self.relative.is_used:
            return super().attended(q, k, v, step, first_only=first_only)
        return SelfAttention.attended(self, q, k, v, step, first_only=first_only)

    def shared(self, step: Step) -> Sequence[Tensor]:
        """Of the positions that the step needs: keys and queries, [heads, positions, head_dim] (of what is not used,
        of none), and the position by distance."""
        table, rows = step.shared
        if self.relative.shares_keys:
            q, k, _ = self.qkv(table).view(len(table), 3, -1, self.head_dim).permute(1, 2, 0, 3)
            return k, q, rows
        keys, queries = (
            table.new_empty(0) if projection is None else self._heads(projection(table))
            for projection in (self.pos_key_proj, self.pos_query_proj)
        )
        return keys, queries, rows

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim).transpose(0, 1)

    def bias(self, q: Tensor, k: Tensor, start: int, shared: Sequence[Tensor]) -> Tensor:
        position_keys, position_queries, by_distance = shared
        longest = (len(by_distance) + 1) // 2
        query = torch.arange(start, start + len(q), device=q.device).unsqueeze(1)
        places = by_distance[query - torch.arange(len(k), device=q.device) + longest - 1]  # [queries, keys]
        bias = q.new_zeros(q.shape[1], len(q), len(k))
        if self.relative.by_content:
            scores = torch.matmul(q.transpose(0, 1), position_keys.transpose(1, 2))  # [heads, queries, positions]
            bias += scores.gather(2, places.expand_as(bias))
        if self.relative.by_position:
            scores = torch.matmul(k.transpose(0, 1), position_queries.transpose(1, 2))  # [heads, keys, positions]
            bias += scores.gather(2, places.t().expand(len(scores), -1, -1)).transpose(1, 2)
        return bias.mul_(self.scale)


class DebertaLayer(Layer):
    def __init__(self, config: EncoderConfig, relative: Relative) -> None:
        super().__init__(config)
        self.attention = DisentangledAttention(config, relative)


class ConvolvedLayer(DebertaLayer):
    """v2's first layer: to what it gives comes a convolution of what it got."""

    def __init__(self, config: EncoderConfig, relative: Relative, kernel: int, groups: int, act: str) -> None:
        super().__init__(config, relative)
        size = config.hidden_size
        self.conv = Convolution(size, kernel, groups, act)
        self.conv_norm = LayerNorm(size, config.layer_norm_eps)

    def forward(self, x: Tensor, step: Step, *, first_only: bool = False) -> Tensor:
        added = self.conv(x, step)
        out = super().forward(x, step, first_only=first_only)
        normed: Tensor = self.conv_norm(out + (added[step.first] if first_only else added))
        return normed


class Convolution(nn.Module):
    """Over the tokens of each run, zeros beside it, and an activation."""

    def __init__(self, size: int, kernel: int, groups: int, act: str) -> None:
        super().__init__()
        if size % groups or not kernel % 2:
            raise CheckpointError(
                f"config.json: conv_kernel_size {kernel} must be odd and conv_groups {groups} divide {size}"
            )
        self.weight = declare(size, size // groups, kernel)
        self.bias = declare(size)
        self.groups = groups
        self.activation = activation_name(act)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[tokens, hidden] -> the same. Tokens that are seen have zeros in place of unseen ones."""
        out = torch.empty_like(x)
        runs = torch.split(x, step.lengths), torch.split(out, step.lengths)
        for run, into, seen in zip(*runs, step.seen, strict=True):
            into.copy_(self._convolved(run))
            if seen < len(run):
                into[:seen].copy_(self._convolved(run[:seen]))
        return kernels.activate(out, self.activation)

    def _convolved(self, run: Tensor) -> Tensor:
        wide = functional.conv1d(
            run.t().unsqueeze(0), self.weight, self.bias, padding=self.weight.shape[2] // 2, groups=self.groups
        )
        return wide.squeeze(0).t()


class DebertaV2Model(BiasedEncoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("deberta")
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *separate_qkv("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        Rename("encoder.layer.{n}.attention.self.{a}.{p}", "encoder.layer.{n}.attention.{a}.{p}"),
        Rename("encoder.rel_embeddings.weight", "relative_embeddings"),
        Rename("encoder.LayerNorm.{p}", "relative_norm.{p}"),
        Rename("encoder.conv.conv.{p}", "encoder.layer.0.conv.{p}"),
        Rename("encoder.conv.LayerNorm.{p}", "encoder.layer.0.conv_norm.{p}"),
    )
    ignored: tuple[str, ...] = (*UNUSED, "pooler.", "classifier.")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.relative = Relative.of(checkpoint.config)
        super().__init__(checkpoint)
        if not self.config.positions:
            self.ignored = (*self.ignored, "embeddings.position_embeddings.weight")
        if self.relative.span:
            self.relative_embeddings = declare(2 * self.relative.span, self.config.hidden_size)
            if self.relative.is_normed:
                self.relative_norm = LayerNorm(self.config.hidden_size, self.config.layer_norm_eps)
        else:
            self.ignored = (*self.ignored, "relative_norm.")

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        shape = EncoderConfig.of({"layer_norm_eps": 1e-7, **config}, encoder)
        has_table = config.get("position_biased_input", True)
        size = positive_int(config, "embedding_size", shape.hidden_size)
        return replace(shape, positions=shape.positions if has_table else 0, embedding_size=size)

    def _declare_layer(self, index: int) -> nn.Module:
        config = self.checkpoint.config
        kernel = count(config, "conv_kernel_size", 0)
        if index or not kernel:
            return DebertaLayer(self.config, self.relative)
        groups, act = positive_int(config, "conv_groups", 1), config.get("conv_act") or "tanh"
        return ConvolvedLayer(self.config, self.relative, kernel, groups, act)

    def _step(self, positions: Tensor, context: AttentionContext) -> Step:
        """With the embeddings of the relative positions in the step, [positions, hidden], and which is whose by
        distance from key to query."""
        step = super()._step(positions, context)
        if not self.relative.span:
            return step
        rows = self.relative.rows(max(step.lengths), positions.device)
        first, last = int(rows[0]), int(rows[-1])
        table = self.relative_embeddings[first : last + 1]
        if self.relative.is_normed:
            table = self.relative_norm(table)
        return replace(step, shared=(table, rows - first))


class DebertaV2ForSequenceClassification(DebertaV2Model):
    """First token -> dense -> activation -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (*DebertaV2Model.weight_map, *head_map("pooler.dense", "classifier"))
    ignored: tuple[str, ...] = UNUSED

    def _declare_poolers(self) -> None:
        self._declare_class_head(self.checkpoint.config.get("pooler_hidden_act") or "gelu")


class DebertaV2ForTokenClassification(DebertaV2Model):
    """Classes of every token."""

    ignored: tuple[str, ...] = (*UNUSED, "pooler.")

    def _declare_poolers(self) -> None:
        self._declare_token_head()
