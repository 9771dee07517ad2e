"""Decoder layers that keep a state of fixed size in place of keys and values: which ones, and their shapes, in every
spelling of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from sensorium.checkpoint.decoders import DecoderDefaults
from sensorium.checkpoint.values import indices, positive_int, unsupported
from sensorium.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """LFM2's gated convolution over the last `taps` tokens."""

    taps: int
    bias: bool


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """A gated delta net, whose key heads serve several value heads each, behind a convolution over `taps` tokens."""

    taps: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    takes_turns: bool = False  # value heads of all key heads in turn, as GGUF has them; else each key head's together


StateSpec: TypeAlias = ShortConvSpec | DeltaNetSpec


def state_layers(text: dict[str, Any], decoder: DecoderDefaults, num_layers: int) -> list[StateSpec | None]:
    """Of each layer its state, None of those that attend."""
    if decoder.state_layer is None:
        return [None] * num_layers
    kinds = _layer_types(text, decoder, decoder.state_layer, num_layers)
    if all(kind == decoder.state_layer for kind in kinds):
        raise CheckpointError("config.json: a decoder without a layer that attends is not supported")
    spec: StateSpec
    if decoder.state_every is None:
        spec = ShortConvSpec(positive_int(text, "conv_L_cache", 3), bool(text.get("conv_bias", False)))
    else:
        spec = _delta_net(text)
    return [spec if kind == decoder.state_layer else None for kind in kinds]


def _delta_net(text: dict[str, Any]) -> DeltaNetSpec:
    spec = DeltaNetSpec(
        taps=positive_int(text, "linear_conv_kernel_dim", 4),
        key_heads=positive_int(text, "linear_num_key_heads", 16),
        value_heads=positive_int(text, "linear_num_value_heads", 32),
        key_dim=positive_int(text, "linear_key_head_dim", 128),
        value_dim=positive_int(text, "linear_value_head_dim", 128),
        takes_turns=bool(text.get("linear_value_heads_take_turns", False)),
    )
    if spec.value_heads % spec.key_heads:
        raise CheckpointError(
            f"config.json: linear_num_value_heads {spec.value_heads} is no multiple of linear_num_key_heads "
            f"{spec.key_heads}"
        )
    return spec


def _layer_types(text: dict[str, Any], decoder: DecoderDefaults, state_layer: str, num_layers: int) -> list[str]:
    """`layer_types` says it, else Qwen's number of layers to one that attends, or LFM2's list of those that do."""
    kinds = text.get("layer_types")
    if kinds is None and decoder.state_every is not None:
        every = positive_int(text, "full_attention_interval", decoder.state_every)
        return ["full_attention" if (index + 1) % every == 0 else state_layer for index in range(num_layers)]
    if kinds is None:
        attending = indices(text, "full_attn_idxs")
        numbers = range(num_layers)
        return ["full_attention" if attending is None or number in attending else state_layer for number in numbers]
    known = ("full_attention", state_layer)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must name {num_layers} layers (num_hidden_layers)")
    for kind in kinds:
        if kind not in known:
            raise unsupported("layer type", kind, known)
    return kinds
