"""Pictures made by hand for the tests: what no encoder would write."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def data_url(payload: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(payload).decode()}"


def photo(width: int, height: int) -> Image.Image:
    """Smooth, asymmetric in every direction."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + 2 * y) % 200)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes = b"", *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """`rows` with their filter bytes; without them a header with nearly nothing behind it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey_rows(samples: np.ndarray, depth: int) -> bytes:
    """Samples [height, width] of `depth` bits -> filtered PNG rows."""
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    bits = ((samples[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(samples), -1).astype(np.uint8)
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)


def exif(orientation: int, order: str = "<") -> bytes:
    """A TIFF header with this one tag."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
