"""All files of one checkpoint as named tensors, whatever their formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sensorium.errors import CheckpointError
from sensorium.weights.gguf import BlockCodes, read_gguf_tensors
from sensorium.weights.tensor_files import StoredTensor, read_pickle, read_safetensors


def stored_tensors(files: Iterable[Path], text_files: Iterable[Path] = ()) -> list[StoredTensor | BlockCodes]:
    """The tensors of all files of one checkpoint; a key that two files have is an error.

    `text_files` are a second repository's: their keys get the prefix `language_model.` and yield to the first's.
    """
    own = _tensors_of(files)
    second = [_second(tensor) for tensor in _tensors_of(text_files).values()]
    return [*own.values(), *(tensor for tensor in second if tensor.key not in own)]


def plain_tensors(files: Iterable[Path]) -> list[StoredTensor]:
    """Those that are stored as plain numbers."""
    return [tensor for tensor in _tensors_of(files).values() if isinstance(tensor, StoredTensor)]


def _second(tensor: StoredTensor | BlockCodes) -> StoredTensor:
    if isinstance(tensor, BlockCodes):
        raise CheckpointError(f"{tensor.file.name}: a second repository's language model cannot be quantised GGUF")
    return replace(tensor, key=f"language_model.{tensor.key}")


def _read(files: Sequence[Path]) -> Iterator[StoredTensor | BlockCodes]:
    parts = [file for file in files if file.suffix == ".gguf"]
    if parts:
        yield from read_gguf_tensors(parts)
    for file in files:
        if file not in parts:
            yield from read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def _tensors_of(files: Iterable[Path]) -> dict[str, StoredTensor | BlockCodes]:
    found: dict[str, StoredTensor | BlockCodes] = {}
    for tensor in _read(tuple(files)):
        if tensor.key in found:
            raise CheckpointError(f"{tensor.key} is in {found[tensor.key].file.name} and again in {tensor.file.name}")
        found[tensor.key] = tensor
    return found
