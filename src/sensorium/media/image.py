"""Image file -> upright RGB pixels, as a viewer would show it on white paper. Runs in decode workers only.

First frame only; alpha, palettes, 16 bits, CMYK and EXIF orientation are resolved here, colour profiles are ignored.
What was decoded leaves in strips, each of which is converted on its own: the image is in memory once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
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
STRIP_PIXELS = 1 << 18
FROM_THE_END = (3, 4, 7, 8)  # orientations whose first row is the stored image's last row or column

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """uint8 [height, width, 3], to come in strips of whole rows. A strip may turn out to be damaged: Refusal."""

    height: int
    width: int
    strips: Iterator[Pixels]


def decode_image(payload: bytes, max_pixels: int) -> DecodedImage:
    """The size was checked against the limits by whoever called; `max_pixels` is that limit, from which follows how
    often a progressive JPEG may go over how many pixels."""
    header = read_header(payload)
    _check_passes(payload, header, max_pixels)
    image = _loaded_or_none(payload, header)
    if image is None and header.format == "JPEG" and jpeg.count_scans(payload).is_whole:
        image = _without_end(payload, header)
    if image is None:
        raise damaged(header)
    return DecodedImage(*header.upright, _strips(image, header))


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


def _loaded_or_none(payload: bytes, header: ImageHeader) -> Image.Image | None:
    """None of a damaged file. Nothing of it stays in memory, as it would with an error that is being handled."""
    try:
        return _loaded(payload, header)
    except UNREADABLE:
        return None


def _loaded(payload: bytes, header: ImageHeader) -> Image.Image:
    image = READERS[header.format](BytesIO(payload))
    if image.size != (header.width, header.height):
        raise ValueError
    image.load()
    return image


def _strips(image: Image.Image, header: ImageHeader) -> Iterator[Pixels]:
    """The upright image from its top on."""
    flip = FLIPS.get(header.orientation)
    try:
        for box in _boxes(header):
            rgb = _to_rgb(image.crop(box), header)
            yield np.asarray(rgb if flip is None else rgb.transpose(flip))
    except UNREADABLE:
        raise damaged(header) from None


def _boxes(header: ImageHeader) -> Iterator[tuple[int, int, int, int]]:
    """Where the strips of the upright image stand in the stored one: its rows or its columns, from either end."""
    width, height = header.width, header.height
    by_columns = header.orientation >= 5
    length, across = (width, height) if by_columns else (height, width)
    step = max(STRIP_PIXELS // across, 1)
    starts = range(0, length, step)
    for start in starts:
        begin, end = start, min(start + step, length)
        if header.orientation in FROM_THE_END:
            begin, end = length - end, length - begin
        yield (begin, 0, end, height) if by_columns else (0, begin, width, end)


def _without_end(payload: bytes, header: ImageHeader) -> Image.Image:
    """A JPEG that lacks its end marker, whose pixels are all there: whatever follows does not change them. One that is
    cut off elsewhere takes the filler for pixels, and shows it."""
    try:
        first, second = (_loaded(payload.rstrip(b"\xff") + filler + b"\xff\xd9", header) for filler in FILLERS)
    except UNREADABLE:
        raise damaged(header) from None
    if not all(map(np.array_equal, _strips(first, header), _strips(second, header))):
        raise damaged(header)
    return first


def _to_rgb(image: Image.Image, header: ImageHeader) -> Image.Image:
    """A part of the image as it looks on white."""
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
