"""Which files of a model folder hold its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sensorium.checkpoint.hub import NO_GGUF
from sensorium.checkpoint.values import read_json
from sensorium.errors import CheckpointError


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files in index order: safetensors before pickles, an index before a single file.

    CheckpointError if there are none, or if an index names what is not there or lies outside the folder.
    """
    for name, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = read_json(folder / f"{name}.index.json")
        if index is not None:
            return _indexed_files(folder, f"{name}.index.json", index, suffix)
        if (folder / name).is_file():
            return (folder / name,)
    only = list(folder.glob("*.safetensors"))
    if len(only) == 1:  # quantisers once named it after their settings
        return (only[0],)
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} has nothing but GGUF weights, {NO_GGUF}")
    raise CheckpointError(f"{folder} has no weights (model.safetensors or pytorch_model.bin, or their index)")


def _indexed_files(folder: Path, index_name: str, index: dict[str, Any], suffix: str) -> tuple[Path, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_name} has no weight_map")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{index_name} names a strange file: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index_name} names {name}, which is not there")
        files.append(folder / name)
    return tuple(files)
