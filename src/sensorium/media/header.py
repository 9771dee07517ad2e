"""Format, size and orientation of an image from its first bytes, in plain Python.

Runs in the HTTP process, so it decodes nothing, believes no length without a check and takes a bounded number of
steps. The worker uses the same orientation, so that both agree on the size of the upright image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from sensorium.media import jpeg
from sensorium.media.source import Refusal

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]

MAX_CHUNKS = 4096  # looked at; real files have some hundred
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`width` and `height` as stored; `orientation` is EXIF's 1 to 8."""

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1
    bit_depth: int = 8  # of one sample (PNG)
    has_scans: bool = False  # a JPEG that comes in several, which keeps all coefficients until its end

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as a viewer shows it."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def decoded_bytes(self) -> int:
        """Of each pixel in the process that decodes, at most."""
        if self.format == "WEBP":
            return 20  # the library's canvas, the one before it, and copies of what it shows
        return 16 if self.has_scans else 8


def image_format(payload: bytes) -> ImageFormat | None:
    """The allow-list, by magic bytes; what the client or the sending server declared plays no part."""
    if payload.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if payload.startswith(b"RIFF") and payload[8:12] == b"WEBP":
        return "WEBP"
    if payload.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if payload.startswith(b"BM") and int.from_bytes(payload[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "BMP"
    return None


def read_header(payload: bytes) -> ImageHeader:
    """Raises Refusal("type") for anything outside the allow-list, Refusal("parse") for a broken header."""
    readers = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "BMP": _bmp}
    found = image_format(payload)
    if found is None:
        raise Refusal("type", "This file is not in a supported image format: send JPEG, PNG, WebP, GIF or BMP.")
    header = readers[found](payload)
    if header is None:
        raise Refusal("parse", f"The {found} file is damaged: its header cannot be read.")
    return header


def exif_orientation(tiff: bytes) -> int:
    """EXIF block (from its TIFF header on) -> orientation, 1 where there is none or it is broken."""
    order: Literal["little", "big"]
    if tiff.startswith(b"II*\0"):
        order = "little"
    elif tiff.startswith(b"MM\0*"):
        order = "big"
    else:
        return 1
    start = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[start : start + 2], order)
    for offset in range(start + 2, start + 2 + 12 * min(count, 256), 12):
        entry = tiff[offset : offset + 12]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == ORIENTATION_TAG:
            value = int.from_bytes(entry[8:10], order)
            is_short = int.from_bytes(entry[2:4], order) == 3 and int.from_bytes(entry[4:8], order) == 1
            return value if is_short and 1 <= value <= 8 else 1
    return 1


def _jpeg(data: bytes) -> ImageHeader | None:
    orientation, header, components = 1, None, 0
    for segment in islice(jpeg.segments(data), jpeg.MAX_SEGMENTS):
        if segment.marker in jpeg.FRAMES and header is None:
            if len(segment.body) < 6:
                return None
            height, width = int.from_bytes(segment.body[1:3], "big"), int.from_bytes(segment.body[3:5], "big")
            components = segment.body[5]
            header = ImageHeader("JPEG", width, height, has_scans=segment.marker not in jpeg.SEQUENTIAL)
        if segment.marker == jpeg.SCAN:
            is_whole = len(segment.body) > 0 and segment.body[0] >= components
            if header is not None and not is_whole:
                header = replace(header, has_scans=True)
            break
        if segment.marker == jpeg.EXIF and segment.body.startswith(b"Exif\0\0") and orientation == 1:
            orientation = exif_orientation(segment.body[6:])
    return None if header is None else replace(header, orientation=orientation)


def _png(data: bytes) -> ImageHeader | None:
    if data[8:16] != b"\0\0\0\rIHDR" or len(data) < 33:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    orientation, offset = 1, 33
    for _ in range(MAX_CHUNKS):
        length, kind = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        if kind in (b"IDAT", b"IEND", b""):
            return ImageHeader("PNG", width, height, orientation, bit_depth=data[24])
        if kind == b"eXIf" and length <= 1 << 20:
            orientation = exif_orientation(data[offset + 8 : offset + 8 + length])
        offset += 12 + length
    return None


def _webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return ImageHeader(
            "WEBP", int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
        )
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        has_exif, is_animated = bool(data[20] & 8), bool(data[20] & 2)
        return ImageHeader("WEBP", width, height, _webp_orientation(data) if has_exif and not is_animated else 1)
    return None


def _webp_orientation(data: bytes) -> int:
    offset = 12
    for _ in range(MAX_CHUNKS):
        kind, length = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        if kind == b"EXIF":
            body = data[offset + 8 : offset + 8 + min(length, 1 << 20)]
            return exif_orientation(body.removeprefix(b"Exif\0\0"))
        if len(kind) < 4:
            break
        offset += 8 + length + (length & 1)
    return 1


def _gif(data: bytes) -> ImageHeader | None:
    if len(data) < 13:
        return None
    return ImageHeader("GIF", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))


def _bmp(data: bytes) -> ImageHeader | None:
    if len(data) < 26:
        return None
    if int.from_bytes(data[14:18], "little") == 12:
        return ImageHeader("BMP", int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little"))
    width = int.from_bytes(data[18:22], "little", signed=True)
    height = int.from_bytes(data[22:26], "little", signed=True)
    return ImageHeader("BMP", width, abs(height)) if width > 0 else None
