"""Bindings of the C++ kernels (`native/`) through ctypes: the functions of `sensorium.kernels` for bf16 on a CPU.

What a kernel does not take (other dtypes, odd head sizes, strange strides) goes to `reference`, so a result is never
wrong. Threads come from torch's own OpenMP pool. A row's result depends neither on the number of threads nor on the
rows computed together with it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from sensorium.kernels import Activation, DecoderLayerParts, Quantization
from sensorium.kernels.reference import plain as reference

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext

logger = logging.getLogger(__name__)

Isa = Literal["portable", "avx2", "avx512", "avx512_bf16"]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "avx512_bf16")  # the index is the C side's number
ABI = 7
PANEL = 32  # output columns that are stored together, kPanel of native/kernels.h
LANES = 16
QUERY_STEP = 192  # of one run; up to a tile's rows (96) the keys of a run are split among threads, which adds otherwise
COMPACT_HEAD, COMPACT_FOUR = 64, 192  # bytes of a compact panel: at its start, and for every four inputs
EXCEPTIONS = 256  # one weight in so many of a panel may have an unusual exponent
LAYOUT = 1  # of quantised weights and how they are rounded: to be raised with every change of either
_FORM_BF16, _FORM_INT8, _FORM_INT4, _FORM_ROWS, _FORM_COMPACT = 0, 1, 2, 3, 4
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh")

_BF16 = torch.bfloat16
_CACHES = (_BF16, torch.int8)
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "set_threads": (_P, _I32),
    "use_large_pages": (_P, _I64),
    "pack_bf16": (_P, _P, _I64, _I64, _I64, _I64, _I64, _P),
    "unpack_bf16": (_P, _P, _I64, _I64, _P, _I64, _P),
    "compact": (_P, _P, _P, _I64, _P, _P),
    "unpack_compact": (_P, _P, _P, _I64, _P),
    "gather_rows": (_P, _I64, _P, _I64, _P),
    "quantize": (_P, _P, _P, _I64, _I64, _I64),
    "pack_codes": (_P, _P, _P, _I64, _I64, _I64),
    "unpack_quantized": (_P, _P, _P, _I64, _P),
    "linear": (_P, _P, _P, _I64, _I64, _P, _I32),
    "attention": (_P, _P),
    "rms_norm": (_P, _P, _I64, _P, _P, _I64, _I64, _I64, _F32),
    "add_rms_norm": (_P, _P, _P, _P, _P, _P, _I64, _I64, _F32),
    "layer_norm": (_P, _P, _P, _P, _P, _I64, _I64, _F32),
    "gated": (_P, _P, _P, _I64, _I64, _I32),
    "activate": (_P, _P, _P, _I64, _I32),
    "rope": (_P, _P, _I64, _P, _I64, _P, _P, _I64, _I64, _I64, _I64),
    "decoder": (_P, _P, _P),
    "write_kv": (_P, _P, _I64, _P, _I64, _P, _P, _P, _I64, _I64, _I64, _I64, _I32),
}


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        ("weight", _P),
        ("scales", _P),
        ("zeros", _P),
        ("bias", _P),
        ("n", _I64),
        ("k", _I64),
        ("form", _I32),
        ("group", _I32),
    ]


class _Attention(ctypes.Structure):
    _fields_: ClassVar = [
        ("q", _P),
        ("out", _P),
        ("k", _P),
        ("v", _P),
        ("q_stride", _I64),
        ("out_stride", _I64),
        ("k_block_stride", _I64),
        ("k_head_stride", _I64),
        ("k_row_stride", _I64),
        ("v_block_stride", _I64),
        ("v_head_stride", _I64),
        ("v_row_stride", _I64),
        ("block_tables", _P),
        ("query_start", _P),
        ("seq_lens", _P),
        ("max_blocks", _I64),
        ("sequences", _I32),
        ("heads", _I32),
        ("kv_heads", _I32),
        ("head_dim", _I32),
        ("block_size", _I32),
        ("causal", _I32),
        ("window", _I32),
        ("int8", _I32),
        ("fp32", _I32),
        ("scale", _F32),
    ]


def _packed_like(x: Tensor, dtype: torch.dtype = _BF16) -> bool:
    """Whether the heads of each token lie side by side: [tokens, heads, head_dim], any distance between tokens."""
    head_dim = x.shape[2]
    return x.dtype is dtype and x.stride(2) == 1 and (x.stride(1) == head_dim or x.shape[1] == 1)


class _DecoderLayer(ctypes.Structure):
    _fields_: ClassVar = [
        ("input_norm", _P),
        ("q_norm", _P),
        ("k_norm", _P),
        ("post_norm", _P),
        ("qkv", _P),
        ("o", _P),
        ("gate_up", _P),
        ("down", _P),
        ("window", _I64),
    ]


class _Decoder(ctypes.Structure):
    _fields_: ClassVar = [
        ("layers", _P),
        ("final_norm", _P),
        ("num_layers", _I32),
        ("heads", _I32),
        ("kv_heads", _I32),
        ("head_dim", _I32),
        ("rotary", _I32),
        ("block_size", _I32),
        ("activation", _I32),
        ("int8_cache", _I32),
        ("eps", _F32),
        ("scale", _F32),
    ]


class _DecoderStep(ctypes.Structure):
    _fields_: ClassVar = [
        ("hidden", _P),
        ("out", _P),
        ("cos", _P),
        ("sin", _P),
        ("caches", _P),
        ("slots", _P),
        ("block_tables", _P),
        ("query_start", _P),
        ("seq_lens", _P),
        ("rows", _P),
        ("tokens", _I64),
        ("max_blocks", _I64),
        ("sequences", _I64),
        ("num_rows", _I64),
    ]


class Native:
    """The library with one instruction set chosen. Its methods have the signatures of `sensorium.kernels`."""

    isa: Isa
    _set_threads: Callable[..., None]
    _use_large_pages: Callable[..., None]
    _pack_bf16: Callable[..., None]
    _unpack_bf16: Callable[..., None]
    _compact: Callable[..., None]
    _unpack_compact: Callable[..., None]
    _gather_rows: Callable[..., None]
    _quantize: Callable[..., None]
    _pack_codes: Callable[..., None]
    _unpack_quantized: Callable[..., None]
    _linear: Callable[..., None]
    _attention: Callable[..., None]
    _rms_norm: Callable[..., None]
    _add_rms_norm: Callable[..., None]
    _layer_norm: Callable[..., None]
    _gated: Callable[..., None]
    _activate: Callable[..., None]
    _rope: Callable[..., None]
    _decoder: Callable[..., None]
    _write_kv: Callable[..., None]

    def __init__(self, path: Path, isa: Isa | None, threads: int | None) -> None:
        self._library = ctypes.CDLL(str(path))
        if self._library.sensorium_abi() != ABI:
            raise OSError(f"{path.name} was built for another version of this package; install the package again")
        for name, arguments in _SIGNATURES.items():
            function = self._library[f"sensorium_{name}"]
            function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        fork = _torch_fork()
        self.threads = threads or torch.get_num_threads()
        self._library.sensorium_open.argtypes = (_I32, _I32, _P)
        self._library.sensorium_open.restype = _P
        self._library.sensorium_isa.argtypes, self._library.sensorium_isa.restype = (_P,), ctypes.c_char_p
        number = -1 if isa is None else ISAS.index(isa) if isa in ISAS else len(ISAS)
        self._runtime = self._library.sensorium_open(number, self.threads, fork)
        if not self._runtime:
            raise OSError(f"there are no {isa} kernels for this processor")
        self.isa = self._library.sensorium_isa(self._runtime).decode()
        self.pooled = fork is not None

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        self._set_threads(self._runtime, threads)

    def describe(self) -> str:
        pool = f"{self.threads} threads of torch's pool" if self.pooled else "one thread, torch's pool was not found"
        return f"native {self.isa} kernels, {pool}"

    def supports(self, x: Tensor) -> bool:
        return x.dtype is _BF16 and x.device.type == "cpu"

    def empty_linear(
        self,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = _BF16,
        device: torch.device | None = None,
        quantization: Quantization | None = None,
    ) -> Form:
        """A form to be filled; `dtype` and `device` are the reference's business."""
        if quantization is None:
            return PackedLinear(self, out_features, in_features)
        return QuantizedLinear(self, out_features, in_features, quantization)

    @property
    def quantized_layout(self) -> str:
        """Names the form of quantised weights: those of one layout fit into one another's place."""
        return f"{LAYOUT} {self.isa}"

    def quantized_in_place(
        self, kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
    ) -> Form:
        """A form over what `QuantizedLinear.parts` gave, where it lies; it must not change while the form lives."""
        return QuantizedLinear(self, out_features, in_features, quantization, kept)

    def linear_in_place(self, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int) -> Form | None:
        """A form over bf16 rows [n, in] at (first row, rows) where they lie; they must not change while it lives."""
        if not self.isa.startswith("avx512") or any(rows.stride(1) != 1 for _, rows in parts):
            return None  # elsewhere packing on the way would take longer than reading
        return RowsLinear(self, parts, out_features, in_features)

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, quantization: Quantization | None = None) -> Form:
        packed = self.empty_linear(weight.shape[0], weight.shape[1], quantization=quantization)
        packed.fill(0, weight)
        packed.set_bias(bias)
        return packed

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is not _BF16 or weight.dtype is not _BF16:
            return reference.rms_norm(x, weight, eps)
        size = x.shape[-1]
        x = x.contiguous()
        out = torch.empty_like(x)
        self._rms_norm(
            self._runtime, x.data_ptr(), size, weight.data_ptr(), out.data_ptr(), size, x.numel() // size, size, eps
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum is written into `residual`."""
        if not (x.dtype is residual.dtype is weight.dtype is _BF16 and x.is_contiguous() and residual.is_contiguous()):
            return reference.add_rms_norm(x, residual, weight, eps)
        size = x.shape[-1]
        out = torch.empty_like(x)
        target = residual.data_ptr()
        self._add_rms_norm(
            self._runtime, x.data_ptr(), target, weight.data_ptr(), out.data_ptr(), target, x.numel() // size, size, eps
        )
        return out, residual

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        size = x.shape[-1]
        if x.dtype is not _BF16 or any(t is not None and t.dtype is not _BF16 for t in (weight, bias)):
            return torch.nn.functional.layer_norm(x, (size,), weight, bias, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._layer_norm(
            self._runtime,
            x.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            eps,
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.gated(gate_up, "silu")

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        if x.dtype is not _BF16 or not x.is_contiguous():
            return reference.gated(x, activation)
        size = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], size))
        self._gated(
            self._runtime, x.data_ptr(), out.data_ptr(), out.numel() // size, size, ACTIVATIONS.index(activation)
        )
        return out

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """In place where the layout allows it."""
        if x.dtype is not _BF16:
            return reference.activate(x, activation)
        x = x.contiguous()
        at = x.data_ptr()
        self._activate(self._runtime, at, at, x.numel(), ACTIVATIONS.index(activation))
        return x

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates in place."""
        if not (_packed_like(q) and _packed_like(k) and cos.dtype is sin.dtype is torch.float32):
            return reference.rope(q, k, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        tokens, heads, head_dim = q.shape
        rotary = 2 * cos.shape[1]
        c, s = cos.data_ptr(), sin.data_ptr()
        for x, count in ((q, heads), (k, k.shape[1])):
            at, stride = x.data_ptr(), x.stride(0)
            self._rope(self._runtime, at, stride, at, stride, c, s, tokens, count, head_dim, rotary)
        return q, k

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        if not (
            _packed_like(k)
            and _packed_like(v)
            and k_cache.dtype is v_cache.dtype
            and k_cache.dtype in _CACHES
            and k_cache.is_contiguous()
            and v_cache.is_contiguous()
            and slots.is_contiguous()
        ):
            reference.write_kv(k, v, k_cache, v_cache, slots)
            return
        _, heads, block_size, _ = k_cache.shape
        self._write_kv(
            self._runtime,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            k.shape[0],
            heads,
            k.shape[2],
            block_size,
            k_cache.dtype is torch.int8,
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context: AttentionContext,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        tokens, heads, head_dim = q.shape
        tables = context.block_tables
        fp32 = self._attends_in_float32(q)
        dtype, caches = (torch.float32, (torch.float32,)) if fp32 else (_BF16, _CACHES)
        if not (
            _packed_like(q, dtype)
            and k_cache.dtype is v_cache.dtype
            and k_cache.dtype in caches
            and head_dim % 2 == 0
            and k_cache.stride(3) == v_cache.stride(3) == 1
            and tables.stride(-1) == 1
        ):
            return reference.paged_attention(q, k_cache, v_cache, context, scale, sliding_window)
        out = q.new_empty((tokens, heads, head_dim))
        k_strides, v_strides = k_cache.stride(), v_cache.stride()
        arguments = _Attention(
            q.data_ptr(),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q.stride(0),
            heads * head_dim,
            k_strides[0],
            k_strides[1],
            k_strides[2],
            v_strides[0],
            v_strides[1],
            v_strides[2],
            tables.data_ptr(),
            context.query_start.data_ptr(),
            context.seq_lens.data_ptr(),
            tables.stride(0),
            len(context.query_lens),
            heads,
            k_cache.shape[1],
            head_dim,
            k_cache.shape[2],
            1,
            sliding_window or 0,
            k_cache.dtype is torch.int8,
            fp32,
            scale,
        )
        self._attention(self._runtime, ctypes.addressof(arguments))
        return out

    def _attends_in_float32(self, q: Tensor) -> bool:
        return q.dtype is torch.float32 and self.isa != "portable"  # which is a third as fast as torch

    def varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
    ) -> Tensor:
        if not (self._attends(q, k, v) and window != 0):
            return reference.varlen_attention(q, k, v, lengths, scale, window)
        lens = torch.tensor(lengths, dtype=torch.int32)
        start = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lens, 0, out=start[1:])
        return self._both_ways(q, k, v, start, lens, scale, window)

    def query_step(self, q: Tensor) -> int:
        return QUERY_STEP if self._attends(q) else reference.query_step(q)

    def run_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if not self._attends(q, k, v):
            return reference.run_attention(q, k, v, scale)
        start, lens = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, len(q)], [len(k)]))
        return self._both_ways(q, k, v, start, lens, scale)

    def _attends(self, *tensors: Tensor) -> bool:
        dtype = torch.float32 if self._attends_in_float32(tensors[0]) else _BF16
        return all(_packed_like(t, dtype) for t in tensors) and tensors[0].shape[2] % 2 == 0

    def _both_ways(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, lens: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """`start` int32 [runs + 1]: where each run's queries begin; `lens` int32 [runs]: its keys."""
        tokens, heads, head_dim = q.shape
        out = q.new_empty((tokens, heads, head_dim))
        arguments = _Attention(
            q.data_ptr(),
            out.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            q.stride(0),
            heads * head_dim,
            0,
            head_dim,
            k.stride(0),
            0,
            head_dim,
            v.stride(0),
            None,
            start.data_ptr(),
            lens.data_ptr(),
            0,
            len(lens),
            heads,
            k.shape[1],
            head_dim,
            1,
            0,
            window or 0,
            0,
            self._attends_in_float32(q),
            scale,
        )
        self._attention(self._runtime, ctypes.addressof(arguments))
        return out

    def decoder(
        self,
        layers: Sequence[DecoderLayerParts],
        final_norm: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        eps: float,
        activation: Activation = "silu",
    ) -> NativeDecoder | None:
        """All layers as one call, or None where a part has a form or dtype that needs the kernels one by one."""
        tensors = [final_norm]
        for parts in layers:
            tensors += [t for t in (parts.input_norm, parts.q_norm, parts.k_norm, parts.post_norm) if t is not None]
            if not all(isinstance(form, NativeLinear) for form in (parts.qkv, parts.o, parts.gate_up, parts.down)):
                return None
        if not layers or head_dim % 2 or any(t.dtype is not _BF16 or not t.is_contiguous() for t in tensors):
            return None
        return NativeDecoder(
            self,
            layers,
            final_norm,
            _Decoder(
                None,
                final_norm.data_ptr(),
                len(layers),
                num_heads,
                num_kv_heads,
                head_dim,
                0,
                0,
                ACTIVATIONS.index(activation),
                0,
                eps,
                scale,
            ),
        )


class NativeDecoder:
    """A whole decoder's layers and last norm in one call: the same numbers as kernel by kernel, without the Python."""

    def __init__(
        self, native: Native, layers: Sequence[DecoderLayerParts], final_norm: Tensor, decoder: _Decoder
    ) -> None:
        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        def form(part: object) -> int:
            if not isinstance(part, NativeLinear):
                raise TypeError(f"expected a packed linear layer, got {type(part).__name__}")
            return part.address

        self._native = native
        self._kept = (list(layers), final_norm)  # the C side has their addresses
        self._layers = (_DecoderLayer * len(layers))(
            *(
                _DecoderLayer(
                    at(p.input_norm),
                    at(p.q_norm),
                    at(p.k_norm),
                    at(p.post_norm),
                    form(p.qkv),
                    form(p.o),
                    form(p.gate_up),
                    form(p.down),
                    p.sliding_window or 0,
                )
                for p in layers
            )
        )
        decoder.layers = ctypes.addressof(self._layers)
        self._decoder = decoder
        self._cache: object = None
        self._caches = (_P * (2 * len(layers)))()

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: list[tuple[Tensor, Tensor]],
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """bf16 [tokens, hidden] -> the normed output of the last layer; cos and sin float32 [tokens, rotated / 2]."""
        if cache is not self._cache:
            self._attach(cache)
        if hidden.dtype is not _BF16 or cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
            raise ValueError(f"expected bfloat16 and float32, got {hidden.dtype}, {cos.dtype} and {sin.dtype}")
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
        tables = context.block_tables
        out = torch.empty_like(hidden)
        self._decoder.rotary = 2 * cos.shape[1]
        step = _DecoderStep(
            hidden.data_ptr(),
            out.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            ctypes.addressof(self._caches),
            context.slots.data_ptr(),
            tables.data_ptr(),
            context.query_start.data_ptr(),
            context.seq_lens.data_ptr(),
            None if rows is None else rows.data_ptr(),
            hidden.shape[0],
            tables.stride(0),
            len(context.query_lens),
            0 if rows is None else len(rows),
        )
        native = self._native
        native._decoder(native._runtime, ctypes.addressof(self._decoder), ctypes.addressof(step))
        return out

    def _attach(self, cache: list[tuple[Tensor, Tensor]]) -> None:
        flat = [tensor for pair in cache for tensor in pair]
        dtype = flat[0].dtype if flat else None
        if (
            len(flat) != len(self._caches)
            or dtype not in _CACHES
            or any(t.dtype is not dtype or not t.is_contiguous() for t in flat)
        ):
            raise ValueError("the cache does not fit the decoder: one contiguous bf16 or int8 pair for every layer")
        self._decoder.int8_cache = dtype is torch.int8
        self._caches[:] = [tensor.data_ptr() for tensor in flat]
        self._decoder.block_size = flat[0].shape[2]
        self._cache = cache


class NativeLinear:
    """A linear layer's weight in panels that the kernels read, made for `fill` to stream rows into."""

    __slots__ = ("_arguments", "_bias", "_native", "_packed", "address", "in_features", "out_features")

    def __init__(self, native: Native, out_features: int, in_features: int, packed: Tensor, form: int) -> None:
        self._native = native
        self.out_features, self.in_features = out_features, in_features
        self._packed = packed
        self._bias: Tensor | None = None
        native._use_large_pages(packed.data_ptr(), packed.nbytes)
        self._arguments = _Linear(packed.data_ptr(), None, None, None, out_features, in_features, form, 0)
        self.address = ctypes.addressof(self._arguments)

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def set_bias(self, bias: Tensor | None) -> None:
        self._bias = None if bias is None else bias.to(torch.float32, copy=True).contiguous()
        self._arguments.bias = None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype = _BF16) -> Tensor:
        """[.., in] bf16 -> [.., out] in bf16 or float32."""
        size = self.in_features
        shape = x.shape
        if shape[-1] != size or x.dtype is not _BF16:
            raise ValueError(f"expected bfloat16 [.., {size}], got {x.dtype} {tuple(shape)}")
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self.out_features), dtype=dtype)
        native = self._native
        native._linear(
            native._runtime, self.address, x.data_ptr(), size, x.numel() // size, y.data_ptr(), dtype is not _BF16
        )
        return y

    def _checked(self, first_row: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`rows` as the packing functions take them."""
        if rows.shape[1] != self.in_features or first_row < 0 or first_row + rows.shape[0] > self.out_features:
            raise ValueError(f"rows {tuple(rows.shape)} do not fit at row {first_row} of {self.out_features}")
        rows = rows.to(dtype)
        return rows if rows.stride(1) == 1 else rows.contiguous()


class PackedLinear(NativeLinear):
    """bf16 weights."""

    __slots__ = ()

    def __init__(self, native: Native, out_features: int, in_features: int) -> None:
        columns = -(-out_features // LANES) * LANES
        packed = torch.empty(columns * (in_features + in_features % 2), dtype=_BF16)
        super().__init__(native, out_features, in_features, packed, _FORM_BF16)

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Put rows [n, in] at `first_row`; the tensor is not kept."""
        rows = self._checked(first_row, rows, _BF16)
        native = self._native
        native._pack_bf16(
            native._runtime,
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            first_row,
            self.out_features,
            self.in_features,
            self._packed.data_ptr(),
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n]."""
        return _unpacked(self, ids)


def _unpacked(form: NativeLinear, ids: Tensor) -> Tensor:
    ids = ids.contiguous()
    out = torch.empty((ids.numel(), form.in_features), dtype=_BF16)
    native = form._native
    native._unpack_bf16(
        native._runtime,
        form._packed.data_ptr(),
        form.out_features,
        form.in_features,
        ids.data_ptr(),
        ids.numel(),
        out.data_ptr(),
    )
    return out


class RowsLinear(NativeLinear):
    """bf16 weights where they already are, such as a checkpoint's file: nothing is copied, the rows are kept.

    The numbers of packed weights, at about half the speed where arithmetic is the limit. `pack` makes them that, in 12
    bits each where that can be: see native/compact.h.
    """

    __slots__ = ("_exceptions", "_parts")

    def __init__(
        self, native: Native, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int
    ) -> None:
        self._parts = list(parts)
        self._exceptions: Tensor | None = None  # int64, of compact weights
        at = torch.zeros(out_features, dtype=torch.int64)
        for first, rows in self._parts:
            if rows.dtype is not _BF16 or rows.shape[1] != in_features or rows.stride(1) != 1:
                raise ValueError(f"expected bfloat16 rows of {in_features}, got {rows.dtype} {tuple(rows.shape)}")
            at[first : first + len(rows)] = torch.arange(len(rows)) * (2 * rows.stride(0)) + rows.data_ptr()
        if not at.all():
            raise ValueError("not every row has a place")
        super().__init__(native, out_features, in_features, at, _FORM_ROWS)

    @property
    def nbytes(self) -> int:
        extra = 0 if self._exceptions is None else self._exceptions.nbytes
        return super().nbytes + self.mapped_bytes + extra

    @property
    def mapped_bytes(self) -> int:
        return sum(rows.nbytes for _, rows in self._parts)

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("these rows are where they are")

    def pack(self) -> None:
        """Copy the rows into panels and let go of them; whoever has `address` computes with the copy from now on."""
        if self._parts and not self._compact():
            packed = PackedLinear(self._native, self.out_features, self.in_features)
            for first, rows in self._parts:
                packed.fill(first, rows)
            self._arguments.weight, self._arguments.form = packed._packed.data_ptr(), _FORM_BF16
            self._packed = packed._packed
        self._parts = []

    def _compact(self) -> bool:
        """Without loss in three quarters of the memory; False if too many weights have unusual exponents."""
        panels = -(-self.out_features // PANEL)
        room = PANEL + max(PANEL, self.in_features * PANEL // EXCEPTIONS)  # the first for what pads an odd size
        size = COMPACT_HEAD + -(-self.in_features // 4) * COMPACT_FOUR
        packed = torch.empty(panels * size, dtype=torch.uint8)
        self._native._use_large_pages(packed.data_ptr(), packed.nbytes)
        found, counts = torch.empty((panels, room), dtype=torch.int64), torch.empty(panels, dtype=torch.int64)
        self._native._compact(
            self._native._runtime, self.address, packed.data_ptr(), room, found.data_ptr(), counts.data_ptr()
        )
        if int(counts.min()) < 0:
            return False
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + (panels + 1)
        self._exceptions = torch.cat([starts, found[torch.arange(room) < counts[:, None]]])
        self._packed = packed
        self._arguments.weight, self._arguments.scales = packed.data_ptr(), self._exceptions.data_ptr()
        self._arguments.form = _FORM_COMPACT
        return True

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n]."""
        if not self._parts and self._exceptions is None:
            return _unpacked(self, ids)
        native, ids = self._native, ids.contiguous()
        out = torch.empty((ids.numel(), self.in_features), dtype=_BF16)
        if self._parts:
            native._gather_rows(self._packed.data_ptr(), self.in_features, ids.data_ptr(), ids.numel(), out.data_ptr())
        else:
            native._unpack_compact(native._runtime, self.address, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out


class QuantizedLinear(NativeLinear):
    """int8 weights with a scale per output, or int4 weights with a float16 scale (and a zero) per output and group.

    Activations are quantised to int8 on the way in, a scale per row (int8, whose outliers take two bytes) or per
    row and group (int4).
    """

    __slots__ = ("_groups", "_scales", "_zeros", "bits", "group", "mapped_bytes")

    def __init__(
        self,
        native: Native,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`kept`: what `parts` of such a form gave, used where it lies; ValueError if it does not fit."""
        bits = quantization.bits
        self.bits, self.group = bits, quantization.group if bits == 4 else -(-in_features // 4) * 4
        self._groups = -(-in_features // self.group)
        columns = -(-out_features // LANES) * LANES
        size = columns * self._groups * self.group * bits // 8
        shape = (-(-out_features // PANEL), self._groups, PANEL)
        dtype = torch.float16 if bits == 4 else torch.float32
        if kept is None:
            packed, scales = torch.empty(size, dtype=torch.uint8), torch.zeros(shape, dtype=dtype)
        else:
            packed, scales = kept["packed"], kept["scales"]
            if packed.shape != (size,) or scales.shape != shape or (packed.dtype, scales.dtype) != (torch.uint8, dtype):
                raise ValueError(f"weights of another form: {tuple(packed.shape)} with scales {tuple(scales.shape)}")
        super().__init__(native, out_features, in_features, packed, _FORM_INT4 if bits == 4 else _FORM_INT8)
        self._scales = scales
        self._zeros: Tensor | None = None
        self.mapped_bytes = 0 if kept is None else packed.nbytes + scales.nbytes
        self._arguments.scales = self._scales.data_ptr()
        self._arguments.group = self.group

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._scales.nbytes + (0 if self._zeros is None else self._zeros.nbytes)

    def parts(self) -> dict[str, Tensor]:
        """All of a form that has neither zeros nor a bias yet, to be kept for another start."""
        return {"packed": self._packed, "scales": self._scales}

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Quantise rows [n, in] and put them at `first_row`; the tensor is not kept."""
        rows = self._checked(first_row, rows, _BF16)
        native = self._native
        native._quantize(native._runtime, self.address, rows.data_ptr(), rows.stride(0), rows.shape[0], first_row)

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Put rows that are quantised already at `first_row`: see `QuantizedForm`."""
        codes = self._checked(first_row, codes, torch.uint8)
        places = torch.arange(first_row, first_row + codes.shape[0])
        panels, columns = places // PANEL, places % PANEL
        self._scales[panels, :, columns] = scales.to(self._scales.dtype)
        if zeros is not None:
            if self.bits != 4:
                raise ValueError("int8 weights have no zero points")
            if self._zeros is None:
                self._zeros = torch.full(self._scales.shape, 8, dtype=torch.uint8)
                self._arguments.zeros = self._zeros.data_ptr()
            self._zeros[panels, :, columns] = zeros.to(torch.uint8)
        native = self._native
        native._pack_codes(native._runtime, self.address, codes.data_ptr(), codes.stride(0), codes.shape[0], first_row)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantised weight rows [n, in] of output indices int64 [n]."""
        ids = ids.contiguous()
        out = torch.empty((ids.numel(), self.in_features), dtype=_BF16)
        native = self._native
        native._unpack_quantized(native._runtime, self.address, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out


Form = PackedLinear | RowsLinear | QuantizedLinear


def _torch_fork() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch computes with: one pool of threads, not two."""
    for path in _openmp_paths():
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, _P).value
        except (OSError, AttributeError):
            continue
    return None


def _openmp_paths() -> Iterator[str]:
    """Loaded OpenMP libraries, torch's own first: a wheel of something else may bring another one."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    paths = {line[line.index("/") :] for line in maps.splitlines() if "/" in line and "omp" in line.rpartition("/")[2]}
    yield from sorted(paths, key=lambda path: "/torch" not in path)


def library_path() -> Path | None:
    """Where the package's build put the library; None when it was installed without a compiler."""
    folder = Path(__file__).parent
    names = [f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)


@functools.cache
def load(isa: Isa | None = None, threads: int | None = None) -> Native:
    """The library with the best instruction set of this processor, or with one that a test asks for. Raises OSError."""
    path = library_path()
    if path is None:
        raise OSError("the native library was not built: the package was installed without a C++ compiler")
    return Native(path, isa, threads)


@functools.cache
def _default() -> Native | None:
    try:
        return load()
    except (OSError, AttributeError) as error:
        logger.warning("native kernels cannot be used, computing with torch alone (slower): %s", error)
        return None


def available() -> bool:
    return _default() is not None


def describe() -> str:
    native = _default()
    return "torch reference kernels" if native is None else native.describe()
