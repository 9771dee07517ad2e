"""The GGUF container: metadata and the places of tensors, of mapped files whose every number is checked.

Little-endian, versions 2 and 3: header, metadata, tensor infos, padding, data. Nothing of the data is read here.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from sensorium.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
MAX_STRINGS = 4_000_000  # of one array
MAX_ENTRIES, MAX_TENSORS = 100_000, 1_000_000
MAX_ALIGNMENT = 1 << 20
MAX_DIMS, MAX_NAME_BYTES = 4, 256

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor is stored: so many weights in so many bytes."""

    name: str
    weights: int
    nbytes: int


BLOCK_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 17),
}
"""By ggml's number."""
_UNSERVED = {
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"},
}
_REMOVED = (4, 5, 31, 32, 33, 36, 37, 38)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place: `offset` is from the file's start, `shape` has the fastest dimension last."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.weights * self.kind.nbytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file. Arrays of metadata are `Strings` or numpy arrays."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path) -> GgufFile:
    """Read the header. CheckpointError says in one line what is wrong with the file."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise CheckpointError(f"{path.name} is no file that can be mapped")
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _Reader(path, memory).file()
    except ValueError as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path.name} is not a GGUF file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_gguf_set(path: Path) -> tuple[GgufFile, ...]:
    """All files of a model, of which `path` is one, the first one first. CheckpointError if one is missing."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        only = read_gguf(path)
        if _stated(only, "split.count") not in (None, 0, 1):
            raise CheckpointError(f"{path.name} is one of several parts, whose names must end in -00001-of-0000N.gguf")
        return (only,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(f"{path.name} cannot be part {int(match['number'])} of {count}")
    paths = [_part(path, match, number) for number in range(1, count + 1)]
    if missing := [one.name for one in paths if not one.is_file()]:
        raise CheckpointError(f"{path.name} is one of {count} parts, and {missing[0]} is not there")
    files = tuple(read_gguf(one) for one in paths)
    _check_set(files)
    return files


def _part(path: Path, match: re.Match[str], number: int) -> Path:
    return path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")


def _stated(file: GgufFile, key: str) -> int | str | None:
    """A number of the split. An array has no equality that is true or false: its text stands for it."""
    value = file.metadata.get(key)
    return value if value is None or isinstance(value, int) else str(value)[:80]


def _check_set(files: tuple[GgufFile, ...]) -> None:
    for number, file in enumerate(files):
        stated = (_stated(file, "split.no"), _stated(file, "split.count"))
        if stated != (number, len(files)):
            raise CheckpointError(
                f"{file.path.name} says that it is part {stated[0]} of {stated[1]}, not {number} of {len(files)}"
            )
    names = [tensor.name for file in files for tensor in file.tensors]
    wanted = _stated(files[0], "split.tensors.count")
    if len(set(names)) != len(names) or wanted not in (None, len(names)):
        raise CheckpointError(f"{files[0].path.name}: its parts have {len(set(names))} tensors in place of {wanted}")


class Strings(Sequence[str]):
    """An array of texts as the file has it. Who wants weights asks for none of them, so they are read when one is."""

    def __init__(self, stored: bytes, count: int) -> None:
        """Each is its length, 8 bytes, and its bytes."""
        self._stored, self._count = stored, count

    @functools.cached_property
    def _texts(self) -> list[str]:
        found, at, stored = [], 0, self._stored
        for _ in range(self._count):
            start = at + _LENGTH.size
            at = start + _LENGTH.unpack_from(stored, at)[0]
            found.append(stored[start:at].decode("utf-8", "replace"))
        return found

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return self._texts[at]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)


