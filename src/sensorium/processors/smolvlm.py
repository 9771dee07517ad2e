"""SmolVLM, SmolVLM2 and Idefics3: an image is enlarged to a fixed edge, cut into tiles of the tower's size, and seen
whole as one more. A video's frames are one square each, behind their times in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from sensorium.checkpoint.values import number as config_number
from sensorium.checkpoint.values import positive_int, square
from sensorium.errors import CheckpointError
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.base import Setting, boolean, integer, number
from sensorium.processors.shown import NamedProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

MAX_EDGE = 4096  # of any image after it was enlarged
MAX_FRAMES, FPS = 64, 1.0
SKIP_S = 1.0  # of both ends of clips that are long
RATE = 24.0  # of a clip that brings no times
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(count: int) -> str:
    """A number below a thousand as English writes it: "one hundred and forty-two"."""
    if count < 20:
        return WORDS[count]
    if count < 100:
        ten = TENS[count // 10 - 2]
        return ten if count % 10 == 0 else f"{ten}-{WORDS[count % 10]}"
    hundreds = f"{WORDS[count // 100]} hundred"
    return hundreds if count % 100 == 0 else f"{hundreds} and {in_words(count % 100)}"


def enlarged(height: int, width: int, edge: int) -> tuple[int, int]:
    """The size whose longer side is `edge`; the shorter one is even."""
    ratio = width / height
    short = int(edge / ratio if width >= height else edge * ratio)
    short = max(short + short % 2, 1)
    return (short, edge) if width >= height else (edge, short)


class SmolVLMProcessor(NamedProcessor):
    modalities: frozenset[Modality] = frozenset({"image", "video"})
    literals: ClassVar[tuple[str, ...]] = ("<video>",)
    settings: ClassVar[Mapping[str, Setting]] = {
        "do_image_splitting": boolean,
        "longest_edge": integer(1, MAX_EDGE),
        "fps": number(0.01, 1000),
        "num_frames": integer(1, 512),
        "max_frames": integer(1, 512),
    }
    marks: ClassVar[Mapping[Modality, str]] = {"image": "<image>", "video": "<video>"}
    _soft = "<image>"

    def _configure(self) -> None:
        config, files = self.checkpoint.config, self.checkpoint.preprocessor
        vision = config.get("vision_config") or {}
        side = square(vision, "image_size", 224)
        self._rows = (side // square(vision, "patch_size", 32) // positive_int(config, "scale_factor", 2)) ** 2
        self._tile = _edge(files, "max_image_size", side)
        if self._tile != side:
            raise CheckpointError(f"preprocessor_config.json: max_image_size {self._tile} is not the tower's {side}")
        self._edge = min(self.overrides.get("longest_edge", _edge(files, "size", 4 * side)), MAX_EDGE)
        self._cuts = self._setting("do_image_splitting", True)
        self._resample = image.resample_filter(files, Resampling.LANCZOS)
        self._normalization = image.Normalization.of(files, image.HALF, image.HALF)
        self._configure_video()

    def _configure_video(self) -> None:
        files = {**self.checkpoint.preprocessor, **self.checkpoint.video_preprocessor}
        stated = files.get("video_sampling") or {}
        self._video_edge = min(_edge(stated, "video_size", _edge(files, "size", self._edge)), MAX_EDGE)
        self._sampling = VideoSampling(
            fps=self.overrides.get("fps", config_number(stated, "fps", FPS)),
            num_frames=self.overrides.get("num_frames"),
            max_frames=self.overrides.get("max_frames", positive_int(stated, "max_frames", MAX_FRAMES)),
            placement="floors",
            skip_s=SKIP_S,
        )

    def video_sampling(self) -> VideoSampling:
        return self._sampling

    def placeholder(self, kind: Modality, index: int) -> str:
        return self.marks[kind] if kind in self.modalities else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind in self.modalities else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """Of a video with times of the first minute; longer numbers may take more."""
        if kind not in self.modalities:
            return super().num_tokens(kind, height, width, frames)
        if kind == "video":
            return frames * self._rows + self._text_tokens(self._timed([0] * frames, 0))
        lines, columns = self._grid(height, width)
        return (lines * columns + 1) * self._rows + self._text_tokens(self._tiled(lines, columns))

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind not in self.modalities:
            return super().process(item)
        pixels = item.data.astype(np.uint8, copy=False)
        arrays: dict[str, NDArray[np.generic]] = {}
        if item.kind == "video":
            squares = [self._squared(frame, self._video_edge) for frame in pixels]
            times = item.timestamps_s or [i / RATE for i in range(len(pixels))]
            arrays["seconds"] = np.array([*times, item.duration_s or times[-1]]).astype(np.int32)  # the clip's last
        else:
            squares = list(self._tiles(pixels))
            arrays["layout"] = np.array(self._grid(*pixels.shape[:2]), np.int32)
        arrays["pixels"] = np.stack([image.planes(one, self._normalization) for one in squares])
        return MediaFeatures(item.kind, self._feature_key(item), len(squares) * self._rows, arrays)

    def _squared(self, pixels: image.Pixels, edge: int) -> image.Pixels:
        height, width = pixels.shape[:2]
        resized = image.resize(pixels, *enlarged(height, width, edge), self._resample)
        return image.resize(resized, self._tile, self._tile, self._resample)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(lines, columns) of tiles; (0, 0): the image is only seen whole."""
        size = self._cut_size(*enlarged(height, width, self._edge))
        lines, columns = (side // self._tile for side in size)
        return (lines, columns) if self._cuts and lines * columns > 1 else (0, 0)

    def _cut_size(self, height: int, width: int) -> tuple[int, int]:
        """The next multiples of a tile: of the longer side, and of what the aspect then makes of the shorter one."""
        ratio, tile = width / height, self._tile
        if width >= height:
            width = math.ceil(width / tile) * tile
            return math.ceil(int(width / ratio) / tile) * tile, width
        height = math.ceil(height / tile) * tile
        return height, math.ceil(int(height * ratio) / tile) * tile

    def _tiles(self, pixels: image.Pixels) -> Iterator[image.Pixels]:
        """Line by line, and the whole image; every one of three sizes is made of the one before."""
        height, width = pixels.shape[:2]
        lines, columns = self._grid(height, width)
        if not lines:
            yield self._squared(pixels, self._edge)
            return
        size = enlarged(height, width, self._edge)
        whole = image.resize(image.resize(pixels, *size, self._resample), *self._cut_size(*size), self._resample)
        side = self._tile
        for line in range(lines):
            for column in range(columns):
                yield whole[line * side : (line + 1) * side, column * side : (column + 1) * side]
        yield image.resize(whole, side, side, self._resample)

    def _counts(self, media: MediaFeatures) -> list[int]:
        return [self._rows] * (media.num_rows // self._rows)

    def _shown(self, media: MediaFeatures) -> str:
        if media.kind == "video":
            *times, duration = media.arrays["seconds"].tolist()
            return self._timed(times, duration)
        lines, columns = media.arrays["layout"].tolist()
        return self._tiled(lines, columns)

    def _tiled(self, lines: int, columns: int) -> str:
        """With one soft token for the rows of each tile."""
        begin = "<fake_token_around_image>"
        whole = f"{begin}<global-img>{self._soft}{begin}"
        if not lines:
            return whole
        tiles = [
            "".join(f"{begin}<row_{line}_col_{column}>{self._soft}" for column in range(1, columns + 1))
            for line in range(1, lines + 1)
        ]
        return "".join(f"{line}\n" for line in tiles) + f"\n{whole}"

    def _timed(self, times: Sequence[int], duration: int) -> str:
        hours, minutes, seconds = duration // 3600, duration // 60 % 60, duration % 60
        frames = "".join(f"\nFrame from {at // 60:02d}:{at % 60:02d}:{self._tiled(0, 0)}" for at in times)
        return (
            f"You are provided the following series of {in_words(len(times))} frames from a "
            f"{hours}:{minutes:02d}:{seconds:02d} [H:MM:SS] video.\n{frames}\n\n"
        )


class Idefics3Processor(SmolVLMProcessor):
    modalities = frozenset({"image"})
    literals = ()


def _edge(files: Mapping[str, Any], name: str, default: int) -> int:
    """The longest edge of a size that a file states."""
    size = files.get(name)
    stated = size.get("longest_edge") if isinstance(size, Mapping) else size
    return positive_int({name: stated}, name, default)
