"""What encoders compute with: linear layers through oneDNN, attention within windows, gated activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from sensorium import kernels
from sensorium.kernels import reference
from sensorium.kernels.cpu import onednn

CPU = torch.device("cpu")


def filled(weight: torch.Tensor, bias: torch.Tensor | None) -> onednn.OneDnnLinear:
    """Rows come in pieces, as from a checkpoint with separate projections."""
    form = onednn.OneDnnLinear(*weight.shape)
    cut = len(weight) // 3
    form.fill(cut, weight[cut:])
    form.fill(0, weight[:cut])
    form.set_bias(bias)
    return form


@pytest.mark.skipif(not onednn.usable(), reason="this torch has no oneDNN operators")
@pytest.mark.parametrize("rows", [1, 7, 13, 300])  # the last two are padded
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_onednn_linear(rows: int, has_bias: bool) -> None:
    weight, x, other = torch.randn(96, 80), torch.randn(rows, 80), torch.randn(rows, 96)
    bias = torch.randn(96) if has_bias else None
    form = filled(weight, bias)
    plain = functional.linear(x, weight, bias)
    torch.testing.assert_close(form(x), plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(form(x.view(1, rows, 80)), plain.view(1, rows, 96), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(form(x.t().contiguous().t()), plain, atol=1e-4, rtol=1e-5)
    kept = other.clone()
    torch.testing.assert_close(form.added(x, other), plain + other, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(other, kept, atol=0, rtol=0)
    for activation in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"):
        torch.testing.assert_close(
            form.activated(x, activation), reference.activate(plain.clone(), activation), atol=1e-4, rtol=1e-5
        )


@pytest.mark.skipif(not onednn.usable(), reason="this torch has no oneDNN operators")
@pytest.mark.parametrize(("elements", "most"), [(96 * 80, 8 + 7 + 2), (96 * 80 - 1, 100)])
@torch.inference_mode()
def test_few_numbers_of_rows_reach_small_weights(elements: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that is new costs more than the rows."""
    form = filled(torch.randn(96, 80), None)
    met: set[int] = set()
    linear = onednn._linear

    def spy(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        met.add(len(x))
        return linear(x, *rest)

    monkeypatch.setattr(onednn, "_linear", spy)
    monkeypatch.setattr(onednn, "SMALL_ELEMENTS", elements)
    for rows in range(1, 101):
        assert len(form(torch.randn(rows, 80))) == rows
    assert len(met) == most


@pytest.mark.skipif(not onednn.usable(), reason="this torch has no oneDNN operators")
@torch.inference_mode()
def test_rows_of_a_packed_weight_come_back() -> None:
    weight, x = torch.randn(50, 40), torch.randn(3, 40)
    form = filled(weight, None)
    before = form(x)
    torch.testing.assert_close(form.rows(torch.tensor([4, 49, 4])), weight[[4, 49, 4]], atol=0, rtol=0)
    torch.testing.assert_close(form(x), before)
    assert form.nbytes == weight.nbytes


def test_large_float32_layers_use_it_and_small_ones_where_mkl_keeps_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(size: int, dtype: torch.dtype) -> type:
        return type(kernels.empty_linear(size, size, dtype=dtype, device=CPU))

    onednn_if_usable = onednn.OneDnnLinear if onednn.usable() else reference.PlainLinear
    monkeypatch.setattr(onednn, "fewest_elements", lambda: onednn.MIN_ELEMENTS)  # what Intel's processors have
    assert kind(16, torch.float32) is reference.PlainLinear
    assert kind(512, torch.float32) is onednn_if_usable
    assert kind(512, torch.bfloat16) is not onednn.OneDnnLinear
    monkeypatch.setattr(onednn, "fewest_elements", lambda: 0)  # others
    assert kind(16, torch.float32) is onednn_if_usable


@pytest.mark.parametrize("lengths", [[1], [5, 200, 3], [64, 64], [33, 1, 32, 100]])
@pytest.mark.parametrize("window", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_windowed_attention(lengths: list[int], window: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(sum(lengths), 3, 2, 16).to(dtype).unbind(1)
    out = kernels.varlen_attention(q, k, v, lengths, 0.25, window)
    start = 0
    for length in lengths:
        run = slice(start, start + length)
        near = (torch.arange(length) - torch.arange(length).unsqueeze(1)).abs() <= window
        scores = torch.einsum("qhd,khd->hqk", q[run].float(), k[run].float()) * 0.25
        weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[run].float())
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(out[run].float(), expected, atol=tolerance, rtol=tolerance)
        start += length


@pytest.mark.parametrize("lengths", [[7, 7], [5, 40, 3]])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_several_heads_of_queries_share_one_of_keys(lengths: list[int], window: int | None, dtype: torch.dtype) -> None:
    fused = torch.randn(sum(lengths), 4 + 2 + 2, 16).to(dtype)
    q, k, v = fused.split([4, 2, 2], dim=1)
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = reference.varlen_attention(q, wide_k, wide_v, lengths, 0.25, window)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for module in (kernels, reference):
        out = module.varlen_attention(q, k, v, lengths, 0.25, window)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(dtype: torch.dtype) -> None:
    x = torch.randn(5, 48).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    pairs: Any = (("gelu", functional.gelu), ("silu", functional.silu))
    for activation, function in pairs:
        torch.testing.assert_close(
            kernels.gated(x, activation).float(), function(gate) * up, atol=tolerance, rtol=tolerance
        )
    torch.testing.assert_close(kernels.silu_mul(x), kernels.gated(x, "silu"))
