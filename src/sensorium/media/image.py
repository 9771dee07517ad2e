"""Image file -> upright RGB pixels, as a viewer would show it on white paper. Runs in decode workers only.

First frame only; alpha, palettes, 16 bits, CMYK and EXIF orientation are resolved here, colour profiles are ignored.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

# Pillow imports these when a file needs them, which a worker that is locked in no longer can.
from PIL import ImageColor, ImagePalette, TiffImagePlugin  # noqa: F401  # isort: skip

from sensorium.media import jpeg
from sensorium.media.header import ImageFormat, ImageHeader, read_header
from sensorium.media.source import Refusal

READERS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
"""Called directly: `Image.open` also follows a JPEG into its multi-picture format (MPF) and knows 40 more."""

FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files. The worker takes anything else in the same way."""

MAX_PASSES = 20  # over as many pixels as an image may have; over fewer pixels, more
FILLERS = (b"", b"\x55" * 64)  # what is put in place of a JPEG's missing end

Pixels = NDArray[np.uint8]


def decode_image(payload: bytes, max_pixels: int) -> Pixels:
    """uint8 [height, width, 3]. The size was checked against the limits by whoever called; `max_pixels` is that
    limit, from which follows how often a progressive JPEG may go over how many pixels."""
    header = read_header(payload)
    _check_passes(payload, header, max_pixels)
    try:
        return _decoded(payload, header)
    except UNREADABLE:
        if header.format == "JPEG" and jpeg.count_scans(payload).is_whole:
            return _without_end(payload, header)
        raise damaged(header) from None


def damaged(header: ImageHeader) -> Refusal:
    return Refusal("parse", f"The {header.format} file is damaged or cut off: it cannot be decoded.")


def _check_passes(payload: bytes, header: ImageHeader, max_pixels: int) -> None:
    """All other formats are gone through once: of animations the first frame alone, and interlacing repeats nothing."""
    if header.format != "JPEG":
        return
    scans, pixels = jpeg.count_scans(payload).count, header.width * header.height
    if scans > jpeg.MAX_SCANS or scans * pixels > MAX_PASSES * max_pixels:
        most = min(jpeg.MAX_SCANS, MAX_PASSES * max_pixels // pixels)
        raise Refusal(
            "large",
            f"The JPEG file has more than {most} scans, which takes too long to decode at its size. "
            "Save it with the usual settings of progressive JPEG, or as baseline JPEG.",
        )


def _decoded(payload: bytes, header: ImageHeader) -> Pixels:
    with READERS[header.format](BytesIO(payload)) as image:
        if image.size != (header.width, header.height):
            raise ValueError
        image.load()
        rgb = _to_rgb(image, header)
        upright = rgb.transpose(FLIPS[header.orientation]) if header.orientation in FLIPS else rgb
        return np.asarray(upright)


def _without_end(payload: bytes, header: ImageHeader) -> Pixels:
    """A JPEG that lacks its end marker, whose pixels are all there: whatever follows does not change them. One that is
    cut off elsewhere takes the filler for pixels, and shows it."""
    try:
        first, second = (_decoded(payload.rstrip(b"\xff") + filler + b"\xff\xd9", header) for filler in FILLERS)
    except UNREADABLE:
        raise damaged(header) from None
    if not np.array_equal(first, second):
        raise damaged(header)
    return first


def _to_rgb(image: Image.Image, header: ImageHeader) -> Image.Image:
    transparency = image.info.pop("transparency", None)
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image), transparency)
    if _is_colour_key(transparency, image.mode):
        image.info["transparency"] = _scaled_key(transparency, image.mode, header)
        return _on_white(image.convert("RGBA"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return _on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_colour_key(transparency: object, mode: str) -> bool:
    """A text chunk may write anything at all under this name, so its type is looked at."""
    if mode == "P":
        return isinstance(transparency, int | bytes)
    if mode == "RGB":
        return isinstance(transparency, tuple) and len(transparency) == 3
    return mode in ("1", "L") and isinstance(transparency, int)


def _scaled_key(key: object, mode: str, header: ImageHeader) -> object:
    """PNG writes the transparent colour in samples of the file's depth; Pillow has made 8 bits of the pixels."""
    if mode == "L" and isinstance(key, int) and header.bit_depth < 8:
        return key * 255 // ((1 << header.bit_depth) - 1)
    if mode == "RGB" and isinstance(key, tuple) and header.bit_depth == 16:
        return tuple(sample >> 8 for sample in key)
    return key


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def _from_16_bits(samples: NDArray[np.generic], key: object) -> Image.Image:
    """Grey 0..65535 -> 0..255, rounded."""
    wide = np.clip(samples.astype(np.int32), 0, 65535)
    grey = ((wide + 128) // 257).astype(np.uint8)
    if isinstance(key, int):
        grey[wide == key] = 255
    return Image.fromarray(grey).convert("RGB")
