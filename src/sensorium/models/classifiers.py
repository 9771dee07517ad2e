"""Decoders that classify or reward instead of speaking: a small head on the last, or on every, token's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from sensorium.checkpoint.labels import classifier_activation, num_labels
from sensorium.checkpoint.text_config import TextConfig
from sensorium.checkpoint.tokens import special_tokens
from sensorium.errors import CheckpointError
from sensorium.models.decoder import DecoderModel
from sensorium.models.layers import Head, Linear
from sensorium.pooling.pooler import ClassifyPooler, Pooler, StepPooler, TokenPooler
from sensorium.types import PoolingTask

STEP_TOKEN = "<extra_0>"  # noqa: S105 - stands behind every step of reasoning (Qwen2.5-Math-PRM)


class DecoderForSequenceClassification(DecoderModel):
    """The true last token's state through one linear layer: classes, or a score if there is one class."""

    def _declare_head(self, config: TextConfig) -> Linear | None:
        self.score = Head(config.hidden_size, num_labels(self.checkpoint.config), bias=False)
        return None

    def _make_poolers(self) -> Mapping[PoolingTask, Pooler]:
        config = self.checkpoint.config
        labels, activation = num_labels(config), classifier_activation(self.checkpoint.folder, config)
        classify = ClassifyPooler("last", self.score, labels, activation)
        poolers: dict[PoolingTask, Pooler] = {
            "classify": classify,
            "token_classify": TokenPooler(labels, head=self.score),
        }
        if labels == 1:
            poolers["score"] = classify
        return {**poolers, **super()._make_poolers()}


class RewardHead(nn.Module):
    """Two linear layers with a ReLU between them, stored as `score.0` and `score.2`."""

    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.inner = Head(size, size, bias=True)
        self.outer = Head(size, labels, bias=True)

    def forward(self, state: Tensor) -> Tensor:
        out: Tensor = self.outer(nn.functional.relu(self.inner(state)))
        return out


class DecoderForRewardModel(DecoderModel):
    """A reward of every token (Qwen2.5-Math-RM)."""

    labels: ClassVar[int] = 1
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        **DecoderModel.weight_prefixes,
        "score.0.": "score.inner.",
        "score.2.": "score.outer.",
    }

    def _declare_head(self, config: TextConfig) -> Linear | None:
        self.score = RewardHead(config.hidden_size, self.labels)
        return None

    def _make_poolers(self) -> Mapping[PoolingTask, Pooler]:
        return {"token_classify": TokenPooler(self.labels, head=self.score)}


class DecoderForProcessRewardModel(DecoderForRewardModel):
    """How likely every step of reasoning is wrong or right (Qwen2.5-Math-PRM)."""

    labels: ClassVar[int] = 2

    def _make_poolers(self) -> Mapping[PoolingTask, Pooler]:
        tokens = special_tokens(self.checkpoint.folder, self.checkpoint.tokenizer_config)
        ids = [i for i, text in tokens if text == STEP_TOKEN]
        if not ids:
            raise CheckpointError(f"the tokenizer has no token {STEP_TOKEN}, which ends a step of reasoning")
        return {"token_classify": StepPooler(self.score, self.labels, ids[0])}
