"""Experts, and the edits of single logits."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import assert_close

from sensorium.kernels import Activation, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda.experts import CudaExperts
from sensorium.kernels.cuda.logits import Edits, edit

CUDA = CudaBackend()


def linear(out: int, of: int, dtype: torch.dtype, *, bias: bool) -> reference.PlainLinear:
    made = reference.PlainLinear((torch.randn(out, of) * of**-0.5).to(dtype))
    made.set_bias(torch.randn(out) if bias else None)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "activation", "bias"),
    [(1, 4, 2, "silu", False), (5, 3, 3, "clamped_swiglu", True), (40, 2, 1, "gelu_tanh", True)],
)
def test_experts(
    tokens: int, experts: int, per_token: int, activation: Activation, bias: bool, dtype: torch.dtype
) -> None:
    gate_up = [linear(2 * 20, 72, dtype, bias=bias) for _ in range(experts)]
    down = [linear(72, 20, dtype, bias=bias) for _ in range(experts)]
    made = CUDA.experts(gate_up, down, activation)
    assert isinstance(made, CudaExperts)
    x = torch.randn(tokens, 72).to(dtype)
    chosen, weights = reference.choose(torch.randn(tokens, experts), per_token, renormalizes=True, scale=1.0)
    expected = reference.experts(gate_up, down, activation)(x, chosen, weights)
    assert_close(made(x, chosen, weights), expected, 4)


def test_experts_that_nobody_chose() -> None:
    gate_up = [linear(2 * 16, 16, torch.float32, bias=False) for _ in range(6)]
    down = [linear(16, 16, torch.float32, bias=False) for _ in range(6)]
    chosen, weights = torch.tensor([[4, 1], [4, 5], [1, 4]]), torch.rand(3, 2)
    x = torch.randn(3, 16)
    expected = reference.experts(gate_up, down, "silu")(x, chosen, weights)
    assert_close(CUDA.experts(gate_up, down, "silu")(x, chosen, weights), expected, 4)


def test_edits() -> None:
    logits = 4 * torch.randn(3, 1100)
    said = torch.tensor([2.0, 0.0, 1.0, 5.0])
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 35), dtype=torch.int64).to(torch.int32)
    edits = Edits(
        bias_starts=torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        biased=torch.tensor([7, 1099, 0], dtype=torch.int32),
        biases=torch.tensor([3.5, -torch.inf, 1.0]),
        seen_starts=torch.tensor([0, 3, 4, 4], dtype=torch.int32),
        seen=torch.tensor([7, 8, 9, 1000], dtype=torch.int32),
        said=said,
        repetition=torch.tensor([1.3, 0.7, 1.0]),
        frequency=torch.tensor([0.5, -0.1, 0.0]),
        presence=torch.tensor([0.25, 1.0, 9.0]),
        masks=bits,
        mask_of=torch.tensor([-1, 1, 0], dtype=torch.int32),
    )
    expected = logits.clone()
    expected[0, 7] += 3.5
    expected[0, 1099] = -torch.inf
    expected[2, 0] += 1.0
    for row, tokens, some in ((0, [7, 8, 9], said[:3]), (1, [1000], said[3:])):
        values, rate = expected[row, tokens], edits.repetition[row]
        values = torch.where(values > 0, values / rate, values * rate)
        expected[row, tokens] = values - edits.frequency[row] * some - edits.presence[row] * (some > 0)
    for row, mask in ((1, 1), (2, 0)):
        allowed = [bool(int(bits[mask, token // 32]) >> (token % 32) & 1) for token in range(1100)]
        expected[row, ~torch.tensor(allowed)] = -torch.inf
    edit(logits, edits)
    torch.testing.assert_close(logits, expected)
