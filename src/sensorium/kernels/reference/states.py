"""Layers that keep a state in plain torch: the causal convolution over a sequence's last tokens, and the gated delta
rule. Sums are float32. A slot is never read as a number, which would wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.context import Segments
from sensorium.kernels.reference.norms import rms_norm

if TYPE_CHECKING:
    from sensorium.kernels.backend import Backend, DeltaParts

CHUNK = 64  # tokens of the delta rule at once: what they do to each other is a square of so many


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, segments: Segments, *, silu: bool = False
) -> Tensor:
    taps, count = weight.t().float(), segments.num_singles  # [taps, channels]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if count:
        windows = torch.cat([states[segments.sources[:count]], x[:count].unsqueeze(1)], dim=1)  # [n, taps, channels]
        out[:count] = (windows.float() * taps).sum(1)
        states[segments.targets[:count]] = windows[:, 1:]
    start = count
    for index in range(count, len(segments.lengths)):
        end = start + segments.lengths[index]
        run = torch.cat([states[segments.sources[index : index + 1]].squeeze(0), x[start:end]])
        windows = run.float().unfold(0, len(taps), 1)  # [tokens, channels, taps]
        out[start:end] = torch.einsum("nct,tc->nc", windows, taps)
        states[segments.targets[index : index + 1]] = run[end - start :].unsqueeze(0)
        start = end
    if bias is not None:
        out += bias
    return (functional.silu(out, inplace=True) if silu else out).to(x.dtype)


def regrouped(states: Tensor, first: int, second: int) -> Tensor:
    """[tokens, heads, ..], of a table of first x second heads column by column."""
    shape = (len(states), first, second, *states.shape[2:])
    return states.reshape(shape).transpose(1, 2).reshape(states.shape)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, learned: Tensor, states: Tensor, segments: Segments
) -> Tensor:
    dtype = v.dtype
    group, scale = v.shape[1] // k.shape[1], k.shape[2] ** -0.5
    queries, keys = (_unit(x).repeat_interleave(group, dim=1) for x in (q, k))
    queries *= scale
    values = v.float()
    out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    count = segments.num_singles
    if count:
        memory = states[segments.sources[:count]] * decay[:count, :, None, None].exp()
        known = torch.einsum("nhk,nhkv->nhv", keys[:count], memory)
        news = (values[:count] - known) * learned[:count].unsqueeze(-1)
        memory += keys[:count].unsqueeze(-1) * news.unsqueeze(-2)
        out[:count] = torch.einsum("nhk,nhkv->nhv", queries[:count], memory)
        states[segments.targets[:count]] = memory
    start = count
    for index in range(count, len(segments.lengths)):
        end = start + segments.lengths[index]
        memory = states[segments.sources[index : index + 1]].squeeze(0)
        for first in range(start, end, CHUNK):
            part = slice(first, min(first + CHUNK, end))
            q, k, v, of_decay, of_learned = (x[part].transpose(0, 1) for x in (queries, keys, values, decay, learned))
            made, memory = _delta_chunk(q, k, v, of_decay, of_learned, memory)
            out[part] = made.transpose(0, 1)
        states[segments.targets[index : index + 1]] = memory.unsqueeze(0)
        start = end
    return out.to(dtype)


def delta_gates(gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    learned, kept = gates.float().chunk(2, dim=1)
    return -rate.exp() * functional.softplus(kept + bias), learned.sigmoid()


def delta_mixed(
    by: Backend, delta: DeltaParts, mixed: Tensor, gates: Tensor, z: Tensor, memory: Tensor, segments: Segments
) -> Tensor:
    """What a gated delta net makes of convolved states [tokens, channels], by the kernels of a backend; gates and z as
    `Backend.delta_gates` and `norm_gated` take them -> like z"""
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    decay, learned = by.delta_gates(gates, delta.rate, delta.bias)
    q, k, v = torch.split(mixed, [keys, keys, values], dim=1)
    q, k = (part.view(len(mixed), delta.key_heads, delta.key_dim) for part in (q, k))
    v = v.view(len(mixed), delta.value_heads, delta.value_dim)
    if delta.takes_turns:
        v, decay, learned = (regrouped(part, -1, delta.key_heads) for part in (v, decay, learned))
    out = by.delta_rule(q, k, v, decay, learned, memory, segments)
    if delta.takes_turns:
        out = regrouped(out, delta.key_heads, -1)
    return by.norm_gated(out, z, delta.norm, delta.eps)


def norm_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = rms_norm(x, weight, eps).flatten(1)
    return functional.silu(z.float()).mul_(normed).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length one, but for those near zero."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


def _delta_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, learned: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens of one run at once: q, k [heads, n, key_dim], v [heads, n, value_dim], decay and learned [heads, n],
    memory [heads, key_dim, value_dim] -> (out [heads, n, value_dim], memory after them).

    What token i learns is its share of v_i less what memory and the tokens before it say of k_i: a triangular system,
    in which everything has faded by the decays between.
    """
    faded = decay.cumsum(-1)
    between = (faded.unsqueeze(-1) - faded.unsqueeze(-2)).tril().exp().tril()  # [heads, i, j <= i]
    from_start = faded.exp().unsqueeze(-1)
    share = learned.unsqueeze(-1)
    system = (share * (k @ k.transpose(1, 2)) * between).tril(-1)
    wanted = share * (v - from_start * (k @ memory))
    news = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = from_start * (q @ memory) + ((q @ k.transpose(1, 2)) * between) @ news
    to_end = (faded[:, -1:] - faded).exp().unsqueeze(-1)
    return out, from_start[:, -1:] * memory + (k * to_end).transpose(1, 2) @ news
