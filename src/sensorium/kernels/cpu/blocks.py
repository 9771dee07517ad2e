"""Weights in GGUF's blocks in the layout of the native kernels, see native/blocks.h."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sensorium.kernels.backend import BLOCK_FORMS, Blocks, MappedBlocks
from sensorium.kernels.cpu.library import BlockSegmentArguments, Library
from sensorium.kernels.cpu.linear import NativeLinear, dequantized

LAYOUT = 6  # of kernels.h
KINDS = tuple(BLOCK_FORMS)
FROM_FILE = frozenset("Q4_0 Q8_0 Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())
"""Those of native/gather.h, which are taken apart where the file has them."""
_PANEL = 32


class BlockLinear(NativeLinear):
    """The blocks' own codes, scales and offsets: nothing is rounded anew.

    Activations are quantised to int8 on the way in, a scale per row and 32 inputs. ValueError if the inputs are no
    whole blocks.
    """

    __slots__ = ("_blocks", "_segments")

    def __init__(self, library: Library, out_features: int, in_features: int, blocks: Blocks) -> None:
        if sum(rows for rows, _ in blocks) != out_features:
            raise ValueError(f"blocks of other rows than {out_features}: {blocks}")
        for _, kind in blocks:
            BLOCK_FORMS[kind].row_bytes(in_features)
        sizes = [library._block_bytes(library._runtime, KINDS.index(kind), rows, in_features) for rows, kind in blocks]
        packed, memory = library.memory.take(sum(sizes))
        super().__init__(library, out_features, in_features, packed, LAYOUT)
        self._memory, self._blocks = memory, blocks
        self._segments = (BlockSegmentArguments * len(blocks))()
        at = first_row = first_panel = 0
        for segment, size, (rows, kind) in zip(self._segments, sizes, blocks, strict=True):
            panels, octets = -(-rows // _PANEL), packed[at : at + size]
            octets.view(panels, -1)[-1].zero_()  # whose columns need not all be there
            segment.data, segment.kind = octets.data_ptr(), KINDS.index(kind)
            segment.first_row, segment.rows, segment.first_panel = first_row, rows, first_panel
            at, first_row, first_panel = at + size, first_row + rows, first_panel + panels
        self._arguments.weight, self._arguments.group = ctypes.addressof(self._segments), len(blocks)

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("weights in blocks are filled with blocks as they are stored")

    def fill_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Put rows at `first_row`: see `BlockWeight`."""
        starts = [0, *itertools.accumulate(rows for rows, _ in self._blocks)]
        form = next(
            (
                BLOCK_FORMS[kind]
                for start, (rows, kind) in zip(starts, self._blocks, strict=False)
                if start <= first_row and first_row + len(blocks) <= start + rows
            ),
            None,
        )
        if form is None or blocks.dtype is not torch.uint8 or blocks.shape[1] != form.row_bytes(self.in_features):
            raise ValueError(f"blocks {tuple(blocks.shape)} do not fit at row {first_row} of {self.out_features}")
        blocks = blocks if blocks.stride(1) == 1 else blocks.contiguous()
        library = self._library
        library._pack_codes(
            library._runtime, self.address, blocks.data_ptr(), blocks.stride(0), blocks.shape[0], first_row
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised weight rows [n, in] of output indices int64 [n]."""
        return dequantized(self, ids)


class MappedBlockLinear(NativeLinear):
    """Blocks in a memory-mapped file: nothing is copied, the rows are kept.

    The numbers of packed ones, to the last bit; many rows are as fast, few take up to three times as long. `pack` makes
    them that.
    """

    __slots__ = ("_addresses", "_packed_blocks", "_parts", "_segments")

    def __init__(self, library: Library, out_features: int, in_features: int, parts: Sequence[MappedBlocks]) -> None:
        parts = sorted(parts, key=lambda part: part.first_row)
        joined = [list(found) for _, found in itertools.groupby(parts, key=lambda part: part.kind)]
        self._parts = parts
        self._packed_blocks: BlockLinear | None = None
        self._addresses = torch.empty(out_features, dtype=torch.int64)
        self._segments = (BlockSegmentArguments * len(joined))()
        super().__init__(library, out_features, in_features, self._addresses, LAYOUT)
        first_row = first_panel = 0
        for segment, found in zip(self._segments, joined, strict=True):
            segment.data, segment.first_row = self._addresses[first_row:].data_ptr(), first_row
            segment.kind, segment.in_file, segment.first_panel = KINDS.index(found[0].kind), 1, first_panel
            for part in found:
                first_row = self._place(part, first_row)
            segment.rows = first_row - segment.first_row
            first_panel += -(-segment.rows // _PANEL)
        if first_row != out_features:
            raise ValueError(f"blocks of {first_row} rows are no weight of {out_features}")
        self._arguments.weight, self._arguments.group = ctypes.addressof(self._segments), len(joined)

    def _place(self, part: MappedBlocks, first_row: int) -> int:
        """The row behind the part."""
        rows, size = part.rows, BLOCK_FORMS[part.kind].row_bytes(self.in_features)
        end = first_row + len(rows)
        if part.first_row != first_row or end > self.out_features:
            raise ValueError(f"rows {part.first_row} to {part.first_row + len(rows)} do not come behind {first_row}")
        if rows.dtype is not torch.uint8 or rows.shape[1] != size or rows.stride(1) != 1:
            raise ValueError(f"expected rows of {size} bytes, got {rows.dtype} {tuple(rows.shape)}")
        self._addresses[first_row:end] = torch.arange(len(rows)) * rows.stride(0) + rows.data_ptr()
        return end

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.mapped_bytes + (0 if self._packed_blocks is None else self._packed_blocks.nbytes)

    @property
    def mapped_bytes(self) -> int:
        return sum(part.rows.nbytes for part in self._parts)

    def pack(self) -> None:
        """Copy the rows into panels and let go of them; whoever has `address` computes with the copy from now on."""
        if not self._parts:
            return
        blocks = tuple((segment.rows, KINDS[segment.kind]) for segment in self._segments)
        packed = BlockLinear(self._library, self.out_features, self.in_features, blocks)
        for part in self._parts:
            packed.fill_blocks(part.first_row, part.rows)
        self._arguments.weight, self._packed_blocks = packed._arguments.weight, packed
        for part in self._parts:
            part.release()
        self._parts, self._packed, self._addresses = [], self._packed[:0], self._packed[:0]

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("memory-mapped rows cannot be filled")

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised weight rows [n, in] of output indices int64 [n]."""
        return dequantized(self, ids)
