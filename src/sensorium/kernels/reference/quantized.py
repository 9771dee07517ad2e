"""int8 and int4 weights in plain torch, on any device: the reference for the native kernels, with the same rounding.

Codes are unsigned: w = (code - 128) * scale for int8, a scale per output; w = (code - zero) * scale for int4, a scale
and a zero (8 unless said otherwise; it need not be a code) per output and group of inputs. Activations become signed
bytes on the way in, with a scale per row (int8) or per row and group (int4). The outliers of an int8 row take two bytes
each: see `round_activations`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import Activation, Quantization
from sensorium.kernels.reference.norms import activate

PIECE = 256 * 1024  # weight elements that are wide at once
OUTLIERS = 2  # values of a row that may be beyond its scale's 127 steps, with int8 weights
WORTHWHILE = 1.25  # how much finer the scale must become by it
DIVISORS = (-8.4, -8.0, -7.6, -7.2, -6.8)  # of a group's largest value: the int4 scales that are tried


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] -> codes uint8 [n, in], scales float32 [n, 1]"""
    wide = weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    codes = (wide * _inverse(largest)).round_()
    return (codes + 128).to(torch.uint8), largest / 127


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[n, in] -> codes uint8 [n, in], scales float16 [n, groups].

    Sixteen codes reach one further down than up, so the value of largest magnitude is given code -8 or less. Some
    smaller scales are tried; the codes of the best one are fitted, found anew and fitted again.
    """
    grouped = in_groups(weight.float(), group)
    top = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    best, most = torch.zeros_like(top), torch.zeros_like(top)
    for divisor in DIVISORS:
        scale, gain = _fit(grouped, _nearest(grouped, (top * (1 / divisor)).half().float()))
        best, most = torch.where(most < gain, scale, best), torch.maximum(most, gain)
    best, _ = _fit(grouped, _nearest(grouped, best.half().float()))
    best = best.half().float()
    best = torch.where(best.abs() < torch.inf, best, 0)
    codes = (_nearest(grouped, best) + 8).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return codes, best.squeeze(2).half()


def _fit(grouped: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(the scale that fits codes best, how much less squared error it leaves than zero would)"""
    product, square = (grouped * codes).sum(2, keepdim=True), codes.square().sum(2, keepdim=True)
    scale = torch.where(square > 0, product / square, 0)
    return scale, scale * product


def round_activations(x: Tensor, group: int, *, outliers: int = 0) -> Tensor:
    """[.., in] -> float32 [.., in]: what signed bytes with one scale per row and group can say of x.

    So many `outliers` of a group may have up to 127 * 128 steps of the scale, if that makes it finer by `WORTHWHILE`:
    in a few channels transformers' states are several times, or hundreds of times, as large as in all others.
    """
    grouped = in_groups(x.float(), group)
    magnitude = grouped.abs()
    reach = largest = magnitude.amax(-1, keepdim=True)  # what is 127 steps
    if 0 < outliers < group:
        rest = magnitude.topk(outliers + 1, -1).values[..., -1:]
        reach = torch.where(rest * WORTHWHILE < largest, torch.maximum(rest, largest / 128), largest)
    codes = (grouped * _inverse(reach)).round_()
    return codes.mul_(reach / 127).flatten(-2)[..., : x.shape[-1]]


