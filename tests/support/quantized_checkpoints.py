"""Rewrites a checkpoint of `checkpoints.py` in the layouts in which quantised ones are published.

Every `write_*` quantises the decoder's linear layers by plain rounding, packs the codes one number at a time as the
format is described, and returns the float weights that the codes stand for, by the names of the original tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.checkpoints import read_weights, write_weights

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours each nibble of a word holds, lowest first

Change = Callable[[Tensor], Tensor]
DAMAGES: tuple[Change, ...] = (  # to any part of a layer
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.flatten()[0],
    lambda t: t.T if t.dim() == 2 else t,
    lambda t: torch.cat([t, t]),
    lambda t: t.float(),
    lambda t: t.to(torch.int8),
)


@dataclass
class Layer:
    """codes int64 [out, in] from 0 up; scales float16 and zeros int64 [out, groups]; the group of every input."""

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)  # as they are stored

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
    """[n, m] from 0 up -> int32 [n, m * bits / 32]: a row is one stream of bits, the first number in the lowest.

    `columns`: which of neighbours each place holds, lowest first.
    """
    rows = []
    order = columns or (0,)
    for row in numbers.tolist():
        filled = row + [0] * (-len(row) % len(order))
        places = [i - i % len(order) + order[i % len(order)] for i in range(len(filled))]
        stream = sum(filled[place] << bits * index for index, place in enumerate(places))
        octets = stream.to_bytes(-(-len(filled) * bits // 32) * 4, "little")
        rows.append(torch.frombuffer(bytearray(octets), dtype=torch.int32))
    return torch.stack(rows)


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


def write_awq_gemv(folder: Path, *, size: int = 32) -> dict[str, Tensor]:
    """Outputs first, neighbours in order; groups are filled up to a multiple of eight."""

    def pack(layer: Layer) -> dict[str, Tensor]:
        spare = -layer.scales.shape[1] % 8
        scales, zeros = (torch.nn.functional.pad(one, (0, spare)) for one in (layer.scales, layer.zeros))
        return {"qweight": words(layer.codes, 4), "qzeros": words(zeros, 4), "scales": scales}

    stated = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemv"}
    return _write(folder, lambda weight: quantise(weight, 4, size, symmetric=False), pack, stated)


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


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def write_mxfp4(folder: Path) -> None:
    """GPT-OSS's experts, rounded to E2M1 in blocks of 32 inputs whose scales are powers of two, as they are published.

    The scales are such that the largest values of some blocks are cut at 6 steps."""
    tensors = read_weights(folder)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    for key in [key for key in tensors if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        blocks = tensors.pop(key).float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, outputs, groups, 32]
        exponents = (blocks.abs().amax(3) / 5).log2().round()
        steps = blocks / 2 ** exponents.unsqueeze(3)
        codes = (steps.unsqueeze(4) - values).abs().argmin(4).to(torch.uint8)
        tensors[f"{key}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{key}_scales"] = (exponents + 127).to(torch.uint8)
    write_weights(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))


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
    *args: Any,
    **more: Any,
) -> dict[str, Tensor]:
    def encode(weight: Tensor) -> Any:
        layer = rounded(weight)
        layer.parts = pack(layer)
        return layer

    return write_layers(folder, encode, *args, **more)


def write_layers(
    folder: Path,
    encode: Callable[..., Any],
    stated: dict[str, Any],
    config_file: str = "config.json",
    config_key: str = "quantization_config",
    extra: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`encode` gives of a matrix (and its name, if it takes two arguments) what has `parts` and `weight()`."""
    stored: dict[str, Tensor] = dict(extra or {})
    floats: dict[str, Tensor] = {}
    takes_name = len(signature(encode).parameters) == 2
    for key, tensor in read_weights(folder).items():
        if key.endswith("_proj.weight") and ".layers." in key:
            layer = encode(tensor.float(), key) if takes_name else encode(tensor.float())
            floats[key] = layer.weight()
            stored |= {f"{key.removesuffix('weight')}{name}": part for name, part in layer.parts.items()}
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
