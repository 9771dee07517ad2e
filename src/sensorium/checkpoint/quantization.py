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
    "awq (gemm and gemv, 4 bits), gptq (2, 3, 4 or 8 bits), compressed-tensors (pack-quantized and int-quantized, 2 "
    "to 8 bits; float-quantized, nvfp4, mxfp4 and mxfp8), auto-round (packed as auto_gptq or auto_awq), fp8, "
    "fbgemm_fp8, modelopt (FP8 and NVFP4), bitsandbytes (nf4, fp4, int8), mlx, hqq and mxfp4"
)
_COMPRESSED_FORMATS = {
    "int": ("pack-quantized", "int-quantized", "naive-quantized"),
    "float": ("float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
}
_COMPRESSED_BITS = {"int": (2, 3, 4, 5, 6, 7, 8), "float": (4, 8)}
_STRATEGIES = ("group", "channel", "tensor", "block", "tensor_group")
_MODELOPT_FP8 = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")
_MLX_BITS, _MLX_GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)
_HQQ_BITS, _GPTQ_BITS = (1, 2, 3, 4, 8), (2, 3, 4, 8)
_PLAIN_BITS = (16, 32)  # of layers that are left as they are
_SIZES = ("bits", "group_size")


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

    @property
    def title(self) -> str:
        """For people: the method, its bits and how many inputs share a scale."""
        bits = f" of {' and '.join(map(str, self.bits))} bits" if self.bits else ""
        return f"{self.layout}{bits}" + (f" in groups of {self.group}" if self.group else "")


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
        "hqq": _hqq,
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
    part = _part(bits, group, has_zeros=has_zeros)
    return StoredQuantization("awq", (bits,), group, symmetric=not has_zeros, mode=version, memory_part=part)


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
    """Which layers are nf4, fp4 or int8 their tensors tell. A CPU has a float16 scale for 32 weights of 4 bits, the
    files a float32 one for 64, or a byte where they are nested."""
    if not stated.get("load_in_4bit", stated.get("_load_in_4bit")):
        return StoredQuantization("bitsandbytes", (8,))
    _one_of("bitsandbytes", "bnb_4bit_quant_type", stated.get("bnb_4bit_quant_type", "fp4"), ("nf4", "fp4"))
    stored = 4 + (8 if stated.get("bnb_4bit_use_double_quant") else 32) / 64
    return StoredQuantization("bitsandbytes", (4,), memory_part=round((4 + 16 / 32) / stored, 2))


def _hqq(stated: Mapping[str, Any]) -> StoredQuantization:
    """Every setting is a tensor; config.json may tell that of all layers, by which memory is planned."""
    inner = stated.get("quant_config")
    own = inner.get("weight_quant_params") if isinstance(inner, dict) else None
    own = own if isinstance(own, dict) else {}
    bits, group = own.get("nbits"), own.get("group_size")
    if bits not in _HQQ_BITS or not isinstance(bits, int) or not isinstance(group, int) or group <= 0:
        return StoredQuantization("hqq", (), memory_part=1.8)
    return StoredQuantization("hqq", (), memory_part=_part(bits, group, has_zeros=True, is_int8=own.get("axis") == 0))


def _part(bits: int, group: int | None, *, has_zeros: bool, is_int8: bool = False) -> float:
    """Bytes in memory for a byte of the files, of integers with a scale, and a zero, for every group of inputs: int4
    with both in float16, or int8 with a scale for every output."""
    groups = 0.0 if group is None else 1 / group
    kept = 8 if is_int8 or bits > 4 else 4 + 16 * max(groups, 1 / 128) * (2 if has_zeros else 1)
    return round(kept / (bits + (16 + bits) * groups), 2)


def _mlx(stated: Mapping[str, Any]) -> StoredQuantization:
    """One setting of all layers, and own ones of some: {"bits", "group_size", "mode"} by a layer's name."""
    mode = _one_of("mlx", "mode", stated.get("mode", "affine"), ("affine", "mxfp4", "nvfp4", "mxfp8"))
    layers = {}
    for name, own in stated.items():
        if isinstance(own, dict):
            _one_of("mlx", "mode of a single layer", own.get("mode", mode), (mode,))
            layers[name] = _mlx_size({**stated, **own})
    bits, group = _mlx_size(stated)
    is_int4 = bits <= 4 and mode == "affine"  # whose scales and zeros are float16
    kept = 4 + 32 / group if is_int4 else 8
    part = round(kept / (bits + (32 if mode == "affine" else 8) / group), 2)
    return StoredQuantization("mlx", (bits,), group, mode=mode, layers=layers, memory_part=part)


def _mlx_size(stated: Mapping[str, Any]) -> tuple[int, int]:
    bits = _one_of("mlx", "bits", stated.get("bits"), _MLX_BITS)
    return bits, _one_of("mlx", "group_size", stated.get("group_size"), _MLX_GROUPS)


