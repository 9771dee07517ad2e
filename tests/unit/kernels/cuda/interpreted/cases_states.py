"""Layers that keep a state: decodes by the kernels against the reference, prompts as a mixture of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import DeltaParts, StateParts
from sensorium.kernels.context import Segments, StateCache
from sensorium.kernels.cuda import states as cuda_states

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLOTS = 7


def segments_of(lengths: list[int], singles: int) -> Segments:
    """Each goes on from a state, the last one from none, and writes where nobody has."""
    count = len(lengths)
    return Segments(lengths, singles, torch.tensor([2, 4, 0][-count:]), torch.tensor([1, 3, 5][:count]))


def slots(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States twice, NaN where nobody may read; slot 0 is zero."""
    made = torch.randn(SLOTS, *shape).to(dtype)
    made[0] = 0
    made[[1, 3, 5, 6]] = torch.nan
    return made, made.clone()


def check_states(own: Tensor, expected: Tensor) -> None:
    assert torch.equal(own.isnan(), expected.isnan())
    assert own[6].isnan().all()
    assert_close(own.nan_to_num(), expected.nan_to_num(), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps", "bias"), [(40, 3, False), (1100, 4, True), (16, 2, False)])
def test_gated_convolutions(channels: int, taps: int, bias: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(channels, taps).to(dtype)
    state = StateParts(weight, torch.randn(channels).to(dtype) if bias else None, None)
    own, expected = slots(taps - 1, channels, dtype=dtype)
    segments, projected = segments_of([1, 1, 1], 3), torch.randn(3, 3 * channels).to(dtype)
    before, after, inner = projected.chunk(3, dim=1)
    wanted = reference.causal_conv(before * inner, weight, state.bias, expected, segments) * after
    assert_close(cuda_states.mixed_tokens(state, projected, None, StateCache((own,)), segments), wanted, 2)
    check_states(own, expected)


def delta_of(key_heads: int, group: int, key_dim: int, value_dim: int, dtype: torch.dtype, turns: bool) -> StateParts:
    heads = key_heads * group
    channels = 2 * key_heads * key_dim + heads * value_dim
    gates = reference.PlainLinear((torch.randn(2 * heads, 24) * 0.3).to(dtype))
    rate, bias = torch.randn(heads), torch.randn(heads)
    bias[0] = 30.0  # where the logarithm is left away
    norm = torch.randn(value_dim).to(dtype)
    delta = DeltaParts(gates, rate, bias, norm, 1e-6, key_heads, heads, key_dim, value_dim, turns)
    return StateParts(torch.randn(channels, 4).to(dtype), None, delta)


def by_reference(state: StateParts, x: Tensor, projected: Tensor, cache: StateCache, segments: Segments) -> Tensor:
    """As `models.delta_net` does it."""
    delta, channels = state.delta, len(state.taps)
    assert delta is not None
    decay, learned = reference.delta_gates(delta.gates(x), delta.rate, delta.bias)
    mixed = reference.causal_conv(projected[:, :channels], state.taps, None, cache.parts[0], segments, silu=True)
    size = delta.key_heads * delta.key_dim
    q, k, v = mixed.split([size, size, channels - 2 * size], dim=1)
    q, k = (part.view(len(x), delta.key_heads, -1) for part in (q, k))
    v, order = v.view(len(x), delta.value_heads, -1), torch.arange(delta.value_heads)
    if delta.takes_turns:
        order = order.view(-1, delta.key_heads).t().flatten()
    out = reference.delta_rule(q, k, v[:, order], decay[:, order], learned[:, order], cache.parts[1], segments)
    back = torch.empty_like(out)
    back[:, order] = out
    return reference.norm_gated(back, projected[:, channels:], delta.norm, delta.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("lengths", "singles"), [([1, 1, 1], 3), ([1, 5], 1)])
def test_delta_nets(lengths: list[int], singles: int, turns: bool, dtype: torch.dtype) -> None:
    state = delta_of(2, 3, 12, 20, dtype, turns)
    assert cuda_states.takes(state)
    segments, tokens, channels = segments_of(lengths, singles), sum(lengths), len(state.taps)
    windows, memory = slots(3, channels, dtype=dtype), slots(6, 12, 20, dtype=torch.float32)
    x, projected = torch.randn(tokens, 24).to(dtype), torch.randn(tokens, channels + 6 * 20).to(dtype)
    wanted = by_reference(state, x, projected, StateCache((windows[1], memory[1])), segments)
    assert state.delta is not None
    joined = torch.cat([projected, state.delta.gates(x)], dim=1)  # as one product gives them
    own, gates = joined.split([channels + 6 * 20, 12], dim=1)
    got = cuda_states.mixed_tokens(state, own, gates, StateCache((windows[0], memory[0])), segments)
    assert_close(got, wanted, 4)
    check_states(*windows)
    within: Any = {"atol": 1e-2, "rtol": 1e-2} if dtype is not torch.float32 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(*memory, equal_nan=True, **within)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_heads(dtype: torch.dtype) -> None:
    heads, x = torch.randn(3, 10, 12).to(dtype), torch.randn(3, 5, 12).to(dtype)
    expected = x * heads[:, 1::2].sigmoid()
    assert_close(cuda_states.gate_heads(x, heads[:, 1::2]), expected, 2)
