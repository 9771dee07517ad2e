"""NomicBERT (Nussbaum et al. 2024): BERT's layers with rotary positions and, in v1 and v1.5, a gated MLP. In v2 (2025)
every other layer's MLP is a choice of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.checkpoint.values import count, number, positive_int
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename
from sensorium.models.encoder import EncoderConfig, PostNormEncoder, SelfAttention, Step, head_map, prefixes
from sensorium.models.layers import activation_name, declare
from sensorium.models.towers.blocks import LayerNorm

THETA = 1000.0
TRAINED_POSITIONS = 2048
GATED: Mapping[str, str] = {"swiglu": "silu", "geglu": "gelu"}
"""What the hub calls a gated MLP -> its activation."""
REQUIRED: Mapping[str, tuple[object, ...]] = {
    "prenorm": (None, False),
    "parallel_block": (None, False),
    "use_rms_norm": (None, False),
    "causal": (None, False),
    "rotary_emb_interleaved": (None, False),
    "rotary_emb_scale_base": (None,),
    "expert_choice_router": (None, False),
    "moe_normalize_expert_weights": (None, False),
    "num_shared_experts": (None, 0),
}
"""What the hub's code can do besides is in no published text encoder."""


class Router(nn.Module):
    def __init__(self, size: int, experts: int) -> None:
        super().__init__()
        self.layer = declare(experts, size)


class Experts(nn.Module):
    """`chosen` of `count` MLPs for every token, weighed by the softmax over all of them; one bias for every token.

    They are not quantised: each is small, and torch computes with the rows of one at a time.
    """

    def __init__(self, config: EncoderConfig, experts: int, chosen: int) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.router = Router(size, experts)
        self.w1 = declare(experts * inner, size)
        self.w2 = declare(experts * inner, size)
        self.bias = declare(size)
        self.activation = activation_name(config.hidden_act)
        self.count = experts
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the same"""
        shares = functional.linear(x, self.router.layer).float().softmax(-1)
        weights, places = shares.topk(self.chosen, dim=-1)  # [tokens, chosen] both
        out = self.bias.expand(len(x), -1).clone()
        inner = len(self.w1) // self.count
        for expert in range(self.count):
            tokens, rank = torch.where(places == expert)
            rows = slice(expert * inner, (expert + 1) * inner)
            hidden = kernels.activate(functional.linear(x[tokens], self.w1[rows]), self.activation)
            share = weights[tokens, rank].unsqueeze(1).to(x.dtype)
            out.index_add_(0, tokens, (hidden @ self.w2[rows]) * share)
        return out


class RoutedOutput(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


class RoutedLayer(nn.Module):
    """A layer whose MLP is a choice of experts."""

    def __init__(self, config: EncoderConfig, experts: int, chosen: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = Experts(config, experts, chosen)
        self.output = RoutedOutput(config)

    def forward(self, x: Tensor, step: Step, *, first_only: bool = False) -> Tensor:
        x = self.attention(x, step, first_only=first_only)
        out: Tensor = self.output.LayerNorm(self.mlp(x) + x)
        return out


class NomicBertModel(PostNormEncoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("nomic_bert", "bert")
    weight_map: ClassVar[tuple[Rename, ...]] = (
        Rename("emb_ln.{p}", "embeddings.LayerNorm.{p}"),
        Rename("encoder.layers.{n}.attn.Wqkv.{p}", "encoder.layer.{n}.attention.qkv.{p}"),
        Rename("encoder.layers.{n}.attn.out_proj.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
        Rename("encoder.layers.{n}.norm1.{p}", "encoder.layer.{n}.attention.output.LayerNorm.{p}"),
        Rename("encoder.layers.{n}.mlp.fc11.{p}", "encoder.layer.{n}.intermediate.dense.{p}", "up"),
        Rename("encoder.layers.{n}.mlp.fc12.{p}", "encoder.layer.{n}.intermediate.dense.{p}", "gate"),
        Rename("encoder.layers.{n}.mlp.fc1.{p}", "encoder.layer.{n}.intermediate.dense.{p}"),
        Rename("encoder.layers.{n}.mlp.fc2.{p}", "encoder.layer.{n}.output.dense.{p}"),
        Rename("encoder.layers.{n}.norm2.{p}", "encoder.layer.{n}.output.LayerNorm.{p}"),
        Rename("encoder.layers.{n}.mlp.router.layer.weight", "encoder.layer.{n}.mlp.router.layer"),
        Rename("encoder.layers.{n}.mlp.experts.mlp.{p}", "encoder.layer.{n}.mlp.{p}"),
        Rename("encoder.layers.{n}.mlp.experts.bias", "encoder.layer.{n}.mlp.bias"),
    )
    ignored: tuple[str, ...] = ("position_ids", "inv_freq", "cls.", "pooler.")

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        for name, values in REQUIRED.items():
            if config.get(name) not in values:
                raise CheckpointError(f"config.json: {name} {config[name]!r} is not supported for NomicBERT")
        act = config.get("hidden_act") or "silu"
        is_gated = act in GATED or "activation_function" not in config
        shape = EncoderConfig.of({**config, "hidden_act": GATED.get(act, act)}, encoder)
        padded = positive_int(config, "pad_vocab_size_multiple", 1)
        rope = _rope(config)
        return replace(
            shape,
            vocab_size=-(-shape.vocab_size // padded) * padded,
            head_size=count(config, "head_dim", 0) if config.get("head_dim") else 0,
            is_gated=is_gated,
            attention_bias=bool(config.get("qkv_proj_bias", False)),
            output_bias=bool(config.get("qkv_proj_bias", False)),
            mlp_bias=bool(config.get("mlp_fc1_bias", False)),
            down_bias=bool(config.get("mlp_fc2_bias", False)),
            rope_positions=positive_int(config, "max_trained_positions", TRAINED_POSITIONS) if rope else 0,
        ).rotary(config, THETA, rope)

    def _declare_layer(self, index: int) -> nn.Module:
        config = self.checkpoint.config
        every, experts = count(config, "moe_every_n_layers", 0), count(config, "num_experts", 0)
        if not experts or not every or index % every != 1 % every:
            return super()._declare_layer(index)
        if self.config.is_gated:
            raise CheckpointError("config.json: experts with a gated MLP are not supported for NomicBERT")
        return RoutedLayer(self.config, experts, positive_int(config, "moe_top_k", 1))


def _rope(config: dict[str, Any]) -> RopeConfig | None:
    """In the hub's names; None where the config has transformers'."""
    if "rotary_emb_base" not in config and "rotary_emb_fraction" not in config:
        return None
    theta, factor = number(config, "rotary_emb_base", 10_000.0), config.get("rotary_scaling_factor")
    partial = number(config, "rotary_emb_fraction", 1.0)
    if not 0 < partial <= 1 or theta <= 0:
        raise CheckpointError("config.json: NomicBERT needs a positive rotary_emb_base and rotary_emb_fraction")
    if factor is None:
        return RopeConfig(theta, partial=partial)
    return RopeConfig(theta, "dynamic", number(config, "rotary_scaling_factor", 1.0), partial=partial)


class NomicBertForSequenceClassification(NomicBertModel):
    """First token -> dense -> tanh -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (*NomicBertModel.weight_map, *head_map("pooler.dense", "classifier"))
    ignored: tuple[str, ...] = ("position_ids", "inv_freq")

    def _declare_poolers(self) -> None:
        self._declare_class_head("tanh")


class NomicBertForTokenClassification(NomicBertModel):
    """Classes of every token."""

    def _declare_poolers(self) -> None:
        self._declare_token_head()
