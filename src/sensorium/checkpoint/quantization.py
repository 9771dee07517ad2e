"""What a checkpoint says of its quantised weights: `quantization_config` of every kind that is served, in one dialect.

AWQ as AutoAWQ writes it, GPTQ as AutoGPTQ and GPTQModel do, both as AutoRound does, compressed-tensors as
llm-compressor does, FP8 as DeepSeek, modelopt, FBGEMM and AutoFP8 do, bitsandbytes, MLX and HQQ, GPT-OSS's mxfp4. Which
layers are quantised is not read here: their tensors' names tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from sensorium.errors import CheckpointError

SUPPORTED = (
    "awq (gemm and gemv, 4 bits), gptq (2, 3, 4 or 8 bits), compressed-tensors (pack-quantized and int-quantized, 4 "
    "or 8 bits; float-quantized, nvfp4 and mxfp4), auto-round (packed as auto_gptq or auto_awq), fp8, fbgemm_fp8, "
    "modelopt (FP8 and NVFP4), bitsandbytes (nf4, fp4, int8), mlx, hqq and mxfp4"
)
_COMPRESSED_FORMATS = {
    "int": ("pack-quantized", "int-quantized", "naive-quantized"),
    "float": ("float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
}
_STRATEGIES = ("group", "channel", "tensor", "block", "tensor_group")
_MODELOPT_FP8 = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")
_MLX_BITS, _MLX_GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a checkpoint's quantised linear layers are laid out."""

    layout: Literal[
        "awq", "gptq", "compressed-tensors", "mxfp4", "gguf", "fp8", "modelopt", "bitsandbytes", "mlx", "hqq"
    ]
    bits: tuple[int, ...]  # compressed-tensors may mix several
    group: int | None = None  # inputs that share a scale, None: all. Of compressed-tensors the tensors' shapes tell
    zero_offset: int = 0  # what a stored zero lacks: 1 in GPTQ's first format
    symmetric: bool | None = None  # whether GPTQ's zeros are all the middle code; None: the file does not say
    memory_part: float = 1.0  # bytes in memory for a byte of the files
    block: tuple[int, int] | None = None  # outputs and inputs that share one of FP8's scales
    mode: str = ""  # which kind of the layout: AWQ's version, how MLX's codes are numbers
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # MLX's that have bits and a group of their own


def read_quantization(stated: object) -> StoredQuantization | None:
    """`quantization_config` as it stands in config.json. CheckpointError names what is not supported."""
    if not stated:
        return None
    if not isinstance(stated, dict):
        _refuse(f"quantization_config {stated!r}")
    method = stated.get("quant_method", _unnamed(stated))
    readers = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "mxfp4": lambda _: StoredQuantization("mxfp4", (4,)),
        "gguf": _gguf,
        "bitsandbytes": _bitsandbytes,
        "mlx": _mlx,
        "hqq": lambda stated: StoredQuantization("hqq", (), memory_part=1.8),
        "modelopt": _modelopt,
        **dict.fromkeys(("fp8", "fbgemm_fp8"), _fp8),
        **dict.fromkeys(("auto-round", "auto_round", "intel/auto-round"), _auto_round),
    }
    if not isinstance(method, str) or method not in readers:
        _refuse(f"quantisation by {method}")
    return readers[method](stated)


def _unnamed(stated: Mapping[str, Any]) -> str | None:
    """The method by what only it says."""
    signs = {"config_groups": "compressed-tensors", "quant_algo": "modelopt", "quantization": "modelopt"}
    found = next((method for key, method in signs.items() if key in stated), None)
    return found or ("mlx" if {"bits", "group_size"} <= set(stated) else None)


def _awq(stated: Mapping[str, Any]) -> StoredQuantization:
    bits = _one_of("awq", "bits", stated.get("bits", stated.get("w_bit", 4)), (4,))
    version = _one_of("awq", "version", str(stated.get("version", "gemm")).lower(), ("gemm", "gemv"))
    has_zeros = _one_of("awq", "zero_point", stated.get("zero_point", True), (True, False))
    group = _group("awq", stated.get("group_size", stated.get("q_group_size", 128)))
    return StoredQuantization("awq", (bits,), group, symmetric=not has_zeros, mode=version)


