"""The experts of routed layers."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import assert_close

from sensorium.checkpoint.text_config import Routing
from sensorium.kernels import Activation, Quantization, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda import experts as cuda_experts
from sensorium.kernels.cuda.experts import CudaExperts, add_up, sorted_rows
from sensorium.kernels.cuda.linear import CudaQuantizedLinear
from sensorium.kernels.cuda.norms import Summands, add_rms_norm
from sensorium.models import experts as models_experts

CUDA = CudaBackend()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def linear(out: int, of: int, dtype: torch.dtype, *, bias: bool) -> reference.PlainLinear:
    made = reference.PlainLinear((torch.randn(out, of) * of**-0.5).to(dtype))
    made.set_bias(torch.randn(out) if bias else None)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
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
@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_all_tokens_take_besides(dtype: torch.dtype, is_folded: bool, is_gated: bool) -> None:
    """As a tensor, and of other states by the kernels of the experts; added up, and in the norm behind it."""
    gate_up, down = [linear(2 * 20, 72, dtype, bias=False) for _ in range(3)], [linear(72, 20, dtype, bias=False)] * 3
    wide, narrow = linear(2 * 88, 72, dtype, bias=False), linear(72, 88, dtype, bias=False)
    made = CUDA.experts(gate_up, down, "silu")
    assert isinstance(made, CudaExperts)
    x, other, residual = (torch.randn(3, 72).to(dtype) for _ in range(3))
    gate = torch.randn(3, 5).to(dtype)[:, 4:] if is_gated else None
    shared = narrow(reference.gated(wide(other), "silu"))
    chosen, weights = reference.choose(torch.randn(3, 3), 2, renormalizes=True, scale=1.0)
    expected = reference.experts(gate_up, down, "silu")(x, chosen, weights)
    expected += shared if gate is None else shared * gate.sigmoid()
    sums = made.summands(x, chosen, weights, made.shareable(wide, narrow) if is_folded else None, other)
    sums = Summands(sums.parts, sums.shared if is_folded else shared, gate)
    assert_close(add_up(sums, dtype), expected, 4)
    first, norm = torch.randn(72).to(dtype), torch.randn(72).to(dtype)
    wanted = reference.add_rms_norm(reference.rms_norm(expected, first, 1e-6), residual, norm, 1e-6)
    for one, their in zip(add_rms_norm(sums, residual.clone(), norm, 1e-6, 0.0, first), wanted, strict=True):
        assert_close(one, their, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "bias"), [(1, False), (16, False), (17, False), (2, True)])
def test_an_mlp_by_itself(tokens: int, bias: bool, dtype: torch.dtype) -> None:
    """Gate and up of few tokens are multiplied and gated in one launch."""
    weight, x = linear(2 * 70, 72, dtype, bias=bias), torch.randn(tokens, 72).to(dtype)
    got = cuda_experts.gate_and_up_of(x, weight, "gelu_tanh")
    assert_close(got, reference.gated(weight(x), "gelu_tanh"), 4)


def test_what_is_not_folded() -> None:
    made = CUDA.experts([linear(8, 4, torch.float32, bias=False)], [linear(4, 4, torch.float32, bias=False)], "silu")
    assert isinstance(made, CudaExperts)
    plain, biased = linear(4, 4, torch.float32, bias=False), linear(4, 4, torch.float32, bias=True)
    assert made.shareable(plain, plain) is not None
    assert made.shareable(plain, biased) is made.shareable(None, None) is None
    assert made.shareable(plain, linear(4, 4, torch.float16, bias=False)) is None


@pytest.mark.parametrize("is_found", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 5, 2), (40, 3, 1), (20, 4, 3)])
def test_pairs_that_are_found_or_sorted(
    monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int, per_token: int, is_found: bool
) -> None:
    """Experts of several tiles, and of none: the first one is chosen by nobody."""
    monkeypatch.setattr(cuda_experts, "FOUND", 512 if is_found else 0)
    gate_up = [linear(2 * 16, 16, torch.float32, bias=True) for _ in range(experts)]
    down = [linear(16, 16, torch.float32, bias=True) for _ in range(experts)]
    logits = torch.randn(tokens, experts)
    logits[:, 0] = -torch.inf
    chosen, weights = reference.choose(logits, per_token, renormalizes=True, scale=1.0)
    x = torch.randn(tokens, 16)
    expected = reference.experts(gate_up, down, "silu")(x, chosen, weights)
    assert (cuda_experts.order_of(chosen, experts).compared > 0) is is_found
    assert_close(CUDA.experts(gate_up, down, "silu")(x, chosen, weights), expected, 4)


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


@pytest.mark.parametrize("dtype", DTYPES)
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


def test_choice_with_a_factor_of_each_expert() -> None:
    logits, factors = torch.randn(5, 60), torch.rand(60)
    expected, their_weights = reference.choose(logits, 4, renormalizes=True, scale=1.5)
    chosen, weights = cuda_experts.choose(logits, 4, renormalizes=True, scale=1.5, factors=factors)
    assert torch.equal(chosen, expected)
    assert_close(weights, their_weights * factors[expected])


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
