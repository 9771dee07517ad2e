"""Linear layers' weights in the layouts of the native kernels: packed or memory-mapped bf16, int8, int4 and mxfp4
codes. Blocks of GGUF are in `blocks`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation, Quantization
from sensorium.kernels.cpu.library import ACTIVATIONS, Library, LinearArguments

PANEL = 32  # output columns that are stored together, kPanel of native/kernels.h
LANES = 16
FP4_GROUP = 32  # inputs of mxfp4 that share a scale
COMPACT_HEAD, COMPACT_FOUR = 64, 192  # bytes of a compact panel: at its start, and for every four inputs
EXCEPTIONS = 256  # one weight in so many of a panel may have an unusual exponent
_BF16 = torch.bfloat16
_LAYOUT_BF16, _LAYOUT_INT8, _LAYOUT_INT4, _LAYOUT_ROWS, _LAYOUT_COMPACT, _LAYOUT_MXFP4 = range(6)  # of kernels.h


class NativeLinear:
    """A linear layer's weight in panels that the kernels read, made for `fill` to stream rows into."""

    __slots__ = ("_arguments", "_bias", "_library", "_memory", "_packed", "address", "in_features", "out_features")

    def __init__(self, library: Library, out_features: int, in_features: int, packed: Tensor, layout: int) -> None:
        self._library = library
        self.out_features, self.in_features = out_features, in_features
        self._packed = packed
        self._memory: Tensor | None = None  # that the packed weight is in
        self._bias: Tensor | None = None
        self._arguments = LinearArguments(packed.data_ptr(), None, None, None, out_features, in_features, layout, 0)
        self.address = ctypes.addressof(self._arguments)

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)

    @property
    def mapped_bytes(self) -> int:
        """Part of `nbytes` that is a memory-mapped file."""
        return 0

    def set_bias(self, bias: Tensor | None) -> None:
        self._bias = None if bias is None else bias.to(torch.float32, copy=True).contiguous()
        self._arguments.bias = None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype = _BF16) -> Tensor:
        """[.., in] bf16 -> [.., out] in bf16 or float32."""
        size = self.in_features
        shape = x.shape
        if shape[-1] != size or x.dtype is not _BF16:
            raise ValueError(f"expected bfloat16 [.., {size}], got {x.dtype} {tuple(shape)}")
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self.out_features), dtype=dtype)
        library = self._library
        library._linear(
            library._runtime, self.address, x.data_ptr(), size, x.numel() // size, y.data_ptr(), dtype is not _BF16
        )
        return y

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(self(x)), [.., in] bf16 -> [.., out] bf16."""
        y, library = self(x), self._library
        at = y.data_ptr()
        library._activate(library._runtime, at, at, y.numel(), ACTIVATIONS.index(activation))
        return y

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """self(x) + other, which is not changed."""
        return self(x).add_(other)

    def _checked(self, first_row: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`rows` as the packing functions take them."""
        if rows.shape[1] != self.in_features or first_row < 0 or first_row + rows.shape[0] > self.out_features:
            raise ValueError(f"rows {tuple(rows.shape)} do not fit at row {first_row} of {self.out_features}")
        rows = rows.to(dtype)
        return rows if rows.stride(1) == 1 else rows.contiguous()


