"""Products with weights in codes against the same weights as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor
from torch.nn import functional

from sensorium.kernels import Quantization, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda.linear import FROM_CODES, CudaFp4Linear, CudaQuantizedLinear
from sensorium.kernels.reference.quantized import quantize_int4

CUDA = CudaBackend()
CPU = torch.device("cpu")
FORMS = [Quantization(8), *(Quantization(4, group) for group in (32, 64, 128))]
MXFP4 = Quantization(4, 32, floats=True)


def make(out: int, of: int, form: Quantization, dtype: torch.dtype, *, zeros: bool = False, bias: bool = False) -> Any:
    made = CUDA.empty_quantized(out, of, form, dtype=dtype, device=CPU)
    assert isinstance(made, CudaQuantizedLinear)
    weight = torch.randn(out, of) * of**-0.5
    if zeros:
        codes, scales = quantize_int4(weight, form.group)
        made.fill_codes(0, codes[:3], scales[:3], torch.full_like(scales[:3], 7.25))
        made.fill_codes(3, codes[3:], scales[3:], torch.full_like(scales[3:], 9.0))
    else:
        made.fill(0, weight[:3])
        made.fill(3, weight[3:])
    made.set_bias(torch.randn(out) if bias else None)
    return made


def check(made: CudaQuantizedLinear, x: Tensor) -> None:
    weight = made.rows(torch.arange(made.out_features)) if x.dtype == torch.float32 else made._weight(slice(None))
    assert_close(made(x), functional.linear(x.float(), weight.float(), made._bias).to(x.dtype), 3)


def stored(out: int, of: int, dtype: torch.dtype, bias: Tensor | None) -> tuple[CudaFp4Linear, reference.Fp4Linear]:
    """The same codes of mxfp4 for both, filled in parts."""
    codes = torch.randint(0, 16, (out, of), dtype=torch.uint8)
    scales = torch.randint(118, 129, (out, of // 32), dtype=torch.uint8)
    scales[0] = torch.tensor([0, 1, 2])[: of // 32].repeat(of // 32)[: of // 32]  # next to nothing
    made = CUDA.empty_quantized(out, of, MXFP4, dtype=dtype, device=CPU)
    plain = reference.Fp4Linear(out, of, MXFP4, dtype=dtype, device=CPU)
    assert isinstance(made, CudaFp4Linear)
    for one in (made, plain):
        one.fill_codes(0, codes[:5], scales[:5])
        one.fill_codes(5, codes[5:], scales[5:])
        one.set_bias(bias)
    return made, plain


@pytest.mark.parametrize("rows", [1, 17, FROM_CODES + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mxfp4(dtype: torch.dtype, rows: int) -> None:
    made, plain = stored(70, 96, dtype, torch.randn(70) if rows != 17 else None)
    assert torch.equal(made.rows(torch.tensor([69, 0, 8])), plain.rows(torch.tensor([69, 0, 8])))
    assert made.nbytes == plain.nbytes
    x = (torch.randn(rows, 96) / 10).to(dtype)
    assert_close(made(x), plain(x), 4)


def test_every_code_is_exact() -> None:
    """A row of x that is one at one place reads that column."""
    made, plain = stored(40, 64, torch.bfloat16, None)
    assert torch.equal(made(torch.eye(64, dtype=torch.bfloat16)).t()[1:], plain.rows(torch.arange(1, 40)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products(form: Quantization, dtype: torch.dtype) -> None:
    check(make(70, 136, form, dtype, bias=True), torch.randn(5, 136).to(dtype))


@pytest.mark.parametrize("rows", [1, 17, 65, FROM_CODES + 1])
@pytest.mark.parametrize("form", [Quantization(8), Quantization(4, 32)], ids=str)
def test_numbers_of_rows(form: Quantization, rows: int) -> None:
    check(make(9, 40, form, torch.float32), torch.randn(rows, 40))
    wide = torch.randn(2, rows, 80)[:, :, :40]
    check(make(9, 40, form, torch.float32), wide)


@pytest.mark.parametrize("group", [32, 256])
def test_zeros(group: int) -> None:
    check(make(20, 300, Quantization(4, group), torch.float32, zeros=True), torch.randn(3, 300))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_those_of_the_reference(form: Quantization) -> None:
    weight, ids = torch.randn(7, 150), torch.tensor([6, 0, 3])
    other = reference.empty_quantized(7, 150, form, dtype=torch.float32, device=CPU)
    made = CUDA.empty_quantized(7, 150, form, dtype=torch.float32, device=CPU)
    for one in (made, other):
        one.fill(0, weight)
    assert torch.equal(made.rows(ids), other.rows(ids))


def test_groups_without_a_kernel_are_left_to_the_reference() -> None:
    made = CUDA.empty_quantized(4, 48, Quantization(4, 24), dtype=torch.float32, device=CPU)
    assert not isinstance(made, CudaQuantizedLinear)
