"""Towers piece by piece: no piece is large, and the rows are those of the whole, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from torch import Tensor

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.models.towers import blocks
from sensorium.types import Modality


def patches(lines: int, columns: int, width: int = 588) -> Tensor:
    return torch.rand(lines * columns, width)


def grid(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def qwen(lines: int, columns: int) -> Mapping[str, Tensor]:
    return {"pixels": patches(lines, columns), "grid": grid(1, lines, columns)}


Make = Callable[[Path], Any]
FAMILIES: dict[str, tuple[Make, Modality, Callable[[], list[Mapping[str, Tensor]]]]] = {
    "qwen2_vl": (checkpoints.make_qwen2_vl, "image", lambda: [qwen(66, 50), qwen(4, 6)]),
    "omni windows": (checkpoints.make_qwen2_omni, "image", lambda: [qwen(66, 50), qwen(4, 6)]),
    "omni audio": (checkpoints.make_qwen2_omni, "audio", lambda: [{"mel": torch.rand(128, 901)}]),
    "llava": (checkpoints.make_llava, "image", lambda: [{"pixels": torch.rand(3, 28, 28)} for _ in range(300)]),
    "minicpmv": (
        checkpoints.make_minicpmv,
        "image",
        lambda: [
            {
                "patches": torch.randint(0, 256, (1032, 588), dtype=torch.uint8),
                "grids": torch.tensor([[50, 20], [4, 8]]),
            }
        ],
    ),
    "phi3_v": (
        checkpoints.make_phi3_v,
        "image",
        lambda: [{"pixels": torch.rand(101, 3, 56, 56), "grid": grid(10, 10)}],
    ),
    "ultravox": (checkpoints.make_ultravox, "audio", lambda: [{"mel": torch.rand(128, 2050)}]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make, kind, items = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("tower")
    make(folder)
    torch.manual_seed(1)
    return folder, kind, items()


def encoded(model: Model, kind: Modality, items: list[Mapping[str, Tensor]]) -> tuple[list[Tensor], list[int]]:
    """(rows, multiply-adds of every piece)"""
    steps, pieces = model.encoding(kind, items), []
    with torch.inference_mode():
        while True:
            try:
                pieces.append(next(steps))
            except StopIteration as end:
                return end.value, pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_make_the_same_rows(tower: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kind, items = tower
    text = folder / "language"
    model = load_model(open_checkpoint(folder, text if text.exists() else None), dtype=dtype, device="cpu")
    if kind == "audio":
        items = [{"mel": item["mel"].to(dtype)} for item in items]
    whole, few = encoded(model, kind, items)
    monkeypatch.setattr(blocks, "PIECE_MACS", max(few) // 12)
    rows, pieces = encoded(model, kind, items)
    assert len(pieces) > len(few)
    assert sum(pieces) == sum(few)
    if "grid" in items[0] and len(items) > 1:  # the others' pictures and windows are small as they are
        assert max(pieces) < max(few) / 2
    assert len(rows) == len(whole) == len(items)
    for one, other in zip(rows, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [700, 1537, 2500])
def test_queries_of_a_run_in_parts(length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs beside each other, small and large; the numbers are those of the kernel for all at once."""
    lengths = [3, length, 40, 40, 900]
    q, k, v = torch.randn(sum(lengths), 3, 2, 16).to(dtype).unbind(1)
    expected = kernels.varlen_attention(q, k, v, lengths, 0.25)
    monkeypatch.setattr(blocks, "PIECE_MACS", 2 * 32 * length * 200)
    steps, pieces = blocks.attention(q, k, v, lengths, 0.25), []
    try:
        while True:
            pieces.append(next(steps))
    except StopIteration as end:
        assert torch.equal(end.value, expected)
    assert sum(pieces) == sum(2 * 32 * n * n for n in lengths)
    assert len(pieces) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 5])
def test_heads_of_a_run_in_parts(heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture so large that the fewest queries which the kernel takes are too many for one piece: 2 s of 3,500 x
    3,500 pixels in a tower of 1,280."""
    length = 1300
    q, k, v = torch.randn(length, 3, heads, 16).to(dtype).unbind(1)
    expected = kernels.varlen_attention(q, k, v, [length], 0.25)
    monkeypatch.setattr(blocks, "PIECE_MACS", 2 * 2 * 16 * length * kernels.query_step(q))
    steps, pieces = blocks.attention(q, k, v, [length], 0.25), []
    try:
        while True:
            pieces.append(next(steps))
    except StopIteration as end:
        assert torch.equal(end.value, expected)
    assert sum(pieces) == 2 * 16 * heads * length**2
    assert max(pieces) < 2 * blocks.PIECE_MACS  # the last one has what would be too few alone
