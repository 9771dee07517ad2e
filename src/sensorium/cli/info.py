"""`sensorium info`: what this machine and this install have, for bug reports. Imports torch, unlike other commands."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from sensorium.units import size_text

PACKAGES = (
    "sensorium",
    "torch",
    "numpy",
    "tokenizers",
    "pillow",
    "av",
    "soxr",
    "uvicorn",
    "httpx",
    "pydantic",
    "msgspec",
    "jinja2",
    "huggingface-hub",
    "transformers",
)


def info() -> int:
    """Print it; the exit code is 0."""
    for name, value in rows():
        print(f"{name:<16} {value}")
    return 0


def rows() -> Iterator[tuple[str, str]]:
    from sensorium.kernels.devices import devices  # imports torch

    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "cpu", f"{_cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable"
    yield "memory", _memory()
    yield from devices()
    for package in PACKAGES:
        yield package, _version(package)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _memory() -> str:
    fields = [_field(Path("/proc/meminfo"), name).removesuffix(" kB") for name in ("MemTotal", "MemAvailable")]
    if not all(field.isdecimal() for field in fields):
        return "unknown"
    total, available = (size_text(1024 * int(field)) for field in fields)
    return f"{total}, {available} of it available"


def _field(file: Path, name: str) -> str:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
