"""What a checkpoint says of its quantised weights: `quantization_config` of every kind that is served, in one dialect.

AWQ as AutoAWQ writes it, GPTQ as AutoGPTQ and GPTQModel do, both as AutoRound does, compressed-tensors as
llm-compressor does. Which layers are
quantised is not read here: their tensors' names tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from sensorium.errors import CheckpointError

SUPPORTED = (
    "awq (gemm, 4 bits), gptq (4 or 8 bits), compressed-tensors (pack-quantized and int-quantized, 4 or 8 "
    "bits), auto-round (packed as auto_gptq or auto_awq)"
)
_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a checkpoint's quantised linear layers are laid out."""

    layout: Literal["awq", "gptq", "compressed-tensors"]
    bits: tuple[int, ...]  # compressed-tensors may mix several
    group: int | None = None  # inputs that share a scale, None: all. Of compressed-tensors the tensors' shapes tell
    zero_offset: int = 0  # what a stored zero lacks: 1 in GPTQ's first format
    symmetric: bool | None = None  # whether GPTQ's zeros are all the middle code; None: the file does not say


def read_quantization(stated: object) -> StoredQuantization | None:
    """`quantization_config` as it stands in config.json. CheckpointError names what is not supported."""
    if not stated:
        return None
    if not isinstance(stated, dict):
        _refuse(f"quantization_config {stated!r}")
    method = stated.get("quant_method", "compressed-tensors" if "config_groups" in stated else None)
    readers = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        **dict.fromkeys(("auto-round", "auto_round", "intel/auto-round"), _auto_round),
    }
    if not isinstance(method, str) or method not in readers:
        _refuse(f"quantisation by {method}")
    return readers[method](stated)


def _awq(stated: Mapping[str, Any]) -> StoredQuantization:
    bits = _one_of("awq", "bits", stated.get("bits", stated.get("w_bit", 4)), (4,))
    _one_of("awq", "version", str(stated.get("version", "gemm")).lower(), ("gemm",))
    _one_of("awq", "zero_point", stated.get("zero_point", True), (True,))
    return StoredQuantization("awq", (bits,), _group("awq", stated.get("group_size", stated.get("q_group_size", 128))))


def _gptq(stated: Mapping[str, Any]) -> StoredQuantization:
    bits = _one_of("gptq", "bits", stated.get("bits"), (4, 8))
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
    method, groups = "compressed-tensors", stated.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        _refuse("compressed-tensors without config_groups")
    for part in ("kv_cache_scheme", "transform_config"):
        if stated.get(part):
            _refuse(f"compressed-tensors with a {part}")
    if (stated.get("sparsity_config") or {}).get("format", "dense") != "dense":
        _refuse("compressed-tensors with sparse weights")
    bits = []
    for group in groups.values():
        _one_of(method, "format", group.get("format") or stated.get("format"), _COMPRESSED_FORMATS)
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        _one_of(method, "weights.type", weights.get("type", "int"), ("int",))
        bits.append(_one_of(method, "weights.num_bits", weights.get("num_bits"), (4, 8)))
        _one_of(method, "weights.strategy", weights.get("strategy") or "group", _STRATEGIES)
        _one_of(method, "input_activations.type", inputs.get("type", "int"), ("int",))
        _one_of(method, "input_activations.num_bits", inputs.get("num_bits", 8), (8,))
        if group.get("output_activations"):
            _refuse("compressed-tensors with output_activations")
    return StoredQuantization("compressed-tensors", tuple(sorted(set(bits))))


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
