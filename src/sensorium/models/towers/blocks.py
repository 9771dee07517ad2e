"""What vision and audio towers share: their norm, activations, MLP, and the cutting of work into bounded groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps
from sensorium.models.layers import Linear, activation_name, declare

MAX_ROWS = 8192  # patches that go through a tower at once: bounds its activations, still large for a matrix product
CPU_GROUP_ROWS = 1024
PIECE_MACS = 2**31  # multiply-adds of one piece on a CPU: a tenth of a second, where a core does 20 G of them a second
LEAST_ROWS = 256  # of a matrix product: fewer would wait for the weights


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a configuration's name. It may write into its argument."""
    return functools.partial(kernels.activate, activation=activation_name(name))


class PatchLinear(Linear):
    """A convolution whose kernels do not overlap, as a linear layer over flattened patches. Never quantised."""

    least_bits = 16

    def __init__(self, out_features: int, *kernel: int, bias: bool = False) -> None:
        super().__init__(math.prod(kernel), out_features, bias=bias)
        self.weight = declare(out_features, *kernel)


def square_patches(pixels: Tensor, side: int) -> Tensor:
    """[n, 3, height, width] -> [n, patches, 3 * side * side], line by line; what is left at the right and below is cut
    off: 384 pixels are 27 patches of 14, and 6 more."""
    count, channels, height, width = pixels.shape
    lines, columns = height // side, width // side
    cut = pixels[:, :, : lines * side, : columns * side].reshape(count, channels, lines, side, columns, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, lines * columns, -1)


