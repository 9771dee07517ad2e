"""float32 vectors as bytes of other number types, in either byte order, without torch."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
from numpy.typing import NDArray

_FP8 = {"fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2)}  # bits of the exponent and of the fraction
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def item_bytes(dtype: str) -> int:
    return _BYTES[dtype]


def packed(vector: NDArray[np.float32], dtype: str = "float32", endianness: str = "native") -> bytes:
    """The numbers one after the other, rounded to the nearest (ties to even) of the type; what is beyond it becomes
    its largest. `endianness` is little, big or native, this machine's."""
    codes = _codes(np.ascontiguousarray(vector, np.float32), dtype)
    order = sys.byteorder if endianness == "native" else endianness
    return codes.astype(codes.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()


def _codes(vector: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    if dtype == "float32":
        return vector
    if dtype == "float16":
        largest = float(np.finfo(np.float16).max)
        return vector.clip(-largest, largest).astype(np.float16)
    if dtype == "bfloat16":
        bits = vector.view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    values = fp8_values(dtype)
    place = np.searchsorted(values, np.abs(vector))
    low, high = (place - 1).clip(0), place.clip(None, len(values) - 1)
    magnitude = np.abs(vector)
    below, above = magnitude - values[low], values[high] - magnitude
    code = np.where((above < below) | ((above == below) & (high % 2 == 0)), high, low)
    codes: NDArray[np.uint8] = (code + 128 * np.signbit(vector)).astype(np.uint8)
    return codes


@cache
def fp8_values(dtype: str) -> NDArray[np.float32]:
    """The numbers of the positive codes from 0 on, up to the largest that is a number."""
    exponent_bits, fraction_bits = _FP8[dtype]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**fraction_bits
    count = 2**7 - (1 if dtype == "fp8_e4m3" else steps)  # NaN; infinity and the NaNs
    codes = np.arange(count)
    exponents, fractions = codes // steps, codes % steps / steps
    normal = 2.0 ** (exponents - bias) * (1 + fractions)
    values: NDArray[np.float32] = np.where(exponents == 0, 2.0 ** (1 - bias) * fractions, normal).astype(np.float32)
    return values