def _fp8(stated: Mapping[str, Any]) -> StoredQuantization:
    """DeepSeek's and Qwen's, in blocks or with one scale; AutoFP8's; FBGEMM's, with a scale per output."""
    _one_of("fp8", "fmt", stated.get("fmt") or "e4m3", ("e4m3", "float8_e4m3fn"))
    return StoredQuantization("fp8", (8,), block=_block("fp8", stated.get("weight_block_size")))


def _block(method: str, value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one > 0 for one in value):
        _refuse(f"{method} with weight_block_size {value!r}")
    return value[0], value[1]


def _modelopt(stated: Mapping[str, Any]) -> StoredQuantization:
    """As hf_quant_config.json has it, or config.json."""
    inner = stated.get("quantization")
    inner = inner if isinstance(inner, dict) else stated
    kinds = [inner.get("quant_algo")]
    if kinds == ["MIXED_PRECISION"] and isinstance(inner.get("quantized_layers"), dict):
        kinds = [one.get("quant_algo") for one in inner["quantized_layers"].values() if isinstance(one, dict)]
    for kind in kinds:
        _one_of("modelopt", "quant_algo", kind, (*_MODELOPT_FP8, "NVFP4"))
    return StoredQuantization("modelopt", (4, 8), memory_part=1.8 if "NVFP4" in kinds else 1.0)


def _bitsandbytes(stated: Mapping[str, Any]) -> StoredQuantization:
    """Which layers are nf4, fp4 or int8 their tensors tell."""
    if not stated.get("load_in_4bit", stated.get("_load_in_4bit")):
        return StoredQuantization("bitsandbytes", (8,))
    _one_of("bitsandbytes", "bnb_4bit_quant_type", stated.get("bnb_4bit_quant_type", "fp4"), ("nf4", "fp4"))
    return StoredQuantization("bitsandbytes", (4,), memory_part=1.9)


def _mlx(stated: Mapping[str, Any]) -> StoredQuantization:
    """One setting of all layers, and own ones of some: {"bits", "group_size", "mode"} by a layer's name."""
    mode = _one_of("mlx", "mode", stated.get("mode", "affine"), ("affine", "mxfp4", "nvfp4", "mxfp8"))
    layers = {}
    for name, own in stated.items():
        if isinstance(own, dict):
            _one_of("mlx", "mode of a single layer", own.get("mode", mode), (mode,))
            layers[name] = _mlx_size({**stated, **own})
    bits, group = _mlx_size(stated)
    kept_bits = 4.5 if bits <= 4 and mode == "affine" else 8  # of a weight: int4 with its scales and zeros, or int8
    part = round(kept_bits / (bits + 0.5), 2)
    return StoredQuantization("mlx", (bits,), group, mode=mode, layers=layers, memory_part=part)


def _mlx_size(stated: Mapping[str, Any]) -> tuple[int, int]:
    bits = _one_of("mlx", "bits", stated.get("bits"), _MLX_BITS)
    return bits, _one_of("mlx", "group_size", stated.get("group_size"), _MLX_GROUPS)


def _gptq(stated: Mapping[str, Any]) -> StoredQuantization:
    bits = _one_of("gptq", "bits", stated.get("bits"), (2, 3, 4, 8))
    marlin = "marlin" if stated.get("is_marlin_format") else None
    written = _one_of(
        "gptq", "checkpoint_format", marlin or stated.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2")
    )
    _one_of("gptq", "pack_dtype", stated.get("pack_dtype", "int32"), ("int32",))
    symmetric = stated.get("sym")
    own = [*(stated.get("dynamic") or {}).values(), *(stated.get("extra_config") or {}).values()]
    if any(changes.get("sym", symmetric) != symmetric for changes in own if isinstance(changes, dict)):
        symmetric = None  # single layers differ
    for pattern, changes in (stated.get("dynamic") or {}).items():
        if not str(pattern).startswith("-:") and {"bits", "group_size"} & set(changes or ()):
            _refuse(f"gptq with other settings for single layers (dynamic {pattern!r})")
    return StoredQuantization(
        "gptq",
        (bits,),
        _group("gptq", stated.get("group_size", 128)),
        1 if written == "gptq" else 0,
        symmetric if isinstance(symmetric, bool) else None,
    )


