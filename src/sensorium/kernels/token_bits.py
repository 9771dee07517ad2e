"""Sets of tokens as bits: 32 to a number, the first token's the lowest, as grammars and kernels have them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


def mask_of(tokens: Collection[int], vocab_size: int) -> NDArray[np.uint32]:
    """[words], the bits of these tokens"""
    found = np.zeros(-(-vocab_size // WORD_BITS), np.uint32)
    at = np.fromiter(tokens, np.int64, len(tokens))
    np.bitwise_or.at(found, at // WORD_BITS, np.left_shift(np.uint32(1), (at % WORD_BITS).astype(np.uint32)))
    return found


def bits_of(words: NDArray[np.uint32], size: int) -> NDArray[np.bool_]:
    """[words] -> [size], whether each of the first ones is there"""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)
