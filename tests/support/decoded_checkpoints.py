"""Rewrites a checkpoint of `checkpoints.py` in layouts that no kernel multiplies: fp8, fp4, bitsandbytes, MLX, HQQ.

Like `quantized_checkpoints`: every `write_*` returns the float weights that the codes stand for, by the formats'
descriptions and their own tables, not by the readers under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.quantized_checkpoints import compressed_config, words, write_layers

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.tensor(
    [
        *(-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0),
        *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1),
    ]
)
BNB_FP4 = torch.tensor([0, 0.0052083, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25] * 2) * torch.tensor([1.0] * 8 + [-1.0] * 8)
BLOCK = 64  # weights of one of bitsandbytes' blocks
NESTED = 256


def e4m3(octet: int) -> float:
    """The number of a byte: sign, four bits of exponent, three of mantissa."""
    exponent, mantissa = (octet >> 3) & 15, octet & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if octet & 128 else size


E4M3 = torch.tensor([e4m3(octet) for octet in range(256)])


@dataclass
class Encoded:
    """The tensors of a layer by their names, and the weight that they stand for."""

    parts: dict[str, Tensor]
    floats: Tensor

    def weight(self) -> Tensor:
        return self.floats


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the closest number of a table, for each."""
    return (values.unsqueeze(-1) - table).abs().argmin(-1)


def low_first(codes: Tensor) -> Tensor:
    """[n, 2 m] nibbles -> uint8 [n, m]"""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _octets(values: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 of these numbers, the numbers that it is)"""
    codes = nearest(values.clamp(-448, 448), E4M3.clone().index_fill(0, torch.tensor([127, 255]), 1e9))
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), E4M3[codes]


def write_fp8(
    folder: Path,
    *,
    scheme: str = "block",
    name: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> dict[str, Tensor]:
    """`scheme`: what has a scale of its own: "block" (128 x 128), "channel" or "tensor"."""

    def encode(weight: Tensor) -> Encoded:
        out, size = weight.shape
        rows, columns = {"block": (128, 128), "channel": (1, size), "tensor": (out, size)}[scheme]
        scales = torch.zeros(-(-out // rows), -(-size // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = part.abs().max() / 448
        if dtype == torch.float8_e8m0fnu:
            scales = 2.0 ** scales.log2().ceil()
        stored = scales.to(dtype)
        wide = stored.float().repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :size]
        codes, values = _octets(weight / wide)
        stored = stored.reshape(()) if scheme == "tensor" else stored
        return Encoded({"weight": codes, name: stored, "input_scale": torch.ones(())}, values * wide)

    stated: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static"}
    if scheme == "block":
        stated["weight_block_size"] = [128, 128]
    cache = {"self_attn.k_scale": torch.ones(()), "self_attn.v_proj.output_scale": torch.ones(1)}
    extra = {f"model.layers.0.{key}": one for key, one in cache.items()}
    return write_layers(folder, encode, {**stated, **config}, extra=extra)


def write_compressed_fp8(folder: Path, *, scheme: str = "channel") -> dict[str, Tensor]:
    """compressed-tensors' float-quantized, with a cache scheme."""
    weights = {"num_bits": 8, "type": "float", "strategy": scheme}
    weights |= {"block_structure": [128, 128]} if scheme == "block" else {}
    stated = compressed_config("float-quantized", weights, {"num_bits": 8, "type": "float", "dynamic": True})
    stated["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return write_fp8(folder, scheme=scheme, name="weight_scale", dtype=torch.bfloat16, **stated)


def write_mxfp8(folder: Path) -> dict[str, Tensor]:
    """compressed-tensors' mxfp8-quantized: e4m3, and a power of two for 32 inputs as a byte."""

    def encode(weight: Tensor) -> Encoded:
        grouped = weight.view(len(weight), -1, 32)
        exponents = (grouped.abs().amax(2) / 448).log2().ceil().clamp(min=-100)
        scales = 2.0 ** exponents.unsqueeze(2)
        codes, values = _octets(grouped / scales)
        parts = {"weight": codes.view(weight.shape), "weight_scale": (exponents + 127).to(torch.uint8)}
        return Encoded(parts, (values * scales).flatten(1))

    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
    return write_layers(folder, encode, compressed_config("mxfp8-quantized", weights))


def write_fp4(folder: Path, *, kind: str = "nvfp4") -> dict[str, Tensor]:
    """`kind`: compressed-tensors' "nvfp4" or "mxfp4", or "modelopt"."""
    group = 32 if kind == "mxfp4" else 16

    def encode(weight: Tensor) -> Encoded:
        grouped = weight.view(len(weight), -1, group)
        largest = grouped.abs().amax(2) / 6
        if kind == "mxfp4":
            exponents = largest.log2().ceil()
            scales, whole = 2.0**exponents, {}
            stored = (exponents + 127).to(torch.uint8)
        else:
            step = largest.max() / 448
            stored, values = _octets(largest / step)
            scales = values / (1 / step) if kind == "nvfp4" else values * step
            whole = {"weight_global_scale": (1 / step)[None]} if kind == "nvfp4" else {"weight_scale_2": step}
        codes = nearest(grouped / scales.unsqueeze(2).clamp(min=1e-30), E2M1).flatten(1)
        packed = {"weight" if kind == "modelopt" else "weight_packed": low_first(codes)}
        floats = (E2M1[codes].view_as(grouped) * scales.unsqueeze(2)).flatten(1)
        return Encoded({**packed, "weight_scale": stored, **whole}, floats)

    stated = compressed_config(f"{kind}-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group"})
    if kind == "modelopt":
        stated = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}
    return write_layers(folder, encode, stated)


