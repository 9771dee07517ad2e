"""Quantised weights kept on disk: what took seconds to make from a large checkpoint is mapped at the next start.

A copy is one file in a folder of the user's own, laid out like a safetensors file whose tensors are the kernels' packed
weights. Its name says what it was made from: the checkpoint's files with their sizes and times of change, how they were
quantised, and the kernels' layout. The file is written under a temporary name and renamed
atomically. It is ignored if other users can write to it or if its shapes differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensorium.errors import CheckpointError
from sensorium.weights.tensor_files import DTYPE_NAMES, StoredTensor, read_safetensors

logger = logging.getLogger(__name__)

PIECE_BYTES = 4 * 1024 * 1024  # written at once
ALIGNMENT = 64
STALE_S = 3600  # a file half written for so long belongs to nobody


class QuantizedCopy:
    """The copy of one checkpoint, as it is on disk or as it will be."""

    def __init__(self, folder: Path, files: Iterable[Path], made_how: Iterable[object]) -> None:
        """`files`: all that the weights come from. `made_how`: whatever else they depend on, as `repr` says it."""
        made_how = list(made_how)
        paths = [file.resolve() for file in files]
        states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        self._which = _digest([str(path) for path in paths], made_how)[:16]
        self.file = folder / f"{self._which}-{_digest(states, made_how)[:32]}.weights"
        self._made: dict[str, Mapping[str, Tensor]] = {}
        self._stored = self._open()
        self._is_new = not self._stored

    def parts(self, name: str) -> dict[str, Tensor] | None:
        """The memory-mapped tensors of one parameter's packed weight; None if the copy does not have it."""
        found = self._stored.pop(name, None)
        if found is None:
            return None
        for one in found.values():
            if one.populate is not None:
                one.populate()
        return {part: one.view() for part, one in found.items()}

    @property
    def is_empty(self) -> bool:
        """Whether the file has no parameters (left)."""
        return not self._stored

    def add(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Add the tensors of a newly quantised weight. They must not change until they are written."""
        if self._is_new:
            self._made[name] = parts

    def discard(self, why: str) -> None:
        """Remove a copy that does not fit: the next start makes another one."""
        logger.warning("the kept copy of the quantised weights does not fit (%s): made anew", why)
        self.file.unlink(missing_ok=True)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was newly quantised."""
        return not self._made

    def write(self) -> Iterator[None]:
        """Write what was made, a piece at a time; whatever goes wrong is logged and costs only the copy."""
        tensors = {f"{name}.{part}": tensor for name, parts in self._made.items() for part, tensor in parts.items()}
        self._made = {}
        try:
            yield from self._write(tensors)
        except OSError as error:
            logger.warning("the quantised weights are not kept in %s: %s", self.file.parent, error.strerror or error)

    def _open(self) -> dict[str, dict[str, StoredTensor]]:
        try:
            if not self.file.is_file() or not (_is_ours(self.file.parent) and _is_ours(self.file)):
                return {}
            tensors = read_safetensors(self.file)
        except (OSError, CheckpointError) as error:
            logger.warning("the kept copy of the quantised weights is not used: %s", error)
            return {}
        found: dict[str, dict[str, StoredTensor]] = {}
        for tensor in tensors:
            name, _, part = tensor.key.rpartition(".")
            found.setdefault(name, {})[part] = tensor
        return found

    def _write(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        header, size = _header(tensors)
        folder = self.file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            logger.warning("the quantised weights are not kept: others may write to %s", folder)
            return
        for old in folder.glob("*.tmp"):
            if time.time() - old.stat().st_mtime > STALE_S:
                old.unlink(missing_ok=True)
        if shutil.disk_usage(folder).free < 2 * size:
            logger.info("the quantised weights are not kept: %s has little space left", folder)
            return
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
        is_done = False
        try:
            _write_all(handle, memoryview(header))
            for tensor in tensors.values():
                data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), PIECE_BYTES):
                    _write_all(handle, data[start : start + PIECE_BYTES])
                    yield
                _write_all(handle, memoryview(bytes(-len(data) % ALIGNMENT)))
            is_done = True
        finally:
            if not is_done:
                os.close(handle)
                Path(name).unlink(missing_ok=True)
        threading.Thread(target=self._rename, args=(handle, Path(name)), daemon=True).start()

    def _rename(self, handle: int, written: Path) -> None:
        """Once it is on the disk; an older copy of the same checkpoint goes."""
        try:
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            written.replace(self.file)
            for other in self.file.parent.glob(f"{self._which}-*.weights"):
                if other != self.file:
                    other.unlink(missing_ok=True)
            logger.info("the quantised weights are kept in %s for the next start", self.file)
        except OSError as error:
            written.unlink(missing_ok=True)
            logger.warning("the quantised weights are not kept: %s", error.strerror)


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user can have written it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """(the file's head, bytes of the whole file)"""
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _write_all(handle: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(handle, data) :]
