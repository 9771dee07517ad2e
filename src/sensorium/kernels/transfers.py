"""Arrays on their way between host and device: many in one copy, which nobody waits for until its numbers are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes, of each array on the device: what kernels are compiled for
SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
TYPES = {
    np.dtype(str(one).removeprefix("torch.")): one for one in (torch.int32, torch.int64, torch.float32, torch.float64)
}


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors with the arrays' numbers, of 4 or 8 bytes each; of uint32 and uint64 the bits as signed numbers. The
    arrays may change at once. On a CPU, the arrays themselves."""
    signed = [array.view(SIGNED.get(array.dtype, array.dtype)) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in signed]
    places, size = [], 0
    for array in signed:
        places.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    packed = host_bytes(max(size, ALIGNMENT), is_pinned=is_asynchronous(device))
    for array, place in zip(signed, places, strict=True):
        packed[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = torch.from_numpy(packed).to(device, non_blocking=True)
    return [
        there.narrow(0, place, array.nbytes).view(TYPES[array.dtype]).view(array.shape)
        for array, place in zip(signed, places, strict=True)
    ]


class Fetch:
    """Numbers of a device in one copy to the host, which is under way when this is made."""

    __slots__ = ("_event", "_host", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """On one device; those of larger elements first."""
        self._tensors, self._event = list(tensors), None
        device = tensors[0].device
        if device.type == "cpu":
            return
        flat = [one.contiguous().view(-1).view(torch.uint8) for one in tensors]
        packed = flat[0] if len(flat) == 1 else torch.cat(flat)
        self._host = torch.empty(len(packed), dtype=torch.uint8, pin_memory=is_asynchronous(device))
        self._host.copy_(packed, non_blocking=True)
        if is_asynchronous(device):
            self._event = torch.Event(device)
            self._event.record()

    def wait(self) -> list[NDArray[Any]]:
        """What the tensors held. Raises what the device's work before the copy failed with."""
        if self._tensors[0].device.type == "cpu":
            return [one.numpy() for one in self._tensors]
        if self._event is not None:
            self._event.synchronize()
        found, start = [], 0
        for one in self._tensors:
            found.append(self._host[start : start + one.nbytes].view(one.dtype).view(one.shape).numpy())
            start += one.nbytes
        return found


def is_asynchronous(device: torch.device) -> bool:
    """Whether copies are done while the host goes on: not by tensors that stand for a GPU that is not there."""
    return device.type == "cuda" and torch.cuda.is_available()


def host_bytes(count: int, *, is_pinned: bool) -> NDArray[np.uint8]:
    """[count], with memory also where tensors are made without."""
    if is_pinned:
        pinned: NDArray[np.uint8] = torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned  # which keeps the tensor's memory
    return np.empty(count, np.uint8)
