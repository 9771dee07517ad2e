"""Kernels on a card against the reference on the same card, in every type."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import TOLERANCES
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import FP8, Quantization
from sensorium.kernels.context import AttentionContext

pytestmark = pytest.mark.device

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [[1], [16, 17, 1, 300], [257] * 40]


def check(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    within = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), atol=within, rtol=within)


def context_of(lengths: list[int], queries: list[int], decodes: int, device: torch.device) -> AttentionContext:
    """Sequences whose blocks of 16 tokens lie anywhere."""
    width = -(-max(lengths) // 16)
    blocks = torch.randperm(len(lengths) * width, device=device).view(len(lengths), width).int()
    starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
    places = [range(length - count, length) for length, count in zip(lengths, queries, strict=True)]
    slots = [int(blocks[row, place // 16]) * 16 + place % 16 for row, run in enumerate(places) for place in run]
    return AttentionContext(
        queries,
        lengths,
        decodes,
        16,
        starts,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        blocks,
        torch.tensor(slots, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(12, 2, 128, None), (4, 4, 80, 24), (7, 1, 64, 1)]
)
def test_paged_attention(
    card: torch.device,
    dtype: torch.dtype,
    is_fp8: bool,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
) -> None:
    """Decodes, then whole prompts; what nobody wrote is no number."""
    from sensorium.kernels.cuda import CudaBackend

    torch.manual_seed(1)
    for queries, decodes in (([1] * len(lengths), len(lengths)), (lengths, 0)):
        context = context_of(lengths, queries, decodes, card)
        caches = [
            torch.full(
                (len(lengths) * -(-max(lengths) // 16), kv_heads, 16, head_dim), torch.nan, dtype=dtype, device=card
            )
            for _ in range(2)
        ]
        for cache in caches:
            for row, length in enumerate(lengths):
                for place in range(0, length, 16):
                    block = cache[int(context.block_tables[row, place // 16])]
                    block[:, : min(16, length - place)] = torch.randn_like(block[:, : min(16, length - place)])
        if is_fp8:
            caches = [cache.to(torch.float8_e4m3fn) for cache in caches]
        q = torch.randn(sum(queries), heads, head_dim, dtype=dtype, device=card)
        arguments = (q, *caches, context, head_dim**-0.5, window)
        check(CudaBackend().paged_attention(*arguments), reference.paged_attention(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_fp8_rows(card: torch.device, dtype: torch.dtype) -> None:
    """Byte for byte."""
    from sensorium.kernels.cuda import CudaBackend

    torch.manual_seed(4)
    k, v = (20 * torch.randn(40, 4, 128, dtype=dtype, device=card) for _ in range(2))
    caches = [
        [torch.zeros(4, 4, 16, 128, dtype=torch.uint8, device=card).view(torch.float8_e4m3fn) for _ in range(2)]
        for _ in range(2)
    ]
    slots = torch.randperm(64, device=card)[:40]
    CudaBackend().write_kv(k, v, caches[0][0], caches[0][1], slots)
    reference.write_kv(k, v, caches[1][0], caches[1][1], slots)
    for own, expected in zip(*caches, strict=True):
        assert torch.equal(own.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 2048])
def test_norms_and_products_of_elements(card: torch.device, dtype: torch.dtype, rows: int) -> None:
    from sensorium.kernels.cuda import CudaBackend

    backend = CudaBackend()
    torch.manual_seed(2)
    x, residual, weight = (torch.randn(*size, 1536, dtype=dtype, device=card) for size in ((rows,), (rows,), ()))
    check(backend.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    got = backend.add_rms_norm(x, residual.clone(), weight, 1e-6)
    for one, other in zip(got, reference.add_rms_norm(x, residual.clone(), weight, 1e-6), strict=True):
        check(one, other)
    check(backend.silu_mul(x), reference.silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form",
    [Quantization(4), Quantization(8), FP8, Quantization(8, 128, floats=True)],
    ids=["int4", "int8", "fp8", "blocks"],
)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_weights_in_codes(card: torch.device, form: Quantization, rows: int, dtype: torch.dtype) -> None:
    """The reference rounds activations too, so only as near as eight bits are; of fp8 both do, from sm_89 on."""
    from sensorium.kernels.cuda import CudaBackend

    torch.manual_seed(3)
    weight = torch.randn(640, 512, dtype=dtype, device=card)
    x = torch.randn(rows, 512, dtype=dtype, device=card)
    made = []
    for backend in (CudaBackend(), reference):
        packed = backend.empty_quantized(640, 512, form, dtype=dtype, device=card)
        packed.fill(0, weight)
        packed.set_bias(weight[:, 0])
        made.append(packed(x).float())
    is_old = form.floats and torch.cuda.get_device_capability(card) < (8, 9)
    assert (made[0] - made[1]).norm() < (0.04 if is_old else 0.02) * made[1].norm()
