"""Layouts that are decoded: one matrix in each, bit for bit what its format's description makes of it, and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights, write_weights
from support.decoded_checkpoints import (
    E4M3,
    write_bnb4,
    write_bnb8,
    write_compressed_fp8,
    write_fp4,
    write_fp8,
    write_hqq,
    write_mlx,
    write_mxfp8,
)
from support.quantized_checkpoints import DAMAGES, Change, write_awq_gemv, write_gptq, write_packed
from torch import Tensor

from sensorium.checkpoint.quantization import read_quantization
from sensorium.errors import CheckpointError
from sensorium.weights import tensor_files
from sensorium.weights.decoded_codes import fp4_values
from sensorium.weights.joining import join
from sensorium.weights.stored_codes import StoredCodes, unpacked

LAYER = "model.layers.0.mlp.down_proj"
Writer = Callable[..., dict[str, Tensor]]
LAYOUTS: list[tuple[Writer, dict[str, Any]]] = [
    *((write_fp8, {"scheme": scheme}) for scheme in ("block", "channel", "tensor")),
    *((write_compressed_fp8, {"scheme": scheme}) for scheme in ("block", "channel", "tensor")),
    (write_fp8, {"dtype": torch.float8_e8m0fnu}),
    (write_fp8, {"scheme": "tensor", "name": "weight_scale", "quant_method": "modelopt", "quant_algo": "FP8"}),
    *((write_fp4, {"kind": kind}) for kind in ("nvfp4", "mxfp4", "modelopt")),
    *((write_bnb4, {"kind": kind, "nested": nested}) for kind in ("nf4", "fp4") for nested in (False, True)),
    (write_bnb8, {}),
    *((write_mlx, {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)),
    (write_mlx, {"own_bits": 6}),
    *((write_mlx, {"bits": 8 if mode == "mxfp8" else 4, "mode": mode}) for mode in ("mxfp4", "nvfp4", "mxfp8")),
    *((write_hqq, {"bits": bits, "axis": axis}) for bits, axis in ((8, 1), (4, 1), (4, 0), (3, 0), (3, 1), (2, 0))),
    *((write_gptq, {"bits": bits, "symmetric": symmetric}) for bits in (2, 3) for symmetric in (True, False)),
    (write_awq_gemv, {}),
    (write_mxfp8, {}),
    *(
        (write_packed, {"bits": bits, "symmetric": symmetric})
        for bits in (2, 3, 5, 6, 7)
        for symmetric in (True, False)
    ),
]
NAMES = ["-".join([write.__name__, *map(str, options.values())]) for write, options in LAYOUTS]


def written(folder: Path, layout: tuple[Writer, dict[str, Any]]) -> Tensor:
    """One matrix, whose rows are no multiple of a block, with outliers and an empty output."""
    weight = torch.randn(160, 288, generator=torch.Generator().manual_seed(5)) * 0.1
    weight[3, 7], weight[150, 200] = 4.0, -3.0
    write_weights(folder, {f"{LAYER}.weight": weight})
    (folder / "config.json").write_text("{}")
    return layout[0](folder, **layout[1])[f"{LAYER}.weight"]


def read(folder: Path) -> Tensor:
    config = json.loads((folder / "config.json").read_text())
    stored = read_quantization(config.get("quantization_config") or config["quantization"])
    assert stored is not None
    (codes,) = join(tensor_files.read_safetensors(folder / "model.safetensors"), stored)
    if not isinstance(codes, StoredCodes) or codes.shape != (160, 288):
        raise CheckpointError("another weight")
    return torch.cat([rows for _, rows in codes.pieces()])


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_matrix_is_what_its_codes_stand_for(
    tmp_path: Path, layout: tuple[Writer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = written(tmp_path, layout)
    assert torch.equal(read(tmp_path), expected)
    monkeypatch.setattr("sensorium.weights.stored_codes.PIECE", 24 * 288)  # in several pieces
    assert torch.equal(read(tmp_path), expected)


CHANGES: list[Change] = [*DAMAGES, lambda t: (t.view(torch.uint8) | 255).view(t.dtype)]


DAMAGED = [
    *("write_fp8-block", "write_fp4-nvfp4", "write_fp4-modelopt", "write_bnb4-nf4-True", "write_bnb8"),
    *("write_mlx-4", "write_mlx-4-mxfp4", "write_hqq-4-1", "write_awq_gemv", "write_mxfp8", "write_packed-3-False"),
]


@pytest.mark.parametrize("layout", [LAYOUTS[NAMES.index(name)] for name in DAMAGED], ids=DAMAGED)
def test_no_damage_goes_further_than_an_error(tmp_path: Path, layout: tuple[Writer, dict[str, Any]]) -> None:
    """Any part cut, turned, retyped, or left out: refused in one line, or read as some weight of the shape."""
    written(tmp_path, layout)
    tensors, refused = read_weights(tmp_path), 0
    for part in tensors:
        others = {key: one for key, one in tensors.items() if key != part}
        changed = [{**others, part: change(tensors[part]).contiguous()} for change in CHANGES if tensors[part].dim()]
        for damaged in [others, *changed]:
            write_weights(tmp_path, damaged)
            try:
                read(tmp_path)
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
            except ValueError as error:  # of the test: what is left is no layer at all
                assert "unpack" in str(error)
                refused += 1
    assert refused > 6


def test_goldens() -> None:
    """Numbers of the formats' own libraries."""
    octets = torch.tensor([0x01, 0x08, 0x38, 0x3C, 0x40, 0x7E, 0xB8, 0xFE], dtype=torch.uint8)
    numbers = torch.tensor([0.001953125, 0.015625, 1, 1.5, 2, 448, -1, -448])
    assert torch.equal(octets.view(torch.float8_e4m3fn).float(), numbers) and torch.equal(E4M3[octets.int()], numbers)
    packed = torch.tensor([[0x21, 0xF9, 0x07, 0x80, 0x43, 0x65, 0xCB, 0xED]], dtype=torch.uint8)
    nvfp4 = [0.375, 0.75, -0.375, -4.5, 4.5, 0, 0, 0, 1.125, 1.5, 2.25, 3, -1.125, -1.5, -2.25, -3]
    assert torch.equal(fp4_values(packed)[0] * 1.5 / 2, torch.tensor(nvfp4))
    words = torch.tensor([[0xA70FCB66, 0x800FF9D8, 0x1A03C7F1]]).to(torch.int32)  # GPTQ's
    codes = [6, 4, 5, 5, 4, 7, 3, 0, 7, 4, 2, 4, 5, 3, 6, 7, 7, 1, 0, 0, 0, 3, 4, 7, 7, 0, 7, 1, 0, 4, 6, 0]
    assert unpacked(words, 3)[0].tolist() == codes
