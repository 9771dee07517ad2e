"""Compiling for GPUs that are not there, and what the compiled kernels use of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE = re.compile(r"\b(?:LDG|LDGSTS)\.\S*\.?128\b|\bLDG\S*\.128|\bLDGSTS\S*\.128|\bUTMALDG")
HALF_WIDE = re.compile(r"\bLDG(?:STS)?\S*\.64\b")
LOADS = re.compile(r"\bLDG(?:STS)?\b|\bUTMALDG")
SPILLS = re.compile(r"\b(?:LDL|STL)\b")
PRODUCTS = re.compile(r"\b(?:HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA)\b")


class AbsentDevice:
    """A driver of Triton for one compute capability. Nothing can be started with it. The number of the device is the
    capability, so that what is compiled for one is never taken for another."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """`launch` with fake tensors compiles for this compute capability (90: 9.0) into Triton's cache."""
    before = driver._active
    driver.set_active(AbsentDevice(arch))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True, slots=True)
class Usage:
    """What one variant of a kernel uses."""

    kernel: str
    arch: int
    constants: dict[str, object]
    warps: int
    registers: int  # of a thread
    shared_bytes: int
    stack_bytes: int  # of a thread
    spills: int  # instructions that use the stack
    loads: int  # from global memory, in the code
    wide_loads: int  # of them 16 bytes a thread
    half_wide_loads: int  # 8 bytes a thread
    products: int  # instructions of tensor cores


def compiled(functions: list[Any], arch: int) -> Iterator[tuple[str, dict[str, object], Any]]:
    """(name, constants, kernel) of all variants that this process has for a compute capability."""
    for function in functions:
        if arch in function.device_caches:
            for kernel in function.device_caches[arch][0].values():
                names = function.arg_names
                constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
                yield function.__name__, constants, kernel


def usage(name: str, arch: int, constants: dict[str, object], kernel: Any) -> Usage:
    """Read from the binary by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "-res-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
    loads = [line for line in code.splitlines() if LOADS.search(line)]
    return Usage(
        name,
        arch,
        constants,
        kernel.metadata.num_warps,
        numbers["REG"],
        kernel.metadata.shared,
        numbers["STACK"],
        len(SPILLS.findall(code)),
        len(loads),
        sum(bool(WIDE.search(line)) for line in loads),
        sum(bool(HALF_WIDE.search(line)) for line in loads),
        len(PRODUCTS.findall(code)),
    )


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(TOOLS)}).stdout
