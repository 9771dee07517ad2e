"""The LoRA adapters of one engine, by the numbers that requests call them by.

A number is never used again. A sequence holds its adapter for as long as it lives: what is unloaded or replaced
meanwhile is only not found by later requests.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sensorium.errors import CheckpointError
from sensorium.models.adapters import Adapter, load_adapter
from sensorium.models.base import Model


class Adapters:
    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device, *, is_shared: bool = False) -> None:
        """`is_shared`: other ranks have parts of the model."""
        self._model = model
        self._is_shared = is_shared
        self._dtype, self._device = dtype, device
        self._loaded: dict[int, Adapter] = {}

    def load(self, number: int, folder: str) -> str:
        """Why it cannot be loaded, in one line; "": it is."""
        if self._is_shared:
            return "a model that is split over ranks (--tensor-parallel-size) takes no LoRA adapters"
        try:
            self._loaded[number] = load_adapter(self._model, Path(folder), dtype=self._dtype, device=self._device)
        except CheckpointError as error:
            return error.message
        except (OSError, MemoryError, RuntimeError) as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return f"the adapter in {folder} cannot be read: {type(error).__name__}: {first}"
        return ""

    def unload(self, number: int) -> None:
        self._loaded.pop(number, None)

    def find(self, number: int) -> Adapter | None:
        return self._loaded.get(number)
