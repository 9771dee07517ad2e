"""A whole decoder in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.kernels.backend import DecoderLayerParts, RoutedParts, StateParts
from sensorium.kernels.context import LayerCache, StateCache
from sensorium.kernels.cpu.attention import CACHE_DTYPES
from sensorium.kernels.cpu.experts import NativeExperts
from sensorium.kernels.cpu.library import (
    DecoderArguments,
    DecoderLayerArguments,
    DecoderStepArguments,
    Library,
    RoutedArguments,
    RoutingArguments,
    StateMixerArguments,
    StepTableArguments,
)
from sensorium.kernels.cpu.linear import NativeLinear
from sensorium.kernels.cpu.states import runs_of

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, KVCache

_BF16 = torch.bfloat16
MAX_PAIRED = 1024  # dimensions of a head that are rotated in pairs


def can_stack(layers: Sequence[DecoderLayerParts], final_norm: Tensor, head_dim: int) -> bool:
    """Whether there are layers, one of which attends, all weights are native ones and all others contiguous, bf16 or
    what is float32 everywhere."""
    if all(parts.state is not None for parts in layers):
        return False
    tensors, floats = [final_norm], list[Tensor]()
    for parts in layers:
        others = [parts.input_norm, parts.q_norm, parts.k_norm, parts.attended_norm, parts.mlp_norm, parts.after_norm]
        if parts.state is not None:
            others += [parts.state.taps, parts.state.bias]
            if parts.state.delta is not None:
                others.append(parts.state.delta.norm)
                floats += [parts.state.delta.rate, parts.state.delta.bias]
        tensors += [one for one in others if one is not None]
        if not parts.is_plain or not all(isinstance(weight, NativeLinear) for weight in _weights(parts)):
            return False
        if parts.is_paired and head_dim > MAX_PAIRED:
            return False
        if parts.routed is not None and not isinstance(parts.routed.experts, NativeExperts):
            return False
    return all(
        one.dtype is dtype and one.is_contiguous()
        for dtype, of_it in ((_BF16, tensors), (torch.float32, floats))
        for one in of_it
    )


def _weights(parts: DecoderLayerParts) -> list[object]:
    routed, delta = parts.routed, None if parts.state is None else parts.state.delta
    mixers = [parts.qkv, parts.o, *(() if delta is None else (delta.gates,))]
    if routed is None:
        return [*mixers, parts.gate_up, parts.down]
    shared = (routed.shared_gate_up, routed.shared_down, routed.shared_gate)
    return [*mixers, routed.router, *(one for one in shared if one is not None)]


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _address(part: object) -> int | None:
    if part is not None and not isinstance(part, NativeLinear | NativeExperts):
        raise TypeError(f"expected a packed linear layer or experts, got {type(part).__name__}")
    return None if part is None else part.address


def _routed_arguments(routed: RoutedParts, activation: int) -> RoutedArguments:
    experts = routed.experts
    count = experts.count if isinstance(experts, NativeExperts) else 0
    return RoutedArguments(
        _address(experts),
        _address(routed.router),
        _address(routed.shared_gate_up),
        _address(routed.shared_down),
        _address(routed.shared_gate),
        RoutingArguments(count, routed.per_token, routed.renormalizes, routed.scale),
        activation,
    )


def _state_arguments(state: StateParts) -> StateMixerArguments:
    delta = state.delta
    if delta is None:
        return StateMixerArguments(_at(state.taps), _at(state.bias), num_taps=state.taps.shape[1])
    return StateMixerArguments(
        _at(state.taps),
        _at(state.bias),
        _address(delta.gates),
        _at(delta.rate),
        _at(delta.bias),
        _at(delta.norm),
        state.taps.shape[1],
        delta.key_heads,
        delta.value_heads,
        delta.key_dim,
        delta.value_dim,
        delta.takes_turns,
        delta.eps,
    )


def _layer_arguments(
    parts: DecoderLayerParts, routed: RoutedArguments | None, state: StateMixerArguments | None
) -> DecoderLayerArguments:
    return DecoderLayerArguments(
        _at(parts.input_norm),
        _at(parts.q_norm),
        _at(parts.k_norm),
        _at(parts.attended_norm),
        _at(parts.mlp_norm),
        _at(parts.after_norm),
        _address(parts.qkv),
        _address(parts.o),
        _address(parts.gate_up),
        _address(parts.down),
        None if routed is None else ctypes.addressof(routed),
        None if state is None else ctypes.addressof(state),
        _at(parts.sinks),
        parts.sliding_window or 0,
        parts.media_both_ways,
        parts.is_gated,
        parts.rotation,
        paired=parts.is_paired,
    )


class NativeDecoder:
    """A whole decoder's layers and last norm in one call: the same numbers as kernel by kernel, without the Python."""

    scales_queries = False

    def __init__(
        self, library: Library, layers: Sequence[DecoderLayerParts], final_norm: Tensor, decoder: DecoderArguments
    ) -> None:
        self._library = library
        routed = [
            None if parts.routed is None else _routed_arguments(parts.routed, decoder.activation) for parts in layers
        ]
        states = [None if parts.state is None else _state_arguments(parts.state) for parts in layers]
        self._kept = (list(layers), final_norm, routed, states)  # the C side has their addresses
        self._layers = (DecoderLayerArguments * len(layers))(*map(_layer_arguments, layers, routed, states))
        self._has_states = any(states)
        decoder.layers = ctypes.addressof(self._layers)
        self._decoder = decoder
        self._cache: object = None
        self._caches = (ctypes.c_void_p * (2 * len(layers)))()
        self._rotations = (ctypes.c_void_p * (2 * max(parts.rotation + 1 for parts in layers)))()
        self._tables = (StepTableArguments * 1)()
        self._step = DecoderStepArguments(
            rotations=ctypes.addressof(self._rotations),
            caches=ctypes.addressof(self._caches),
            tables=ctypes.addressof(self._tables),
        )
        self._addresses = ctypes.addressof(decoder), ctypes.addressof(self._step)

    def __call__(
        self,
        hidden: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """bf16 [tokens, hidden] -> the normed output of the last layer; cos and sin float32 [tokens, rotated / 2],
        all pairs of one width."""
        if cache is not self._cache:
            self._attach(cache)
        if hidden.dtype is not _BF16:
            raise ValueError(f"expected bfloat16, got {hidden.dtype}")
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        turns = [part.contiguous() for pair in rotations for part in pair]
        self._set_rotations(turns)
        self._set_tables(context)
        step = self._step
        step.hidden, step.out = hidden.data_ptr(), out.data_ptr()
        step.query_start, step.seq_lens = context.query_start.data_ptr(), context.seq_lens.data_ptr()
        step.visible = None if context.visible is None else context.visible.data_ptr()
        step.tokens, step.sequences = hidden.shape[0], len(context.query_lens)
        step.rows, step.num_rows = (None, 0) if rows is None else (rows.data_ptr(), len(rows))
        lengths = None
        if self._has_states:
            step.runs, lengths = runs_of(context.runs)
        library = self._library
        library._decoder(library._runtime, *self._addresses)
        del lengths
        return out

    def _set_rotations(self, turns: list[Tensor]) -> None:
        """Pairs of cos and sin, one after the other."""
        if len(turns) != len(self._rotations):
            raise ValueError(f"{len(turns)} tensors of rotary positions instead of {len(self._rotations)}")
        for number, part in enumerate(turns):
            if part.dtype is not torch.float32:
                raise ValueError(f"expected float32, got {part.dtype}")
            self._rotations[number] = part.data_ptr()
        self._decoder.rotary = 2 * turns[0].shape[1]

    def _set_tables(self, context: AttentionContext) -> None:
        for number in range(len(self._tables)):
            own, table = context.by_table(number), self._tables[number]
            blocks = own.block_tables
            table.slots, table.block_tables, table.max_blocks = (
                own.slots.data_ptr(),
                blocks.data_ptr(),
                blocks.stride(0),
            )

    def _attach(self, cache: KVCache) -> None:
        layers = [layer for layer in cache if isinstance(layer, LayerCache)]
        dtype = layers[0].keys.dtype if layers else None
        if dtype not in CACHE_DTYPES or len(cache) != len(self._layers):
            raise ValueError("the cache does not fit the decoder: one bf16 or int8 pair for every layer that attends")
        for number, (arguments, own) in enumerate(zip(self._layers, cache, strict=True)):
            parts = own.parts if isinstance(own, StateCache) else own[:2]
            wanted = (_BF16, torch.float32) if isinstance(own, StateCache) else (dtype, dtype)
            fits = [one.is_contiguous() and one.dtype is kind for one, kind in zip(parts, wanted, strict=False)]
            if not all(fits) or isinstance(own, StateCache) is not bool(arguments.state):
                raise ValueError(f"the cache of layer {number} does not fit the decoder: not contiguous, or of a kind")
            self._caches[2 * number] = parts[0].data_ptr()
            self._caches[2 * number + 1] = parts[1].data_ptr() if len(parts) > 1 else None
            arguments.table = own.table if isinstance(own, LayerCache) else 0
        self._decoder.int8_cache = dtype is torch.int8
        self._decoder.block_size = layers[0].keys.shape[2]
        self._tables = (StepTableArguments * (1 + max(layer.table for layer in layers)))()
        self._step.tables = ctypes.addressof(self._tables)
        self._cache = cache
