"""int8 and int4 weights: codes and scales against plain arithmetic, products against the dequantised float product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensorium.errors import StartupError
from sensorium.kernels.native import Native, QuantizedLinear

BF16 = torch.bfloat16
SHAPES = [(16, 32), (48, 64), (100, 96), (33, 72), (1, 8), (50, 131), (70, 640)]


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


def dequantized(form: QuantizedLinear) -> Tensor:
    return form.rows(torch.arange(form.out_features)).float()


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_dequantised_weight(kernels: Native, bits: int, group: int,
                                                   shape: tuple[int, int]) -> None:
    form = QuantizedLinear(kernels, *shape, bits, group)
    form.fill(0, random_bf16(*shape))
    bias = random_bf16(shape[0])
    form.set_bias(bias)
    weight = dequantized(form)
    for rows in (0, 1, 3, 12, 13, 40):
        x = random_bf16(rows, shape[1])
        expected = x.float() @ weight.T + bias.float()
        size = x.float().norm() * weight.norm() / shape[1] ** 0.5  # what a random product comes to
        assert (form(x).float() - expected).norm() <= 0.015 * (size + bias.float().norm())
        assert (form(x, torch.float32) - expected).norm() <= 0.015 * size
        together = form(x)
        for row in range(rows):
            assert torch.equal(form(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_where_integers_are_exact(kernels: Native, bits: int) -> None:
    """With x of -127 .. 127 and scales of one, a product is an integer that float32 holds."""
    out_features, in_features, group = 45, 150, 32
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    form = QuantizedLinear(kernels, out_features, in_features, bits, group)
    groups = -(-in_features // group) if bits == 4 else 1
    zeros = torch.randint(0, 16, (out_features, groups), dtype=torch.uint8) if bits == 4 else None
    zero_codes = torch.full((out_features, in_features), 128.0)
    if zeros is not None:
        zero_codes = zeros.float().repeat_interleave(group, dim=1)[:, :in_features]
    scales = torch.ones(out_features, groups)
    for first, last in ((7, 40), (0, 7), (40, 45)):
        form.fill_codes(first, codes[first:last], scales[first:last], None if zeros is None else zeros[first:last])
    weight = codes.float() - zero_codes
    assert torch.equal(dequantized(form), weight)
    for rows in (1, 12, 30):
        x = torch.randint(-127, 128, (rows, in_features)).float()
        x[:, ::group] = 127  # every group's scale is one
        assert torch.equal(form(x.to(BF16), torch.float32), x @ weight.T)


def test_int8_weights_are_the_nearest_codes(fastest: Native) -> None:
    weight = random_bf16(40, 200)
    form = QuantizedLinear(fastest, 40, 200, 8)
    form.fill(0, weight)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((dequantized(form) - weight.float()).abs() <= step * 0.51 + weight.float().abs() / 256).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_no_worse_than_the_plain_rule(fastest: Native, group: int) -> None:
    """The rule of Q4_0: the value of largest magnitude is code -8."""
    weight = random_bf16(64, 512)
    form = QuantizedLinear(fastest, 64, 512, 4, group)
    form.fill(0, weight)
    grouped = weight.float().view(64, -1, group)
    top = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scale = top / -8
    plain = ((grouped / scale).round().clamp(-8, 7) * scale).view(64, 512)
    assert relative_error(dequantized(form), weight.float()) < 0.99 * relative_error(plain, weight.float())
    assert form.nbytes == 64 * 512 // 2 + 64 * 512 // group * 2


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_outliers_and_large_sums(kernels: Native, bits: int) -> None:
    weight = random_bf16(32, 4096)
    weight[3] = 0
    weight[4] = 100
    form = QuantizedLinear(kernels, 32, 4096, bits)
    form.fill(0, weight)
    x = torch.ones(2, 4096).to(BF16)
    x[1] = 0
    expected = x.float() @ dequantized(form).T
    assert torch.equal(form(x, torch.float32)[1], torch.zeros(32))
    torch.testing.assert_close(form(x, torch.float32), expected, rtol=2e-3, atol=0.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_results_do_not_depend_on_the_number_of_threads(fastest: Native, bits: int) -> None:
    weight, x = random_bf16(2000, 640), random_bf16(30, 640)
    threads, results = fastest.threads, []
    try:
        for count in (1, 2, 5):
            fastest.set_threads(count)
            form = QuantizedLinear(fastest, 2000, 640, bits)
            form.fill(0, weight)
            results.append((form(x), form(x[:1]), dequantized(form)))
    finally:
        fastest.set_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_forms_are_chosen_by_name(fastest: Native) -> None:
    weight = random_bf16(32, 64)
    assert fastest.pack_linear(weight, None, quantization="int8").nbytes == 32 * 64 + 32 * 4
    assert fastest.pack_linear(weight, None, quantization="int4").nbytes == 32 * 64 // 2 + 32 * 2
    with pytest.raises(StartupError, match="int3"):
        fastest.pack_linear(weight, None, quantization="int3")
    with pytest.raises(ValueError, match="groups of 12"):
        QuantizedLinear(fastest, 32, 64, 4, 12)
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedLinear(fastest, 32, 64, 8).fill(1, weight)
    with pytest.raises(ValueError, match="zero points"):
        QuantizedLinear(fastest, 2, 4, 8).fill_codes(
            0, torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8))
