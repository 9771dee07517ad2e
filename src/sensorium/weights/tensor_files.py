"""Checkpoint files as named tensors, none of them read yet: views of a memory map, checked against the file's size."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensorium.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
MADV_POPULATE_READ = 22  # of Linux; Python has no name for it
CONVERT_BYTES = 32 * 1024 * 1024  # of a tensor in another dtype that are converted at once

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: Callable[[], Tensor]  # in borrowed memory
    prefetch: Callable[[], None]  # starts reading from the disk
    release: Callable[[], None]  # gives the view's pages back
    populate: Callable[[], None] | None = None  # reads all of it now; None: `view` is no plain mapping of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole tensor: so many that their conversion to another dtype takes little memory."""
        rows = self.view()
        rows = rows if rows.dim() else rows.view(1)  # of one number
        step = max(1, CONVERT_BYTES * rows.shape[0] // max(1, rows.nbytes))
        for start in range(0, rows.shape[0], step):
            yield start, rows[start : start + step]


def part_of(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Some rows of a tensor as one of their own; giving them back gives all of it back."""
    return replace(tensor, shape=(count, *tensor.shape[1:]), view=lambda: tensor.view()[first : first + count])


def stored_tensors(files: Iterable[Path], text_files: Iterable[Path] = ()) -> list[StoredTensor]:
    """The tensors of all files of one checkpoint; a key that two files have is an error.

    `text_files` are a second repository's: their keys get the prefix `language_model.` and yield to the first's.
    """
    own = _tensors_of(files)
    second = [replace(tensor, key=f"language_model.{tensor.key}") for tensor in _tensors_of(text_files).values()]
    return [*own.values(), *(tensor for tensor in second if tensor.key not in own)]


def _tensors_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file):
            if tensor.key in found:
                raise CheckpointError(f"{tensor.key} is in {found[tensor.key].file.name} and again in {file.name}")
            found[tensor.key] = tensor
    return found


def read_safetensors(file: Path) -> list[StoredTensor]:
    """Check the header against the file's size, so that no view can reach outside its own bytes."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file.name} is not a safetensors file, or is cut short")
        try:
            header = json.loads(opened.read(header_bytes), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file.name} has a broken safetensors header: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{file.name} has a broken safetensors header")
        # Private and writable only because torch wants writable memory; nobody writes.
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + header_bytes
    header.pop("__metadata__", None)
    return _check_overlap(file, [_stored(file, memory, start, key, entry) for key, entry in header.items()])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _stored(file: Path, memory: mmap.mmap, start: int, key: str, entry: Any) -> tuple[int, int, StoredTensor]:
    size = len(memory)
    try:
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: the header entry of {key} is broken") from error
    if not sane or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file.name}: the header entry of {key} is broken")
    if start + end > size:
        raise CheckpointError(f"{file.name} is cut short: {key} ends at byte {start + end} of {size}")
    place = _Mapped(memory, start + begin, start + end, shape, dtype)
    tensor = StoredTensor(
        key,
        file,
        shape,
        dtype,
        place.view,
        prefetch=lambda: place.advise(mmap.MADV_WILLNEED),
        release=lambda: place.advise(mmap.MADV_DONTNEED),
        populate=place.populate if place.is_aligned else None,
    )
    return begin, end, tensor


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Bytes `first` to `last` of a mapped file, which are a tensor."""

    memory: mmap.mmap
    first: int
    last: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_aligned(self) -> bool:
        return self.first % self.dtype.itemsize == 0

    def view(self) -> Tensor:
        if self.first == self.last:
            return torch.empty(self.shape, dtype=self.dtype)
        if not self.is_aligned:
            return torch.frombuffer(bytearray(self.memory[self.first : self.last]), dtype=self.dtype).view(self.shape)
        count = math.prod(self.shape)
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=self.first).view(self.shape)

    def advise(self, option: int) -> None:
        page = self.first - self.first % mmap.PAGESIZE
        if self.last > self.first:
            self.memory.madvise(option, page, self.last - page)

    def populate(self) -> None:
        try:
            self.advise(MADV_POPULATE_READ)
        except OSError:  # a system that does not know it
            self.advise(mmap.MADV_WILLNEED)


def _check_overlap(file: Path, tensors: list[tuple[int, int, StoredTensor]]) -> list[StoredTensor]:
    tensors.sort(key=lambda item: item[:2])
    for (_, end, one), (begin, _, other) in itertools.pairwise(tensors):
        if begin < end:
            raise CheckpointError(f"{file.name}: {one.key} and {other.key} overlap")
    return [tensor for _, _, tensor in tensors]


def _read_pickle(file: Path) -> list[StoredTensor]:
    """A torch file, opened by the loader that builds tensors and nothing else."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file.name} holds other things than tensors, or is damaged: not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file.name} holds something else than named tensors")
    tensors = []
    while state:
        key = next(iter(state))
        tensors.append(_from_pickle(file, key, state.pop(key)))
    return tensors


def _from_pickle(file: Path, key: str, tensor: Tensor) -> StoredTensor:
    held = [tensor]
    return StoredTensor(
        key, file, tuple(tensor.shape), tensor.dtype, view=lambda: held[0], prefetch=lambda: None, release=held.clear
    )
