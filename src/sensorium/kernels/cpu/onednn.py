"""float32 linear layers on a CPU through oneDNN, with the weight reordered once for its kernels.

Measured on Zen 4: 1.15 times (one thread) to 1.4 times (two) as fast as `F.linear`, which asks MKL, on Zen 5 twice; an
activation or a sum with another tensor comes with it for nothing. The operators are torch's own, but not part of its
documented interface: `usable` says whether they are there.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import Activation
from sensorium.kernels.reference.norms import activate

MIN_ELEMENTS = 384 * 384  # of a weight: with a smaller one the 12 us that a call costs more are not won back

SMALL_ELEMENTS = 512 * 512
"""Of a weight for which a few rows more cost less than a number of rows that is new: oneDNN then makes a kernel, for
0.45 ms, and keeps the latest few. Steps with prompts or drafts have another number of rows nearly every time."""

POST_OPS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}
"""Our activations -> oneDNN's (name, algorithm)."""


@functools.cache
def usable() -> bool:
    """Whether this torch has the operators and they compute what they should."""
    try:
        x, weight, bias = torch.eye(4), torch.arange(32.0).view(8, 4), torch.ones(8)
        packed = _pack(weight)
        plain = functional.linear(x, weight, bias)
        return bool(
            torch.allclose(_linear(x, packed, bias), plain)
            and torch.equal(packed.to_dense(), weight)
            and torch.allclose(torch.ops.mkldnn._linear_pointwise.binary(x, plain, packed, bias, "add"), plain + plain)
            and torch.allclose(_linear(x, packed, bias, "gelu", "none"), functional.gelu(plain))
        )
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def fewest_elements() -> int:
    """Of a weight for which oneDNN is the better choice.

    MKL keeps its promise of equal results for any number of threads (`MKL_CBWR`) on Intel's processors alone: on Zen 5
    29 of 150 products differed between one, two and three threads, none of oneDNN's. There all go to oneDNN, those with
    a weight whose rows are read back (a tied head) in the plain layout: 3.7 ms for 50,000 x 896, MKL 10.7, packed 2.2.
    """
    try:
        through_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        other = through_mkl and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        other = False
    return 0 if other else MIN_ELEMENTS


def suits(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight [out, in] of this kind is computed faster here."""
    return (
        dtype == torch.float32 and device.type == "cpu" and out_features * in_features >= fewest_elements() and usable()
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = "") -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], algorithm)
    return out


def _padded_rows(rows: int) -> int:
    """As many rows or some more, so that few numbers of rows are met."""
    step = 1 if rows <= 8 else 8 if rows <= 64 else 32
    return -(-rows // step) * step


class OneDnnLinear:
    """A float32 weight in oneDNN's own layout. Packed when the last row has come; plain again if rows are read back."""

    __slots__ = ("_missing", "_packed", "_plain", "_shape", "bias")

    def __init__(self, out_features: int, in_features: int) -> None:
        self._shape = (out_features, in_features)
        self._missing = out_features  # rows
        self._plain: Tensor | None = torch.empty(out_features, in_features)
        self._packed: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 4 * self._shape[0] * self._shape[1] + (0 if self.bias is None else self.bias.nbytes)

    @property
    def mapped_bytes(self) -> int:
        return 0

    def fill(self, first_row: int, rows: Tensor) -> None:
        plain = self._unpacked()
        plain[first_row : first_row + rows.shape[0]].copy_(rows)
        self._missing -= rows.shape[0]
        if self._missing <= 0:
            self._packed, self._plain = _pack(plain), None

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.to("cpu", torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None and fewest_elements():
            return functional.linear(x, self._unpacked(), self.bias)
        return self._product(x, self._unpacked() if self._packed is None else self._packed)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(self(x)), in one call if oneDNN has the activation."""
        if self._packed is None or activation not in POST_OPS:
            return activate(self(x), activation)
        return self._product(x, self._packed, *POST_OPS[activation])

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other` [.., out]."""
        if self._packed is None or self._missing_rows(x):
            return self(x).add_(other)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x.contiguous(), other.contiguous(), self._packed, self.bias, "add"
        )
        return out

    def _product(self, x: Tensor, weight: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
        missing = self._missing_rows(x)
        if not missing:
            return _linear(x.contiguous(), weight, self.bias, activation, algorithm)
        padded = torch.cat((x, x.new_zeros(missing, x.shape[1])))
        return _linear(padded, weight, self.bias, activation, algorithm)[: len(x)]

    def _missing_rows(self, x: Tensor) -> int:
        """Rows that `x` is padded by."""
        if x.dim() != 2 or self._shape[0] * self._shape[1] > SMALL_ELEMENTS:
            return 0
        return _padded_rows(len(x)) - len(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices [n]."""
        return functional.embedding(ids, self._unpacked())

    def _unpacked(self) -> Tensor:
        if self._plain is None:
            packed, self._packed = self._packed, None
            if packed is None:
                raise ValueError("a linear layer without a weight")
            self._plain = packed.to_dense()
        return self._plain
