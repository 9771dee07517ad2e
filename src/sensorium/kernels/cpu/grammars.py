"""Rows that are held to grammars, all of a step in one native call: their tokens are drawn, or taken by their grammars.

The grammar library's functions come as addresses: this knows neither its package nor its version.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from sensorium.kernels.backend import FEW_FORCED, GrammarFunctions, HeldRow, Taken
from sensorium.kernels.cpu.library import GrammarArguments, HeldDrawArguments, Library


class GrammarKernels(Library):
    """Of a library's methods those about grammars."""

    def draw_held(
        self,
        grammars: GrammarFunctions,
        logits: NDArray[np.float32],
        rows: Sequence[HeldRow],
        temperatures: Sequence[float],
        costs: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """See `kernels.draw_held`."""
        if logits.strides[1] != logits.itemsize:
            return None
        count = len(rows)
        table, heats = array("Q", chain.from_iterable(rows)), array("f", temperatures)
        found = np.empty((2, count), np.int64)  # one address for both
        at = found.ctypes.data
        arguments = HeldDrawArguments(
            _addresses(grammars),
            logits.ctypes.data,
            table.buffer_info()[0],
            heats.buffer_info()[0],
            costs.ctypes.data,
            at,
            at + 8 * count,
            logits.strides[0] // logits.itemsize,
            logits.shape[1],
            count,
        )
        self._draw_held(self._runtime, ctypes.addressof(arguments))
        return found[0], found[1].view(np.float32)[:count]

    def take_held(
        self, grammars: GrammarFunctions, matchers: Sequence[int], tokens: Sequence[int]
    ) -> list[tuple[int, Taken]]:
        """See `kernels.take_held`."""
        count = len(matchers)
        addresses, ids = array("Q", matchers), array("I", tokens)
        taken = np.empty((count, 3 + FEW_FORCED), np.int32)
        at = addresses.buffer_info()[0], ids.buffer_info()[0]
        if not self._take_held(_addresses(grammars), *at, count, taken.ctypes.data):
            return []
        return [
            (number, Taken(bool(failed), bool(stopped), forced[:few] if few < FEW_FORCED else [], few == FEW_FORCED))
            for number, (failed, stopped, few, *forced) in enumerate(taken.tolist())
            if failed or stopped or few
        ]


@functools.cache
def _structure(grammars: GrammarFunctions) -> GrammarArguments:
    return GrammarArguments(*grammars)


def _addresses(grammars: GrammarFunctions) -> int:
    return ctypes.addressof(_structure(grammars))
