"""The experts of routed layers."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import assert_close

from sensorium.checkpoint.text_config import Routing
from sensorium.kernels import Activation, Quantization, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda import experts as cuda_experts
from sensorium.kernels.cuda.experts import CudaExperts, sorted_rows
from sensorium.kernels.cuda.linear import CudaQuantizedLinear
from sensorium.models import experts as models_experts

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


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_all_tokens_take_besides(dtype: torch.dtype, is_gated: bool) -> None:
    gate_up, down = [linear(2 * 20, 72, dtype, bias=False) for _ in range(3)], [linear(72, 20, dtype, bias=False)] * 3
    made = CUDA.experts(gate_up, down, "silu")
    assert isinstance(made, CudaExperts)
    x, shared, gate = (torch.randn(3, size).to(dtype) for size in (72, 72, 1))
    chosen, weights = reference.choose(torch.randn(3, 3), 2, renormalizes=True, scale=1.0)
    expected = reference.experts(gate_up, down, "silu")(x, chosen, weights)
    expected += shared * gate.sigmoid() if is_gated else shared
    assert_close(made(x, chosen, weights, shared, gate if is_gated else None), expected, 4)


@pytest.mark.parametrize(("tokens", "experts", "per_token", "tile"), [(1, 4, 2, 16), (40, 6, 2, 16), (70, 60, 4, 64)])
def test_rows_sorted_by_expert(
    monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int, per_token: int, tile: int
) -> None:
    """By comparing and by torch's sort, which is for many."""
    chosen = torch.rand(tokens, experts).argsort(1)[:, :per_token].contiguous()
    compared = sorted_rows(chosen, experts, tile)
    monkeypatch.setattr(cuda_experts, "COMPARED", 0)
    for one, other in zip(compared, sorted_rows(chosen, experts, tile), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "bias"), [(2, False), (40, True)])
def test_experts_in_mxfp4(tokens: int, bias: bool, dtype: torch.dtype) -> None:
    """From their codes, against the same numbers."""

    def codes(out: int, of: int) -> CudaQuantizedLinear:
        made = CUDA.empty_quantized(out, of, Quantization(4, 32, floats=True), dtype=dtype, device=torch.device("cpu"))
        scales = torch.randint(121, 126, (out, of // 32), dtype=torch.uint8)
        made.fill_codes(0, torch.randint(0, 16, (out, of), dtype=torch.uint8), scales)
        made.set_bias(torch.randn(out).to(dtype) if bias else None)
        assert isinstance(made, CudaQuantizedLinear)
        return made

    def numbers(one: CudaQuantizedLinear) -> reference.PlainLinear:
        made = reference.PlainLinear(one._weight(slice(None)))
        made.set_bias(one._bias)
        return made

    gate_up, down = [codes(2 * 32, 64) for _ in range(3)], [codes(64, 32) for _ in range(3)]
    made = CUDA.experts(gate_up, down, "clamped_swiglu")
    assert isinstance(made, CudaExperts)
    x = torch.randn(tokens, 64).to(dtype)
    chosen, weights = reference.choose(torch.randn(tokens, 3), 2, renormalizes=True, scale=1.0)
    plain = reference.experts([*map(numbers, gate_up)], [*map(numbers, down)], "clamped_swiglu")
    expected = plain(x.float(), chosen, weights).to(dtype)
    assert (made(x, chosen, weights).float() - expected.float()).norm() < (
        1e-2 if dtype is torch.bfloat16 else 1e-5
    ) * expected.float().norm()


def test_experts_that_nobody_chose() -> None:
    gate_up = [linear(2 * 16, 16, torch.float32, bias=False) for _ in range(6)]
    down = [linear(16, 16, torch.float32, bias=False) for _ in range(6)]
    chosen, weights = torch.tensor([[4, 1], [4, 5], [1, 4]]), torch.rand(3, 2)
    x = torch.randn(3, 16)
    expected = reference.experts(gate_up, down, "silu")(x, chosen, weights)
    assert_close(CUDA.experts(gate_up, down, "silu")(x, chosen, weights), expected, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize(("experts", "per_token"), [(4, 1), (60, 4), (128, 8), (6, 6)])
def test_choice(experts: int, per_token: int, renormalizes: bool, dtype: torch.dtype) -> None:
    """Of equal logits the first; of logits of minus infinity those that are left, each once."""
    logits = torch.randn(5, experts + 3).to(dtype)[:, :experts]
    logits[1] = 2.0
    logits[2, 1:] = -torch.inf
    logits[3] = logits[3].round()
    chosen, weights = CUDA.choose(logits, per_token, renormalizes=renormalizes, scale=1.5)
    expected, their_weights = reference.choose(logits, per_token, renormalizes=renormalizes, scale=1.5)
    assert torch.equal(chosen, expected)
    assert_close(weights, their_weights)


@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize(("experts", "groups", "taken"), [(6, 1, 1), (60, 4, 2), (128, 8, 3)])
def test_corrected_choice(experts: int, groups: int, taken: int, renormalizes: bool) -> None:
    """Of the best groups, as models that correct their sigmoids choose."""
    logits, correction = torch.randn(5, experts), torch.randn(experts)
    routing = Routing(
        num_experts=experts, per_token=3, expert_size=1, layers=(), renormalizes=renormalizes, scale=1.5,
        groups=groups, groups_per_token=taken, has_correction=True,
    )  # fmt: skip
    expected, their_weights = models_experts.choose(logits, routing, correction)
    chosen, weights = cuda_experts.choose(
        logits, 3, renormalizes=renormalizes, scale=1.5, correction=correction, groups=groups, groups_per_token=taken
    )
    assert torch.equal(chosen, expected)
    assert_close(weights, their_weights)
