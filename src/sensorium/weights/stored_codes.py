"""Quantised linear layers as checkpoints store them: several tensors that make one weight, read as codes or as floats.

AWQ (GEMM) and GPTQ keep `qweight`, `qzeros` and `scales` with the inputs first; compressed-tensors keeps
`weight_packed` or an int8 `weight` with `weight_scale`, the outputs first. In int32 words the low bits come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.quantization import StoredQuantization
from sensorium.errors import CheckpointError
from sensorium.kernels import BlockWeight, Quantization, QuantizedWeight
from sensorium.parallel.ranks import Span
from sensorium.weights.tensor_files import StoredTensor

PIECE = 4 * 1024 * 1024  # weight elements that are unpacked at once
WIDE_GROUP = 128  # how the kernels see groups that are too large for them
MEASURED_ROWS = 256
MOST_ZERO = 16384.0  # beyond, float16 has steps of sixteen codes
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of eight neighbours in its word


class StoredCodes:
    """A quantised weight [out, in] that is not read yet: w = (code - zero) * scale, in groups along the inputs.

    Takes the place of the `StoredTensor` of a float weight: `key` is its name. `kinds` are the parts' types.
    """

    kinds: ClassVar[Mapping[str, tuple[torch.dtype, ...]]]
    becomes_int8 = True  # where the kernels have no layout for the codes; else they become floats
    kept_blocks: str | None = None  # the form of GGUF's blocks, where the kernels of a CPU multiply them as they are

    def __init__(self, base: str, parts: Mapping[str, StoredTensor], stored: StoredQuantization) -> None:
        self.key = f"{base}.weight"
        self.parts = parts
        for name, kinds in self.kinds.items():
            if name in parts and parts[name].dtype not in kinds:
                raise CheckpointError(f"tensor {parts[name].key} in {self.file.name} is {parts[name].dtype}")
        self.zero_offset, self.symmetric = stored.zero_offset, stored.symmetric
        self.shape, self.bits, self.group = self._measure(stored)
        self.groups = -(-self.shape[1] // self.group)

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def prefetch(self) -> None:
        for part in self.parts.values():
            part.prefetch()

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    def pieces(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 rows [n, in]) of the whole weight, or of so many rows from `first` on."""
        scales, zeros, index = self.scales().float(), self.zeros(), self._groups_of_inputs()
        for rows, wanted in self._steps(first, count):
            zero = 2 ** (self.bits - 1) if zeros is None else zeros[rows][:, index].float()
            yield rows.start + wanted.start, ((self.codes(rows).float() - zero) * scales[rows][:, index])[wanted]

    def quantization(self) -> Quantization | None:
        """The kernels' quantisation that holds these very codes; None if there is none."""
        whole = self.group >= self.shape[1]
        if self.order() is not None:
            return None
        if self.bits > 4:
            return Quantization(8) if self.bits == 8 and whole and self.is_symmetric() else None
        if self.group <= 256:
            return Quantization(4, self.group) if self.group % 8 == 0 else None
        return Quantization(4, WIDE_GROUP) if whole or self.group % WIDE_GROUP == 0 else None

    def is_symmetric(self) -> bool:
        """Whether all zeros are the kernels' own: the middle code of 4 or 8 bits."""
        zeros = self.zeros()
        is_middle = zeros is None or bool((zeros == 2 ** (self.bits - 1)).all())
        return is_middle and self.bits in (4, 8)

    def put(self, weight: QuantizedWeight, span: Span, quantization: Quantization, *, with_zeros: bool) -> None:
        """Fill rows with these codes, where `quantization` is `quantization()`."""
        scales, zeros = self.scales(), self.zeros()
        if self.bits <= 4:
            repeats, groups = -(-self.group // quantization.group), -(-self.shape[1] // quantization.group)
            scales = scales.repeat_interleave(repeats, 1)[:, :groups]
            zeros = (
                torch.full_like(scales, 2 ** (self.bits - 1), dtype=torch.uint8)
                if zeros is None
                else zeros.repeat_interleave(repeats, 1)[:, :groups]
            )
        for rows, wanted in self._steps(span.first, span.rows):
            weight.fill_codes(
                span.here + rows.start + wanted.start - span.first,
                self.codes(rows)[wanted],
                scales[rows][wanted],
                zeros[rows][wanted] if with_zeros and zeros is not None else None,
            )

    def put_blocks(self, weight: BlockWeight, span: Span) -> None:
        """Fill rows with `kept_blocks`."""
        raise TypeError(f"{self.key} is not stored in blocks")

    def mapped(self, span: Span) -> list[Tensor] | None:
        """The same where the mapped file has them, in as many runs; None: they are no plain mapping of it."""
        return None

    def populate(self) -> None:
        """Read all of `mapped` now."""

    def every(self, first: int, step: int) -> StoredCodes:
        """The rows first, first + step, .. as a weight of their own."""
        raise CheckpointError(f"the rows of {self.key} cannot be taken apart")

    def _steps(self, first: int = 0, count: int | None = None) -> Iterator[tuple[slice, slice]]:
        """(rows to take apart at a time, which start at a multiple of eight; which of them are wanted)"""
        end = self.shape[0] if count is None else first + count
        step = max(8, PIECE // self.shape[1] // 8 * 8)
        for start in range(first // 8 * 8, end, step):
            stop = min(start + step, -(-end // 8) * 8, self.shape[0])
            yield slice(start, stop), slice(max(first - start, 0), min(end, stop) - start)

    def _view(self, name: str, *shape: int) -> Tensor:
        part = self.parts[name]
        if part.shape != shape:
            raise misshapen(part, f"its layer needs {list(shape)}")
        return part.view()

    def _words(self, count: int) -> int:
        """int32 words of so many codes."""
        return -(-count * self.bits // 32)

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        """((out, in), bits, inputs that share a scale)"""
        raise NotImplementedError

    def codes(self, rows: slice) -> Tensor:
        """uint8 [n, in], 0 to 15 or 255; `rows` starts at a multiple of eight."""
        raise NotImplementedError

    def scales(self) -> Tensor:
        """[out, groups]"""
        raise NotImplementedError

    def zeros(self) -> Tensor | None:
        """[out, groups]; None: the middle code"""
        raise NotImplementedError

    def order(self) -> Tensor | None:
        """The group of every input, where they do not follow one another."""
        return None

    def _groups_of_inputs(self) -> Tensor:
        order = self.order()
        return torch.arange(self.shape[1]) // self.group if order is None else order

    def _order(self, name: str) -> Tensor | None:
        if name not in self.parts:
            return None
        order = self._view(name, self.shape[1]).long()
        if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < self.groups:
            raise CheckpointError(f"tensor {self.parts[name].key} names groups that are not there")
        return None if torch.equal(order, torch.arange(self.shape[1]) // self.group) else order


_WORDS = (torch.int32,)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_INDICES = (torch.int32, torch.int64)


class AwqCodes(StoredCodes):
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; eight neighbours in `AWQ_ORDER`.

    Without qzeros, which only symmetric weights may lack, zeros are the middle code.
    """

    kinds: ClassVar = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _SCALES}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        size, words = matrix_shape(self.parts["qweight"])
        return (8 * words, size), 4, stored.group or size

    def codes(self, rows: slice) -> Tensor:
        words = self._view("qweight", self.shape[1], self.shape[0] // 8)
        return _in_order(unpacked(words[:, rows.start // 8 : rows.stop // 8], 4)).T.contiguous()

    def scales(self) -> Tensor:
        return self._view("scales", self.groups, self.shape[0]).T

    def zeros(self) -> Tensor | None:
        if "qzeros" not in self.parts:
            if not self.symmetric:
                raise CheckpointError(f"tensor {self.parts['qweight'].key} is there without its qzeros")
            return None
        return _in_order(unpacked(self._view("qzeros", self.groups, self.shape[0] // 8), 4)).T


class AwqGemvCodes(StoredCodes):
    """qweight [out, in / 8], qzeros [out, words], scales [out, 8 * words]; neighbours in order, groups filled up."""

    kinds: ClassVar = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _SCALES}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        out, words = matrix_shape(self.parts["qweight"])
        return (out, 8 * words), 4, stored.group or 8 * words

    def codes(self, rows: slice) -> Tensor:
        return unpacked(self._view("qweight", self.shape[0], self.shape[1] // 8)[rows], 4)

    def scales(self) -> Tensor:
        return self._filled("scales", 1)[:, : self.groups]

    def zeros(self) -> Tensor | None:
        return unpacked(self._filled("qzeros", 8), 4)[:, : self.groups]

    def _filled(self, name: str, each: int) -> Tensor:
        """[out, n], whose n hold `each` groups or more."""
        out, count = matrix_shape(self.parts[name])
        if out != self.shape[0] or each * count < self.groups:
            raise misshapen(self.parts[name], f"its layer needs {[self.shape[0], self.groups]} groups")
        return self.parts[name].view()


class GptqCodes(StoredCodes):
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in].

    The first format stores each zero minus one, the second stores it unchanged. Some writers name the wrong format. The
    zeros of symmetric weights are the middle code, so there the stored value shows which format it is; of others the
    codes do (`_settle_zeros`).
    """

    kinds: ClassVar = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _SCALES, "g_idx": _INDICES}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        """A layer may have bits and a group of its own, which the shapes of its zeros and scales show."""
        words, size = matrix_shape(self.parts["qweight"])
        zeros, scales = (matrix_shape(self.parts[name]) for name in ("qzeros", "scales"))
        fitting = [bits for bits in (*stored.bits, 2, 3, 4, 8) if zeros[1] == -(-size * bits // 32)]
        bits = fitting[0] if fitting else stored.bits[0]
        inputs = words * 32 // bits
        group = stored.group or inputs
        if zeros[0] == scales[0] != -(-inputs // group) and inputs % scales[0] == 0:
            group = inputs // scales[0]
        return (size, inputs), bits, group

    def codes(self, rows: slice) -> Tensor:
        words = self._view("qweight", self._words(self.shape[1]), self.shape[0])
        return unpacked(words[:, rows].T, self.bits)

    def scales(self) -> Tensor:
        return self._view("scales", self.groups, self.shape[0]).T

    def zeros(self) -> Tensor | None:
        return None if self.shows_format() else self._zeros(self.zero_offset)

    def shows_format(self) -> bool:
        """The zeros are the middle code, whichever format they have."""
        return self.symmetric is not False and self._are_near_middle(self._stored_zeros())

    def mean(self, zero_offset: int) -> float:
        """Of the first rows' weights, each in scales of its group, if the zeros lack so much."""
        rows = slice(0, MEASURED_ROWS)
        zeros = self._zeros(zero_offset)[rows][:, self._groups_of_inputs()]
        return float((self.codes(rows).float() - zeros).mean())

    def _zeros(self, offset: int) -> Tensor:
        return self._stored_zeros().add(offset).bitwise_and(2**self.bits - 1)

    def doubt(self) -> str | None:
        """What is odd about the zeros, where config.json alone says which format they have."""
        stored = self._stored_zeros()
        if self.symmetric and not self._are_near_middle(stored):
            return "are not the middle code though sym is true"
        middle = 2 ** (self.bits - 1)
        if self.symmetric is False and bool((stored == middle - 1 + self.zero_offset).all()):
            return f"are all {middle - 1 + self.zero_offset} though sym is false"
        return None

    def _stored_zeros(self) -> Tensor:
        """uint8 [out, groups]"""
        words = self._view("qzeros", self.groups, self._words(self.shape[0]))
        return unpacked(words, self.bits)[:, : self.shape[0]].T

    def _are_near_middle(self, stored: Tensor) -> bool:
        middle = 2 ** (self.bits - 1)
        return bool(((stored == middle) | (stored == middle - 1)).all())

    def order(self) -> Tensor | None:
        return self._order("g_idx")


class PackedCodes(StoredCodes):
    """compressed-tensors' pack-quantized: signed codes moved to 0 and up, weight_packed [out, in * bits / 32].

    weight_scale [out, groups]; weight_zero_point [out * bits / 32, groups] is packed along the outputs. A row is one
    stream of bits, as the library writes it today; what its older versions made of 3, 5, 6 and 7 bits is refused.
    """

    kinds: ClassVar = {
        "weight_packed": _WORDS,
        "weight_scale": _SCALES,
        "weight_shape": _INDICES,
        "weight_zero_point": _WORDS,
        "weight_g_idx": _INDICES,
    }

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        out, words = matrix_shape(self.parts["weight_packed"])
        rows, size = self._view("weight_shape", 2).tolist()
        bits = next((bits for bits in stored.bits if -(-size * bits // 32) == words), None)
        if rows != out or size <= 0 or bits is None:
            raise misshapen(self.parts["weight_packed"], f"which is no weight of {[rows, size]}")
        return (out, size), bits, _group_of(self.parts["weight_scale"], size)

    def codes(self, rows: slice) -> Tensor:
        return unpacked(self.parts["weight_packed"].view()[rows], self.bits)[:, : self.shape[1]]

    def scales(self) -> Tensor:
        return _scales_of(self.parts["weight_scale"], self.shape[0], self.groups)

    def zeros(self) -> Tensor | None:
        if "weight_zero_point" not in self.parts:
            return None
        words = self._view("weight_zero_point", self._words(self.shape[0]), self.groups)
        return unpacked(words.T, self.bits)[:, : self.shape[0]].T

    def order(self) -> Tensor | None:
        return self._order("weight_g_idx")


class ByteCodes(StoredCodes):
    """compressed-tensors' int-quantized: weight int8 [out, in], weight_scale [out, groups], or one for all.

    Activations are quantised here with a scale per token, whatever the checkpoint says of them.
    """

    kinds: ClassVar = {"weight": (torch.int8,), "weight_scale": _SCALES, "weight_zero_point": (torch.int8,)}

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        out, size = matrix_shape(self.parts["weight"])
        return (out, size), 8, _group_of(self.parts["weight_scale"], size)

    def codes(self, rows: slice) -> Tensor:
        return _unsigned(self.parts["weight"].view()[rows])

    def scales(self) -> Tensor:
        return _scales_of(self.parts["weight_scale"], self.shape[0], self.groups)

    def zeros(self) -> Tensor | None:
        if "weight_zero_point" not in self.parts:
            return None
        return _unsigned(_scales_of(self.parts["weight_zero_point"], self.shape[0], self.groups))


def counted_from_zeros(scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w = scale * code + offset as (code - zero) * scale: float16 scales and zeros, and where a group is one number.

    There the code 1 counts from 0, with the offset as its scale. A zero's rounding moves a weight by 2 ** -11 of the
    offset.
    """
    is_constant = offsets.abs() > MOST_ZERO * scales.abs()
    zeros = torch.where(is_constant, 0, -offsets / torch.where(is_constant, 1, scales))
    zeros = torch.where(scales == 0, 0, zeros)
    return torch.where(is_constant, offsets, scales).half(), zeros.half(), is_constant


def misshapen(part: StoredTensor, but: str) -> CheckpointError:
    return CheckpointError(f"tensor {part.key} in {part.file.name} has shape {list(part.shape)}, {but}")


def matrix_shape(part: StoredTensor) -> tuple[int, int]:
    if len(part.shape) != 2 or not math.prod(part.shape):
        raise misshapen(part, "which is no matrix")
    return part.shape[0], part.shape[1]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Words of any size [n, m] -> uint8 codes [n, k]: a row is one stream of bits, the lowest of a word first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)
    places = torch.arange(8, dtype=torch.uint8)
    stream = ((octets.unsqueeze(-1) >> places) & 1).flatten(-2)
    whole = stream.shape[-1] // bits * bits
    codes = stream[..., :whole].reshape(*stream.shape[:-1], -1, bits)
    return (codes << places[:bits]).sum(-1, dtype=torch.uint8)


def _in_order(codes: Tensor) -> Tensor:
    """AWQ's [n, 8 * m], neighbours side by side again."""
    return codes.view(codes.shape[0], -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 -> uint8, 128 more"""
    return codes.view(torch.uint8) ^ 128


def _group_of(scales: StoredTensor, size: int) -> int:
    """Inputs that share a scale, by the shape [out, groups], [out], [1] or [] of the scales."""
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if len(scales.shape) > 2 or not groups or size % groups:
        raise misshapen(scales, f"which does not go with {size} inputs")
    return size // groups


def _scales_of(part: StoredTensor, out: int, groups: int) -> Tensor:
    """[out, groups] of what may be one number, or one for every output."""
    value = part.view()
    if value.numel() not in (1, out * groups):
        raise misshapen(part, f"its layer needs {[out, groups]}")
    return value.reshape(1, 1).expand(out, groups) if value.numel() == 1 else value.reshape(out, groups)
