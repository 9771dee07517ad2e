"""Which files of a model folder hold its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sensorium.checkpoint.values import read_json
from sensorium.errors import CheckpointError


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files in index order: safetensors before pickles, an index before a single file.

    CheckpointError if there are none, if one cannot be read, or if an index names what is not there or lies outside the
    folder.
    """
    files = _named_files(folder)
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file.name} is a link to what is not there: download it again")
        if not (file.is_file() and os.access(file, os.R_OK)):
            raise CheckpointError(f"{file.name} is no file that can be read")
    return files


def _named_files(folder: Path) -> tuple[Path, ...]:
    for name, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = read_json(folder / f"{name}.index.json")
        if index is not None:
            return _indexed_files(folder, f"{name}.index.json", index, suffix)
        if (folder / name).is_file():
            return (folder / name,)
    only = list(folder.glob("*.safetensors"))
    if len(only) == 1:  # quantisers once named it after their settings
        return (only[0],)
    parts = sorted(file for file in folder.glob("*.gguf") if not file.name.lower().startswith("mmproj"))
    if parts:
        return tuple(parts)
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
