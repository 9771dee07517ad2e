"""Checkpoint files as named tensors, none of them read yet: views of a memory map, checked against the file's size."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Runs:
    """The rows of a matrix in turn where the mapped file has them, which is in another order."""

    rows: Callable[[], list[Tensor]]
    populate: Callable[[], None]  # reads all of them now


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
    cut: Callable[[int, int], StoredTensor] | None = None  # (first, count) -> these rows; None: see `part_of`
    runs: Runs | None = None  # where `view` copies rows into another order

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole tensor, or of so many rows from `first` on: as many at a time as take little
        memory when they are converted to another dtype."""
        rows = self.view()
        rows = rows if rows.dim() else rows.view(1)  # of one number
        end = rows.shape[0] if count is None else first + count
        step = max(1, CONVERT_BYTES * rows.shape[0] // max(1, rows.nbytes))
        for start in range(first, end, step):
            yield start, rows[start : min(start + step, end)]


def part_of(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Some rows of a tensor as one of their own. Of a pickle they are not given back: others may need the rest."""
    if tensor.cut is not None:
        return tensor.cut(first, count)
    rows, shape = slice(first, first + count), (count, *tensor.shape[1:])
    return replace(tensor, shape=shape, view=lambda: tensor.view()[rows], release=lambda: None, runs=None)


def element_of(tensor: StoredTensor, index: int) -> StoredTensor:
    """tensor[index] as one of its own."""
    part = part_of(tensor, index, 1)
    return replace(part, key=f"{tensor.key}[{index}]", shape=part.shape[1:], view=lambda: part.view()[0], cut=None)


def transposed(tensor: StoredTensor) -> StoredTensor:
    """Of a matrix."""
    return replace(tensor, shape=tensor.shape[::-1], view=lambda: tensor.view().t(), populate=None, cut=None, runs=None)


def every(tensor: StoredTensor, first: int, step: int) -> StoredTensor:
    """tensor[first::step], of a part of a pickle: the whole one, once given back, is gone."""
    shape = (len(range(first, tensor.shape[0], step)), *tensor.shape[1:])
    return replace(tensor, shape=shape, view=lambda: tensor.view()[first::step], populate=None, cut=None, runs=None)


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
    return begin, end, mapped_tensor(key, file, memory, start + begin, shape, dtype)


def mapped_tensor(
    key: str, file: Path, memory: mmap.mmap, first: int, shape: tuple[int, ...], dtype: torch.dtype
) -> StoredTensor:
    """The bytes from `first` on of a mapped file, whose bounds have been checked, as a tensor."""
    last = first + math.prod(shape) * dtype.itemsize
    return _mapped(key, file, _Mapped(memory, first, last, shape, dtype))


def _mapped(key: str, file: Path, place: _Mapped) -> StoredTensor:
    return StoredTensor(
        key,
        file,
        place.shape,
        place.dtype,
        place.view,
        prefetch=lambda: place.advise(mmap.MADV_WILLNEED),
        release=lambda: place.advise(mmap.MADV_DONTNEED),
        populate=place.populate if place.is_aligned else None,
        cut=lambda first, count: _mapped(key, file, place.rows(first, count)),
    )


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

    def rows(self, first: int, count: int) -> _Mapped:
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        start = self.first + first * size
        return replace(self, first=start, last=start + count * size, shape=(count, *self.shape[1:]))

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


def read_pickle(file: Path) -> list[StoredTensor]:
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
