"""Images, video and audio as a Python program has them -> files in memory, without loss.

What comes out goes the way of every media item: measured by its header, decoded in a worker under limits.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sensorium.errors import RequestError
from sensorium.media.framelist import LosslessFrames
from sensorium.media.source import MediaSource
from sensorium.types import Modality

_WAV = struct.Struct("<4sI4s4sIHHIIHH4sI")
_IEEE_FLOAT = 3


def source_of(kind: Modality, item: Any, param: str) -> MediaSource:
    """Of a URL, a path, a file's bytes, a PIL image, or an array: uint8 [height, width, 3] for an image, uint8 [frames,
    height, width, 3] or a list of images for a video, (float [samples], rate in Hz) for audio. RequestError if it is
    none of these."""
    match item:
        case str():
            return MediaSource(kind, param, url=item)
        case os.PathLike():
            return MediaSource(kind, param, payload=_read(Path(item), param))
        case bytes() | bytearray() | memoryview():
            return MediaSource(kind, param, payload=bytes(item))
    try:
        if kind == "image":
            return MediaSource(kind, param, payload=_png(_image(item)))
        if kind == "audio":
            samples, rate = item
            return MediaSource(kind, param, payload=_wav(np.asarray(samples), int(rate)))
        return MediaSource(kind, param, payload=LosslessFrames.of([_png(_image(frame)) for frame in item]))
    except (TypeError, ValueError, KeyError) as error:
        raise RequestError(f"`{param}`: this cannot be read as {kind}: {_FORMS[kind]}.", param=param) from error


_FORMS = {
    "image": "give a URL, a path, a file's bytes, a PIL image or uint8 [height, width, 3]",
    "video": "give a URL, a path, a file's bytes, images or uint8 [frames, height, width, 3]",
    "audio": "give a URL, a path, a file's bytes or (float [samples], rate in Hz)",
}


def _read(path: Path, param: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"`{param}`: {path} cannot be read: {error.strerror}.", param=param) from error


def _image(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    pixels = np.asarray(item)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError("not pixels")
    return Image.fromarray(pixels)


def _png(image: Image.Image) -> bytes:
    """Kept as it is, its EXIF orientation included; modes that PNG has no word for become RGB."""
    file = io.BytesIO()
    shown = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    shown.save(file, "PNG", compress_level=1, exif=image.getexif().tobytes())
    return file.getvalue()


def _wav(samples: np.ndarray[Any, Any], rate: int) -> bytes:
    """float32, one channel; of several the mean."""
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating) or rate < 1:
        raise ValueError("not samples")
    data = samples.astype("<f4").tobytes()
    header = _WAV.pack(
        b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, _IEEE_FLOAT, 1, rate, 4 * rate, 4, 32, b"data", len(data)
    )
    return header + data


class PythonParts:
    """Takes the objects out of messages and keeps them: {"type": "image", "image": ...} (or vLLM's image_pil), and the
    same for video and audio, become parts with a URL that only this call knows."""

    def __init__(self) -> None:
        self._items: dict[str, Any] = {}

    def replaced(self, messages: Sequence[Any]) -> list[Any]:
        return [self._message(message) for message in messages]

    def content(self, given: Any) -> Any:
        """A text, the parts of a content, or a list of these, as bodies of comparisons write them."""
        if isinstance(given, str):
            return given
        if given and isinstance(given[0], dict):
            return {"content": [self._part(part) for part in given]}
        return [self.content(one) for one in given]

    def with_objects(self, media: Sequence[MediaSource]) -> tuple[MediaSource, ...]:
        """The sources, with the objects in the place of those URLs."""
        return tuple(
            source_of(one.kind, self._items[one.url], one.param) if one.url in self._items else one for one in media
        )

    def _message(self, message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list | tuple):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        for modality in ("image", "video", "audio"):
            name = "image_pil" if kind == "image_pil" and modality == "image" else modality
            if kind == name and name in part:
                return {"type": f"{modality}_url", f"{modality}_url": self._kept(part[name])}
        return part

    def _kept(self, item: Any) -> str:
        url = f"object:{id(self)}-{len(self._items)}"
        self._items[url] = item
        return url
