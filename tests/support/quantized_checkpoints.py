"""Rewrites a checkpoint of `checkpoints.py` in the layouts in which quantised ones are published.

Every `write_*` quantises the decoder's linear layers by plain rounding, packs the codes one number at a time as the
format is described, and returns the float weights that the codes stand for, by the names of the original tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.checkpoints import read_weights, write_weights

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours each nibble of a word holds, lowest first


@dataclass
class Layer:
    """codes int64 [out, in] from 0 up; scales float16 and zeros int64 [out, groups]; the group of every input."""

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor

    def weight(self) -> Tensor:
        return (self.codes - self.zeros[:, self.group]) * self.scales.float()[:, self.group]


def quantise(weight: Tensor, bits: int, size: int | None, *, symmetric: bool = True, shuffled: bool = False) -> Layer:
    """`size` inputs, or all, share a scale: neighbours, or any (act-order)."""
    out, inputs = weight.shape
    size = size or inputs
    group = torch.arange(inputs) // size
    if shuffled:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    groups, most = int(group.max()) + 1, 2**bits - 1
    scales, zeros = torch.zeros(out, groups), torch.zeros(out, groups, dtype=torch.long)
    for index in range(groups):
        part = weight[:, group == index]
        if symmetric:
            scales[:, index], zeros[:, index] = part.abs().amax(1) / (most // 2), most // 2 + 1
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, index] = (high - low) / most
            zeros[:, index] = (-low / scales[:, index]).round().long().clamp(0, most)
    scales = scales.half()
    codes = (weight / scales.float()[:, group]).round().long() + zeros[:, group]
    return Layer(bits, codes.clamp(0, most), scales, zeros, group)


def words(numbers: Tensor, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] from 0 up -> int32 [n, m * bits / 32], the first number of a word in its lowest bits."""
    count = 32 // bits
    columns = columns or tuple(range(count))
    rows = []
    for numbers_of_row in numbers.tolist():
        row = numbers_of_row + [0] * (-len(numbers_of_row) % count)
        packed = []
        for start in range(0, len(row), count):
            word = sum(row[start + column] << bits * place for place, column in enumerate(columns))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def write_awq(folder: Path, *, size: int = 32, config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    def pack(layer: Layer) -> dict[str, Tensor]:
        return {
            "qweight": words(layer.codes.T, 4, AWQ_COLUMNS),
            "qzeros": words(layer.zeros.T, 4, AWQ_COLUMNS),
            "scales": layer.scales.T,
        }

    return _write(
        folder,
        lambda weight: quantise(weight, 4, size, symmetric=False),
        pack,
        {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm", **(config or {})},
    )


def write_gptq(
    folder: Path,
    *,
    bits: int = 4,
    size: int | None = 32,
    symmetric: bool = True,
    act_order: bool = False,
    config: dict[str, Any] | None = None,
    config_file: str = "config.json",
    second_format: bool | None = None,
) -> dict[str, Tensor]:
    """`second_format`: how zeros are stored, if not as checkpoint_format says."""
    method = {"quant_method": "gptq"} if config_file == "config.json" else {}
    config = {
        **method,
        "bits": bits,
        "group_size": size or -1,
        "sym": symmetric,
        "desc_act": act_order,
        **(config or {}),
    }
    if second_format is None:
        second_format = config.get("checkpoint_format") == "gptq_v2"
    lacks = 0 if second_format else 1

    def pack(layer: Layer) -> dict[str, Tensor]:
        return {
            "qweight": words(layer.codes, bits).T,
            "scales": layer.scales.T,
            "g_idx": layer.group.int(),
            "qzeros": words((layer.zeros.T - lacks) % 2**bits, bits),
        }

    return _write(
        folder,
        lambda weight: quantise(weight, bits, size, symmetric=symmetric, shuffled=act_order),
        pack,
        config,
        config_file,
    )


def write_packed(
    folder: Path,
    *,
    bits: int = 4,
    size: int | None = 32,
    symmetric: bool = True,
    act_order: bool = False,
    config: dict[str, Any] | None = None,
    config_key: str = "quantization_config",
) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized: signed numbers, stored with half the range added."""

    def pack(layer: Layer) -> dict[str, Tensor]:
        packed = {
            "weight_packed": words(layer.codes, bits),
            "weight_scale": layer.scales.bfloat16(),
            "weight_shape": torch.tensor(layer.codes.shape),
        }
        if not symmetric:
            packed["weight_zero_point"] = words(layer.zeros.T, bits).T
        if act_order:
            packed["weight_g_idx"] = layer.group.int()
        return packed

    def rounded(weight: Tensor) -> Layer:
        layer = quantise(weight, bits, size, symmetric=symmetric, shuffled=act_order)
        return replace(layer, scales=layer.scales.bfloat16())

    return _write(
        folder,
        rounded,
        pack,
        compressed_config(
            "pack-quantized",
            {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "group_size": size or -1,
                "strategy": "group" if size else "channel",
                "actorder": "group" if act_order else None,
            },
            **(config or {}),
        ),
        config_key=config_key,
    )


def write_int8(folder: Path, *, strategy: str = "channel", config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """compressed-tensors' int-quantized (W8A8)."""

    def rounded(weight: Tensor) -> Layer:
        layer = quantise(weight, 8, None)
        if strategy == "channel":
            return layer
        scales = layer.scales.amax().expand(len(weight), 1)
        return replace(layer, scales=scales, codes=(weight / scales.float()).round().long() + 128)

    def pack(layer: Layer) -> dict[str, Tensor]:
        scales = layer.scales if strategy == "channel" else layer.scales[:1, 0].clone()
        return {"weight": (layer.codes - 128).to(torch.int8), "weight_scale": scales}

    return _write(
        folder,
        rounded,
        pack,
        compressed_config(
            "int-quantized",
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy},
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
            **(config or {}),
        ),
    )


def compressed_config(
    layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **more,
    }


def _write(
    folder: Path,
    rounded: Callable[[Tensor], Layer],
    pack: Callable[[Layer], dict[str, Tensor]],
    stated: dict[str, Any],
    config_file: str = "config.json",
    config_key: str = "quantization_config",
) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for key, tensor in read_weights(folder).items():
        if key.endswith("_proj.weight") and ".layers." in key:
            layer = rounded(tensor.float())
            floats[key] = layer.weight()
            stored |= {f"{key.removesuffix('weight')}{name}": part for name, part in pack(layer).items()}
        else:
            floats[key] = stored[key] = tensor
    write_weights(folder, stored)
    config = json.loads((folder / "config.json").read_text())
    if config_file == "config.json":
        config = {**config, config_key: stated}
    else:
        (folder / config_file).write_text(json.dumps(stated))
    (folder / "config.json").write_text(json.dumps(config))
    return floats
