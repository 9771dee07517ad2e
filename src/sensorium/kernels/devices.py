"""What torch and the kernels find on this machine, for `sensorium info`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sensorium.kernels.cpu import native
from sensorium.units import size_text


def devices() -> Iterator[tuple[str, str]]:
    """(name, value) of each fact."""
    yield "torch threads", str(torch.get_num_threads())
    yield "cpu features", torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = size_text(device.total_memory)
        yield f"gpu {index}", f"{device.name}, {memory}, compute {device.major}.{device.minor}"
    yield "native kernels", _native()


def _native() -> str:
    try:
        return native.load().describe()
    except (OSError, AttributeError) as error:
        return f"not there, torch computes alone ({error})"