def write_bnb4(folder: Path, *, kind: str = "nf4", nested: bool = False) -> dict[str, Tensor]:
    """bitsandbytes, blocks along the flattened matrix; `nested`: their statistics are codes too."""
    table = {"nf4": NF4, "fp4": BNB_FP4}[kind]
    inner = torch.linspace(-1, 1, 256)

    def encode(weight: Tensor) -> Encoded:
        flat = weight.flatten()
        count = -(-len(flat) // BLOCK)
        index = torch.arange(len(flat)) // BLOCK
        absmax = torch.stack([flat[index == block].abs().max() for block in range(count)])
        state: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "dtype": "bfloat16", "shape": [*weight.shape]}
        parts = {"absmax": absmax}
        if nested:
            offset = float(absmax.mean())
            block = torch.arange(count) // NESTED
            largest = torch.stack([(absmax - offset)[block == one].abs().max() for one in range(int(block[-1]) + 1)])
            codes = nearest((absmax - offset) / largest[block], inner)
            absmax = inner[codes] * largest[block] + offset
            parts = {"absmax": codes.to(torch.uint8), "nested_absmax": largest, "nested_quant_map": inner.clone()}
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        found = nearest(flat / absmax[index], table)
        parts |= {
            "quant_map": table.clone(),
            f"quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
        packed = (found[::2] << 4 | found[1::2]).to(torch.uint8)[:, None]  # the first of two is high
        floats = (table[found] * absmax[index]).bfloat16().float().view_as(weight)
        return Encoded({"weight": packed, **{f"weight.{name}": one for name, one in parts.items()}}, floats)

    return write_layers(
        folder,
        encode,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        },
    )


def write_bnb8(folder: Path) -> dict[str, Tensor]:
    def encode(weight: Tensor) -> Encoded:
        largest = weight.abs().amax(1)
        codes = (weight / largest[:, None] * 127).round()
        parts = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.zeros(1, dtype=torch.uint8)}
        return Encoded(parts, codes * (largest * 7.874015718698502e-3)[:, None])

    return write_layers(folder, encode, {"quant_method": "bitsandbytes", "load_in_8bit": True})


def write_mlx(folder: Path, *, bits: int = 4, mode: str = "affine", own_bits: int | None = None) -> dict[str, Tensor]:
    """`own_bits`: of the first layer's down_proj."""
    group = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}[mode]
    named = "model.layers.0.mlp.down_proj"

    def affine(weight: Tensor, bits: int) -> Encoded:
        grouped = weight.view(len(weight), -1, group)
        low, high = grouped.amin(2), grouped.amax(2)
        turned = low.abs() > high.abs()  # then scales are negative
        scales = torch.where(turned, low - high, high - low).div(2**bits - 1).bfloat16()
        biases = torch.where(turned, high, low).bfloat16()
        wide, offset = scales.float().unsqueeze(2), biases.float().unsqueeze(2)
        codes = ((grouped - offset) / wide).round().clamp(0, 2**bits - 1)
        packed = words(codes.flatten(1).long(), bits).view(torch.uint32)
        return Encoded({"weight": packed, "scales": scales, "biases": biases}, (codes * wide + offset).flatten(1))

    def encode(weight: Tensor, key: str) -> Encoded:
        if mode == "affine":
            return affine(weight, own_bits if own_bits and key == f"{named}.weight" else bits)
        grouped = weight.view(len(weight), -1, group)
        largest = grouped.abs().amax(2) / (448 if mode == "mxfp8" else 6)
        if mode == "nvfp4":
            octets, scales = _octets(largest)
            stored = octets.view(torch.uint8)
        else:
            stored = (largest.log2().ceil() + 127).to(torch.uint8)
            scales = 2.0 ** (stored.float() - 127)
        scaled = grouped / scales.unsqueeze(2)
        if mode == "mxfp8":
            codes, values = _octets(scaled)
            packed = codes.view(torch.uint8).flatten(1)
        else:
            found = nearest(scaled, E2M1)
            packed, values = low_first(found.flatten(1)), E2M1[found]
        parts = {"weight": packed.contiguous().view(torch.uint32), "scales": stored}
        return Encoded(parts, (values * scales.unsqueeze(2)).flatten(1))

    stated: dict[str, Any] = {"bits": bits, "group_size": group, "mode": mode, "model.layers.0.mlp.up_proj": True}
    if own_bits:
        stated[named] = {"bits": own_bits, "group_size": group}
    return write_layers(folder, encode, stated, config_key="quantization")


def write_hqq(folder: Path, *, bits: int = 4, axis: int = 1, group: int = 32) -> dict[str, Tensor]:
    fields = {8: 1, 4: 2, 3: 10, 2: 4}[bits]

    def encode(weight: Tensor) -> Encoded:
        matrix = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1)
        low, high = matrix.amin(axis, keepdim=True), matrix.amax(axis, keepdim=True)
        scales = ((high - low) / (2**bits - 1)).half()
        zeros = (-low / scales.float()).half()
        codes = (matrix / scales.float() + zeros.float()).round().clamp(0, 2**bits - 1)
        step = -(-len(codes) // fields)
        filled = torch.zeros(step * fields, codes.shape[1], dtype=torch.long)
        filled[: len(codes)] = codes.long()
        packed = sum(part << bits * (fields - 1 - index) for index, part in enumerate(filled.split(step)))
        settings = {"nbits": bits, "group_size": group, "axis": axis}
        parts = {
            "W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
            "scale": scales,
            "zero": zeros,
            "shape": torch.tensor(weight.shape),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in settings.items()},
            "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        }
        return Encoded(parts, ((codes.half() - zeros) * scales).float().view_as(weight))

    stated = {"weight_quant_params": {"nbits": bits, "group_size": group, "axis": axis}}
    return write_layers(folder, encode, {"quant_method": "hqq", "quant_config": stated})
