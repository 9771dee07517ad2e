"""Loads the C++ kernels (`native/`) through ctypes: the shared object, its instruction sets and its structs.

Threads come from torch's own OpenMP pool. A row's result depends neither on the number of threads nor on the rows
computed together with it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from sensorium.kernels.backend import Activation, GrammarFunctions
from sensorium.kernels.cpu.memory import WeightMemory

Isa = Literal["portable", "avx2", "avx512", "avx512_bf16"]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "avx512_bf16")  # the index is the C side's number
ABI = 21
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh", "clamped_swiglu")

_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "set_threads": (_P, _I32),
    "use_large_pages": (_P, _I64),
    "pack_bf16": (_P, _P, _I64, _I64, _I64, _I64, _I64, _P),
    "unpack_bf16": (_P, _P, _I64, _I64, _P, _I64, _P),
    "compact": (_P, _P, _P, _I64, _P, _P),
    "unpack_compact": (_P, _P, _P, _I64, _P),
    "gather_rows": (_P, _I64, _P, _I64, _P),
    "block_bytes": (_P, _I32, _I64, _I64),
    "quantize": (_P, _P, _P, _I64, _I64, _I64),
    "pack_codes": (_P, _P, _P, _I64, _I64, _I64),
    "unpack_quantized": (_P, _P, _P, _I64, _P),
    "linear": (_P, _P, _P, _I64, _I64, _P, _I32),
    "attention": (_P, _P),
    "rms_norm": (_P, _P, _I64, _P, _P, _I64, _I64, _I64, _F32, _F32),
    "add_rms_norm": (_P, _P, _P, _P, _P, _P, _I64, _I64, _F32, _F32),
    "layer_norm": (_P, _P, _P, _P, _P, _I64, _I64, _F32),
    "gated": (_P, _P, _P, _I64, _I64, _I32),
    "activate": (_P, _P, _P, _I64, _I32),
    "rope": (_P, _P, _I64, _P, _I64, _P, _P, _I64, _I64, _I64, _I64),
    "decoder": (_P, _P, _P),
    "experts": (_P, _P, _P),
    "causal_conv": (_P, _P),
    "delta_rule": (_P, _P),
    "delta_gates": (_P, _P, _P, _P, _I64, _I64, _P, _P),
    "norm_gated": (_P, _P, _P, _I64, _P, _P, _I64, _I64, _I64, _F32),
    "choose": (_P, _P, _P, _I64, _P, _P),
    "draw": (_P, _P),
    "draw_held": (_P, _P),
    "write_kv": (_P, _P, _I64, _P, _I64, _P, _P, _P, _I64, _I64, _I64, _I64, _I32),
}
_RETURNS = {"block_bytes": _I64, "take_held": _I64}
_LOCKED: dict[str, tuple[Any, ...]] = {"take_held": (_P, _P, _P, _I64, _P)}
"""What keeps the interpreter's lock: it is shorter than giving that back."""


class LinearArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("weight", _P),
        ("scales", _P),
        ("zeros", _P),
        ("bias", _P),
        ("n", _I64),
        ("k", _I64),
        ("layout", _I32),
        ("group", _I32),
    ]


class BlockSegmentArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", _P),
        ("first_row", _I64),
        ("rows", _I64),
        ("first_panel", _I64),
        ("kind", _I32),
        ("in_file", _I32),
    ]


class AttentionArguments(ctypes.Structure):
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
        ("visible", _P),
        ("sinks", _P),
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


class ExpertsArguments(ctypes.Structure):
    _fields_: ClassVar = [("gate_up", _P), ("down", _P), ("count", _I32), ("activation", _I32)]


class ExpertStepArguments(ctypes.Structure):
    _fields_: ClassVar = [("x", _P), ("y", _P), ("chosen", _P), ("weights", _P), ("tokens", _I64), ("per_token", _I32)]


class RoutingArguments(ctypes.Structure):
    _fields_: ClassVar = [("experts", _I32), ("per_token", _I32), ("renormalizes", _I32), ("scale", _F32)]


class DrawArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("logits", _P),
        ("rows", _P),
        ("masks", _P),
        ("temperatures", _P),
        ("uniforms", _P),
        ("tokens", _P),
        ("highest", _P),
        ("stride", _I64),
        ("vocab", _I64),
        ("words", _I64),
        ("count", _I64),
    ]


class GrammarArguments(ctypes.Structure):
    _fields_: ClassVar = [(name, _P) for name in GrammarFunctions._fields]


class HeldDrawArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("grammars", _P),
        ("logits", _P),
        ("rows", _P),
        ("temperatures", _P),
        ("costs", _P),
        ("tokens", _P),
        ("highest", _P),
        ("stride", _I64),
        ("vocab", _I64),
        ("count", _I64),
    ]


class RoutedArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("experts", _P),
        ("router", _P),
        ("shared_gate_up", _P),
        ("shared_down", _P),
        ("shared_gate", _P),
        ("routing", RoutingArguments),
        ("activation", _I32),
    ]


class StateRunsArguments(ctypes.Structure):
    _fields_: ClassVar = [("lengths", _P), ("sources", _P), ("targets", _P), ("count", _I64), ("singles", _I64)]


class CausalConvArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("x", _P),
        ("weight", _P),
        ("bias", _P),
        ("y", _P),
        ("states", _P),
        ("stride", _I64),
        ("channels", _I64),
        ("taps", _I64),
        ("silu", _I32),
        ("runs", StateRunsArguments),
    ]


class DeltaRuleArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("q", _P),
        ("k", _P),
        ("v", _P),
        ("out", _P),
        ("decay", _P),
        ("learned", _P),
        ("states", _P),
        ("q_stride", _I64),
        ("k_stride", _I64),
        ("v_stride", _I64),
        ("key_heads", _I64),
        ("value_heads", _I64),
        ("key_dim", _I64),
        ("value_dim", _I64),
        ("runs", StateRunsArguments),
        ("takes_turns", _I32),
    ]


class StateMixerArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("taps", _P),
        ("bias", _P),
        ("gates", _P),
        ("rate", _P),
        ("rate_bias", _P),
        ("norm", _P),
        ("num_taps", _I64),
        ("key_heads", _I64),
        ("value_heads", _I64),
        ("key_dim", _I64),
        ("value_dim", _I64),
        ("takes_turns", _I32),
        ("eps", _F32),
    ]


class DecoderLayerArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("input_norm", _P),
        ("q_norm", _P),
        ("k_norm", _P),
        ("attended_norm", _P),
        ("mlp_norm", _P),
        ("after_norm", _P),
        ("qkv", _P),
        ("o", _P),
        ("gate_up", _P),
        ("down", _P),
        ("routed", _P),
        ("state", _P),
        ("sinks", _P),
        ("window", _I64),
        ("both_ways", _I32),
        ("gated", _I32),
        ("rotation", _I32),
        ("table", _I32),
        ("paired", _I32),
    ]


class DecoderArguments(ctypes.Structure):
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
        ("norms_whole_qk", _I32),
        ("eps", _F32),
        ("scale", _F32),
        ("norm_offset", _F32),
    ]


class StepTableArguments(ctypes.Structure):
    _fields_: ClassVar = [("slots", _P), ("block_tables", _P), ("max_blocks", _I64)]


class DecoderStepArguments(ctypes.Structure):
    _fields_: ClassVar = [
        ("hidden", _P),
        ("out", _P),
        ("rotations", _P),
        ("caches", _P),
        ("tables", _P),
        ("query_start", _P),
        ("seq_lens", _P),
        ("visible", _P),
        ("rows", _P),
        ("tokens", _I64),
        ("sequences", _I64),
        ("num_rows", _I64),
        ("runs", StateRunsArguments),
    ]


class Library:
    """The shared object with one instruction set chosen: its functions and the runtime that they take first.

    Raises OSError if it cannot be loaded, or has no kernels for `isa` or for this processor.
    """

    isa: Isa
    _set_threads: Callable[..., None]
    _use_large_pages: Callable[..., None]
    _pack_bf16: Callable[..., None]
    _unpack_bf16: Callable[..., None]
    _compact: Callable[..., None]
    _unpack_compact: Callable[..., None]
    _gather_rows: Callable[..., None]
    _block_bytes: Callable[..., int]
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
    _experts: Callable[..., None]
    _choose: Callable[..., None]
    _draw: Callable[..., None]
    _draw_held: Callable[..., None]
    _take_held: Callable[..., int]
    _causal_conv: Callable[..., None]
    _delta_rule: Callable[..., None]
    _delta_gates: Callable[..., None]
    _norm_gated: Callable[..., None]
    _write_kv: Callable[..., None]

    def __init__(self, path: Path, isa: Isa | None, threads: int | None) -> None:
        self._library = ctypes.CDLL(str(path))
        if self._library.sensorium_abi() != ABI:
            raise OSError(f"{path.name} was built for another version of this package; install the package again")
        for library, functions in ((self._library, _SIGNATURES), (ctypes.PyDLL(str(path)), _LOCKED)):
            for name, arguments in functions.items():
                function = library[f"sensorium_{name}"]
                function.argtypes, function.restype = arguments, _RETURNS.get(name)
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
        self.memory = WeightMemory(self._use_large_pages)

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        self._set_threads(self._runtime, threads)


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
