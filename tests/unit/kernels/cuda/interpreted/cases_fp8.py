"""fp8 weights and activations: on cards that multiply e4m3, and on those that make numbers of the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor
from torch.nn import functional

from sensorium.kernels import FP8, Quantization, reference
from sensorium.kernels.backend import LowRank, TokenGroups
from sensorium.kernels.cuda import CudaBackend, fp8, launch
from sensorium.kernels.cuda.fp8 import CudaFp8Linear
from sensorium.kernels.cuda.linear import FROM_CODES
from sensorium.kernels.reference.fp8 import quantize_fp8

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = Quantization(8, 128, floats=True)
FORMS = [FP8, Quantization(8, 32, floats=True), BLOCKS, Quantization(8, 256, floats=True)]


@pytest.fixture(params=[80, 90])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(launch, "capability", lambda: request.param)
    return int(request.param)


def pair(out: int, of: int, form: Quantization, dtype: torch.dtype, *, bias: bool = False) -> tuple[Any, Any]:
    """The same weight for these kernels and for the reference."""
    weight, added = torch.randn(out, of) * of**-0.5, torch.randn(out)
    made = []
    for backend in (CudaBackend(), reference):
        one = backend.empty_quantized(out, of, form, dtype=dtype, device=CPU)
        one.fill(0, weight[:3])
        one.fill(3, weight[3:])
        one.set_bias(added if bias else None)
        made.append(one)
    assert isinstance(made[0], CudaFp8Linear)
    assert torch.equal(made[0]._codes, made[1]._codes)
    return made[0], made[1]


def check(made: Any, other: Any, x: Tensor, capability: int) -> None:
    """Of sm_80 activations stay as they are."""
    expected = other(x) if capability == 90 else functional.linear(x.float(), other._weight(slice(None)), other._bias)
    assert_close(made(x), expected.to(x.dtype), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products(capability: int, form: Quantization, dtype: torch.dtype) -> None:
    made, other = pair(70, 300, form, dtype, bias=True)
    check(made, other, torch.randn(5, 300).to(dtype), capability)


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("form", [FP8, BLOCKS], ids=str)
def test_numbers_of_rows(capability: int, form: Quantization, rows: int) -> None:
    made, other = pair(9, 136, form, torch.float32)
    check(made, other, torch.randn(2, rows, 150)[:, :, :136], capability)


def test_many_rows_on_a_card_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight becomes numbers, which cuBLAS multiplies."""
    monkeypatch.setattr(launch, "capability", lambda: 80)
    monkeypatch.setattr(fp8, "launch", None)
    made, other = pair(9, 40, BLOCKS, torch.float32)
    check(made, other, torch.randn(FROM_CODES + 1, 40), 80)


@pytest.mark.parametrize("bias", [False, True])
def test_torch_multiplies_what_it_can(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """In bfloat16, of sides that are multiples of 16, with a scale per output."""
    made, other = pair(48, 64, FP8, torch.bfloat16, bias=bias)
    started: list[str] = []
    start = launch.launch

    def told(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.__name__)
        start(kernel, *args, **options)

    monkeypatch.setattr(fp8, "launch", told)
    for x in (torch.randn(1, 64).bfloat16(), torch.randn(3, 7, 64).bfloat16()):
        assert_close(made(x), other(x))
    assert started == ["quantize_rows"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group"), [(1, 1), (40, 40), (300, 128), (2100, 2100), (1500, 32)])
def test_activations_become_codes_of_the_reference(size: int, group: int, dtype: torch.dtype) -> None:
    x = (10 * torch.randn(4, size + 3)).to(dtype)[:, :size]
    x[1] = 0
    codes, scales = fp8.quantize_rows(x, group)
    expected_codes, expected_scales = quantize_fp8(x, group)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert (codes.view(torch.uint8) != expected_codes).float().mean() < 0.001


def test_what_is_no_number_stays_none() -> None:
    """The interpreter's products take the byte of NaN for 480, so codes are looked at."""
    x = torch.randn(2, 40)
    x[0, 3] = torch.nan
    codes, _ = fp8.quantize_rows(x, 40)
    assert codes.float().isnan().nonzero().tolist() == [[0, 3]]


def test_adapters_of_a_layer(capability: int) -> None:
    """They take the numbers that codes are made of."""
    made, other = pair(48, 64, BLOCKS, torch.float32)
    one, x = LowRank(torch.randn(4, 64) / 8, [(0, torch.randn(48, 4) / 2)]), torch.randn(3, 64)
    groups = TokenGroups([torch.tensor([2, 0])])
    out, without = made(x), made(x)
    CudaBackend().add_low_rank(out, x, [one], groups)
    reference.add_low_rank(without, x, [one], groups)
    assert_close(out, without, 4)
    check(made, other, x[1:2], capability)


def test_rows_of_weights() -> None:
    ids = torch.tensor([6, 0, 3])
    for form in FORMS:
        made, other = pair(7, 150, form, torch.float32)
        assert torch.equal(made.rows(ids), other.rows(ids))
