"""A whole decoder in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.kernels.backend import DecoderLayerParts, RoutedParts
from sensorium.kernels.context import LayerCache
from sensorium.kernels.cpu.attention import CACHE_DTYPES
from sensorium.kernels.cpu.experts import NativeExperts
from sensorium.kernels.cpu.library import (
    DecoderArguments,
    DecoderLayerArguments,
    DecoderStepArguments,
    Library,
    RoutedArguments,
    RoutingArguments,
    StepTableArguments,
)
from sensorium.kernels.cpu.linear import NativeLinear

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, KVCache

_BF16 = torch.bfloat16


def can_stack(layers: Sequence[DecoderLayerParts], final_norm: Tensor) -> bool:
    """Whether there are layers, all weights are native ones and all norms contiguous bf16."""
    tensors = [final_norm]
    for parts in layers:
        norms = (parts.input_norm, parts.q_norm, parts.k_norm, parts.attended_norm, parts.mlp_norm, parts.after_norm)
        tensors += [norm for norm in norms if norm is not None]
        if not all(isinstance(weight, NativeLinear) for weight in _weights(parts)):
            return False
        if parts.routed is not None and not isinstance(parts.routed.experts, NativeExperts):
            return False
    return bool(layers) and all(t.dtype is _BF16 and t.is_contiguous() for t in tensors)


def _weights(parts: DecoderLayerParts) -> list[object]:
    routed = parts.routed
    if routed is None:
        return [parts.qkv, parts.o, parts.gate_up, parts.down]
    shared = (routed.shared_gate_up, routed.shared_down, routed.shared_gate)
    return [parts.qkv, parts.o, routed.router, *(one for one in shared if one is not None)]


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


def _layer_arguments(parts: DecoderLayerParts, routed: RoutedArguments | None) -> DecoderLayerArguments:
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
        _at(parts.sinks),
        parts.sliding_window or 0,
        parts.media_both_ways,
        parts.rotation,
    )


class NativeDecoder:
    """A whole decoder's layers and last norm in one call: the same numbers as kernel by kernel, without the Python."""

    def __init__(
        self, library: Library, layers: Sequence[DecoderLayerParts], final_norm: Tensor, decoder: DecoderArguments
    ) -> None:
        self._library = library
        routed = [
            None if parts.routed is None else _routed_arguments(parts.routed, decoder.activation) for parts in layers
        ]
        self._kept = (list(layers), final_norm, routed)  # the C side has their addresses
        self._layers = (DecoderLayerArguments * len(layers))(*map(_layer_arguments, layers, routed))
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
        library = self._library
        library._decoder(library._runtime, *self._addresses)
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
        flat = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        dtype = flat[0].dtype if flat else None
        if (
            len(flat) != len(self._caches)
            or dtype not in CACHE_DTYPES
            or any(t.dtype is not dtype or not t.is_contiguous() for t in flat)
        ):
            raise ValueError("the cache does not fit the decoder: one contiguous bf16 or int8 pair for every layer")
        self._decoder.int8_cache = dtype is torch.int8
        self._caches[:] = [tensor.data_ptr() for tensor in flat]
        self._decoder.block_size = flat[0].shape[2]
        for arguments, layer in zip(self._layers, layers, strict=True):
            arguments.table = layer.table
        self._tables = (StepTableArguments * (1 + max(layer.table for layer in layers)))()
        self._step.tables = ctypes.addressof(self._tables)
        self._cache = cache
