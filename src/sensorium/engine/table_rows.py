"""The block tables of running sequences as arrays, by slot: on the host, and on an accelerator a copy that follows it.

A step sends what is new of them, not all of them: of 256 sequences of 128k tokens they are 8 MB.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.sequence import Sequence
from sensorium.engine.staging import Staging


class TableRows:
    """`host` int32 [tables, slots, blocks]: behind a sequence's blocks, and where a table has given its block back, is
    any valid block number."""

    def __init__(self, num_tables: int, max_num_seqs: int, max_blocks: int, staging: Staging | None) -> None:
        shape = (num_tables, max_num_seqs, max(max_blocks, 1))
        self.host = np.zeros(shape, np.int32)
        self._copied: list[list[list[int]]] = [[] for _ in range(max_num_seqs)]  # the block lists of a slot's tables
        self._num_copied = [[0] * num_tables for _ in range(max_num_seqs)]
        self._staging = staging
        self._news: list[tuple[int, list[int]]] = []  # (first place in the flat tables, blocks) not on the device yet
        self._sent: tuple[Tensor, Tensor] | None = None  # places and blocks that this step brings
        self._device = None if staging is None else staging.zeros(shape, torch.int32)

    @property
    def nbytes(self) -> int:
        """On an accelerator."""
        return 0 if self._device is None else self._device.nbytes

    def follow(self, seq: Sequence) -> None:
        """Bring the rows of a sequence up to date; usually nothing is new."""
        slot, num_copied = seq.slot, self._num_copied[seq.slot]
        if self._copied[slot] is not seq.blocks:
            self._copied[slot] = seq.blocks
            num_copied[:] = [0] * len(num_copied)
        for table, blocks in enumerate(seq.blocks):
            known = num_copied[table]
            if len(blocks) == known:
                continue
            self.host[table, slot, known : len(blocks)] = blocks[known:]
            num_copied[table] = len(blocks)
            if self._device is not None:
                _, slots, width = self.host.shape
                self._news.append(((table * slots + slot) * width + known, blocks[known:]))

    def put_news(self) -> None:
        """The last that a step puts into its staging, as its size is any."""
        if self._staging is None or not self._news:
            return
        places = np.concatenate([np.arange(first, first + len(blocks)) for first, blocks in self._news])
        blocks = np.concatenate([np.array(blocks, np.int32) for _, blocks in self._news])
        self._sent = self._staging.put(places), self._staging.put(blocks)

    def take_news(self) -> None:
        """Behind `Staging.send`: the device's tables are the host's."""
        if self._device is not None and self._sent is not None:
            places, blocks = self._sent
            self._device.view(-1).index_copy_(0, places, blocks)
            self._sent = None
            self._news.clear()

    def gathered(self, slots: Tensor) -> Seq[Tensor]:
        """On the device: int32 [slots, blocks] of each table."""
        if self._device is None:
            raise ValueError("the tables are on the host only")
        return self._device.index_select(1, slots).unbind()

    def of(self, slots: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """int32 [tables, slots, width]"""
        return self.host[:, slots, :width]
