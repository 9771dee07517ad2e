"""Sizes in bytes: their units, how messages write them, how flags are read."""

from __future__ import annotations

import re

MiB = 1024 * 1024
GiB = 1024 * MiB
LETTERS = {"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
"""One letter behind a number, as vLLM reads it: `4g` is decimal, `4G` binary."""

_UNITS = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_size(text: str) -> int:
    """`256MiB`, `4GB`, `4G` or plain bytes -> bytes. ValueError says how to write it."""
    match = _SIZE.fullmatch(text.strip())
    unit = match.group(2) if match else ""
    scale = LETTERS.get(unit) or _UNITS.get(unit.lower() or "b") if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not a size; write 256MiB, 4GB or a number of bytes")
    return int(float(match.group(1)) * scale)


def size_text(size_bytes: int) -> str:
    """20971520 -> "20 MiB": for messages, to four digits."""
    for unit, name in ((1024**4, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (1024, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.4g} {name}"
    return f"{size_bytes} bytes"


def decimal_text(size_bytes: float) -> str:
    """1536000 -> "1.5 MB": for the log's line of what a server takes, which people and scripts compare with files."""
    for unit in ("B", "kB", "MB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} GB"


def size_flag(size_bytes: int) -> str:
    """1048576 -> "1MiB": as a flag's value, which `parse_size` reads back exactly."""
    text = size_text(size_bytes).replace(" ", "")
    return text if text[0] != "-" and text.endswith("iB") and parse_size(text) == size_bytes else str(size_bytes)
