"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT.

Devlin et al. 2018; Liu et al. 2019 (positions start after the padding id); Sanh et al. 2019 (half the layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sensorium.checkpoint.families import EncoderDefaults
from sensorium.models.base import Rename
from sensorium.models.encoder import FLASH_MAP, EncoderConfig, PostNormEncoder, head_map, prefixes, separate_qkv

ENCODER_MAP = (
    Rename("{a}.LayerNorm.gamma", "{a}.LayerNorm.weight"),
    Rename("{a}.LayerNorm.beta", "{a}.LayerNorm.bias"),
    Rename("encoder.layer.{n}.{a}.output.LayerNorm.gamma", "encoder.layer.{n}.{a}.output.LayerNorm.weight"),
    Rename("encoder.layer.{n}.{a}.output.LayerNorm.beta", "encoder.layer.{n}.{a}.output.LayerNorm.bias"),
    Rename("encoder.layer.{n}.output.LayerNorm.gamma", "encoder.layer.{n}.output.LayerNorm.weight"),
    Rename("encoder.layer.{n}.output.LayerNorm.beta", "encoder.layer.{n}.output.LayerNorm.bias"),
    *separate_qkv("attention.self.query", "attention.self.key", "attention.self.value"),
    *FLASH_MAP,
)


class BertModel(PostNormEncoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("bert", "roberta")
    weight_map: ClassVar[tuple[Rename, ...]] = ENCODER_MAP
    ignored: tuple[str, ...] = ("position_ids", "cls.", "lm_head.", "pooler.")


class ColBert(BertModel):
    """A vector of every token, through one linear layer (ColBERT v1 and v2)."""

    def _declare_poolers(self) -> None:
        self._declare_vectors_head()


class BertForSequenceClassification(BertModel):
    """First token -> dense -> tanh -> classes; with one class a cross-encoder's score."""

    weight_map: ClassVar[tuple[Rename, ...]] = (*ENCODER_MAP, *head_map("pooler.dense", "classifier"))
    ignored: tuple[str, ...] = ("position_ids",)

    def _declare_poolers(self) -> None:
        self._declare_class_head("tanh")


class RobertaForSequenceClassification(BertForSequenceClassification):
    weight_map: ClassVar[tuple[Rename, ...]] = (*ENCODER_MAP, *head_map("classifier.dense", "classifier.out_proj"))
    ignored: tuple[str, ...] = ("position_ids", "pooler.")


class BertForTokenClassification(BertModel):
    """Classes of every token; of RoBERTa too."""

    def _declare_poolers(self) -> None:
        self._declare_token_head()


class DistilBertModel(PostNormEncoder):
    """No token types, no pooler."""

    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "distilbert.transformer.": "encoder.",
        "transformer.": "encoder.",
        "distilbert.": "",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *separate_qkv("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        Rename("encoder.layer.{n}.attention.out_lin.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
        Rename("encoder.layer.{n}.sa_layer_norm.{p}", "encoder.layer.{n}.attention.output.LayerNorm.{p}"),
        Rename("encoder.layer.{n}.ffn.lin1.{p}", "encoder.layer.{n}.intermediate.dense.{p}"),
        Rename("encoder.layer.{n}.ffn.lin2.{p}", "encoder.layer.{n}.output.dense.{p}"),
        Rename("encoder.layer.{n}.output_layer_norm.{p}", "encoder.layer.{n}.output.LayerNorm.{p}"),
    )
    ignored: tuple[str, ...] = ("position_ids", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        return replace(EncoderConfig.of(config, encoder), layer_norm_eps=1e-12)


class DistilBertForSequenceClassification(DistilBertModel):
    """First token -> dense -> ReLU -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (*DistilBertModel.weight_map, *head_map("pre_classifier", "classifier"))

    def _declare_poolers(self) -> None:
        self._declare_class_head("relu")


class DistilBertForTokenClassification(DistilBertModel):
    """Classes of every token."""

    def _declare_poolers(self) -> None:
        self._declare_token_head()