def _gptq(stated: Mapping[str, Any]) -> StoredQuantization:
    """Of single layers' settings only what is not served is looked at: the shapes of a layer's tensors tell them."""
    bits = _one_of("gptq", "bits", stated.get("bits"), _GPTQ_BITS)
    marlin = "marlin" if stated.get("is_marlin_format") else None
    written = _one_of(
        "gptq", "checkpoint_format", marlin or stated.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2")
    )
    _one_of("gptq", "pack_dtype", stated.get("pack_dtype", "int32"), ("int32",))
    symmetric = stated.get("sym")
    own, others = _layers("gptq", stated, "dynamic"), _layers("gptq", stated, "extra_config")
    if any(changes.get("sym", symmetric) != symmetric for changes in (*own.values(), *others.values())):
        symmetric = None  # single layers differ
    for name, changes in (*own.items(), *others.items()):
        if not name.startswith("-:") and changes.get("bits") not in (None, *_PLAIN_BITS):
            _one_of("gptq", f"bits of {name[:80]!r}", changes["bits"], _GPTQ_BITS)
    group = _group("gptq", stated.get("group_size", 128))
    has_zeros = bits < 4 or symmetric is not True
    return StoredQuantization(
        "gptq",
        (bits,),
        group,
        1 if written == "gptq" else 0,
        symmetric if isinstance(symmetric, bool) else None,
        _part(bits, group, has_zeros=has_zeros, is_int8=bool(stated.get("desc_act")) and group is not None),
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
    own = [one for one in _layers(method, stated, "extra_config").values() if one.get("bits") not in _PLAIN_BITS]
    if reader is _awq and any(one.get(key, stated.get(key)) != stated.get(key) for one in own for key in _SIZES):
        _refuse(f"{method} packed as awq with other settings for single layers (extra_config)")
    return reader(stated)


def _compressed(stated: Mapping[str, Any]) -> StoredQuantization:
    """A scheme of the cache alone quantises no weight, nor does a group that has none."""
    groups = stated.get("config_groups") or ({} if stated.get("kv_cache_scheme") else None)
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        _refuse("compressed-tensors without config_groups")
    if stated.get("transform_config"):
        _refuse("compressed-tensors with a transform_config")
    if _table("compressed-tensors", "sparsity_config", stated.get("sparsity_config")).get("format", "dense") != "dense":
        _refuse("compressed-tensors with sparse weights")
    found = [_compressed_group(stated, group) for group in groups.values() if group.get("weights")]
    bits = tuple(sorted({bits for bits, _, _ in found}))
    block = next((block for _, block, _ in found if block is not None), None)
    part = max((part for _, _, part in found), default=1.0)
    return StoredQuantization("compressed-tensors", bits, block=block, memory_part=part)


def _compressed_group(stated: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, tuple[int, int] | None, float]:
    """(bits, FP8's block, `memory_part`) of a group of layers. Activations are quantised here in one way only."""
    method = "compressed-tensors"
    weights, inputs = (_table(method, name, group.get(name)) for name in ("weights", "input_activations"))
    kind = _one_of(method, "weights.type", weights.get("type", "int"), ("int", "float"))
    written = _one_of(method, "format", group.get("format") or stated.get("format"), _COMPRESSED_FORMATS[kind])
    bits = _one_of(method, "weights.num_bits", weights.get("num_bits"), _COMPRESSED_BITS[kind])
    _one_of(method, "weights.strategy", weights.get("strategy") or "group", _STRATEGIES)
    _one_of(method, "input_activations.type", inputs.get("type", kind), ("int", "float"))
    _one_of(method, "input_activations.num_bits", inputs.get("num_bits", 8), (8,) if kind == "int" else (4, 8))
    if group.get("output_activations"):
        _refuse("compressed-tensors with output_activations")
    size = weights.get("group_size")
    size = size if type(size) is int and size > 0 else None
    if kind == "int" and written == "pack-quantized":
        has_zeros, scattered = bits < 4 or weights.get("symmetric") is False, weights.get("actorder") == "group"
        part = _part(bits, size, has_zeros=has_zeros, is_int8=scattered)
    else:
        part = round(8 / (bits + 8 / (size or 16)), 2) if kind == "float" and bits == 4 else 1.0
    return bits, _block(method, weights.get("block_structure")), part


def _table(method: str, what: str, value: object) -> Mapping[str, Any]:
    """An object; nothing is an empty one."""
    if value is not None and not isinstance(value, dict):
        _refuse(f"{method} with {what} {str(value)[:80]!r}")
    return value or {}


def _layers(method: str, stated: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    """Settings of single layers, by their names or patterns of them."""
    return {
        str(name): _table(method, f"{key} {str(name)[:80]!r}", own)
        for name, own in _table(method, key, stated.get(key)).items()
    }


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
