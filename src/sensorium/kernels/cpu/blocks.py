"""Weights in GGUF's blocks in the layout of the native kernels, see native/blocks.h."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from sensorium.kernels.backend import BLOCK_FORMS, Blocks
from sensorium.kernels.cpu.library import BlockSegmentArguments, Library
from sensorium.kernels.cpu.linear import NativeLinear, dequantized

LAYOUT = 6  # of kernels.h
KINDS = tuple(BLOCK_FORMS)
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
