"""MPNet (Song et al. 2020): BERT's layers, and a bias by distance that all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext
from sensorium.models.base import Rename
from sensorium.models.biased import BiasedAttention, BiasedEncoder, by_distance
from sensorium.models.encoder import Layer, SelfAttention, Step, head_map, prefixes, separate_qkv
from sensorium.models.layers import declare

BUCKETS = 32  # rows of the table that are used, whatever the config says
FARTHEST = 128  # tokens from which on all distances are one


class Attention(BiasedAttention):
    def shared(self, step: Step) -> Sequence[Tensor]:
        return step.shared

    def bias(self, q: Tensor, k: Tensor, start: int, shared: Sequence[Tensor]) -> Tensor:
        return by_distance(shared[0], start, len(q), len(k))


class MPNetLayer(Layer):
    attention_class: ClassVar[type[SelfAttention]] = Attention


def bucket(distance: Tensor) -> Tensor:
    """Key's position less the query's -> row of the table, int64. Half of the rows are for keys ahead; of each half the
    first half is one distance each, the others wider and wider ones."""
    half = BUCKETS // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.float() / exact) / math.log(FARTHEST / exact)
    wide = exact + (ratio * (half - exact)).long()  # of 0 it is -inf, and not used
    row = torch.where(far < exact, far, wide.clamp(max=half - 1))
    return row + half * (distance > 0)


class MPNetModel(BiasedEncoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("mpnet")
    weight_map: ClassVar[tuple[Rename, ...]] = (
        Rename("encoder.relative_attention_bias.weight", "relative_attention_bias"),
        *separate_qkv("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        Rename("encoder.layer.{n}.attention.attn.o.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
        Rename("encoder.layer.{n}.attention.LayerNorm.{p}", "encoder.layer.{n}.attention.output.LayerNorm.{p}"),
    )
    ignored: tuple[str, ...] = ("position_ids", "lm_head.", "pooler.")
    layer_class: ClassVar[type[Layer]] = MPNetLayer

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        buckets = positive_int(checkpoint.config, "relative_attention_num_buckets", BUCKETS)
        if buckets < BUCKETS:
            raise CheckpointError(f"config.json: relative_attention_num_buckets must be at least {BUCKETS}")
        self.relative_attention_bias = declare(buckets, self.config.num_heads)

    def _step(self, positions: Tensor, context: AttentionContext) -> Step:
        """With what each distance adds, [heads, 2 * longest - 1], from the longest way back to the longest ahead."""
        step = super()._step(positions, context)
        longest = max(step.lengths)
        distances = torch.arange(1 - longest, longest, device=positions.device)
        return replace(step, shared=(self.relative_attention_bias[bucket(distances)].t().contiguous(),))


class MPNetForSequenceClassification(MPNetModel):
    """First token -> dense -> tanh -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        *MPNetModel.weight_map,
        *head_map("classifier.dense", "classifier.out_proj"),
    )

    def _declare_poolers(self) -> None:
        self._declare_class_head("tanh")