def _auto_round(stated: Mapping[str, Any]) -> StoredQuantization:
    """AutoRound packs as another method does and says which: "auto_round:auto_gptq", or the method alone; in old
    versions as `backend`, which may name a kernel behind it."""
    method = "auto-round"
    packing = str(stated.get("packing_format") or stated.get("backend") or "auto_round:auto_gptq")
    reader = {"auto_gptq": _gptq, "gptq": _gptq, "auto_awq": _awq, "awq": _awq}.get(
        packing.removeprefix("auto_round:").partition(":")[0]
    )
    if reader is None:
        _refuse(f"{method} with packing_format {packing!r}")
    _one_of(method, "data_type", stated.get("data_type") or "int", ("int",))
    for name, changes in (stated.get("extra_config") or {}).items():
        own = changes if isinstance(changes, dict) else {}
        if own.get("bits", 16) < 16 and any(
            own.get(key, stated.get(key)) != stated.get(key) for key in ("bits", "group_size")
        ):
            _refuse(f"{method} with other settings for single layers (extra_config {name!r})")
    return reader(stated)


def _compressed(stated: Mapping[str, Any]) -> StoredQuantization:
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        _refuse("compressed-tensors without config_groups")
    if stated.get("transform_config"):
        _refuse("compressed-tensors with a transform_config")
    if (stated.get("sparsity_config") or {}).get("format", "dense") != "dense":
        _refuse("compressed-tensors with sparse weights")
    found = [_compressed_group(stated, group) for group in groups.values()]
    bits = tuple(sorted({bits for bits, _, _ in found}))
    block = next((block for _, _, block in found if block is not None), None)
    becomes_int8 = any(kind == "float" and bits == 4 for bits, kind, _ in found)
    return StoredQuantization("compressed-tensors", bits, block=block, memory_part=1.8 if becomes_int8 else 1.0)


def _compressed_group(stated: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, str, tuple[int, int] | None]:
    """(bits, "int" or "float", FP8's block) of a group of layers. Activations are quantised here in one way only."""
    method, weights, inputs = "compressed-tensors", group.get("weights") or {}, group.get("input_activations") or {}
    kind = _one_of(method, "weights.type", weights.get("type", "int"), ("int", "float"))
    _one_of(method, "format", group.get("format") or stated.get("format"), _COMPRESSED_FORMATS[kind])
    bits = _one_of(method, "weights.num_bits", weights.get("num_bits"), (4, 8))
    _one_of(method, "weights.strategy", weights.get("strategy") or "group", _STRATEGIES)
    _one_of(method, "input_activations.type", inputs.get("type", kind), ("int", "float"))
    _one_of(method, "input_activations.num_bits", inputs.get("num_bits", 8), (8,) if kind == "int" else (4, 8))
    if group.get("output_activations"):
        _refuse("compressed-tensors with output_activations")
    return bits, kind, _block(method, weights.get("block_structure"))


def _gguf(stated: Mapping[str, Any]) -> StoredQuantization:
    """As `checkpoint.gguf` writes it: every tensor's type is in its file."""
    part = stated.get("memory_part")
    if isinstance(part, bool) or not isinstance(part, int | float) or part <= 0:
        _refuse("gguf without its file")
    return StoredQuantization("gguf", (), memory_part=float(part))


def _one_of(method: str, what: str, value: Any, known: Iterable[Any]) -> Any:
    if value not in known or isinstance(value, bool) is not isinstance(next(iter(known)), bool):
        _refuse(f"{method} with {what} {value!r}")
    return value


def _group(method: str, value: object) -> int | None:
    if value in (None, -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        _refuse(f"{method} with group_size {value!r}")
    return value


def _refuse(what: str) -> NoReturn:
    raise CheckpointError(
        f"config.json: {what} is not supported; supported are {SUPPORTED}. Or serve the original "
        "checkpoint with --quantization int8 or int4"
    )
