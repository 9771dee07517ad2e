"""A whole decoder in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.kernels.backend import DecoderLayerParts
from sensorium.kernels.cpu.attention import CACHE_DTYPES
from sensorium.kernels.cpu.library import DecoderArguments, DecoderLayerArguments, DecoderStepArguments, Library
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
        if not all(isinstance(weight, NativeLinear) for weight in (parts.qkv, parts.o, parts.gate_up, parts.down)):
            return False
    return bool(layers) and all(t.dtype is _BF16 and t.is_contiguous() for t in tensors)


class NativeDecoder:
    """A whole decoder's layers and last norm in one call: the same numbers as kernel by kernel, without the Python."""

    def __init__(
        self, library: Library, layers: Sequence[DecoderLayerParts], final_norm: Tensor, decoder: DecoderArguments
    ) -> None:
        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        def address(part: object) -> int:
            if not isinstance(part, NativeLinear):
                raise TypeError(f"expected a packed linear layer, got {type(part).__name__}")
            return part.address

        self._library = library
        self._kept = (list(layers), final_norm)  # the C side has their addresses
        self._layers = (DecoderLayerArguments * len(layers))(
            *(
                DecoderLayerArguments(
                    at(p.input_norm),
                    at(p.q_norm),
                    at(p.k_norm),
                    at(p.attended_norm),
                    at(p.mlp_norm),
                    at(p.after_norm),
                    address(p.qkv),
                    address(p.o),
                    address(p.gate_up),
                    address(p.down),
                    p.sliding_window or 0,
                    p.media_both_ways,
                    p.rotation,
                )
                for p in layers
            )
        )
        decoder.layers = ctypes.addressof(self._layers)
        self._decoder = decoder
        self._cache: object = None
        self._caches = (ctypes.c_void_p * (2 * len(layers)))()

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
        turns = [part.contiguous() for pair in rotations for part in pair]
        if hidden.dtype is not _BF16 or any(part.dtype is not torch.float32 for part in turns):
            raise ValueError(f"expected bfloat16 and float32, got {hidden.dtype} and {[part.dtype for part in turns]}")
        hidden = hidden.contiguous()
        tables = context.block_tables
        out = torch.empty_like(hidden)
        addresses = (ctypes.c_void_p * len(turns))(*(part.data_ptr() for part in turns))
        self._decoder.rotary = 2 * turns[0].shape[1]
        step = DecoderStepArguments(
            hidden.data_ptr(),
            out.data_ptr(),
            ctypes.addressof(addresses),
            ctypes.addressof(self._caches),
            context.slots.data_ptr(),
            tables.data_ptr(),
            context.query_start.data_ptr(),
            context.seq_lens.data_ptr(),
            None if context.visible is None else context.visible.data_ptr(),
            None if rows is None else rows.data_ptr(),
            hidden.shape[0],
            tables.stride(0),
            len(context.query_lens),
            0 if rows is None else len(rows),
        )
        library = self._library
        library._decoder(library._runtime, ctypes.addressof(self._decoder), ctypes.addressof(step))
        return out

    def _attach(self, cache: KVCache) -> None:
        flat = [tensor for layer in cache for tensor in (layer.keys, layer.values)]
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
        self._cache = cache
