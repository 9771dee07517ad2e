"""int8 and int4 weights: codes and scales against plain arithmetic, products against the dequantised float product.

The native forms and their torch twin take the same tests.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from sensorium import kernels as dispatcher
from sensorium.errors import StartupError
from sensorium.kernels import Quantization, reference
from sensorium.kernels.cpu.linear import QuantizedLinear
from sensorium.kernels.cpu.native import Native
from sensorium.kernels.reference import quantized

BF16 = torch.bfloat16
SHAPES = [(16, 32), (48, 64), (100, 96), (33, 72), (1, 8), (50, 131), (70, 640)]


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


def dequantized(form: QuantizedLinear | quantized.QuantizedLinear) -> Tensor:
    return form.rows(torch.arange(form.out_features)).float()


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_dequantised_weight(
    kernels: Native, bits: Literal[4, 8], group: int, shape: tuple[int, int]
) -> None:
    form = QuantizedLinear(kernels, *shape, Quantization(bits, group))
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
def test_exact_where_integers_are_exact(kernels: Native, bits: Literal[4, 8]) -> None:
    """With x of -127 .. 127 and scales of one, a product is an integer that float32 holds."""
    out_features, in_features, group = 45, 150, 32
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    form = QuantizedLinear(kernels, out_features, in_features, Quantization(bits, group))
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


def test_outliers_are_exact_too(kernels: Native) -> None:
    """Two values of a row may have up to 127 * 128 steps: here a step is one, and products are integers again."""
    form = QuantizedLinear(kernels, 45, 150, Quantization(8))
    codes = torch.randint(0, 256, (45, 150), dtype=torch.uint8)
    form.fill_codes(0, codes, torch.ones(45, 1))
    for rows in (1, 2, 12, 30):
        x = torch.randint(-127, 128, (rows, 150)).float()
        x[:, 40] = 127
        for row in range(rows):
            places = torch.randperm(40)[:2] if row % 3 else torch.tensor([148, 149])  # in two words, in one
            x[row, places] = torch.tensor([16256.0, -256.0 if row % 2 else 192.0])
        product = x @ (codes.float() - 128).T
        assert torch.equal(form(x.to(BF16), torch.float32), product)


def with_outliers(rows: int, size: int, *factors: float) -> Tensor:
    """Normal values but for some columns, as the states of transformers are."""
    x = torch.randn(rows, size)
    for place, factor in enumerate(factors):
        x[:, (place * 37 + 5) % size] = factor * (1 + torch.rand(rows))
    return x.to(BF16)


@pytest.mark.parametrize("factors", [(30,), (20, -40), (3000, -20), (9, 10, 11, -12), (1e30,)], ids=str)
@pytest.mark.parametrize("size", [16, 131, 1536])
def test_outliers_leave_the_other_values_fine(kernels: Native, size: int, factors: tuple[float, ...]) -> None:
    """As the reference has them, in whatever rows they stand; with one or two, the rest keeps its steps."""
    weight = random_bf16(40, size)
    ours, reference_form = QuantizedLinear(kernels, 40, size, Quantization(8)), twin_of((40, size), Quantization(8))
    for form in (ours, reference_form):
        form.fill_codes(0, *quantized.quantize_int8(weight))
    x = torch.cat([with_outliers(9, size, *factors), random_bf16(4, size)])
    together, expected = ours(x, torch.float32), reference_form(x.float())
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4 * expected.abs().amax().item())
    for row in range(len(x)):
        assert torch.equal(ours(x[row : row + 1], torch.float32), together[row : row + 1])
    if size > 16 and max(factors) < 1000:
        rounded = quantized.round_activations(x, size, outliers=quantized.OUTLIERS)
        rest = x.float().abs() < 8
        limit = 0.012 if len(factors) <= quantized.OUTLIERS else 0.04  # of four, the third and fourth set the scale
        assert relative_error(torch.where(rest, rounded, 0), torch.where(rest, x.float(), 0)) < limit


def test_a_row_of_outliers_alone(kernels: Native) -> None:
    """Fewer values than there may be outliers, and equal ones."""
    form = QuantizedLinear(kernels, 32, 64, Quantization(8))
    form.fill_codes(0, torch.full((32, 64), 129, dtype=torch.uint8), torch.ones(32, 1))
    x = torch.zeros(4, 64).to(BF16)
    x[0, 7], x[1, :2], x[2, 3:7], x[3, 9:11] = 3, 5, 2, torch.tensor([4.0, -8.0]).to(BF16)
    torch.testing.assert_close(form(x, torch.float32), torch.tensor([3.0, 10, 8, -4])[:, None].expand(4, 32))


def test_int8_weights_are_the_nearest_codes(fastest: Native) -> None:
    weight = random_bf16(40, 200)
    form = QuantizedLinear(fastest, 40, 200, Quantization(8))
    form.fill(0, weight)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((dequantized(form) - weight.float()).abs() <= step * 0.51 + weight.float().abs() / 256).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_no_worse_than_the_plain_rule(fastest: Native, group: int) -> None:
    """The rule of Q4_0: the value of largest magnitude is code -8."""
    weight = random_bf16(64, 512)
    form = QuantizedLinear(fastest, 64, 512, Quantization(4, group))
    form.fill(0, weight)
    grouped = weight.float().view(64, -1, group)
    top = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scale = top / -8
    plain = ((grouped / scale).round().clamp(-8, 7) * scale).view(64, 512)
    assert relative_error(dequantized(form), weight.float()) < 0.99 * relative_error(plain, weight.float())
    assert form.nbytes == 64 * 512 // 2 + 64 * 512 // group * 2


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_outliers_and_large_sums(kernels: Native, bits: Literal[4, 8]) -> None:
    weight = random_bf16(32, 4096)
    weight[3] = 0
    weight[4] = 100
    form = QuantizedLinear(kernels, 32, 4096, Quantization(bits))
    form.fill(0, weight)
    x = torch.ones(2, 4096).to(BF16)
    x[1] = 0
    expected = x.float() @ dequantized(form).T
    assert torch.equal(form(x, torch.float32)[1], torch.zeros(32))
    torch.testing.assert_close(form(x, torch.float32), expected, rtol=2e-3, atol=0.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_results_do_not_depend_on_the_number_of_threads(fastest: Native, bits: Literal[4, 8]) -> None:
    weight, x = random_bf16(2000, 640), random_bf16(30, 640)
    threads, results = fastest.threads, []
    try:
        for count in (1, 2, 5):
            fastest.set_threads(count)
            form = QuantizedLinear(fastest, 2000, 640, Quantization(bits))
            form.fill(0, weight)
            results.append((form(x), form(x[:1]), dequantized(form)))
    finally:
        fastest.set_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_forms_are_chosen_by_quantization(fastest: Native) -> None:
    weight = random_bf16(32, 64)
    assert fastest.pack_linear(weight, None, quantization=Quantization(8)).nbytes == 32 * 64 + 32 * 4
    assert fastest.pack_linear(weight, None, quantization=Quantization(4)).nbytes == 32 * 64 // 2 + 32 * 2
    with pytest.raises(StartupError, match="groups of 12"):
        Quantization(4, 12)
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedLinear(fastest, 32, 64, Quantization(8)).fill(1, weight)
    with pytest.raises(ValueError, match="zero points"):
        QuantizedLinear(fastest, 2, 4, Quantization(8)).fill_codes(
            0, torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8)
        )


def twin_of(shape: tuple[int, int], quantization: Quantization) -> quantized.QuantizedLinear:
    return quantized.QuantizedLinear(*shape, quantization, dtype=BF16, device=torch.device("cpu"))


QUANTIZATIONS = [Quantization(8), Quantization(4, 32), Quantization(4, 64), Quantization(4, 128)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_twin_has_the_same_codes_and_products(
    kernels: Native, quantization: Quantization, shape: tuple[int, int]
) -> None:
    """Equal codes but for a few that lie between two; with equal codes products differ by float32's rounding alone."""
    weight, bias = random_bf16(*shape), random_bf16(shape[0])
    ours, twin = QuantizedLinear(kernels, *shape, quantization), twin_of(shape, quantization)
    every = torch.arange(shape[0])
    for form in (ours, twin):
        form.fill(0, weight[: shape[0] // 3])
        form.fill(shape[0] // 3, weight[shape[0] // 3 :])
        form.set_bias(bias)
    assert (ours.rows(every) != twin.rows(every)).float().mean() <= 0.001
    codes, scales, zeros = codes_of(weight, quantization)
    for form in (ours, twin):
        form.fill_codes(0, codes, scales, zeros)
    assert torch.equal(ours.rows(every), twin.rows(every))
    for rows in (1, 5, 40):
        x = random_bf16(rows, shape[1])
        expected = twin(x)
        assert expected.dtype is BF16
        torch.testing.assert_close(ours(x), expected, rtol=2**-7, atol=1e-3)  # neighbours in bf16


def codes_of(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales as a checkpoint could bring them, zeros at random: a code or, GGUF's and MLX's, any number."""
    if quantization.bits == 8:
        return *quantized.quantize_int8(weight), None
    codes, scales = quantized.quantize_int4(weight, quantization.group)
    return codes, scales, (torch.rand(scales.shape) * 40 - 12).half()


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_twin_in_every_dtype(quantization: Quantization, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = torch.randn(70, 131)
    form = twin_of((70, 131), quantization)
    form.fill(0, weight)
    dequantised = dequantized(form)
    x = torch.randn(2, 9, 131).to(dtype)
    out = form(x)
    assert out.dtype is dtype
    assert out.shape == (2, 9, 70)
    assert relative_error(out, x.float() @ dequantised.T) < 0.015
    assert not form(torch.zeros(3, 131, dtype=dtype)).any()
    assert form(torch.full((1, 131), torch.nan, dtype=dtype)).isnan().all()


def test_the_twin_steps_in_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the native build, and for what it does not compute."""
    dispatcher._say_slow.cache_clear()
    for dtype in (torch.float32, BF16, torch.float32, BF16):
        monkeypatch.setattr(dispatcher, "_native", lambda: None)
        form = dispatcher.empty_linear(48, 32, dtype=dtype, device=torch.device("cpu"), quantization=Quantization(4))
        assert isinstance(form, quantized.QuantizedLinear)
    assert [record.message for record in caplog.records if "slow" in record.message] == [
        "quantised weights of float32 on cpu are computed with torch alone: right, but slow",
        "quantised weights of bfloat16 on cpu are computed with torch alone: right, but slow",
    ]
    dispatcher._say_slow.cache_clear()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_over_an_int8_cache_is_within_two_percent(head_dim: int) -> None:
    """Keys that repeat in every token, as models have them, and values without any pattern."""
    torch.manual_seed(5)
    keys = torch.randn(1, 4, 700, head_dim) + 2 * torch.randn(1, 4, 1, head_dim)
    queries, values = torch.randn(1, 4, 30, head_dim), torch.randn(1, 4, 700, head_dim)
    exact = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    rounded = [reference.dequantize_heads(reference.quantize_heads(x), torch.float32) for x in (keys, values)]
    assert max(relative_error(got, x) for got, x in zip(rounded, (keys, values), strict=True)) < 0.007
    got = torch.nn.functional.scaled_dot_product_attention(queries, rounded[0], rounded[1])
    assert 0 < relative_error(got, exact) < 0.02


# Acceptance: real shapes of layers, and the rule that files of 4-bit weights are commonly made by.

REAL_SHAPES = {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)}


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("layer", REAL_SHAPES)
def test_products_of_real_layers_are_within_one_and_a_half_percent(
    fastest: Native, quantization: Quantization, layer: str
) -> None:
    shape = REAL_SHAPES[layer]
    weight = torch.randn(shape).mul_(shape[1] ** -0.5).to(BF16)
    x = random_bf16(24, shape[1])
    form = QuantizedLinear(fastest, *shape, quantization)
    form.fill(0, weight)
    exact = x.float() @ dequantized(form).T
    assert relative_error(form(x, torch.float32), exact) <= 0.015
    assert relative_error(form(x[:1], torch.float32), exact[:1]) <= 0.015


def q4_0(weight: Tensor, group: int) -> Tensor:
    """What is left of a weight [n, in] after Q4_0's rule: d = largest / -8 in float16, codes trunc(w / d + 8.5)."""
    grouped = weight.float().unflatten(1, (-1, group))
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    d = largest / -8
    codes = (grouped * torch.where(d != 0, 1 / d, 0) + 8.5).trunc().clamp(0, 15)
    return ((codes - 8) * d.half().float()).flatten(1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("spread", ["normal", "uniform", "heavy"])
@pytest.mark.parametrize("form", ["native", "twin"])
def test_4_bit_weights_are_no_worse_than_q4_0(
    request: pytest.FixtureRequest, group: int, spread: str, form: str
) -> None:
    torch.manual_seed(11)
    shape = (512, 1536)
    weight = (
        {
            "normal": torch.randn(shape),
            "uniform": torch.rand(shape) - 0.5,
            "heavy": torch.distributions.StudentT(3.0).sample(shape),
        }[spread]
        .mul(0.02)
        .to(BF16)
    )
    packed = (
        twin_of(shape, Quantization(4, group))
        if form == "twin"
        else QuantizedLinear(request.getfixturevalue("fastest"), *shape, Quantization(4, group))
    )
    packed.fill(0, weight)
    codes = packed.rows(torch.arange(shape[0])).float()
    assert relative_error(codes, weight.float()) < relative_error(q4_0(weight, group), weight.float())
