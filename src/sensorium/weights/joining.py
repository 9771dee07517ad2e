"""The tensors that make one quantised weight, found by their names and joined.

GPT-OSS keeps the experts of a layer as `NAME_blocks` and `NAME_scales`, which become one weight of each expert.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median

from sensorium.checkpoint.quantization import StoredQuantization
from sensorium.errors import CheckpointError
from sensorium.weights.decoded_codes import Bnb4Codes, Bnb8Codes, Fp4Codes, Fp8Codes, HqqCodes, MlxCodes, Mxfp4Codes
from sensorium.weights.stored_codes import (
    AwqCodes,
    AwqGemvCodes,
    ByteCodes,
    GptqCodes,
    PackedCodes,
    StoredCodes,
    misshapen,
)
from sensorium.weights.tensor_files import StoredTensor, element_of

logger = logging.getLogger(__name__)

MEASURED_LAYERS = 8

_SWITCHED = re.compile(r"(.+)\.switch_mlp\.(gate|up|down)_proj\.(weight|scales|biases)")
_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}

_CACHE_SCALE = re.compile(r".*\.(?:[kvq]_scale|prob_scale|kv_scale|[kvq]_proj\.output_scale)")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of a kind are the layers that have `first`, and, `by_type`, that have it in the kind's type with `needed[0]`:
    plain weights, or those of another kind, may be called so too."""

    kind: type[StoredCodes]
    first: str
    needed: tuple[str, ...]
    possible: tuple[str, ...] = ()
    by_type: bool = False

    def base(self, key: str, tensors: Mapping[str, StoredTensor]) -> str | None:
        """The layer's name, if this is the first tensor of one."""
        if key not in tensors or not key.endswith(f".{self.first}"):
            return None
        base = key.removesuffix(f".{self.first}")
        is_one = tensors[key].dtype in self.kind.kinds[self.first] and f"{base}.{self.needed[0]}" in tensors
        return base if is_one or not self.by_type else None


_INPUT_SCALES = ("input_scale", "activation_scale", "input_zero_point", "input_global_scale", "input_scale_ub")
_FP8 = _Layout(Fp8Codes, "weight", ("weight_scale",), _INPUT_SCALES, by_type=True)
_LAYOUTS: Mapping[str, tuple[_Layout, ...]] = {
    "awq": (_Layout(AwqCodes, "qweight", ("scales",), ("qzeros",)),),
    "awq gemv": (_Layout(AwqGemvCodes, "qweight", ("qzeros", "scales")),),
    "gptq": (_Layout(GptqCodes, "qweight", ("qzeros", "scales"), ("g_idx",)),),
    "compressed-tensors": (
        _Layout(Fp4Codes, "weight_packed", ("weight_scale",), ("weight_global_scale", *_INPUT_SCALES), by_type=True),
        _Layout(
            PackedCodes,
            "weight_packed",
            ("weight_scale", "weight_shape"),
            ("weight_zero_point", "weight_g_idx", *_INPUT_SCALES),
        ),
        _Layout(ByteCodes, "weight", ("weight_scale",), ("weight_zero_point", *_INPUT_SCALES), by_type=True),
        _FP8,
    ),
    "fp8": (_FP8,),
    "modelopt": (_Layout(Fp4Codes, "weight", ("weight_scale", "weight_scale_2"), _INPUT_SCALES, by_type=True), _FP8),
    "bitsandbytes": (
        _Layout(
            Bnb4Codes,
            "weight",
            ("weight.absmax", "weight.quant_map"),
            tuple(name for name in Bnb4Codes.kinds if "nested" in name or "quant_state" in name),
            by_type=True,
        ),
        _Layout(Bnb8Codes, "weight", ("SCB",), ("weight_format",), by_type=True),
    ),
    "mlx": (_Layout(MlxCodes, "weight", ("scales",), ("biases",), by_type=True),),
    "hqq": (
        _Layout(
            HqqCodes,
            "W_q",
            ("scale", "zero", "nbits", "group_size", "axis", "shape"),
            (
                *("packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"),
                *(
                    "offload_meta",
                    "encoded_state_dict",
                    "stores_quant_config",
                    "channel_wise",
                    "optimize",
                    "round_zero",
                ),
            ),
        ),
    ),
}


def join(tensors: Iterable[StoredTensor | StoredCodes], stored: StoredQuantization) -> list[StoredTensor | StoredCodes]:
    """Tensors of a quantised checkpoint, those of a quantised weight joined into one; the others stay as they are."""
    if stored.layout == "gguf":  # whose blocks are one tensor each
        return list(tensors)
    left = _without_cache_scales(_named(tensors))
    if stored.layout == "mxfp4":
        experts = list(_mxfp4_experts(left, stored))
        return [*left.values(), *experts]
    if stored.layout == "mlx":
        left, stored = _mlx_experts(left, stored)
    layouts = _LAYOUTS["awq gemv" if (stored.layout, stored.mode) == ("awq", "gemv") else stored.layout]
    joined: list[StoredCodes] = []
    for key in list(left):
        for layout in layouts:
            base = layout.base(key, left)
            if base is None:
                continue
            if missing := [name for name in layout.needed if f"{base}.{name}" not in left]:
                raise CheckpointError(f"tensor {key} is there without its {', '.join(missing)}")
            names = [one for one in (layout.first, *layout.needed, *layout.possible) if f"{base}.{one}" in left]
            joined.append(layout.kind(base, {name: left.pop(f"{base}.{name}") for name in names}, stored))
    _settle_zeros([codes for codes in joined if isinstance(codes, GptqCodes)], stored)
    return [*left.values(), *joined]


