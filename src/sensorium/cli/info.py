"""`sensorium info`: what this machine and this install have, for bug reports; what a model is, and a GGUF file holds.

Imports torch, unlike other commands.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.gguf import SUFFIX, describe
from sensorium.checkpoint.gguf_config import kept_as
from sensorium.cli.models import find_checkpoint, find_draft, memory_rows, model_rows
from sensorium.config import DRAFT_FLAG
from sensorium.errors import StartupError
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


def info(model: str | None = None, draft: str | None = None) -> int:
    """Print it; the exit code is 0. CheckpointError if the model is none that is served, StartupError if `draft` cannot
    guess for it."""
    if draft is not None and model is None:
        raise StartupError(f"{DRAFT_FLAG} goes with a model: sensorium info MODEL {DRAFT_FLAG} {draft}")
    for name, value in rows() if model is None else rows_of(model, draft):
        print(f"{name:<16} {value}")
    return 0


def rows_of(model: str, draft: str | None = None) -> Iterator[tuple[str, str]]:
    """What a model is, from its configs and the sizes of its files: weights are not loaded. With the model that guesses
    for it, what both take."""
    is_file, checkpoint = Path(model).suffix == SUFFIX, find_checkpoint(model)
    guessing = None if draft is None else find_draft(draft, checkpoint)
    yield from file_rows(Path(model)) if is_file else _folder_rows(checkpoint)
    if guessing is not None:
        yield "draft model", f"{guessing.family.title}, {guessing.max_model_len} tokens; its memory is in what follows"
    yield from memory_rows(checkpoint, draft=guessing)


def _folder_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    from sensorium import kernels  # imports torch

    yield from model_rows(checkpoint)
    yield "kernels", kernels.describe()


def file_rows(path: Path) -> Iterator[tuple[str, str]]:
    """What a GGUF file, or the set that it is part of, has and what is made of it."""
    from sensorium import kernels  # imports torch

    found = describe(path)
    is_large = found.stored_bytes >= kernels.MAPPED_BYTES
    yield "format", f"GGUF, {size_text(found.file_bytes)}" + (f" in {found.parts} files" if found.parts > 1 else "")
    yield "architecture", found.architecture
    yield "weights", f"{found.weights / 1e6:,.1f} million, {found.bits_per_weight:.2f} bits each"
    for kind, count in found.types.items():
        is_mapped = is_large and kernels.maps_blocks(kind)
        yield f"  {kind}", f"{100 * count / found.weights:.1f} %, {kept_as(kind, is_mapped=is_mapped)}"
    yield "in memory", f"{size_text(found.memory_bytes)} of weights, besides the KV cache"
    if found.tower is not None:
        yield "tower", f"{found.tower.name} beside it, {size_text(found.tower.stat().st_size)}, is loaded too"
    yield "context", f"{found.context_length} tokens"
    yield "kernels", kernels.describe()


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
