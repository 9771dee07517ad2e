"""Rotation of queries and keys and the writing of the cache in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensorium.kernels.context import LayerCache
from sensorium.kernels.cuda.device import rope as device
from sensorium.kernels.cuda.launch import FLOATS, launch, octets, power_of_two
from sensorium.kernels.reference.fp8 import E4M3

TILE = 1024  # numbers of heads that a program holds
KINDS = {torch.int8: "int8", E4M3: "fp8"}


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernels read such tensors."""
    return (
        q.dtype is k.dtype
        and q.dtype in FLOATS
        and q.stride(2) == k.stride(2) == 1
        and cos.dtype is sin.dtype is torch.float32
        and cos.stride() == sin.stride()
        and cos.stride(1) == 1
    )


def can_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels write such rows into such a cache."""
    kind = KINDS.get(k_cache.dtype)
    fits = k_cache.dtype is v_cache.dtype and (kind is not None or k_cache.dtype is k.dtype)
    rows = k_cache.stride(2) == k_cache.shape[3] == v_cache.stride(2)
    return fits and rows and k.stride(2) == v.stride(2) == 1 and not (kind == "int8" and k.shape[2] % 4)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In place."""
    heads, kv_heads = q.shape[1], k.shape[1]
    sizes = _sizes(q.shape[2], cos.shape[1])
    at_once = _at_once(q.shape[2], heads)
    tiles = -(-heads // at_once) + -(-kv_heads // at_once)
    launch(
        device.rotate, (q.shape[0], tiles), q, k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        cos.stride(0), HEADS=heads, KV_HEADS=kv_heads, HEADS_AT_ONCE=at_once, num_warps=2, **sizes,
    )  # fmt: skip
    return q, k


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    at_once = _at_once(head_dim, kv_heads)
    launch(
        device.write_kv, (tokens, -(-kv_heads // at_once)), k, v, octets(k_cache), octets(v_cache), slots, k.stride(0),
        k.stride(1),
        v.stride(0), v.stride(1), *_strides(k_cache, v_cache), KV_HEADS=kv_heads, D=head_dim,
        BLOCK_D=power_of_two(head_dim), HEADS_AT_ONCE=at_once, num_warps=2, **_page(k_cache),
    )  # fmt: skip


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    offset: float,
    cache: LayerCache,
    slots: Tensor,
    *,
    is_paired: bool = False,
    norms_whole: bool = False,
    norms_values: bool = False,
    writes: bool = True,
    scales: Tensor | None = None,
) -> Tensor:
    """Norm (weights [head_dim] of q and k) and rotate q; norm and rotate k and write it and v to the cache; returns q,
    which is rotated in place but where `norms_whole`: all heads of q are normed together, and all of k, each with its
    own weights. k and v are left as they are. `is_paired`: what turns together lies side by side, see
    `DecoderLayerParts`. `norms_values`: v without weights. Without `writes` there is only q. `scales` float32 [tokens],
    of rotated queries."""
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    at_once = _at_once(head_dim, kv_heads)
    tiles = -(-heads // at_once) + 2 * -(-kv_heads // at_once) * writes
    q_norm, k_norm = norms or (q, k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if norms_whole else q
    launch(
        device.rotate_and_write, (q.shape[0], tiles), q, k, v, cos, sin, q_norm, k_norm, out, octets(cache.keys),
        octets(cache.values), slots, cos if scales is None else scales, eps, offset, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1), cos.stride(0),
        *_strides(cache.keys, cache.values), HEADS=heads, KV_HEADS=kv_heads, BLOCK_D=power_of_two(head_dim),
        HAS_NORM=norms is not None, HAS_OFFSET=offset != 0, PAIRED=is_paired, WHOLE=norms_whole,
        NORMS_VALUES=norms_values, HAS_SCALES=scales is not None, HEADS_AT_ONCE=at_once, num_warps=2,
        **_sizes(head_dim, cos.shape[1]), **_page(cache.keys),
    )  # fmt: skip
    return out


def _sizes(head_dim: int, half: int) -> dict[str, int]:
    return {"D": head_dim, "HALF": half, "BLOCK_H": power_of_two(half), "BLOCK_R": power_of_two(head_dim - 2 * half)}


def _at_once(head_dim: int, heads: int) -> int:
    return min(power_of_two(heads), max(1, TILE // power_of_two(head_dim)))


def _strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, int, int, int]:
    return k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1)


def _page(cache: Tensor) -> dict[str, Any]:
    return {"PAGE": cache.shape[2], "ROW": cache.shape[3], "KIND": KINDS.get(cache.dtype, "same")}