def _named(tensors: Iterable[StoredTensor | StoredCodes]) -> dict[str, StoredTensor]:
    """By key. DeepSeek's name of a scale, which is multiplied like any other, is made the usual one."""
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if isinstance(tensor, StoredCodes):
            continue
        key = re.sub(r"\.weight_scale_inv$", ".weight_scale", tensor.key)
        if key in found:
            raise CheckpointError(f"tensors {found[key].key} and {tensor.key} are both a layer's scales")
        found[key] = tensor
    return found


def _without_cache_scales(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Scales of an fp8 cache have no use here: an int8 one has its own for every token, an fp8 one has none."""
    kept = {key: tensor for key, tensor in tensors.items() if not _CACHE_SCALE.fullmatch(key)}
    if len(kept) < len(tensors):
        logger.info("%d scales of an fp8 KV cache are passed over", len(tensors) - len(kept))
    return kept


def _mxfp4_experts(left: dict[str, StoredTensor], stored: StoredQuantization) -> Iterator[StoredCodes]:
    """The weight of each expert, out of blocks [experts, outputs, groups, 16] and scales that it takes from `left`."""
    for key in [key for key in left if key.endswith("_blocks")]:
        base = key.removesuffix("_blocks")
        if f"{base}_scales" not in left:
            raise CheckpointError(f"tensor {key} is there without its {base.rpartition('.')[2]}_scales")
        blocks, scales = left.pop(key), left.pop(f"{base}_scales")
        if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
            raise misshapen(blocks, f"which does not go with scales of {list(scales.shape)}")
        place, _, name = base.rpartition(".")
        for index in range(blocks.shape[0]):
            parts = {"blocks": element_of(blocks, index), "scales": element_of(scales, index)}
            yield Mxfp4Codes(f"{place}.{index}.{name}", parts, stored)


def _mlx_experts(
    tensors: dict[str, StoredTensor], stored: StoredQuantization
) -> tuple[dict[str, StoredTensor], StoredQuantization]:
    """Those of each expert in place of what MLX stacks as `switch_mlp`, with the settings that the stack has."""
    found, layers = {}, dict(stored.layers)
    for key, tensor in tensors.items():
        match = _SWITCHED.fullmatch(key)
        if match is None or not tensor.nbytes:
            found[key] = tensor
            continue
        place, name, part = match.groups()
        own = _MIXTRAL[name] if place.endswith(".block_sparse_moe") else f"{name}_proj"
        stack = stored.layers.get(key.removesuffix(f".{part}"))
        for index in range(tensor.shape[0]):
            base = f"{place}.experts.{index}.{own}"
            found[f"{base}.{part}"] = replace(element_of(tensor, index), key=f"{base}.{part}")
            layers |= {} if stack is None else {base: stack}
    return found, replace(stored, layers=layers)


def _settle_zeros(layers: list[GptqCodes], stored: StoredQuantization) -> None:
    """Which format zeros have that are not the middle code. A layer's weights are about zero on average, a small part
    of a scale away; with zeros of the wrong format they are a whole scale away. So zeros that config.json calls by the
    wrong name are told, as long as four bits make a scale that large. One line for all layers, by the first one."""
    unsure = [codes for codes in layers if codes.bits == 4 and not codes.shows_format()][:MEASURED_LAYERS]
    other = 1 - stored.zero_offset
    if unsure and abs(_median_mean(unsure, stored.zero_offset)) > 0.5 and abs(_median_mean(unsure, other)) < 0.25:
        for codes in layers:
            codes.zero_offset = other
        logger.warning(
            "%s: checkpoint_format is wrong: the zeros are of GPTQ's %s format, as the codes show, and read as that",
            unsure[0].file.parent.name,
            "first" if other else "second",
        )
    elif layers:
        _tell_doubt(layers[0], stored)


def _median_mean(layers: list[GptqCodes], zero_offset: int) -> float:
    return median(codes.mean(zero_offset) for codes in layers)


def _tell_doubt(first: GptqCodes, stored: StoredQuantization) -> None:
    doubt = first.doubt()
    if doubt is not None:
        logger.warning(
            "%s: the zeros of %s %s. They are read as GPTQ's %s format, as checkpoint_format says; if the "
            "model answers nonsense, checkpoint_format or sym is wrong",
            first.file.parent.name,
            first.key,
            doubt,
            "first" if stored.zero_offset else "second",
        )
