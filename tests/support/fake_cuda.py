"""A GPU that is not there: tensors of `cuda` with shapes and types but no numbers, on a torch that knows only CPUs.

An operation of tensors on two devices raises, so does reading a number of one. What crosses between host and device,
and how many operations there are, is counted: `Traffic`.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

# A CPU build of torch has nothing that sets the current device of `cuda`, not even to do nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


def install(folder: Path) -> None:
    """Make `cuda` a device of this process, as long as it lives. Without a compiler or headers a test is skipped."""
    if torch.cuda.is_available():
        return
    compiler, torch_folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("there is no g++, which a device guard is compiled with")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{torch_folder}/include", str(source)]
    made = subprocess.run(
        [*command, "-o", str(library), f"-L{torch_folder}/lib", "-lc10"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"torch's headers do not compile here: {made.stderr[-300:]}")
    ctypes.CDLL(str(library))


class Traffic(TorchDispatchMode):
    """Counts what is launched and what crosses between host and device. An operation that gives another view of a
    tensor launches nothing, nor does memory without contents."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.to_device: list[str] = []
        self.to_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        given, made = _tensors([*args, *(kwargs or {}).values()]), _tensors([out])
        kinds = {one.device.type for one in (*given, *made)}
        if kinds == {"cpu", "cuda"}:
            (self.to_device if made and made[0].device.type == "cuda" else self.to_host).append(name)
        elif "cuda" in kinds and not name.startswith(("empty", "new_empty")):
            known = {one.untyped_storage()._cdata for one in given}
            if func._schema.is_mutable or any(one.untyped_storage()._cdata not in known for one in made):
                self.launched[name] += 1
        return out

    @property
    def launches(self) -> int:
        return sum(self.launched.values())


def _tensors(values: Any) -> list[Tensor]:
    """A number of the host is an argument of the kernel that takes it."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.dim() or value.device.type == "cuda":
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def count_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of Triton are no more than counted by the innermost `Traffic`."""

    def counted(kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        mode = _get_current_dispatch_mode_stack()[-1]
        if isinstance(mode, Traffic):
            mode.launched[kernel.__name__] += 1

    package = importlib.import_module("sensorium.kernels.cuda")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}") if found.name != "build" else package
        if hasattr(module, "launch") and found.name != "launch":
            monkeypatch.setattr(module, "launch", counted)
