"""The LoRA adapters of one engine, by the numbers that requests call them by.

A number is never used again. A sequence holds its adapter for as long as it lives: what is unloaded or replaced
meanwhile is only not found by later requests. Where a model is split, every rank has its part of each adapter, for as
long as rank 0 has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.errors import CheckpointError
from sensorium.ipc import messages
from sensorium.models.adapters import Adapter, StepAdapters, load_adapter
from sensorium.models.base import Model

if TYPE_CHECKING:
    from sensorium.engine.leader import Leader


class Adapters:
    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device, leader: Leader | None = None) -> None:
        """`leader`: of the other ranks, where there are some and this is rank 0."""
        self._model = model
        self._leader = leader
        self._dtype, self._device = dtype, device
        self._loaded: dict[int, Adapter] = {}
        self._elsewhere: dict[int, int] = {}  # bytes that other ranks have of each

    def load(self, number: int, folder: str) -> str:
        """Why it cannot be loaded, in one line; "": it is."""
        if self._leader is not None:
            self._leader.send(messages.encode_load_adapter(number, folder))
        error = self._read(number, folder)
        if self._leader is None:
            return error
        answers = self._leader.adapters_loaded()
        error = next(filter(None, [error, *(why for why, _ in answers)]), "")
        self._elsewhere[number] = sum(size for _, size in answers)
        if error:
            self.unload(number)
            self._leader.send(messages.encode_unload_adapter(number))
        else:
            dropped = messages.encode_unload_adapter(number)
            weakref.finalize(self._loaded[number], self._leader.send, dropped).atexit = False
        return error

    def _read(self, number: int, folder: str) -> str:
        try:
            found = load_adapter(self._model, Path(folder), number, dtype=self._dtype, device=self._device)
            self._loaded[number] = found
        except CheckpointError as error:
            return error.message
        except (OSError, MemoryError, RuntimeError) as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return f"the adapter in {folder} cannot be read: {type(error).__name__}: {first}"
        return ""

    def unload(self, number: int) -> None:
        self._loaded.pop(number, None)
        self._elsewhere.pop(number, None)

    def nbytes(self, number: int) -> int:
        """On all ranks; 0 of one that is not loaded."""
        found = self._loaded.get(number)
        return 0 if found is None else found.nbytes + self._elsewhere.get(number, 0)

    def find(self, number: int) -> Adapter | None:
        return self._loaded.get(number)

    def of_step(self, rows: Mapping[int, Tensor | None]) -> StepAdapters:
        """Those of a step that another rank laid out, by their numbers."""
        return StepAdapters([(self._loaded[number], own) for number, own in rows.items()])
