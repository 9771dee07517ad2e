"""Norms, activations and rotary embedding in plain torch. Sums are float32; results have the input's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    if x.dtype == torch.float32:
        return functional.rms_norm(x, (x.shape[-1],), weight + offset if offset else weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    if offset:
        return ((wide * scale).mul_(weight.float() + offset)).to(x.dtype)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return rms_norm(residual, weight, eps, offset), residual


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "quick_gelu":
        return (x * 1.702).sigmoid_().mul_(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "relu": functional.relu,
        "tanh": torch.tanh,
    }
    return functions[activation](x)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gated(x: Tensor, activation: Activation) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        return activate(gate.clamp(max=7.0), "quick_gelu").mul_(up.clamp(-7.0, 7.0).add_(1))
    return activate(gate, activation).mul_(up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, rot / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
