"""Weights in GGUF's blocks in plain torch, on any device: the file's bytes, decoded while they are multiplied.

Activations become signed bytes on the way in, with a scale per row and 32 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sensorium.kernels.backend import BLOCK_FORMS, Blocks
from sensorium.kernels.reference.blocks import DECODERS
from sensorium.kernels.reference.quantized import QuantizedLinear, round_activations

GROUP = 32  # activations that share a scale


class BlockLinear(QuantizedLinear):
    """A linear layer's weight as its file has it, rows of several kinds one behind the other.

    ValueError if the inputs are no whole blocks.
    """

    __slots__ = ("_parts",)

    def __init__(
        self, out_features: int, in_features: int, blocks: Blocks, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.out_features, self.in_features, self.bits = out_features, in_features, 8
        self._bias, self._dtype, self._zeros = None, dtype, None
        widths = [BLOCK_FORMS[kind].row_bytes(in_features) for _, kind in blocks]
        size = sum(rows * width for (rows, _), width in zip(blocks, widths, strict=True))
        self._codes = torch.zeros(size, dtype=torch.uint8, device=device)
        self._scales = self._codes[:0]
        self._parts: list[tuple[int, str, Tensor]] = []  # (first row, kind, bytes [rows, bytes of a row])
        at = first = 0
        for (rows, kind), width in zip(blocks, widths, strict=True):
            self._parts.append((first, kind, self._codes[at : at + rows * width].view(rows, width)))
            at, first = at + rows * width, first + rows
        if first != out_features:
            raise ValueError(f"blocks of {first} rows are no weight of {out_features}")

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("weights in blocks are filled with blocks as they are stored")

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        raise TypeError("weights in blocks are filled with blocks as they are stored")

    def fill_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Put rows at `first_row`: see `BlockWeight`."""
        for first, _, octets in self._parts:
            if first <= first_row and first_row + len(blocks) <= first + len(octets):
                if blocks.shape[1] != octets.shape[1]:
                    break
                octets[first_row - first : first_row - first + len(blocks)].copy_(blocks)
                return
        raise ValueError(f"blocks {tuple(blocks.shape)} do not fit at row {first_row} of {self.out_features}")

    def _rounded(self, x: Tensor) -> Tensor:
        return round_activations(x, GROUP)

    def _weight(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            return torch.cat(list(self._slices(rows.start, min(rows.stop, self.out_features))))
        found = torch.empty(len(rows), self.in_features, device=self._codes.device)
        for first, kind, octets in self._parts:
            here = (rows >= first) & (rows < first + len(octets))
            found[here] = decoded(kind, octets[rows[here] - first], self.in_features)
        return found

    def _slices(self, start: int, stop: int) -> Iterator[Tensor]:
        for first, kind, octets in self._parts:
            own = octets[max(start - first, 0) : max(stop - first, 0)]
            if len(own):
                yield decoded(kind, own, self.in_features)


def decoded(kind: str, rows: Tensor, in_features: int) -> Tensor:
    """uint8 [n, bytes of a row] -> float32 [n, in]"""
    return DECODERS[kind](rows.reshape(-1, BLOCK_FORMS[kind].nbytes)).view(-1, in_features)
