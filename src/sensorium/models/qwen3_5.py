"""Qwen3.5 and later, dense or with experts: three layers in four are gated delta nets, the rest has gated attention;
the vision tower is Qwen3-VL's without deepstack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.qwen3_vit import QWEN3_VIT_MAP, Qwen3Vit
from sensorium.models.towers.qwen_vit import QwenVit, QwenVitConfig

_FROM, _TO = "model.layers.{n}.linear_attn.", "model.layers.{n}.self_attn."

QWEN35_MAP = (
    Rename(f"{_FROM}in_proj_qkv.{{p}}", f"{_TO}in_proj.{{p}}", "qkv"),
    Rename(f"{_FROM}in_proj_z.{{p}}", f"{_TO}in_proj.{{p}}", "z"),
    Rename(f"{_FROM}in_proj_b.{{p}}", f"{_TO}gates.{{p}}", "b"),
    Rename(f"{_FROM}in_proj_a.{{p}}", f"{_TO}gates.{{p}}", "a"),
    Rename(f"{_FROM}conv1d.{{p}}", f"{_TO}conv.{{p}}"),
    Rename(f"{_FROM}A_log", f"{_TO}decay.rate"),
    Rename(f"{_FROM}dt_bias", f"{_TO}decay.bias"),
    Rename(f"{_FROM}norm.{{p}}", f"{_TO}norm.{{p}}"),
    Rename(f"{_FROM}out_proj.{{p}}", f"{_TO}out_proj.{{p}}"),
    *DECODER_MAP,
)


class Qwen35ForCausalLM(DecoderForCausalLM):
    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.language_model.": "model."}
    weight_map: ClassVar[tuple[Rename, ...]] = QWEN35_MAP
    ignored: tuple[str, ...] = (*DecoderForCausalLM.ignored, "mtp.", "model.visual.")


class Qwen35(Qwen2VL):
    weight_map: ClassVar[tuple[Rename, ...]] = (*QWEN35_MAP, *QWEN3_VIT_MAP)
    ignored: tuple[str, ...] = (*Qwen2VL.ignored, "mtp.")

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        vision = {**(checkpoint.config.get("vision_config") or {}), "deepstack_visual_indexes": []}
        return Qwen3Vit(QwenVitConfig.of_qwen3(vision), self.text.hidden_size)
