"""Routed experts: the native call against plain torch, and each against its promises."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sensorium.kernels import Quantization, reference
from sensorium.kernels.backend import Activation, Experts, PackedWeight
from sensorium.kernels.cpu.native import Native
from sensorium.kernels.reference import PlainExperts, PlainLinear, gated

BF16 = torch.bfloat16
COUNT, HIDDEN, INNER = 5, 70, 36
QUANTIZATIONS = [None, Quantization(8), Quantization(4, 32)]
MXFP4 = Quantization(4, 32, floats=True)  # whose sizes must be whole groups


def weights_of(kernels: Native, quantization: Quantization | None, *, bias: bool) -> list[list[PackedWeight]]:
    """Gate and up of each expert, and down of each."""
    return [
        [
            kernels.pack_linear(
                (torch.randn(size) / size[1] ** 0.5).to(BF16),
                torch.randn(size[0]).to(BF16) if bias else None,
                quantization=quantization,
            )
            for _ in range(COUNT)
        ]
        for size in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]


def fp4_weights(kernels: Native) -> list[list[PackedWeight]]:
    """The same in mxfp4, with biases, of sizes 96 and 64."""
    made: list[list[PackedWeight]] = [[], []]
    for part, (out, size) in zip(made, ((128, 96), (96, 64)), strict=True):
        for _ in range(COUNT):
            weight = kernels.empty_quantized(out, size, MXFP4)
            scales = torch.randint(120, 125, (out, size // 32), dtype=torch.uint8)
            weight.fill_codes(0, torch.randint(0, 16, (out, size), dtype=torch.uint8), scales)
            weight.set_bias(torch.randn(out).to(BF16))
            part.append(weight)
    return made


def choices(tokens: int, per_token: int) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(tokens, COUNT).topk(per_token, -1).indices
    return chosen, torch.rand(tokens, per_token)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_swiglu"])
def test_native_is_plain_torch(kernels: Native, quantization: Quantization | None, activation: Activation) -> None:
    gate_up, down = weights_of(kernels, quantization, bias=activation == "clamped_swiglu")
    native, plain = kernels.experts(gate_up, down, activation), PlainExperts(gate_up, down, activation)
    assert native is not None
    for tokens, per_token in ((1, 1), (1, 3), (7, 2), (40, 5), (1100, 1)):
        x = (3 * torch.randn(tokens, HIDDEN)).to(BF16)
        chosen, weights = choices(tokens, per_token)
        if tokens == 1100:  # all to one, in several blocks
            chosen.fill_(3)
        assert error(native(x, chosen, weights), plain(x, chosen, weights)) < 0.01


def test_mxfp4_experts_are_plain_torch(kernels: Native) -> None:
    gate_up, down = fp4_weights(kernels)
    native, plain = kernels.experts(gate_up, down, "clamped_swiglu"), PlainExperts(gate_up, down, "clamped_swiglu")
    assert native is not None
    for tokens, per_token in ((1, 1), (1, 3), (40, 5), (300, 1)):
        x = torch.randn(tokens, 96).to(BF16)
        chosen, weights = choices(tokens, per_token)
        together = native(x, chosen, weights)
        assert error(together, plain(x, chosen, weights)) < 0.01
        assert torch.equal(native(x[:1], chosen[:1], weights[:1]), together[:1])


@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (5, 5), (40, 8), (128, 8), (37, 20)])
@pytest.mark.parametrize("renormalizes", [True, False])
def test_choices_are_those_of_plain_torch(kernels: Native, experts: int, per_token: int, *, renormalizes: bool) -> None:
    """With many equal logits, of which the first counts as larger."""
    for spread in (0, 1, 20):
        logits = torch.randint(-spread, spread + 1, (300, experts)).to(BF16) / 2
        options: dict[str, Any] = {"renormalizes": renormalizes, "scale": 1.5}
        chosen, weights = kernels.choose(logits, per_token, **options)
        order = [sorted(range(experts), key=lambda e: -row[e])[:per_token] for row in logits.tolist()]
        assert chosen.tolist() == order
        expected = reference.choose(logits, per_token, **options)
        assert torch.equal(chosen, expected[0])
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-7)
    assert kernels.choose(logits[:0], per_token, **options)[0].shape == (0, per_token)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_token_gets_the_same_alone(kernels: Native, quantization: Quantization | None) -> None:
    gate_up, down = weights_of(kernels, quantization, bias=False)
    experts = kernels.experts(gate_up, down, "silu")
    assert experts is not None
    x = torch.randn(60, HIDDEN).to(BF16)
    chosen, weights = choices(60, 3)
    together = experts(x, chosen, weights)
    for i in range(60):
        one = slice(i, i + 1)
        assert torch.equal(experts(x[one], chosen[one], weights[one]), together[one])
        back = experts(x[one], chosen[one].flip(1), weights[one].flip(1))
        assert torch.equal(back, together[one])  # in whatever order its experts were named


def test_only_chosen_experts_are_read(kernels: Native) -> None:
    gate_up, down = weights_of(kernels, None, bias=False)
    for part in (gate_up, down):
        part[2].fill(
            0, torch.full((len(part[2].rows(torch.arange(30))) + 6, cast(Any, part[2]).in_features), torch.nan).to(BF16)
        )
    made: list[Experts | None] = [kernels.experts(gate_up, down, "silu"), PlainExperts(gate_up, down, "silu")]
    chosen = torch.tensor([[0, 1], [4, 3], [1, 4]])
    for experts in made:
        assert experts is not None
        x, weights = torch.randn(3, HIDDEN).to(BF16), torch.rand(3, 2)
        assert not experts(x, chosen, weights).isnan().any()
        assert experts(x, torch.tensor([[0, 1], [4, 2], [1, 4]]), weights).isnan().any(1).tolist() == [0, 1, 0]


def test_the_sum_is_that_of_the_experts() -> None:
    """Written out, in float32."""
    torch.manual_seed(3)
    first, second = torch.randn(COUNT, 2 * INNER, HIDDEN), torch.randn(COUNT, HIDDEN, INNER)
    experts = PlainExperts([PlainLinear(one) for one in first], [PlainLinear(one) for one in second], "silu")
    x = torch.randn(9, HIDDEN)
    chosen, weights = choices(9, 2)
    expected = torch.stack(
        [
            sum(w * (second[e] @ gated(first[e] @ x[t], "silu")) for e, w in zip(chosen[t], weights[t], strict=True))
            for t in range(9)
        ]
    )
    assert error(experts(x, chosen, weights), expected) < 1e-6


def test_clamped_swiglu() -> None:
    """Published numbers of GPT-OSS's experts."""
    gates, ups = torch.tensor([1.75, 2.3125, 2.875, 3.4375]), torch.tensor([2.03125, 2.59375, 3.15625, 3.71875])
    expected = torch.tensor([5.0479, 8.1514, 11.8603, 16.1742])
    assert torch.allclose(gated(torch.cat([gates, ups]), "clamped_swiglu"), expected, atol=1e-4)
    outside = gated(torch.tensor([9.0, -9.0, 9.0, -9.0]), "clamped_swiglu")
    within = gated(torch.tensor([7.0, -9.0, 7.0, -7.0]), "clamped_swiglu")
    assert torch.equal(outside, within)
