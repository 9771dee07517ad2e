"""mxfp4 weights: the native kernel, the reference and what the format says of the codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensorium.kernels import Quantization, reference
from sensorium.kernels.cpu.linear import Fp4Linear
from sensorium.kernels.cpu.native import Native

BF16 = torch.bfloat16
MXFP4 = Quantization(4, 32, floats=True)
CPU = torch.device("cpu")


def stored(out: int, size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights of about one."""
    scales = torch.randint(120, 131, (out, size // 32), dtype=torch.uint8)
    return torch.randint(0, 16, (out, size), dtype=torch.uint8), scales


def both(kernels: Native, out: int, size: int, bias: Tensor | None = None) -> tuple[Fp4Linear, reference.Fp4Linear]:
    """The same weight twice, the native one filled in uneven parts."""
    native = kernels.empty_quantized(out, size, MXFP4)
    plain = reference.Fp4Linear(out, size, MXFP4, dtype=BF16, device=CPU)
    assert isinstance(native, Fp4Linear)
    codes, scales = stored(out, size)
    plain.fill_codes(0, codes, scales)
    for first, last in ((0, 5), (5, out // 2), (out // 2, out)):
        native.fill_codes(first, codes[first:last], scales[first:last])
    native.set_bias(bias)
    plain.set_bias(bias)
    return native, plain


@pytest.mark.parametrize(("out", "size"), [(70, 96), (64, 32), (33, 640), (16, 288)])
def test_native_is_plain_torch(kernels: Native, out: int, size: int) -> None:
    native, plain = both(kernels, out, size, torch.randn(out).to(BF16))
    assert torch.equal(native.rows(torch.arange(out)), plain.rows(torch.arange(out)))
    for rows in (1, 2, 5, 6, 7, 40, 300):
        x = torch.randn(rows, size).to(BF16)
        torch.testing.assert_close(native(x, torch.float32), plain(x.float()), rtol=1e-4, atol=1e-2)
        assert torch.equal(native(x), native(x, torch.float32).to(BF16))


def test_weights_are_exact(kernels: Native) -> None:
    """A row of x that is one at one place reads that column of the weight, scale included."""
    native, plain = both(kernels, 40, 64)
    assert torch.equal(native(torch.eye(64).to(BF16)).t(), plain.rows(torch.arange(40)))
    assert native.nbytes < 64 * 64 * 0.54  # with padding


def test_a_row_gets_the_same_alone(kernels: Native) -> None:
    native, _ = both(kernels, 70, 320)
    x = torch.randn(41, 320).to(BF16)
    together = native(x, torch.float32)
    for i in range(41):
        assert torch.equal(native(x[i : i + 1], torch.float32)[0], together[i])
    assert torch.equal(native(x[3:12], torch.float32), together[3:12])


def test_numbers_of_the_codes(kernels: Native) -> None:
    """0x21: 0.5 and 1; 0xf9: -0.5 and -6; scales from the smallest to the largest."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([1, 2, 9, 15])
    for power in (0, 1, 127, 252):
        scales = torch.full((1, 1), power, dtype=torch.uint8)
        for weight in (
            kernels.empty_quantized(1, 32, MXFP4),
            reference.empty_quantized(1, 32, MXFP4, dtype=torch.float32, device=CPU),
        ):
            weight.fill_codes(0, codes, scales)
            row = weight.rows(torch.tensor([0]))[0, :5].double() / 2.0 ** (power - 127)
            assert row.tolist() == [0.5, 1.0, -0.5, -6.0, 0.0]


def test_results_do_not_depend_on_the_number_of_threads(kernels: Native) -> None:
    native, _ = both(kernels, 1000, 640)
    x, threads, found = torch.randn(50, 640).to(BF16), kernels.threads, []
    for count in (1, 3):
        kernels.set_threads(count)
        found.append((native(x), native(x[:1])))
    kernels.set_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_it_does_not_take(kernels: Native) -> None:
    weight = kernels.empty_quantized(8, 32, MXFP4)
    with pytest.raises(TypeError, match="codes as they are stored"):
        weight.fill(0, torch.zeros(8, 32))
    with pytest.raises(ValueError, match="zero points"):
        weight.fill_codes(0, *stored(8, 32), torch.zeros(8, 1))
    with pytest.raises(ValueError, match="do not fit"):
        weight.fill_codes(1, *stored(8, 32))
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.empty_quantized(8, 40, MXFP4)
