"""docs/models.md: of every row of the registry what it takes, how much memory, which flags apply, what is missing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from published_models import FILES, MODEL_TYPES, PUBLISHED, TENSORS
from safetensors.torch import save_file

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES, load_class
from sensorium.kernels import Quantization
from sensorium.models.adapters import adaptable
from sensorium.models.base import Model
from sensorium.models.cache import CacheGroup, EncoderGroup, KeyValueGroup, PagedGroup, StateGroup
from sensorium.models.loading import declared_bytes
from sensorium.units import decimal_text

QUANTIZED = (None, Quantization(8), Quantization(4))  # bfloat16, and what --quantization int8 and int4 make


def declared(architecture: str, config: Mapping[str, Any]) -> Model:
    """The model of a published config.json, without weights."""
    shape = {"architectures": [architecture], "torch_dtype": "bfloat16", **config}
    if architecture in MODEL_TYPES:
        shape["model_type"] = MODEL_TYPES[architecture]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in {"config.json": shape, **FILES.get(architecture, {})}.items():
            (folder / file).write_text(json.dumps(content))
        tensors = {key: torch.zeros(size) for key, size in TENSORS.get(architecture, {}).items()}
        save_file(tensors, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder)
        with torch.device("meta"):
            model: Model = load_class(checkpoint.family.model)(checkpoint)
    return model


def cache_text(groups: Iterable[CacheGroup], dtype: torch.dtype) -> str:
    """What grows with every token, and what a sequence takes at most besides: layers with a window, a recording, two
    slots of states."""
    token = sequence = 0
    for group in groups:
        if isinstance(group, StateGroup):
            sequence += 2 * group.slot_bytes(torch.bfloat16)
            continue
        each = group.token_bytes(dtype) if isinstance(group, KeyValueGroup) else 0
        if isinstance(group, PagedGroup) and group.sliding_window is not None:
            sequence += each * group.sliding_window
        elif isinstance(group, PagedGroup):
            token += each
    told = [f"{decimal_text(token)} a token"] if token else []
    return ", ".join(told + ([f"{decimal_text(sequence)} a sequence"] if sequence else [])) or "none"


def size_row(name: str, model: Model) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = [decimal_text(declared_bytes(model, torch.bfloat16, kind)) for kind in QUANTIZED]
    groups = model.cache_groups()
    recording = [group for group in groups if isinstance(group, EncoderGroup)]
    rest = f"; {decimal_text(recording_bytes(model, recording))} a window of audio" if recording else ""
    caches = [cache_text(groups, dtype) for dtype in (torch.bfloat16, torch.int8)]
    cells = [name, f"{parameters / 1e6:,.0f} M", *weights, caches[0] + rest, caches[1] if groups else ""]
    return f"| {' | '.join(cells)} |"


def recording_bytes(model: Model, groups: Iterable[EncoderGroup]) -> int:
    rows = int(model.checkpoint.config.get("max_source_positions") or 1500)
    return rows * sum(group.token_bytes(torch.bfloat16) for group in groups)


def refused(model: Model) -> list[str]:
    """Flags that end the start, or the load of an adapter, with a line that says why."""
    family = model.checkpoint.family
    flags = []
    if family.overflows_float16:
        flags.append("--dtype float16")
    if not model.cache_groups():
        flags.append("--kv-cache-dtype int8")
    has_own_pooling = bool(family.modalities) and family.encoder is not None
    if "embed" not in model.poolers or has_own_pooling:
        flags.append("--pooling")
    return [*flags, *([] if adaptable(model) else ["--lora"])]


def ineffective(model: Model) -> list[str]:
    """Groups of flags, in the words of the page, that are taken and change nothing."""
    groups = {
        "flags of the cache": bool(model.cache_groups()),
        "flags of generation": model.generates,
        "flags of media": bool(model.checkpoint.family.modalities),
    }
    return [group for group, is_used in groups.items() if not is_used]


def section(title: str, names: list[str], paths: list[str]) -> str:
    """One title of the registry, whose architectures may have several sizes. SystemExit if nobody wrote one down."""
    shapes = [(name, size, shape) for name in names for size, shape in PUBLISHED.get(name, {}).items()]
    if not shapes:
        raise SystemExit(f"tools/published_models.py has no size of {title} ({', '.join(names)}): add a published one")
    models = [(size, declared(name, shape)) for name, size, shape in shapes]
    family, first = FAMILIES[names[0]], models[0][1]
    told = {
        "Takes": ", ".join(("text", *family.modalities)),
        "Answers at": listed(paths),
        "Refused": listed(refused(first)),
        "Without effect": ", ".join(ineffective(first)),
        "Not supported": family.lacks,
    }
    lines = [f"## {title}", "", listed(names), "", *(f"- {what}: {text}" for what, text in told.items() if text), ""]
    lines += ["| | parameters | bfloat16 | int8 | int4 | KV cache | int8 |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(size_row(size, model) for size, model in models)])


def listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
