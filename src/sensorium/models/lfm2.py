"""LFM2: layers with a short convolution in attention's place, between layers that attend."""

from __future__ import annotations

from typing import ClassVar

from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM

_LAYER = "model.layers.{n}."

LFM2_MAP = (
    Rename("model.embedding_norm.{p}", "model.norm.{p}"),
    Rename(f"{_LAYER}operator_norm.{{p}}", f"{_LAYER}input_layernorm.{{p}}"),
    Rename(f"{_LAYER}ffn_norm.{{p}}", f"{_LAYER}post_attention_layernorm.{{p}}"),
    Rename(f"{_LAYER}feed_forward.w1.{{p}}", f"{_LAYER}mlp.gate_up_proj.{{p}}", "gate"),
    Rename(f"{_LAYER}feed_forward.w3.{{p}}", f"{_LAYER}mlp.gate_up_proj.{{p}}", "up"),
    Rename(f"{_LAYER}feed_forward.w2.{{p}}", f"{_LAYER}mlp.down_proj.{{p}}"),
    Rename(f"{_LAYER}self_attn.out_proj.{{p}}", f"{_LAYER}self_attn.o_proj.{{p}}"),
    Rename(f"{_LAYER}self_attn.q_layernorm.{{p}}", f"{_LAYER}self_attn.q_norm.{{p}}"),
    Rename(f"{_LAYER}self_attn.k_layernorm.{{p}}", f"{_LAYER}self_attn.k_norm.{{p}}"),
    Rename(f"{_LAYER}conv.conv.{{p}}", f"{_LAYER}self_attn.conv.{{p}}"),
    Rename(f"{_LAYER}conv.in_proj.{{p}}", f"{_LAYER}self_attn.in_proj.{{p}}"),
    Rename(f"{_LAYER}conv.out_proj.{{p}}", f"{_LAYER}self_attn.out_proj.{{p}}"),
    *DECODER_MAP,
)
"""`self_attn` is what mixes tokens, in layers that do not attend too."""


class Lfm2ForCausalLM(DecoderForCausalLM):
    weight_map: ClassVar[tuple[Rename, ...]] = LFM2_MAP
