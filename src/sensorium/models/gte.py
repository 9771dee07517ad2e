"""GTE, multilingual and en-v1.5 (Zhang et al. 2024; `NewModel` on the hub), and Snowflake Arctic Embed m v2: BERT's
layers with rotary positions and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sensorium.checkpoint.families import EncoderDefaults
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.checkpoint.values import number
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename
from sensorium.models.encoder import EncoderConfig, PostNormEncoder, head_map, prefixes, separate_qkv

THETA = 160_000.0
REQUIRED: Mapping[str, tuple[object, ...]] = {
    "layer_norm_type": (None, "layer_norm"),
    "logn_attention_scale": (None, False),
    "position_embedding_type": (None, "rope"),
}
"""What the hub's code can do besides is in no published checkpoint."""


class GteModel(PostNormEncoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = prefixes("new", "gte")
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *separate_qkv("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        Rename("encoder.layer.{n}.attention.qkv_proj.{p}", "encoder.layer.{n}.attention.qkv.{p}"),
        Rename("encoder.layer.{n}.attention.o_proj.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
        Rename("encoder.layer.{n}.attn_ln.{p}", "encoder.layer.{n}.attention.output.LayerNorm.{p}"),
        Rename("encoder.layer.{n}.mlp.up_gate_proj.{p}", "encoder.layer.{n}.intermediate.dense.{p}", "up+gate"),
        Rename("encoder.layer.{n}.mlp.down_proj.{p}", "encoder.layer.{n}.output.dense.{p}"),
        Rename("encoder.layer.{n}.mlp_ln.{p}", "encoder.layer.{n}.output.LayerNorm.{p}"),
    )
    ignored: tuple[str, ...] = ("position_ids", "inv_freq", "lm_head.", "pooler.")

    def _read(self, config: dict[str, Any], encoder: EncoderDefaults) -> EncoderConfig:
        for name, values in REQUIRED.items():
            if config.get(name) not in values:
                raise CheckpointError(f"config.json: {name} {config[name]!r} is not supported for GTE")
        plain = {**config, "position_embedding_type": "absolute"}
        shape = replace(EncoderConfig.of(plain, encoder), is_gated=True, mlp_bias=False)
        return shape.rotary(config, THETA, _ntk(config, shape.head_dim))


def _ntk(config: dict[str, Any], head_dim: int) -> RopeConfig | None:
    """The hub's "ntk" kind: theta times the factor, and all frequencies a little lower."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("type") != "ntk":
        return None
    if scaling.get("mixed_b") is not None:
        raise CheckpointError("config.json: rope_scaling's mixed_b is not supported for GTE")
    factor = number(scaling, "factor", 1.0)
    if factor <= 0:
        raise CheckpointError("config.json: rope_scaling's factor must be positive")
    theta = number(config, "rope_theta", THETA)
    return RopeConfig(theta * factor, "linear", factor ** (2 / head_dim))


class GteForSequenceClassification(GteModel):
    """First token -> dense -> tanh -> classes."""

    weight_map: ClassVar[tuple[Rename, ...]] = (*GteModel.weight_map, *head_map("pooler.dense", "classifier"))
    ignored: tuple[str, ...] = ("position_ids", "inv_freq")

    def _declare_poolers(self) -> None:
        self._declare_class_head("tanh")


class GteForTokenClassification(GteModel):
    """Classes of every token."""

    def _declare_poolers(self) -> None:
        self._declare_token_head()