def merged_blocks(states: Tensor, lines: int, columns: int, merge: int) -> Tensor:
    """[n, lines * columns, size] -> [n, blocks, merge * merge * size]: the cells of a block side by side, line by
    line; so are the blocks."""
    count, _, size = states.shape
    blocks = states.reshape(count, lines // merge, merge, columns // merge, merge, size).transpose(2, 3)
    return blocks.reshape(count, -1, merge * merge * size)


def normalised(item: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """An item's patches `pixels` [n, 3 * …], normalised by its `scale` and `shift` [3] in float32 and then in the
    weights' type; a piece at a time."""
    pixels = item["pixels"]
    if "scale" not in item:
        return pixels.to(dtype)
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    scale, shift = item["scale"].unsqueeze(1), item["shift"].unsqueeze(1)
    for rows, into in zip(torch.split(pixels, MAX_ROWS), torch.split(out, MAX_ROWS), strict=True):
        channels = rows.view(len(rows), 3, -1).to(torch.float32, copy=True)
        into.view(channels.shape).copy_(channels.mul_(scale).add_(shift))
    return out


def hidden_state(stated: object, layers: int) -> int:
    """`vision_feature_layer` -> the layers before that hidden state, counted as in transformers: 0 is what enters the
    first layer, i what layer i gives, negative ones count from the end. CheckpointError if there is none."""
    if not isinstance(stated, int):
        raise CheckpointError(f"config.json: vision_feature_layer must be one number, not {stated!r}")
    state = stated if stated >= 0 else layers + 1 + stated
    if not 0 <= state <= layers:
        raise CheckpointError(f"config.json: vision_feature_layer {stated} of {layers} layers")
    return state


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = declare(size)
        self.bias = declare(size) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class ClippedLinear(nn.Module):
    """A linear layer whose input and output are held within the checkpoint's bounds, where it has such."""

    def __init__(self, in_features: int, out_features: int, *, has_bounds: bool) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features)
        self.has_bounds = has_bounds
        if has_bounds:
            self.input_min, self.input_max, self.output_min, self.output_max = (declare() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_bounds:
            plain: Tensor = self.linear(x)
            return plain
        bounded: Tensor = self.linear(x.clamp(self.input_min, self.input_max))
        return bounded.clamp(self.output_min, self.output_max)


class Conv2d(nn.Module):
    """Kernel 3, stride 2, padding 1, on planes [n, channels, height, width]."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = declare(out_channels, in_channels, 3, 3)
        self.bias = declare(out_channels) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return functional.conv2d(x, self.weight, self.bias, stride=2, padding=1)
        # In float32, as the convolutions of Whisper's tower are.
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return functional.conv2d(x.float(), weight, bias, stride=2, padding=1).to(x.dtype)


class Mlp(nn.Module):
    """Two biased linear layers."""

    def __init__(self, size: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1 = Linear(size, inner, bias=True)
        self.act = activation(act)
        self.fc2 = Linear(inner, size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Projector(nn.Module):
    """Two linear layers, behind a norm if `eps` is given: what makes rows of a language model out of a tower's."""

    def __init__(
        self, in_features: int, inner: int, out_features: int, act: str, *, bias: bool = True, eps: float | None = None
    ) -> None:
        super().__init__()
        self.layer_norm = None if eps is None else LayerNorm(in_features, eps)
        self.linear_1 = Linear(in_features, inner, bias=bias)
        self.act = activation(act)
        self.linear_2 = Linear(inner, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.act(self.linear_1(x if self.layer_norm is None else self.layer_norm(x))))
        return out


def weights(*modules: nn.Module) -> int:
    """Multiply-adds that these modules' linear layers take for one row."""
    return sum(
        layer.in_features * layer.out_features
        for module in modules
        for layer in module.modules()
        if isinstance(layer, Linear)
    )


def by_rows(work: Callable[..., Tensor], macs: int, *inputs: Tensor) -> Steps[Tensor]:
    """work(*inputs) a bounded number of rows at a time, where a row takes `macs` multiply-adds and depends on no other.

    It also bounds what the wide middle of an MLP takes, the largest activation of a tower."""
    total, most = len(inputs[0]), MAX_ROWS
    if inputs[0].is_cpu:
        most = min(MAX_ROWS, max(PIECE_MACS // macs // LEAST_ROWS * LEAST_ROWS, LEAST_ROWS))
    out: Tensor | None = None
    for start in range(0, total, most):
        yield min(most, total - start) * macs
        rows = work(*(x[start : start + most] for x in inputs))
        if len(rows) == total:
            return rows
        if out is None:
            out = rows.new_empty(total, *rows.shape[1:])
        out[start : start + most] = rows
    return work(*inputs) if out is None else out


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Steps[Tensor]:
    """`kernels.varlen_attention`, runs together as long as they are small, and a large one a part of its queries at a
    time."""
    width = 2 * q.shape[1] * q.shape[2]
    macs = [length**2 * width for length in lengths]
    if sum(macs) <= PIECE_MACS or not q.is_cpu:
        yield sum(macs)
        return kernels.varlen_attention(q, k, v, list(lengths), scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    start = 0
    for runs in groups(macs, PIECE_MACS):
        end = start + sum(lengths[runs])
        part = slice(start, end)
        if runs.stop - runs.start == 1:
            yield from _one_run(q[part], k[part], v[part], scale, out[part])
        else:
            yield sum(macs[runs])
            out[part] = kernels.varlen_attention(q[part], k[part], v[part], list(lengths[runs]), scale)
        start = end
    return out


def _one_run(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Steps[None]:
    """Queries come in steps of the kernel's; where one step is too large, a part of the heads at a time."""
    step, macs = kernels.query_step(q), 2 * k.numel()
    most = max(PIECE_MACS // macs // step, 1) * step
    heads = max(min(PIECE_MACS * q.shape[1] // (most * macs), q.shape[1]), 1)
    starts = list(range(0, len(q), most))
    if len(starts) > 1 and len(q) - starts[-1] < step:
        del starts[-1]  # too few to be computed alone
    for start, end in zip(starts, [*starts[1:], len(q)], strict=True):
        for first in range(0, q.shape[1], heads):
            some = slice(first, first + heads)
            yield (end - start) * 2 * k[:, some].numel()
            out[start:end, some] = kernels.run_attention(q[start:end, some], k[:, some], v[:, some], scale)


def group_rows(x: Tensor) -> int:
    """Patches or frames of several items that go through a tower together. More are no faster on a CPU."""
    return min(MAX_ROWS, CPU_GROUP_ROWS) if x.is_cpu else MAX_ROWS


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
