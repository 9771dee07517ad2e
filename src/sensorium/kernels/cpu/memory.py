"""Memory for packed weights in large pages: a weight of less than some of them shares them with its neighbours."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2 * 1024 * 1024
CHUNK = 16 * PAGE
ALIGNMENT = 64


class WeightMemory:
    """Cuts small weights out of chunks, which live as long as any weight that is in them.

    Without it an expert, which is smaller than a large page, would lie in small ones: a decode reads each of
    them once and would wait for their addresses (a seventh of an int4 step).
    """

    def __init__(self, use_large_pages: Callable[[int, int], None]) -> None:
        self._use_large_pages = use_large_pages
        self._chunk: weakref.ref[Tensor] | None = None
        self._used = 0  # bytes of the chunk

    def take(self, nbytes: int) -> tuple[Tensor, Tensor]:
        """(uint8 [nbytes], which begins at a multiple of 64; what must be kept as long as that)"""
        if nbytes >= CHUNK // 4:
            own = torch.empty(nbytes, dtype=torch.uint8)
            self._use_large_pages(own.data_ptr(), nbytes)
            return own, own
        chunk = None if self._chunk is None else self._chunk()
        if chunk is None or self._used + nbytes > chunk.nbytes:
            chunk = torch.empty(CHUNK + PAGE, dtype=torch.uint8)
            self._use_large_pages(chunk.data_ptr(), chunk.nbytes)
            self._chunk, self._used = weakref.ref(chunk), -chunk.data_ptr() % PAGE
        first = self._used
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return chunk[first : first + nbytes], chunk
