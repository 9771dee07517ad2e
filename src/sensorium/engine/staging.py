"""A step's arrays on their way to an accelerator: laid out in one buffer of the host, copied in one go.

An array has its place on the device as soon as it is put there, its numbers come with `send`. Places follow from the
sizes of what was put before, so a step that puts the same sizes in the same order has the same addresses: those that a
captured graph reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.kernels.transfers import host_bytes, is_asynchronous

ALIGNMENT = 64  # bytes: wide loads, and whole cache lines of the host
MAX_VIEWS = 4096  # that are kept: of the same place and shape they come again in every step

Wait: TypeAlias = Callable[[], None]


class Staging:
    """Two buffers of the host take turns: one is written while the copy of the other may still be under way."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """`capacity` bytes; what does not fit is copied by itself."""
        self._device = device
        self._is_asynchronous = is_asynchronous(device)
        self._target = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._arrays = [host_bytes(capacity, is_pinned=self._is_asynchronous) for _ in range(2)]
        self._sources = [torch.from_numpy(array) for array in self._arrays]
        self._waits: list[Wait | None] = [None, None]
        self._turn = 0
        self._used = 0
        self._views: dict[tuple[int, np.dtype[np.generic], tuple[int, ...]], Tensor] = {}
        self.spilled = False  # whether something of this step has another place than the buffer
        self.copies = 0  # so far, of any kind

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._target.nbytes

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the device that stays."""
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def begin(self) -> None:
        """A new step. What was put and not sent is dropped."""
        self._used = 0
        self.spilled = False
        wait, self._waits[self._turn] = self._waits[self._turn], None
        if wait is not None:
            wait()

    def put(self, array: NDArray[np.generic]) -> Tensor:
        """Where the array will be on the device, once `send` was called. It is valid until the next step's `send`."""
        start, size = self._used, array.nbytes
        if start + size > len(self._arrays[0]):
            self.copies += 1
            self.spilled = True
            return torch.from_numpy(np.array(array)).to(self._device)
        self._arrays[self._turn][start : start + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._used = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        key = (start, array.dtype, array.shape)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            view = self._views[key] = self._target[start : start + size].view(dtype).view(array.shape)
        return view

    def send(self) -> None:
        """Copy what was put since `begin`. Returns at once; what is launched after it finds the numbers."""
        if not self._used:
            return
        self.copies += 1
        self._target[: self._used].copy_(self._sources[self._turn][: self._used], non_blocking=True)
        if self._is_asynchronous:
            event = torch.Event(self._device)
            event.record()
            self._waits[self._turn] = event.synchronize
        self._turn = 1 - self._turn
        self._used = 0


def staging_bytes(tokens: int, sequences: int, tables: int, axes: int) -> int:
    """Enough for the arrays of a step, and the new entries of its block tables but for a sequence that comes with
    thousands: so many of 8 bytes for each token and each sequence."""
    per_token = 4 + axes + tables
    per_sequence = 24 + 4 * tables
    return 8 * (tokens * per_token + sequences * per_sequence) + 2 * 12 * 4096 + ALIGNMENT * 64
