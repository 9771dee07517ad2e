"""The experts of routed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor

from sensorium.checkpoint.text_config import Routing
from sensorium.kernels import FP8, Activation, Quantization, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda import experts as cuda_experts
from sensorium.kernels.cuda.experts import CudaExperts, add_up, sorted_rows
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


MXFP4 = Quantization(4, 32, floats=True)
FORMS = {
    "mxfp4": MXFP4, "int8": Quantization(8), "fp8": FP8,
    **{f"int4 of {group}": Quantization(4, group) for group in (32, 64, 128, 256)},
    **{f"fp8 of {group}": Quantization(8, group, floats=True) for group in (32, 64, 128, 256)},
}  # fmt: skip

USUAL = ("mxfp4", "int8", "fp8", "int4 of 64", "fp8 of 128")  # in all types; other groups in one


def coded(out: int, of: int, form: Quantization, dtype: torch.dtype, *, bias: bool = False, zeros: bool = False) -> Any:
    """A weight of random codes."""
    made: Any = CUDA.empty_quantized(out, of, form, dtype=dtype, device=torch.device("cpu"))
    codes, scales, _, _ = made.parts
    assert made.kind in ("mxfp4", "int8", "int4", "fp8")
    if form == MXFP4:
        made.fill_codes(0, torch.randint(0, 16, (out, of), dtype=torch.uint8),
                        torch.randint(121, 126, scales.shape, dtype=torch.uint8))  # fmt: skip
    elif form.bits == 4:
        made.fill_codes(0, torch.randint(0, 16, (out, of), dtype=torch.uint8), torch.rand(scales.shape) * of**-0.5 / 4,
                        16 * torch.rand(scales.shape) if zeros else None)  # fmt: skip
    else:
        made.fill(0, torch.randn(out, of) * of**-0.5)
    made.set_bias(torch.randn(out) if bias else None)
    assert codes.count_nonzero() > 0
    return made


def as_numbers(weight: Any, dtype: torch.dtype = torch.float32) -> reference.PlainLinear:
    made = reference.PlainLinear(weight._weight(slice(None)).to(dtype))
    made.set_bias(weight._bias)
    return made


def nearly(found: Tensor, expected: Tensor, most: float) -> bool:
    return bool((found.float() - expected.float()).norm() < most * expected.float().norm())


CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form in FORMS for dtype in DTYPES if form in USUAL or dtype is torch.bfloat16]
)
@pytest.mark.parametrize("tokens", [2, 50])
def test_experts_in_codes(tokens: int, form: str, dtype: torch.dtype) -> None:
    """From their codes, against the same numbers: few and many rows, of which the first expert has most and the last
    one none. That one's scales are no numbers, and nobody reads them."""
    size, inner = (96, 64) if form == "mxfp4" else (168, 72)
    bias, zeros = tokens > 2, tokens > 2 and form.startswith("int4")
    gate_up = [coded(2 * inner, size, FORMS[form], dtype, bias=bias, zeros=zeros) for _ in range(3)]
    down = [coded(size, inner, FORMS[form], dtype, bias=bias) for _ in range(3)]
    made = CUDA.experts(gate_up, down, "silu")
    assert isinstance(made, CudaExperts)
    x, weights = torch.randn(tokens, size).to(dtype), torch.rand(tokens, 1)
    chosen = torch.zeros(tokens, 1, dtype=torch.int64)
    chosen[1] = 1
    plain = reference.experts([*map(as_numbers, gate_up)], [*map(as_numbers, down)], "silu")
    expected = plain(x.float(), chosen, weights)
    for one in (gate_up[2], down[2]):
        one._scales.fill_(255 if form == "mxfp4" else torch.nan)
        one.set_bias(torch.full([one.out_features], torch.nan) if bias else None)
    assert nearly(CUDA.experts(gate_up, down, "silu")(x, chosen, weights), expected, CLOSE[dtype])


@pytest.mark.parametrize("form", USUAL)
def test_what_all_tokens_take_besides_in_codes(form: str) -> None:
    """In the experts' layouts, where it has no other."""
    quantization = FORMS[form]
    gate_up, down = ([coded(out, of, quantization, torch.float32) for _ in range(3)]
                     for out, of in ((2 * 96, 64), (64, 96)))  # fmt: skip
    wide, narrow = coded(2 * 160, 64, quantization, torch.float32), coded(64, 160, quantization, torch.float32)
    made = CUDA.experts(gate_up, down, "silu")
    assert isinstance(made, CudaExperts)
    shared = made.shareable(wide, narrow)
    assert shared is not None
    assert made.shareable(as_numbers(wide), narrow) is None
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    chosen, weights = reference.choose(torch.randn(3, 3), 2, renormalizes=True, scale=1.0)
    plain = reference.experts([*map(as_numbers, gate_up)], [*map(as_numbers, down)], "silu")
    expected = plain(x, chosen, weights) + as_numbers(narrow)(reference.gated(as_numbers(wide)(other), "silu"))
    assert nearly(add_up(made.summands(x, chosen, weights, shared, other), x.dtype), expected, 1e-5)


def test_layouts_of_two_products() -> None:
    """Each product has its own."""
    gate_up = [coded(2 * 32, 64, MXFP4, torch.float32) for _ in range(2)]
    down = [linear(64, 32, torch.float32, bias=True) for _ in range(2)]
    made = CUDA.experts(gate_up, down, "clamped_swiglu")
    assert isinstance(made, CudaExperts)
    x, chosen, weights = torch.randn(2, 64), torch.tensor([[0], [1]]), torch.rand(2, 1)
    expected = reference.experts([*map(as_numbers, gate_up)], down, "clamped_swiglu")(x, chosen, weights)
    assert nearly(made(x, chosen, weights), expected, 1e-5)


def test_experts_of_other_layouts_are_torch_s() -> None:
    """Groups without a kernel, and experts of several layouts."""
    down = [linear(64, 32, torch.float32, bias=False) for _ in range(2)]
    first, second = coded(64, 64, FORMS["int8"], torch.float32), coded(64, 64, FORMS["int4 of 64"], torch.float32)
    small = CUDA.empty_quantized(64, 64, Quantization(4, 16), dtype=torch.float32, device=torch.device("cpu"))
    for gate_up in ([first, second], [small, small], [first, as_numbers(first)]):
        assert not isinstance(CUDA.experts(gate_up, down, "silu"), CudaExperts)
    zeros = coded(64, 64, FORMS["int4 of 64"], torch.float32, zeros=True)
    assert not isinstance(CUDA.experts([second, zeros], down, "silu"), CudaExperts)


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