def activation_bytes(tokens: int, in_features: int) -> int:
    """Upper bound of what a product of so many rows takes beside its result."""
    return 4 * (4 * tokens * (in_features + 256) + 4 * max(PIECE, in_features) + tokens * (PIECE // in_features + 1))


def in_groups(x: Tensor, group: int) -> Tensor:
    """[.., in] -> [.., groups, group], zeros behind the last one"""
    padded = functional.pad(x, (0, -x.shape[-1] % group))
    return padded.view(*x.shape[:-1], -1, group)


def _inverse(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)  # 127 / x would be 127 * (1 / x)


def _nearest(grouped: Tensor, scale: Tensor) -> Tensor:
    inverse = torch.where(scale.abs() > 1e-30, 1 / scale, 0)
    return (grouped * inverse).round_().clamp_(-8, 7)


def quantized_bytes(out_features: int, in_features: int, quantization: Quantization) -> int:
    """Of a weight's codes and scales."""
    groups = -(-in_features // quantization.scaled_together(in_features))
    if quantization.bits == 8:
        return out_features * (in_features + groups * torch.float32.itemsize)
    return out_features * (-(-in_features // 2) + groups * torch.float16.itemsize)


class QuantizedLinear:
    """A linear layer's weight as codes, two int4 codes to a byte, with the methods of the native `QuantizedLinear`."""

    __slots__ = ("_bias", "_codes", "_dtype", "_group", "_scales", "_zeros", "bits", "in_features", "out_features")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.out_features, self.in_features, self.bits = out_features, in_features, quantization.bits
        self._group = quantization.scaled_together(in_features)
        width = in_features if self.bits == 8 else -(-in_features // 2)
        self._codes = torch.zeros(out_features, width, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(
            out_features,
            -(-in_features // self._group),
            device=device,
            dtype=torch.float32 if self.bits == 8 else torch.float16,
        )
        self._zeros: Tensor | None = None
        self._bias: Tensor | None = None
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._codes, self._scales, self._zeros, self._bias) if t is not None)

    @property
    def mapped_bytes(self) -> int:
        return 0

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes uint8 [out, ..], scales and zeros [out, groups], bias float32 [out]."""
        return self._codes, self._scales, self._zeros, self._bias

    @property
    def scaled_together(self) -> int:
        """How many inputs share a scale; 0: all."""
        return 0 if self._group == self.in_features and self.bits == 8 else self._group

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Quantise rows [n, in] and put them at `first_row`; the tensor is not kept."""
        step = max(1, PIECE // self.in_features)
        for start in range(0, rows.shape[0], step):
            self.fill_codes(first_row + start, *self._quantized(rows[start : start + step].to(self._codes.device)))

    def _quantized(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scales) of rows [n, in], as `fill_codes` takes them"""
        return quantize_int8(rows) if self.bits == 8 else quantize_int4(rows, self._group)

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Put rows that are quantised already at `first_row`: see `QuantizedWeight`."""
        place = slice(first_row, first_row + codes.shape[0])
        if codes.shape[1] != self.in_features or first_row < 0 or place.stop > self.out_features:
            raise ValueError(f"rows {tuple(codes.shape)} do not fit at row {first_row} of {self.out_features}")
        if zeros is not None:
            if self.bits != 4:
                raise ValueError("weights of eight bits have no zero points")
            if self._zeros is None:
                self._zeros = torch.full_like(self._scales, 8)
            self._zeros[place].copy_(zeros)
        self._codes[place].copy_(codes if self.bits == 8 else self._pack(codes))
        self._scales[place].copy_(scales)

    def _pack(self, codes: Tensor) -> Tensor:
        """int4 codes [n, in] -> two to a byte"""
        even = functional.pad(codes, (0, codes.shape[1] % 2))
        return even[:, ::2] | (even[:, 1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        """The other way."""
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, : self.in_features]

    def set_bias(self, bias: Tensor | None) -> None:
        self._bias = None if bias is None else bias.to(self._codes.device, torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        rounded = self._rounded(x)
        out = x.new_empty((*x.shape[:-1], self.out_features))
        step = max(1, PIECE // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            bias = None if self._bias is None else self._bias[rows]
            out[..., rows] = functional.linear(rounded, self._weight(rows), bias)
        return out

    def _rounded(self, x: Tensor) -> Tensor:
        """float32, what of x is multiplied"""
        return round_activations(x, self._group, outliers=OUTLIERS if self.bits == 8 else 0)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        return activate(self(x), activation)

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised weight rows [n, in] of output indices int64 [n]."""
        return self._weight(ids).to(self._dtype)

    def _weight(self, rows: slice | Tensor) -> Tensor:
        """float32 [n, in]"""
        codes = self._codes[rows]
        if self.bits == 8:
            return (codes.float() - 128) * self._scales[rows]
        wide = in_groups(self._unpack(codes).float(), self._group)
        zeros = 8 if self._zeros is None else self._zeros[rows].float().unsqueeze(2)
        return ((wide - zeros) * self._scales[rows].float().unsqueeze(2)).flatten(1)[:, : self.in_features]
