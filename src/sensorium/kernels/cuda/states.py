"""Layers that keep a state in place of keys and values: decodes in Triton, prompts by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import Backend, DeltaParts, StateParts
from sensorium.kernels.context import Segments, StateCache
from sensorium.kernels.cuda.device import states as device
from sensorium.kernels.cuda.launch import launch, power_of_two

_REFERENCE: Backend = reference
BLOCK = 1024  # channels of a program
WIDEST = 128 * 128  # numbers of a head's memory, which one program holds


def takes(state: StateParts) -> bool:
    """Whether a decode of such a layer has kernels."""
    delta = state.delta
    return state.taps.shape[1] > 1 and (
        delta is None or power_of_two(delta.key_dim) * power_of_two(delta.value_dim) <= WIDEST
    )


def mixed_tokens(
    state: StateParts, projected: Tensor, gates: Tensor | None, cache: StateCache, segments: Segments
) -> Tensor:
    """What stands between the two projections of a layer: [tokens, ..] -> [tokens, out]. `gates`: those of `delta`."""
    delta, is_decode = state.delta, segments.num_singles == len(projected)
    if delta is None or gates is None:
        if is_decode:
            return conv_step(state, projected, cache.parts[0], segments, channels=projected.shape[1] // 3)
        before, after, inner = projected.chunk(3, dim=-1)
        conv = reference.causal_conv(before * inner, state.taps, state.bias, cache.parts[0], segments)
        return conv.mul_(after)
    before_states, memory = cache.parts
    channels = len(state.taps)
    z = projected.narrow(1, channels, delta.value_heads * delta.value_dim)
    if is_decode:
        made = conv_step(state, projected, before_states, segments, channels=channels)
        return delta_step(delta, made, gates, z, memory, segments)
    mixed = reference.causal_conv(
        projected.narrow(1, 0, channels), state.taps, state.bias, before_states, segments, silu=True
    )
    return reference.delta_mixed(_REFERENCE, delta, mixed, gates, z, memory, segments)


def conv_step(state: StateParts, x: Tensor, states: Tensor, segments: Segments, *, channels: int) -> Tensor:
    """[rows, channels, or three times as many, and what stands behind them] -> [rows, channels]"""
    taps = state.taps.contiguous()
    out = torch.empty((len(x), channels), dtype=x.dtype, device=x.device)
    block = min(BLOCK, power_of_two(channels))
    launch(
        device.conv_step, (len(x), -(-channels // block)), x, taps, taps if state.bias is None else state.bias, states,
        segments.sources, segments.targets, out, x.stride(0), states.stride(0), channels, TAPS=taps.shape[1],
        HAS_BIAS=state.bias is not None, SILU=state.delta is not None, GATED=state.delta is None, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out


def delta_step(
    delta: DeltaParts, mixed: Tensor, gates: Tensor, z: Tensor, memory: Tensor, segments: Segments
) -> Tensor:
    out = torch.empty((len(mixed), delta.value_heads * delta.value_dim), dtype=mixed.dtype, device=mixed.device)
    keys, values = power_of_two(delta.key_dim), power_of_two(delta.value_dim)
    launch(
        device.delta_step, (len(mixed), delta.value_heads), mixed, gates, z, delta.rate, delta.bias, delta.norm, memory,
        segments.sources, segments.targets, out, delta.eps, delta.key_dim**-0.5, mixed.stride(0), gates.stride(0),
        z.stride(0), memory.stride(0), KEY_HEADS=delta.key_heads, VALUE_HEADS=delta.value_heads, KEY_DIM=delta.key_dim,
        VALUE_DIM=delta.value_dim, BLOCK_K=keys, BLOCK_V=values, TAKES_TURNS=delta.takes_turns,
        num_warps=max(1, min(8, keys * values // 1024)),
    )  # fmt: skip
    return out


def gate_heads(x: Tensor, gates: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], contiguous, times the sigmoid of gates, which may be a strided view; in place."""
    tokens, heads, size = x.shape
    launch(
        device.gate_heads, (tokens, -(-heads * size // BLOCK)), x, gates, gates.stride(0), gates.stride(1), HEADS=heads,
        D=size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return x
