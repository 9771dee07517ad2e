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
LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)")
BLOCK_COPY = "cp.async.bulk.tensor"
PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")


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
    stack_bytes: int  # of a thread: what did not find a register is there
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
    """Registers and stack are read from the binary by the tool that comes with Triton, instructions from the assembly
    that it was made of: to take the binary apart takes as long as to compile."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = tool_output("cuobjdump", "-res-usage", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
    code = kernel.asm["ptx"]
    widths = [width for line in code.splitlines() if (width := loaded_bytes(line))]
    return Usage(
        name,
        arch,
        constants,
        kernel.metadata.num_warps,
        numbers["REG"],
        kernel.metadata.shared,
        numbers["STACK"] + numbers["LOCAL"],
        len(widths),
        widths.count(16),
        widths.count(8),
        len(PRODUCT.findall(code)),
    )


def loaded_bytes(line: str) -> int:
    """How many a thread loads from global memory by a line of PTX; 0: it is no load."""
    if BLOCK_COPY in line:
        return 16  # at least, by one thread for all
    if load := LOAD.search(line):
        return int(load[1] or 1) * int(load[2]) // 8
    copy = COPY.search(line)
    return int(copy[1], 0) if copy else 0


def tool_output(tool: str, *arguments: str) -> str:
    """Of one of Triton's own tools."""
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(TOOLS)}).stdout
