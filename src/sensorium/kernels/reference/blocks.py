"""GGUF's blocks of weights -> float32, bit for bit as the format's reference computes them.

`blocks` are uint8 [n, bytes of a block] everywhere; a result is float32 [n, weights of a block]. In a block of 32
byte j of 16 holds weight j in its low bits and weight j + 16 in its high ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)  # 112 times bitsandbytes' nf4
BNB_FP4 = (0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30)  # 120 times its fp4
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of E2M1

HALVES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Where a block's float16 scales and offsets begin."""


def are_numbers(kind: str, blocks: Tensor) -> bool:
    """Whether all scales are: neither infinite nor none."""
    if kind == "MXFP4":
        return not bool((blocks[:, 0] == 255).any())
    return not any(bool((blocks[:, at + 1] & 0x7C == 0x7C).any()) for at in HALVES[kind])  # the exponent's bits


def half(octets: Tensor) -> Tensor:
    """uint8 [n, 2] -> float32 [n, 1], of float16"""
    return octets.contiguous().view(torch.float16).float()


def nibbles(octets: Tensor) -> Tensor:
    """[.., 16] -> [.., 32], in the order of a block of 32"""
    return torch.cat((octets & 15, octets >> 4), -1)


def _shifted(octets: Tensor, step: int, mask: int) -> Tensor:
    """[n, m] -> [n, 8 / step, m]: the fields of `step` bits of every byte, the lowest first"""
    return (octets.unsqueeze(1) >> torch.arange(0, 8, step, dtype=torch.uint8).view(1, -1, 1)) & mask


def _bits(octets: Tensor) -> Tensor:
    """[n, m] -> [n, 8 m], the lowest bit of every byte first"""
    return ((octets.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return half(blocks[:, :2]) * (nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return half(blocks[:, :2]) * nibbles(blocks[:, 4:]).float() + half(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    codes = nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return half(blocks[:, :2]) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return half(blocks[:, :2]) * codes.float() + half(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return half(blocks[:, :2]) * blocks[:, 2:].view(torch.int8).float()


def _two_bits(octets: Tensor) -> Tensor:
    """[n, 64] -> [n, 256]: two runs of 32 bytes, each four runs of 32 weights"""
    return _shifted(octets.reshape(-1, 32), 2, 3).reshape(-1, 256)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, d, least = blocks[:, :16], half(blocks[:, 80:82]), half(blocks[:, 82:84])
    codes = _two_bits(blocks[:, 16:80]).float().view(-1, 16, 16)
    return _affine(codes, d * (scales & 15).float(), least * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    packed, d = blocks[:, 96:108], half(blocks[:, 108:110])
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    high = _shifted(packed[:, 8:], 2, 3).flatten(1)
    scales = d * ((low | high << 4).float() - 32)
    missing = 4 - 4 * _shifted(blocks[:, :32], 1, 1).flatten(1).float()
    codes = _two_bits(blocks[:, 32:96]).float() - missing
    return (scales.unsqueeze(2) * codes.view(-1, 16, 16)).flatten(1)


def k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, minima) float32 [n, 8] of Q4_K and Q5_K: w = scale * code - minimum"""
    packed = blocks[:, 4:16]
    first, second, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (mixed & 15) | (first >> 6) << 4), 1)
    minima = torch.cat((second & 63, (mixed >> 4) | (second >> 6) << 4), 1)
    return half(blocks[:, :2]) * scales.float(), half(blocks[:, 2:4]) * minima.float()


def _affine(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """codes [n, groups, m]; scales and minima [n, groups]"""
    return (scales.unsqueeze(2) * codes - minima.unsqueeze(2)).flatten(1)


def _low_runs(octets: Tensor) -> Tensor:
    """[n, 128] -> [n, 8, 32]: four runs of 32 bytes, low bits before high ones"""
    return _shifted(octets.reshape(-1, 32), 4, 15).reshape(-1, 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine(_low_runs(blocks[:, 16:]).float(), *k_scales(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    codes = _low_runs(blocks[:, 48:]) | _shifted(blocks[:, 16:48], 1, 1) << 4
    return _affine(codes.float(), *k_scales(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _shifted(blocks[:, :128].reshape(-1, 64), 4, 15).reshape(-1, 256)
    codes = (low | _two_bits(blocks[:, 128:192]) << 4).float() - 32
    scales = half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
    return (scales.unsqueeze(2) * codes.view(-1, 16, 16)).flatten(1)


def _looked_up(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    return torch.tensor(table, dtype=torch.float32)[codes.long()]


def _of_table(table: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Of blocks of a scale and 32 codes."""
    return lambda blocks: half(blocks[:, :2]) * _looked_up(nibbles(blocks[:, 2:]), table)


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _shifted(blocks[:, 4:8], 4, 15).transpose(1, 2).flatten(1)
    high = _shifted(blocks[:, 2:4], 2, 3).transpose(1, 2).flatten(1)
    scales = half(blocks[:, :2]) * ((low | high << 4).float() - 32)
    codes = _looked_up(nibbles(blocks[:, 8:].reshape(-1, 8, 16)), IQ4)
    return (scales.unsqueeze(2) * codes).flatten(1)


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=2), (exponent - 1).clamp(min=0) << 23)
    return bits.view(torch.float32) * _looked_up(nibbles(blocks[:, 1:]), FP4)


def _lines_q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nibbles(blocks[:, 4:]), half(blocks[:, :2]), half(blocks[:, 2:4])


def _lines_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = k_scales(blocks)
    return _low_runs(blocks[:, 16:]).flatten(1), scales, -minima


LINES: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {"Q4_1": _lines_q4_1, "Q4_K": _lines_q4_k}
"""Of blocks in groups of 32: codes [n, weights], scales and offsets [n, groups], w = scale * code + offset."""

DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _of_table(IQ4),
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NF4": _of_table(NF4),
    "FP4": _of_table(BNB_FP4),
}
