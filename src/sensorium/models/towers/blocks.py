"""What vision and audio towers share: their norm, activations, MLP, and the cutting of work into bounded groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.models.layers import Linear, activation_name, declare

MAX_ROWS = 8192  # patches that go through a tower at once: bounds its activations, still large for a matrix product


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a configuration's name. It may write into its argument."""
    return functools.partial(kernels.activate, activation=activation_name(name))


class PatchLinear(Linear):
    """A convolution whose kernels do not overlap, as a linear layer over flattened patches. Never quantised."""

    least_bits = 16

    def __init__(self, out_features: int, *kernel: int, bias: bool = False) -> None:
        super().__init__(math.prod(kernel), out_features, bias=bias)
        self.weight = declare(out_features, *kernel)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(size)
        self.bias = declare(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Mlp(nn.Module):
    """Two biased linear layers. Rows go through in pieces: the wide middle is the largest activation of a tower."""

    def __init__(self, size: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1 = Linear(size, inner, bias=True)
        self.act = activation(act)
        self.fc2 = Linear(inner, size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= MAX_ROWS:
            out: Tensor = self.fc2(self.act(self.fc1(x)))
            return out
        return torch.cat([self.fc2(self.act(self.fc1(rows))) for rows in torch.split(x, MAX_ROWS)])


def groups(lengths: Sequence[int], limit: int = MAX_ROWS) -> Iterator[slice]:
    """Consecutive runs whose lengths sum to at most `limit`; a run that is longer than that stands alone."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > limit:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def separate(rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Rows of a batch -> one tensor per item with memory of its own, so that a cache can drop one alone."""
    if len(lengths) == 1:
        return [rows]
    return [part.clone() for part in torch.split(rows, list(lengths))]