class PackedLinear(NativeLinear):
    """bf16 weights."""

    __slots__ = ()

    def __init__(self, library: Library, out_features: int, in_features: int) -> None:
        columns = -(-out_features // LANES) * LANES
        packed, memory = library.memory.take(2 * columns * (in_features + in_features % 2))
        super().__init__(library, out_features, in_features, packed.view(_BF16), _LAYOUT_BF16)
        self._memory = memory

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Put rows [n, in] at `first_row`; the tensor is not kept."""
        rows = self._checked(first_row, rows, _BF16)
        library = self._library
        library._pack_bf16(
            library._runtime,
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            first_row,
            self.out_features,
            self.in_features,
            self._packed.data_ptr(),
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n]."""
        return _unpacked(self, ids)


def _unpacked(weight: NativeLinear, ids: Tensor) -> Tensor:
    ids = ids.contiguous()
    out = torch.empty((ids.numel(), weight.in_features), dtype=_BF16)
    library = weight._library
    library._unpack_bf16(
        library._runtime,
        weight._packed.data_ptr(),
        weight.out_features,
        weight.in_features,
        ids.data_ptr(),
        ids.numel(),
        out.data_ptr(),
    )
    return out


class MappedLinear(NativeLinear):
    """bf16 weights in a memory-mapped checkpoint file: nothing is copied, the rows are kept.

    The numbers of packed weights, at about half the speed where arithmetic is the limit. `pack` makes them that, in 12
    bits each where that can be: see native/compact.h.
    """

    __slots__ = ("_exceptions", "_parts")

    def __init__(
        self, library: Library, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int
    ) -> None:
        self._parts = list(parts)
        self._exceptions: Tensor | None = None  # int64, of compact weights
        at = torch.zeros(out_features, dtype=torch.int64)
        for first, rows in self._parts:
            if rows.dtype is not _BF16 or rows.shape[1] != in_features or rows.stride(1) != 1:
                raise ValueError(f"expected bfloat16 rows of {in_features}, got {rows.dtype} {tuple(rows.shape)}")
            at[first : first + len(rows)] = torch.arange(len(rows)) * (2 * rows.stride(0)) + rows.data_ptr()
        if not at.all():
            raise ValueError("not every row has a place")
        super().__init__(library, out_features, in_features, at, _LAYOUT_ROWS)

    @property
    def nbytes(self) -> int:
        extra = 0 if self._exceptions is None else self._exceptions.nbytes
        return super().nbytes + self.mapped_bytes + extra

    @property
    def mapped_bytes(self) -> int:
        return sum(rows.nbytes for _, rows in self._parts)

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("memory-mapped rows cannot be filled")

    def pack(self) -> None:
        """Copy the rows into panels and let go of them; whoever has `address` computes with the copy from now on."""
        if self._parts and not self._compact():
            packed = PackedLinear(self._library, self.out_features, self.in_features)
            for first, rows in self._parts:
                packed.fill(first, rows)
            self._arguments.weight, self._arguments.layout = packed._packed.data_ptr(), _LAYOUT_BF16
            self._packed, self._memory = packed._packed, packed._memory
        self._parts = []

    def _compact(self) -> bool:
        """Without loss in three quarters of the memory; False if too many weights have unusual exponents."""
        panels = -(-self.out_features // PANEL)
        room = PANEL + max(PANEL, self.in_features * PANEL // EXCEPTIONS)  # the first for what pads an odd size
        size = COMPACT_HEAD + -(-self.in_features // 4) * COMPACT_FOUR
        packed, memory = self._library.memory.take(panels * size)
        found, counts = torch.empty((panels, room), dtype=torch.int64), torch.empty(panels, dtype=torch.int64)
        self._library._compact(
            self._library._runtime, self.address, packed.data_ptr(), room, found.data_ptr(), counts.data_ptr()
        )
        if int(counts.min()) < 0:
            return False
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + (panels + 1)
        self._exceptions = torch.cat([starts, found[torch.arange(room) < counts[:, None]]])
        self._packed, self._memory = packed, memory
        self._arguments.weight, self._arguments.scales = packed.data_ptr(), self._exceptions.data_ptr()
        self._arguments.layout = _LAYOUT_COMPACT
        return True

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n]."""
        if not self._parts and self._exceptions is None:
            return _unpacked(self, ids)
        library, ids = self._library, ids.contiguous()
        out = torch.empty((ids.numel(), self.in_features), dtype=_BF16)
        if self._parts:
            library._gather_rows(self._packed.data_ptr(), self.in_features, ids.data_ptr(), ids.numel(), out.data_ptr())
        else:
            library._unpack_compact(library._runtime, self.address, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out


class QuantizedLinear(NativeLinear):
    """int8 weights with a scale per output, or int4 weights with a float16 scale (and a zero) per output and group.

    Activations are quantised to int8 on the way in, a scale per row (int8, whose outliers take two bytes) or per
    row and group (int4).
    """

    __slots__ = ("_groups", "_mapped_bytes", "_memory_of_zeros", "_scales", "_zeros", "bits", "group")

    def __init__(
        self,
        library: Library,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`kept`: tensors from another weight's `parts()`, not copied. ValueError on a shape or dtype mismatch."""
        bits = quantization.bits
        self.bits, self.group = bits, quantization.group if bits == 4 else -(-in_features // 4) * 4
        self._groups = -(-in_features // self.group)
        columns = -(-out_features // LANES) * LANES
        size = columns * self._groups * self.group * bits // 8
        shape = (-(-out_features // PANEL), self._groups, PANEL)
        dtype = torch.float16 if bits == 4 else torch.float32
        memory = None
        if kept is None:
            # Together: the scales of one weight are fewer than a page.
            scale_bytes = math.prod(shape) * dtype.itemsize
            both, memory = library.memory.take(-(-size // 64) * 64 + scale_bytes)
            packed, scales = both[:size], both[len(both) - scale_bytes :].view(dtype).view(shape).zero_()
        else:
            packed, scales = kept["packed"], kept["scales"]
            if packed.shape != (size,) or scales.shape != shape or (packed.dtype, scales.dtype) != (torch.uint8, dtype):
                raise ValueError(f"weights of another layout: {tuple(packed.shape)} with scales {tuple(scales.shape)}")
        super().__init__(library, out_features, in_features, packed, _LAYOUT_INT4 if bits == 4 else _LAYOUT_INT8)
        self._scales, self._memory = scales, memory
        self._zeros: Tensor | None = None
        self._mapped_bytes = 0 if kept is None else packed.nbytes + scales.nbytes
        self._arguments.scales = self._scales.data_ptr()
        self._arguments.group = self.group

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._scales.nbytes + (0 if self._zeros is None else self._zeros.nbytes)

    @property
    def mapped_bytes(self) -> int:
        return self._mapped_bytes

    def parts(self) -> dict[str, Tensor]:
        """The tensors that `Native.cached_linear` takes; only of a weight filled by `fill`, without a bias."""
        return {"packed": self._packed, "scales": self._scales}

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Quantise rows [n, in] and put them at `first_row`; the tensor is not kept."""
        rows = self._checked(first_row, rows, _BF16)
        library = self._library
        library._quantize(library._runtime, self.address, rows.data_ptr(), rows.stride(0), rows.shape[0], first_row)

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Put rows that are quantised already at `first_row`: see `QuantizedWeight`."""
        codes = self._checked(first_row, codes, torch.uint8)
        places = torch.arange(first_row, first_row + codes.shape[0])
        panels, columns = places // PANEL, places % PANEL
        self._scales[panels, :, columns] = scales.to(self._scales.dtype)
        if zeros is not None:
            if self.bits != 4:
                raise ValueError("int8 weights have no zero points")
            if self._zeros is None:
                octets, self._memory_of_zeros = self._library.memory.take(self._scales.nbytes)
                self._zeros = octets.view(torch.float16).view(self._scales.shape).fill_(8)
                self._arguments.zeros = self._zeros.data_ptr()
            self._zeros[panels, :, columns] = zeros.to(torch.float16)
        library = self._library
        library._pack_codes(
            library._runtime, self.address, codes.data_ptr(), codes.stride(0), codes.shape[0], first_row
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised weight rows [n, in] of output indices int64 [n]."""
        return dequantized(self, ids)


class Fp4Linear(NativeLinear):
    """mxfp4 weights as they are stored: codes of E2M1, a power of two for every 32 inputs. Activations stay bf16.

    ValueError if the inputs are no whole groups.
    """

    __slots__ = ("_scales",)

    def __init__(self, library: Library, out_features: int, in_features: int) -> None:
        if in_features % FP4_GROUP:
            raise ValueError(f"mxfp4 weights of {in_features} inputs: they must be a multiple of {FP4_GROUP}")
        panels, groups = -(-out_features // PANEL), in_features // FP4_GROUP
        size, scale_bytes = panels * PANEL * in_features // 2, panels * groups * PANEL
        both, memory = library.memory.take(size + scale_bytes)
        super().__init__(library, out_features, in_features, both[:size], _LAYOUT_MXFP4)
        self._memory = memory
        self._scales = both[size:].view(panels, groups, PANEL).zero_()
        self._arguments.scales, self._arguments.group = self._scales.data_ptr(), FP4_GROUP

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._scales.nbytes

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("mxfp4 weights are filled with codes as they are stored")

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Put rows at `first_row`: see `QuantizedWeight`."""
        if zeros is not None:
            raise ValueError("mxfp4 weights have no zero points")
        codes = self._checked(first_row, codes, torch.uint8)
        places = torch.arange(first_row, first_row + codes.shape[0])
        self._scales[places // PANEL, :, places % PANEL] = scales
        library = self._library
        library._pack_codes(
            library._runtime, self.address, codes.data_ptr(), codes.stride(0), codes.shape[0], first_row
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n]."""
        return dequantized(self, ids)


def dequantized(weight: NativeLinear, ids: Tensor) -> Tensor:
    """Rows bf16 [n, in] of a weight in codes."""
    ids = ids.contiguous()
    out = torch.empty((ids.numel(), weight.in_features), dtype=_BF16)
    library = weight._library
    library._unpack_quantized(library._runtime, weight.address, ids.data_ptr(), ids.numel(), out.data_ptr())
    return out
