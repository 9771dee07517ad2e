"""Quantised layers whose codes no kernel multiplies as they are: decoded to floats by their format's own formula.

What is made of the floats is for the loader to say: see `StoredCodes.becomes_int8`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.checkpoint.quantization import StoredQuantization
from sensorium.errors import CheckpointError
from sensorium.kernels import FP8, BlockWeight, Quantization
from sensorium.kernels.reference.blocks import BNB_FP4, FP4, NF4
from sensorium.parallel.ranks import Span
from sensorium.weights.stored_codes import ByteCodes, StoredCodes, counted_from_zeros, matrix_shape, misshapen, unpacked
from sensorium.weights.tensor_files import StoredTensor, every

SCB_STEP = 7.874015718698502e-3  # bitsandbytes' 1 / 127
MAX_STATE_BYTES = 1 << 16

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_OCTETS = (torch.uint8,)
_FP8 = torch.float8_e4m3fn
_POWERS = torch.float8_e8m0fnu  # a byte that is an exponent of two


class DecodedCodes(StoredCodes):
    """`decoded` gives rows as floats."""

    def pieces(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        for rows, wanted in self._steps(first, count):
            yield rows.start + wanted.start, self.decoded(rows)[wanted]

    def quantization(self) -> Quantization | None:
        return None

    def decoded(self, rows: slice) -> Tensor:
        """float32 [n, in]; `rows` starts at a multiple of eight."""
        raise NotImplementedError

    def _numbers(self, name: str, count: int) -> Tensor:
        """[count], of a part with so many numbers in any shape"""
        part = self.parts[name]
        if math.prod(part.shape) != count:
            raise misshapen(part, f"its layer needs {count} numbers")
        return part.view().reshape(count)


class Fp8Codes(DecodedCodes):
    """weight float8 e4m3 [out, in], weight_scale of the whole, of every output, of groups of inputs or of blocks.

    w = code * scale. Scales of one byte are powers of two (MXFP8). Scales of activations are passed over: activations
    have a scale per token here. Where a device multiplies e4m3 the codes stay as they are, with the scale of every
    output and group of inputs.
    """

    kinds: ClassVar = {"weight": (_FP8,), "weight_scale": (*_FLOATS, _POWERS, torch.uint8)}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        out, size = matrix_shape(self.parts["weight"])
        scales = self.parts["weight_scale"]
        self.block = stored.block or (128, 128)
        if math.prod(scales.shape) == 1:
            self.block = out, size
        elif scales.shape[0] == out and size % (groups := max(math.prod(scales.shape[1:]), 1)) == 0:
            self.block = 1, size // groups
        expected = (-(-out // self.block[0]), -(-size // self.block[1]))
        if [one for one in scales.shape if one != 1] != [one for one in expected if one != 1]:
            raise misshapen(scales, f"which does not go with {[out, size]} in blocks of {list(self.block)}")
        return (out, size), 8, self.block[1]

    def quantization(self) -> Quantization | None:
        if self.group >= self.shape[1]:
            return FP8
        return Quantization(8, self.group, floats=True) if self.group in (32, 64, 128, 256) else None

    def is_symmetric(self) -> bool:
        return True

    def zeros(self) -> Tensor | None:
        return None

    def codes(self, rows: slice) -> Tensor:
        """The bytes of e4m3 [n, in]"""
        codes = self.parts["weight"].view()[rows]
        if not isinstance(codes, FakeTensor) and codes.float().isnan().any():  # a rehearsal's have no numbers
            raise CheckpointError(
                f"tensor {self.parts['weight'].key} in {self.file.name} has codes that are no numbers"
            )
        return codes.view(torch.uint8)

    def scales(self) -> Tensor:
        stored = self.parts["weight_scale"].view()
        scales = stored.view(_POWERS) if stored.dtype == torch.uint8 else stored
        scales = scales.float().reshape(-(-self.shape[0] // self.block[0]), -1)
        return scales[torch.arange(self.shape[0]) // self.block[0]]

    def decoded(self, rows: slice) -> Tensor:
        own = self.scales()[rows]
        return self.codes(rows).view(_FP8).float() * own.repeat_interleave(self.block[1], 1)[:, : self.shape[1]]


class Fp4Codes(DecodedCodes):
    """E2M1 codes, two neighbours a byte, the first one low; a scale for every group of inputs, and one of the whole.

    compressed-tensors calls them weight_packed, weight_scale and weight_global_scale, by which is divided; modelopt
    weight, weight_scale and weight_scale_2, by which is multiplied. MXFP4 has powers of two and no second scale.
    """

    kinds: ClassVar = {
        **dict.fromkeys(("weight", "weight_packed"), _OCTETS),
        "weight_scale": (_FP8, _POWERS, torch.uint8),
        **dict.fromkeys(("weight_global_scale", "weight_scale_2"), _FLOATS),
    }

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        self.packed = self.parts["weight_packed" if "weight_packed" in self.parts else "weight"]
        out, octets = matrix_shape(self.packed)
        rows, groups = matrix_shape(self.parts["weight_scale"])
        if rows != out or 2 * octets % groups:
            raise misshapen(self.parts["weight_scale"], f"which does not go with a weight of {[out, 2 * octets]}")
        return (out, 2 * octets), 4, 2 * octets // groups

    def decoded(self, rows: slice) -> Tensor:
        scales = self.parts["weight_scale"].view()[rows]
        scales = (scales.view(_POWERS) if scales.dtype == torch.uint8 else scales).float()
        if "weight_global_scale" in self.parts:
            scales = scales / self._numbers("weight_global_scale", 1).float()
        if "weight_scale_2" in self.parts:
            scales = scales * self._numbers("weight_scale_2", 1).float()
        values = fp4_values(self.packed.view()[rows])
        return _scaled(values, scales)


class Mxfp4Codes(DecodedCodes):
    """Microscaling FP4: blocks of 32 inputs [out, groups, 16], scales [out, groups].

    Byte j of a block has element 2 j in its low bits; a code is E2M1, a scale the exponent of two plus 127. 255 is NaN.
    """

    kinds: ClassVar = {"blocks": (torch.uint8,), "scales": (torch.uint8,)}
    becomes_int8 = False

    def __init__(self, base: str, parts: Mapping[str, StoredTensor], stored: StoredQuantization) -> None:
        super().__init__(base, parts, stored)
        self._stored, self._base = stored, base

    def quantization(self) -> Quantization | None:
        return Quantization(4, 32, floats=True)

    def codes(self, rows: slice) -> Tensor:
        return unpacked(self._view("blocks", self.shape[0], self.groups, 16)[rows].flatten(1), 4)

    def zeros(self) -> Tensor | None:
        return None

    def is_symmetric(self) -> bool:
        return True

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        shape = self.parts["blocks"].shape
        if len(shape) != 3 or shape[2] != 16 or not math.prod(shape):
            raise misshapen(self.parts["blocks"], "and mxfp4 blocks are [outputs, groups, 16]")
        return (shape[0], 32 * shape[1]), 4, 32

    def decoded(self, rows: slice) -> Tensor:
        values = fp4_values(self._view("blocks", self.shape[0], self.groups, 16)[rows].flatten(1))
        exponents = self.scales()[rows].int().sub_(127).unsqueeze(2)
        return torch.ldexp(values.view(-1, self.groups, 32), exponents).flatten(1)

    def scales(self) -> Tensor:
        scales = self._view("scales", self.shape[0], self.groups)
        if bool((scales == 255).any()):
            raise CheckpointError(
                f"tensor {self.parts['scales'].key} in {self.file.name} has a scale that is no number"
            )
        return scales

    def every(self, first: int, step: int) -> StoredCodes:
        return Mxfp4Codes(self._base, {k: every(part, first, step) for k, part in self.parts.items()}, self._stored)


class Bnb4Codes(DecodedCodes):
    """bitsandbytes' nf4 and fp4: weight, two weights a byte, the first one high, in blocks along the flattened matrix.

    w = quant_map[code] * absmax, in the dtype of the original; absmax may be codes themselves (nested statistics).
    A CPU multiplies the codes in blocks of 32, by numbers of a byte that are as near to quant_map's as 0.5 % of them.
    """

    TABLES: ClassVar = {"NF4": (NF4, 112), "FP4": (BNB_FP4, 120)}

    kinds: ClassVar = {
        "weight": (torch.uint8, *_FLOATS),  # the same bytes, whatever they are called
        "weight.absmax": (torch.uint8, torch.float32),
        **dict.fromkeys(("weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"), (torch.float32,)),
        **dict.fromkeys((f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")), _OCTETS),
    }

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        part = next((one for name, one in self.parts.items() if "quant_state" in name), None)
        if part is None:
            raise CheckpointError(f"tensor {self.parts['weight'].key} is there without its quant_state")
        self.state = _bnb_state(part)
        out, size = self.state["shape"]
        if self.parts["weight"].nbytes != -(-out * size // 2):
            raise misshapen(self.parts["weight"], f"which is no weight of {[out, size]}")
        self.blocks = -(-out * size // self.state["blocksize"])
        largest = self._statistics()  # which have a form of their own
        kind = "NF4" if "weight.quant_state.bitsandbytes__nf4" in self.parts else "FP4"
        if size % 32 == 0 and self.state["blocksize"] % 32 == 0 and self._is_of_table(kind, largest):
            self.kept_blocks = kind
        return (out, size), 4, self.state["blocksize"]

    def _is_of_table(self, kind: str, largest: Tensor) -> bool:
        """Whether the kernels' numbers are this weight's, and float16 holds its scales."""
        table, times = self.TABLES[kind]
        near = (torch.tensor(table) / times - self._numbers("weight.quant_map", 16)).abs().max() < 0.5 / times
        scales = largest / times
        return bool(near & ((scales.half().float() - scales).abs() <= scales.abs() / 256).all())

    def put_blocks(self, weight: BlockWeight, span: Span) -> None:
        scales = (self._statistics() / self.TABLES[self.kept_blocks or ""][1]).half()
        for rows, wanted in self._steps(span.first, span.rows):
            first = span.here + rows.start + wanted.start - span.first
            weight.fill_blocks(first, self._blocks(rows, scales)[wanted])

    def _blocks(self, rows: slice, scales: Tensor) -> Tensor:
        """uint8 [n, in / 32 * 18]: a scale and the codes of each 32 inputs, the first 16 of them low"""
        codes = self._codes(rows).view(-1, 32).to(torch.uint8)
        first = rows.start * self.shape[1]
        places = torch.arange(first, first + codes.numel(), 32) // self.group
        octets = scales[places].unsqueeze(1).view(torch.uint8)
        return torch.cat((octets, codes[:, :16] | codes[:, 16:] << 4), 1).view(-1, self.shape[1] // 32 * 18)

    def _codes(self, rows: slice) -> Tensor:
        """Those of whole rows, one behind the other; the first row's number is even."""
        first, last = rows.start * self.shape[1], rows.stop * self.shape[1]
        octets = self.parts["weight"].view().flatten().view(torch.uint8)[first // 2 : -(-last // 2)]
        return torch.stack((octets >> 4, octets & 15), -1).flatten()[: last - first]

    def decoded(self, rows: slice) -> Tensor:
        codes, first = self._codes(rows).int(), rows.start * self.shape[1]
        values = self._numbers("weight.quant_map", 16).index_select(0, codes)
        scales = self._statistics()[torch.arange(first, first + len(codes)) // self.group]
        weights: Tensor = (values * scales).to(self.state["dtype"])
        return weights.float().view(-1, self.shape[1])

    def _statistics(self) -> Tensor:
        """float32 [blocks]: the largest magnitude of each"""
        absmax = self._numbers("weight.absmax", self.blocks)
        if absmax.dtype == torch.float32:
            return absmax
        names = ("weight.nested_quant_map", "weight.nested_absmax")
        if any(name not in self.parts for name in names) or "nested_blocksize" not in self.state:
            raise CheckpointError(f"tensor {self.parts['weight.absmax'].key} is there without its nested statistics")
        index = torch.arange(self.blocks) // self.state["nested_blocksize"]
        table, largest = self._numbers(names[0], 256), self._numbers(names[1], int(index[-1]) + 1)
        offset: float = self.state["nested_offset"]
        return table[absmax.int()] * largest[index] + offset


class Bnb8Codes(ByteCodes):
    """bitsandbytes' int8: weight [out, in] and SCB [out], the largest magnitudes. Outlying inputs are none here."""

    kinds: ClassVar = {"weight": (torch.int8,), "SCB": (torch.float32,), "weight_format": _OCTETS}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        layout = self.parts.get("weight_format")
        if layout is not None and bool(layout.view().any()):
            raise CheckpointError(
                f"tensor {self.parts['weight'].key} is stored in tiles for one kind of GPU: save it anew"
            )
        out, size = matrix_shape(self.parts["weight"])
        return (out, size), 8, size

    def scales(self) -> Tensor:
        return self._view("SCB", self.shape[0]).unsqueeze(1) * SCB_STEP


class MlxCodes(DecodedCodes):
    """MLX: weight uint32 [out, in * bits / 32], a row one stream of bits; scales and biases [out, groups].

    affine: w = code * scale + bias. mxfp4, nvfp4 and mxfp8 have scales of one byte and no biases.
    """

    kinds: ClassVar = {"weight": (torch.uint32,), "scales": (*_FLOATS, torch.uint8), "biases": _FLOATS}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        bits, group = stored.layers.get(self.key.removesuffix(".weight"), (stored.bits[0], stored.group or 64))
        out, words = matrix_shape(self.parts["weight"])
        size = words * 32 // bits
        self.mode = stored.mode
        for name in ("scales", "biases"):
            if name in self.parts and self.parts[name].shape != (out, size // group):
                raise misshapen(self.parts[name], f"which does not go with {bits} bits in groups of {group}")
        if (self.mode == "affine") != ("biases" in self.parts) or size % group:
            raise misshapen(self.parts["weight"], f"which is no weight of mode {self.mode} in groups of {group}")
        return (out, size), bits, group

    def quantization(self) -> Quantization | None:
        fits = self.mode == "affine" and self.bits <= 4
        return Quantization(4, self.group) if fits and self._lines()[3] else None

    def codes(self, rows: slice) -> Tensor:
        codes = unpacked(self.parts["weight"].view()[rows], self.bits)
        is_constant = self._lines()[2][rows].unsqueeze(2)
        return codes.view(*is_constant.shape[:2], -1).masked_fill(is_constant, 1).flatten(1)

    def scales(self) -> Tensor:
        return self._lines()[0]

    def zeros(self) -> Tensor | None:
        return self._lines()[1]

    def is_symmetric(self) -> bool:
        return False

    def _lines(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Scales and zeros in float16, where a group is one number, and whether float16 holds the scales."""
        scales, offsets = (self.parts[name].view().float() for name in ("scales", "biases"))
        found, zeros, is_constant = counted_from_zeros(scales, offsets)
        exact = torch.where(is_constant, offsets, scales)
        return found, zeros, is_constant, bool(((found.float() - exact).abs() <= exact.abs() / 1024).all())

    def decoded(self, rows: slice) -> Tensor:
        words, scales = self.parts["weight"].view()[rows], self.parts["scales"].view()[rows]
        if self.mode == "affine":
            values, scales = unpacked(words, self.bits).float(), scales.float()
        else:
            octets = words.contiguous().view(torch.uint8)
            values = octets.view(_FP8).float() if self.mode == "mxfp8" else fp4_values(octets)
            scales = scales.contiguous().view(_FP8 if self.mode == "nvfp4" else _POWERS).float()
        biases = self.parts["biases"].view()[rows].float() if "biases" in self.parts else None
        return _scaled(values, scales, biases)


class HqqCodes(DecodedCodes):
    """HQQ: W_q, whose bytes hold rows from equal parts of the matrix, the first part in the highest bits.

    w = (code - zero) * scale in the dtype of the scales, on a matrix [groups, group] (axis 1) or [group, groups]
    (axis 0), which then gets the shape of the weight. Every setting is a tensor.
    """

    kinds: ClassVar = {"W_q": (torch.uint8, torch.int32), "scale": _FLOATS, "zero": _FLOATS}
    FIELDS: ClassVar = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes of a byte, or of a word of 3 bits each

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        bits, group, axis, out, size = self._settings()
        if bits not in self.FIELDS or axis not in (0, 1) or min(group, out, size) <= 0 or out * size % group:
            raise misshapen(self.parts["W_q"], f"which is no weight of {[out, size]} in {bits} bits")
        self.columns = group if axis == 1 else out * size // group
        self.axis, (self.step, width) = axis, matrix_shape(self.parts["W_q"])
        self.count, rows = out * size // group, out * size // self.columns
        if width != self.columns or self.step != -(-rows // self.FIELDS[bits]):
            raise misshapen(self.parts["W_q"], f"which is no weight of {[out, size]} in groups of {group}")
        return (out, size), bits, group

    def quantization(self) -> Quantization | None:
        fits = self.bits <= 4 and self.axis == 1 and self.shape[1] % self.group == 0
        return Quantization(4, self.group) if fits and self.group <= 256 and self.group % 8 == 0 else None

    def codes(self, rows: slice) -> Tensor:
        flat = torch.arange(rows.start * self.shape[1], rows.stop * self.shape[1])
        return self._codes(flat // self.columns, flat % self.columns).to(torch.uint8).view(-1, self.shape[1])

    def scales(self) -> Tensor:
        return self._numbers("scale", self.count).view(self.shape[0], -1)

    def zeros(self) -> Tensor | None:
        return self._numbers("zero", self.count).view(self.shape[0], -1)

    def is_symmetric(self) -> bool:
        return False

    def _codes(self, row: Tensor, column: Tensor) -> Tensor:
        packed = self.parts["W_q"].view()[row % self.step, column]
        shifts = self.bits * (self.FIELDS[self.bits] - 1 - row // self.step)
        codes: Tensor = (packed.int() >> shifts.int()) & (2**self.bits - 1)
        return codes

    def _settings(self) -> list[int]:
        """[bits, group, axis, out, in]"""
        found = [self.parts[name].view().flatten() for name in ("nbits", "group_size", "axis", "shape")]
        if [len(one) for one in found] != [1, 1, 1, 2] or any(one.is_floating_point() for one in found):
            raise misshapen(self.parts["W_q"], "whose settings are no numbers of a matrix")
        return [int(one) for one in torch.cat(found)]

    def decoded(self, rows: slice) -> Tensor:
        flat = torch.arange(rows.start * self.shape[1], rows.stop * self.shape[1])
        row, column = flat // self.columns, flat % self.columns
        scales, zeros = (self._numbers(name, self.count) for name in ("scale", "zero"))
        codes = self._codes(row, column).to(scales.dtype)
        group = row if self.axis == 1 else column
        weights: Tensor = (codes - zeros[group]) * scales[group]
        return weights.float().view(-1, self.shape[1])


def _scaled(values: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """values [n, in], scales and offsets [n, groups] -> values * scales + offsets"""
    found = values.view(*scales.shape, -1) * scales.unsqueeze(2)
    return (found if offsets is None else found + offsets.unsqueeze(2)).flatten(1)


def fp4_values(octets: Tensor) -> Tensor:
    """uint8 [n, m] -> float32 [n, 2 m]: the low bits of a byte before its high ones"""
    return (torch.tensor(FP4) / 2)[unpacked(octets, 4).int()]  # the table has twice the values


def _bnb_state(part: StoredTensor) -> Mapping[str, Any]:
    """The JSON that stands in a tensor of bytes. CheckpointError if it is none of a matrix."""
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    try:
        stated = json.loads(bytes(part.view().flatten()[:MAX_STATE_BYTES].tolist()))
        shape = [int(one) for one in stated["shape"]]
        found: dict[str, Any] = {
            "shape": shape,
            "blocksize": int(stated["blocksize"]),
            "dtype": dtypes[stated["dtype"]],
        }
        if "nested_blocksize" in stated:
            found["nested_blocksize"] = int(stated["nested_blocksize"])
            found["nested_offset"] = float(stated["nested_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"tensor {part.key} in {part.file.name} is no description of a weight") from error
    sizes = [*shape, found["blocksize"], found.get("nested_blocksize", 1)]
    if len(shape) != 2 or min(sizes) <= 0:
        raise CheckpointError(f"tensor {part.key} in {part.file.name} describes no matrix: {shape}")
    return found
