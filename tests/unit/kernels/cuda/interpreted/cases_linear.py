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
from sensorium.kernels.cuda.linear import FROM_CODES, CudaQuantizedLinear
from sensorium.kernels.reference.quantized import quantize_int4

CUDA = CudaBackend()
CPU = torch.device("cpu")
FORMS = [Quantization(8), *(Quantization(4, group) for group in (32, 64, 128))]


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
