"""Which kernels compute on a device that torch calls `cuda`.

Those for NVIDIA GPUs are compiled where they run, which takes a first start half a minute. So a model starts on the
reference, another process compiles, and `switch` is called between two steps. Where they cannot be had, the reference
stays; one line of the log says why.
"""

from __future__ import annotations

import functools
import logging
import shutil
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from sensorium.kernels import reference
from sensorium.kernels.backend import Backend

LEAST_CAPABILITY = (8, 0)  # tensor cores for bfloat16, copies that a program does not wait for

logger = logging.getLogger(__name__)


class GpuKernels:
    """`current` computes, `weights` are made for what will. Both are the reference at first."""

    def __init__(self) -> None:
        self.current: Backend = reference
        self.weights: Backend = reference

    @property
    def is_switched(self) -> bool:
        return self.current is not reference

    @property
    def is_compiling(self) -> bool:
        """Whether weights are there for kernels that are not."""
        return self.weights is not self.current

    def prepare(self) -> None:
        """Weights that are made from now on are those of the kernels for NVIDIA GPUs, which are not compiled yet."""
        self.weights = _compiled()

    def switch(self) -> None:
        """From now on the kernels for NVIDIA GPUs. Nothing may be computing; what a model has made of the ones before
        (`Model.forget_kernels`) is to be made anew."""
        self.current = self.weights = _compiled()

    def switch_back(self) -> None:
        """To the reference."""
        self.current = self.weights = reference


def _compiled() -> Backend:
    """By name: it needs Triton, and its weights ask here what is compiled."""
    made: Backend = import_module("sensorium.kernels.cuda").CudaBackend()
    return made


@functools.cache
def gpu_kernels() -> GpuKernels:
    """Those of this process: there is one GPU in it, and one model."""
    return GpuKernels()


def refusal(device: torch.device) -> str | None:
    """Why the kernels for NVIDIA GPUs are not for this device; None: they are."""
    if device.type != "cuda":
        return f"there are none for devices of the kind {device.type}"
    if torch.version.hip is not None:
        return "this build of torch is for ROCm"
    if torch.version.cuda is None:
        return "this build of torch knows no CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"compute capability {major}.{minor} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'sensorium[cuda]')"
    return compiler_missing()


def compiler_missing() -> str | None:
    """Triton builds a small program at its first start on a machine, even where all kernels are in its cache."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "Triton needs a C compiler (cc, gcc or clang), and there is none on the PATH"
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").is_file():
        return f"Triton needs Python's headers, and {headers} has no Python.h (package python3-dev)"
    return None


def begin(device: torch.device) -> bool:
    """Before a model is loaded: whether there will be other kernels than the reference; if not, the log says why."""
    reason = refusal(device)
    if reason is None:
        gpu_kernels().prepare()
        return True
    logger.warning("kernels for NVIDIA GPUs are not used, torch alone computes: %s", reason)
    return False
