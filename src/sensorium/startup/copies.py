"""What every rank of a model has whole, by the names in its files: towers, and of a decoder what is not shared out.

Nothing but the files' headers is read, so that it is known before a process has torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.gguf_file import read_gguf
from sensorium.errors import CheckpointError

_DECODER = re.compile(
    r"((model|thinker|vlm|llm|language_model|text_model)\.)*"
    r"(layers\.\d+\.(?P<part>.+)|(?P<table>(embed_tokens\w*|lm_head)\..+)|norm\..+)"
    r"|blk\.\d+\.(?P<gguf_part>.+)|(?P<gguf_table>(token_embd|output)\..+)|output_norm\..+"
)
"""Names of a decoder's tensors, in GGUF files those of the last line; all others are of towers and what joins them."""
_ATTENTION = re.compile(r"self_attn\.(\w+_proj\.|sinks)|attn_(q|k|v|qkv|output|sinks)\.")
_KEYS = re.compile(r"self_attn\.[kv]_proj\.|attn_[kv]\.")
_INNER = re.compile(
    r"(mlp|feed_forward|block_sparse_moe)\.(.+\.)?((gate|up|down|gate_up)_proj|w[123])(_|\.|$)"
    r"|experts\.|ffn_(gate|up|down)"
)
_UNREAD_HEAD = re.compile(r"(.+\.)?(vision_\w+|img_processor)\.head\..+")
_TOWER_LAYER = re.compile(r".*(vision_\w+|img_processor)\.(.+\.)?layers?\.(?P<layer>\d+)\..+")


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes in files, of one copy."""

    towers: int = 0  # that are read: without layers behind the one whose states are taken
    decoder: int = 0
    keys: int = 0  # projections to keys and values, of which several ranks have the same heads where these are few


def copies_of(checkpoint: Checkpoint) -> Copies:
    """All zeros for files that have no header, or a broken one: the engine says what is wrong."""
    text = checkpoint.text
    if text is None:
        return Copies()
    towers = _Towers(checkpoint)
    decoder = keys = 0
    try:
        for name, size in _tensors((*checkpoint.weight_files, *checkpoint.text_weight_files)):
            match = _DECODER.fullmatch(name)
            if match is None:
                towers.add(name, size)
                continue
            part = match["part"] or match["gguf_part"] or ""
            shares_heads = not text.norms_whole_qk
            if shares_heads and _KEYS.match(part):
                keys += size
            elif match["table"] is None is match["gguf_table"] and not (
                _INNER.match(part) or (shares_heads and _ATTENTION.match(part))
            ):
                decoder += size
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Copies()
    return Copies(towers.read_bytes(), decoder, keys)


class _Towers:
    """What stands before a decoder: of a tower like CLIP the layers up to the state that is taken, without a pooling
    head, and everything else."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, processor = checkpoint.config, checkpoint.config.get("img_processor")
        state = config.get("vision_feature_layer", -1)
        if isinstance(processor, dict):  # of Phi-3-Vision
            state = processor.get("layer_idx", -2)
        self._states = [int(one) for one in (state if isinstance(state, list) else [state])]
        self._layers: dict[int, int] = {}
        self._rest = 0

    def add(self, name: str, size: int) -> None:
        layer = _TOWER_LAYER.fullmatch(name)
        if layer is not None:
            number = int(layer["layer"])
            self._layers[number] = self._layers.get(number, 0) + size
        elif _UNREAD_HEAD.fullmatch(name) is None:
            self._rest += size

    def read_bytes(self) -> int:
        count = 1 + max(self._layers, default=-1)
        used = max(state if state >= 0 else count + 1 + state for state in self._states)
        return self._rest + sum(size for layer, size in self._layers.items() if layer < used)


def _tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, int]]:
    """Name and bytes."""
    for file in files:
        if file.suffix == ".gguf":
            yield from ((one.name, one.nbytes) for one in read_gguf(file).tensors)
        elif file.suffix == ".safetensors":
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError(file.name)
                entries = json.loads(opened.read(length))
            for name, entry in entries.items():
                if name != "__metadata__":
                    first, end = entry["data_offsets"]
                    yield name, end - first
