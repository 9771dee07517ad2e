"""Layers that keep a state, in native code: the causal convolution and the gated delta rule."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.cpu.attention import heads_are_adjacent
from sensorium.kernels.cpu.library import CausalConvArguments, DeltaRuleArguments, Library, StateRunsArguments

if TYPE_CHECKING:
    from sensorium.kernels.context import Segments

_BF16 = torch.bfloat16


def runs_of(segments: Segments) -> tuple[StateRunsArguments, Tensor]:
    """(what the library is told, the lengths, which must be kept as long)"""
    lengths = torch.tensor(segments.lengths, dtype=torch.int64)
    addresses = (one.data_ptr() for one in (lengths, segments.sources, segments.targets))
    return StateRunsArguments(*addresses, len(lengths), segments.num_singles), lengths


class StateKernels(Library):
    """What the kernels do not take is computed by the reference implementation. A run's tokens are computed one after
    the other: the numbers do not depend on how a prompt is cut, to the last bit."""

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, segments: Segments, *, silu: bool = False
    ) -> Tensor:
        given = [one for one in (x, weight, states, bias) if one is not None]
        is_plain = x.stride(1) == 1 and states.is_contiguous() and (bias is None or bias.is_contiguous())
        if not is_plain or any(one.dtype is not _BF16 for one in given):
            return reference.causal_conv(x, weight, bias, states, segments, silu=silu)
        weight = weight.contiguous()
        out = torch.empty(x.shape, dtype=_BF16)
        runs, _lengths = runs_of(segments)
        arguments = CausalConvArguments(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            states.data_ptr(),
            x.stride(0),
            *weight.shape,
            silu,
            runs,
        )
        self._causal_conv(self._runtime, ctypes.addressof(arguments))
        return out

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, learned: Tensor, states: Tensor, segments: Segments
    ) -> Tensor:
        floats = (decay, learned, states)
        if (
            not all(heads_are_adjacent(one) for one in (q, k, v))
            or any(one.dtype is not torch.float32 for one in floats)
            or not states.is_contiguous()
        ):
            return reference.delta_rule(q, k, v, decay, learned, states, segments)
        decay, learned = decay.contiguous(), learned.contiguous()
        out = torch.empty(v.shape, dtype=_BF16)
        runs, _lengths = runs_of(segments)
        arguments = DeltaRuleArguments(
            *(one.data_ptr() for one in (q, k, v, out, decay, learned, states)),
            *(one.stride(0) for one in (q, k, v)),
            k.shape[1],
            v.shape[1],
            k.shape[2],
            v.shape[2],
            runs,
            0,
        )
        self._delta_rule(self._runtime, ctypes.addressof(arguments))
        return out

    def delta_gates(self, gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if gates.dtype is not _BF16 or not gates.is_contiguous() or rate.dtype is not torch.float32:
            return reference.delta_gates(gates, rate, bias)
        tokens, heads = gates.shape[0], gates.shape[1] // 2
        decay, learned = torch.empty(tokens, heads), torch.empty(tokens, heads)
        addresses = (gates.data_ptr(), rate.data_ptr(), bias.data_ptr())
        self._delta_gates(self._runtime, *addresses, tokens, heads, decay.data_ptr(), learned.data_ptr())
        return decay, learned

    def norm_gated(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not x.is_contiguous() or z.stride(1) != 1 or any(one.dtype is not _BF16 for one in (x, z, weight)):
            return reference.norm_gated(x, z, weight, eps)
        out = torch.empty(z.shape, dtype=_BF16)
        addresses = (x.data_ptr(), z.data_ptr(), z.stride(0), weight.data_ptr(), out.data_ptr())
        self._norm_gated(self._runtime, *addresses, *x.shape, eps)
        return out