class _Reader:
    """Reads a header from front to back; no number of it is believed."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory, self.at = path, memory, 0
        self.end = min(len(memory), MAX_HEADER_BYTES)

    def file(self) -> GgufFile:
        if self.memory[:4] != _MAGIC:
            raise self.broken("is not a GGUF file")
        self.at = 4
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise self.broken("is a big-endian GGUF file, which is not supported")
        if version not in _VERSIONS:
            raise self.broken(f"has GGUF version {version}; 2 and 3 are supported")
        tensors, entries = self.number("Q"), self.number("Q")
        if entries > MAX_ENTRIES or tensors > MAX_TENSORS:
            raise self.broken(f"states {entries} metadata entries and {tensors} tensors, which is too many")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string(MAX_NAME_BYTES)
            if key in metadata:
                raise self.broken(f"has the metadata key {key!r} twice")
            metadata[key] = self.value(self.number("I"))
        infos = [self.info() for _ in range(tensors)]
        return GgufFile(self.path, metadata, self.placed(infos, metadata.get("general.alignment", 32)))

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} {what}")

    def take(self, nbytes: int) -> int:
        """Where the next so many bytes begin."""
        start = self.at
        if nbytes > self.end - start:
            raise self.broken("has a broken or too large GGUF header, or is cut short")
        self.at = start + nbytes
        return start

    def number(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self.memory, self.take(struct.calcsize(layout)))[0]

    def string(self, most: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > most:
            raise self.broken(f"has a text of {length} bytes")
        start = self.take(length)
        return self.memory[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.number(self.scalar(kind))

    def scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.broken(f"has metadata of the unknown type {kind}")
        return _SCALARS[kind]

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            raise self.broken("has arrays of arrays in its metadata, which is not supported")
        dtype = np.dtype("?" if kind == 7 else "<" + self.scalar(kind))
        if count > MAX_HEADER_BYTES:
            raise self.broken(f"has an array of {count} numbers")
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.memory[start : self.at], dtype)

    def strings(self, count: int) -> Strings:
        """One pass over their lengths: a vocabulary has hundreds of thousands."""
        if count > min(MAX_STRINGS, (self.end - self.at) // 8):
            raise self.broken(f"has an array of {count} strings")
        first = at = self.at
        end, memory, unpack = self.end, self.memory, _LENGTH.unpack_from
        for _ in range(count):
            start = at + 8
            if start > end:
                self.take(end)
            at = start + unpack(memory, at)[0]
            if at > end:
                self.at = start
                self.take(end)
        self.at = at
        return Strings(memory[first:at], count)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(MAX_NAME_BYTES), self.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.broken(f"has a tensor {name!r} of {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: object) -> tuple[GgufTensor, ...]:
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.broken(f"has general.alignment {alignment!r}, which is no small power of two")
        data = -(-self.at // alignment) * alignment
        found = []
        for name, shape, kind, offset in infos:
            tensor = GgufTensor(name, shape, self.block_type(name, kind), data + offset)
            if offset % alignment or shape[-1] % tensor.kind.weights or not all(shape):
                raise self.broken(f"has a tensor {name!r} at a wrong offset, or of a wrong shape {list(shape)}")
            if tensor.offset + tensor.nbytes > len(self.memory):
                raise self.broken(f"is cut short: {name!r} ends at byte {tensor.offset + tensor.nbytes}")
            found.append(tensor)
        if len({tensor.name for tensor in found}) < len(found):
            raise self.broken("has two tensors of one name")
        for one, other in itertools.pairwise(sorted(found, key=lambda tensor: tensor.offset)):
            if one.offset + one.nbytes > other.offset:
                raise self.broken(f"has tensors that overlap: {one.name!r} and {other.name!r}")
        return tuple(found)

    def block_type(self, name: str, kind: int) -> BlockType:
        if kind in _REMOVED:
            raise self.broken(f"has {name!r} in a type that llama.cpp has removed ({kind}): make the file anew")
        if kind not in BLOCK_TYPES:
            served = ", ".join(one.name for one in BLOCK_TYPES.values())
            raise self.broken(
                f"has {name!r} as {_UNSERVED.get(kind, f'type {kind}')}, not supported; supported are {served}: make "
                "the file anew with llama-quantize, as Q4_K_M for one"
            )
        return BLOCK_TYPES[kind]
