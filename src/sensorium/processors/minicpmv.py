"""MiniCPM-V 2.6, 4.0 and 4.5: an image is seen whole and, if it is large, in slices of its own aspect; 64 rows for
each of them.

In the prompt an image has a number, which counts the prompt's images; a video is its frames, one image after the
other, without numbers. 4.5 may pack frames: `packing_nums` in a row have the rows of one. Slices travel as bytes: the
model normalises them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError, StartupError
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.base import Piece, PlaceholderRun, Processor, Setting, SettingError, boolean, integer, number
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

MAX_SLICES = 36
MAX_FRAMES = 64  # of a video that is not packed; packs of one that is
MAX_PACKING = 6  # frames that 4.5 has learned to read as one
PACKING_VERSION = "4.5"
TENTHS = 10  # units of a frame's time in a second
TAGS: Mapping[Modality, str] = {"image": "(<image>./</image>)", "video": "(<video>./</video>)"}
TOKENS: Mapping[str, str] = {  # names in preprocessor_config.json
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
}
_KINDS: Mapping[str, Modality] = {tag: kind for kind, tag in TAGS.items()}
_TAG = re.compile("(" + "|".join(map(re.escape, TAGS.values())) + ")")


@dataclass(frozen=True, slots=True)
class Slicing:
    """How one image is cut. Sizes are (height, width) in pixels, multiples of the patch."""

    whole: tuple[int, int]
    slice: tuple[int, int]
    rows: int = 0  # of slices; none if the image is only seen whole
    columns: int = 0

    @property
    def count(self) -> int:
        return 1 + self.rows * self.columns


def slice_grid(height: int, width: int, max_slices: int, scale: int) -> tuple[int, int] | None:
    """(rows, columns) whose aspect is nearest to the image's, of as many slices as it has squares of `scale`."""
    wanted = min(math.ceil(height * width / (scale * scale)), max_slices)
    if wanted <= 1:
        return None
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slices]
    grids = [(count // columns, columns) for count in counts for columns in range(1, count + 1) if not count % columns]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))


def scaled_size(height: float, width: float, scale: int, patch: int, *, enlarges: bool) -> tuple[int, int]:
    """The size with the area of a square of `scale` and the same aspect, to the nearest patch."""
    if enlarges or height * width > scale * scale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest(height, patch), _nearest(width, patch)


def slicing(height: int, width: int, max_slices: int, scale: int, patch: int) -> Slicing:
    grid = slice_grid(height, width, max_slices, scale)
    if grid is None:
        size = scaled_size(height, width, scale, patch, enlarges=True)
        return Slicing(size, size)
    rows, columns = grid
    cell = scaled_size(_nearest(height, rows) / rows, _nearest(width, columns) / columns, scale, patch, enlarges=True)
    return Slicing(scaled_size(height, width, scale, patch, enlarges=False), cell, rows, columns)


def _nearest(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


class MiniCPMVProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"image", "video"})
    settings: ClassVar[Mapping[str, Setting]] = {
        "max_slice_nums": integer(1, MAX_SLICES),
        "video_max_slice_nums": integer(1, MAX_SLICES),
        "use_image_id": boolean,
        "packing_nums": integer(1, MAX_PACKING),
        "fps": number(0.01, 1000),
        "num_frames": integer(1, 1024),
        "max_frames": integer(1, 1024),
    }
    literals: ClassVar[tuple[str, ...]] = tuple(TAGS.values())

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        names = {name: checkpoint.preprocessor.get(name) or token for name, token in TOKENS.items()}
        ids = {name: tokenizer.token_to_id(token) for name, token in names.items()}
        missing = [names[name] for name, token_id in ids.items() if token_id is None]
        if missing:
            raise StartupError(f"The tokenizer lacks tokens that MiniCPM-V's prompts need: {', '.join(missing)}")
        self._tokens = {name: np.array([token_id], np.int32) for name, token_id in ids.items()}
        self._fill = int(self._tokens["unk"][0])

    def _configure(self) -> None:
        config, files = self.checkpoint.config, self.checkpoint.preprocessor
        slices = config.get("slice_config") or {}
        self._scale: int = files.get("scale_resolution") or slices.get("scale_resolution", 448)
        self._patch: int = files.get("patch_size") or config.get("patch_size", 14)
        self._rows: int = config.get("query_num", 64)
        if files.get("image_feature_size", self._rows) != self._rows:
            raise CheckpointError("preprocessor_config.json: 'image_feature_size' is not config.json's 'query_num'")
        self._packing: int | None = self._setting("packing_nums", None)
        if self._packing and str(config.get("version")) != PACKING_VERSION:
            raise SettingError(
                "packing_nums",
                f"needs MiniCPM-V {PACKING_VERSION}; this is version {config.get('version')}: leave it out",
            )
        numbered = config.get("use_image_id", True)
        self._numbered: bool = self._setting("use_image_id", True if numbered is None else numbered)
        most = self._setting("max_slice_nums", slices.get("max_slice_nums", 9))
        whole = not image.switch(files, "slice_mode")
        self._most: dict[Modality, int] = {
            "image": 1 if whole else most,
            "video": 1 if whole else self._setting("video_max_slice_nums", 1 if self._packing else 2),
        }
        # As the model's card samples: about one frame a second, thinned out evenly.
        self._sampling = VideoSampling(
            fps=self._setting("fps", 1.0),
            num_frames=self.overrides.get("num_frames"),
            max_frames=self._setting("max_frames", MAX_FRAMES * (self._packing or 1)),
            placement="stride",
        )

    def video_sampling(self) -> VideoSampling:
        return self._sampling

    def placeholder(self, kind: Modality, index: int) -> str:
        return TAGS[kind] if kind in TAGS else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind in TAGS else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind not in TAGS:
            return super().num_tokens(kind, height, width, frames)
        shown = frames if kind == "image" else math.ceil(frames / (self._packing or 1))
        return shown * self._slicing(kind, height, width).count * self._rows

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind not in TAGS:
            return super().process(item)
        frames = item.data.astype(np.uint8, copy=False)
        frames = frames if item.kind == "video" else frames[None]
        plan = self._slicing(item.kind, frames.shape[1], frames.shape[2])
        packing = self._packing if item.kind == "video" else None
        shown = [frames[start : start + (packing or 1)] for start in range(0, len(frames), packing or 1)]
        # The frames of a pack lie together, cell by cell.
        cells = (cell for pack in shown for cell in zip(*(self._slices(one, plan) for one in pack), strict=True))
        slices = [part for cell in cells for part in cell]
        arrays: dict[str, NDArray[np.generic]] = {
            "patches": np.concatenate([self._patches(part) for part in slices]),  # uint8 [patches, 3 * patch * patch]
            "grids": np.array([part.shape[:2] for part in slices], np.int32) // self._patch,  # [slices, 2]
            "layout": np.array([len(shown), plan.rows, plan.columns], np.int32),
        }
        if packing:
            sizes = [len(pack) for pack in shown]
            arrays["packs"] = np.repeat(np.array(sizes, np.int32), plan.count)  # slices that the resampler reads as one
            arrays["times"] = self._times(item, sizes, plan.count)
        return MediaFeatures(item.kind, self._feature_key(item), len(shown) * plan.count * self._rows, arrays)

    @staticmethod
    def _times(item: MediaItem, sizes: Sequence[int], count: int) -> NDArray[np.int32]:
        """int32 [slices], tenths of a second, in the order of the slices; a clip that brings no times has a frame a
        second."""
        seconds = np.array(item.timestamps_s or range(len(item.data)), np.float64)
        tenths = np.rint(seconds * TENTHS).astype(np.int32)
        packs = np.split(tenths, np.cumsum(sizes)[:-1])
        return np.concatenate([np.tile(pack, count) for pack in packs])

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        pieces = _TAG.split(text)  # texts and, at odd places, tags
        self._check_counts([_KINDS[tag] for tag in pieces[1::2]], media)
        return self._assemble(self._pieces(pieces, media, add_special_tokens), media)

    def text_length(self, text: str) -> int:
        return sum(len(self.tokenizer.encode(piece)) for piece in _TAG.split(text)[::2])

    def _pieces(
        self, pieces: Sequence[str], media: Sequence[MediaFeatures], add_special_tokens: bool
    ) -> Iterator[Piece]:
        waiting = {kind: iter([i for i, one in enumerate(media) if one.kind == kind]) for kind in TAGS}
        seen: Counter[Modality] = Counter()
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                yield self._encoded(piece, add_special_tokens=add_special_tokens and place == 0)
                continue
            kind = _KINDS[piece]
            index = next(waiting[kind])
            if kind == "image" and self._numbered:
                yield self._tokens["im_id_start"]
                yield self._encoded(str(seen[kind]))
                yield self._tokens["im_id_end"]
            seen[kind] += 1
            yield from self._medium(index, media[index])

    def _medium(self, item: int, features: MediaFeatures) -> Iterator[Piece]:
        """Every frame or pack: the whole image, then its slices, line by line. Packs stand on lines of their own."""
        frames, rows, columns = features.arrays["layout"].tolist()
        line_end = self._encoded("\n")
        first_rows = itertools.count(0, self._rows)
        for frame in range(frames):
            if frame and "packs" in features.arrays:
                yield line_end
            yield from self._slot("im", item, next(first_rows))
            for row in range(rows):
                if row:
                    yield line_end
                for _ in range(columns):
                    yield from self._slot("slice", item, next(first_rows))

    def _slot(self, name: str, item: int, row: int) -> Iterator[Piece]:
        yield self._tokens[f"{name}_start"]
        yield PlaceholderRun(item, self._fill, self._rows, row)
        yield self._tokens[f"{name}_end"]

    def _encoded(self, text: str, *, add_special_tokens: bool = False) -> NDArray[np.int32]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), np.int32)

    def _slicing(self, kind: Modality, height: int, width: int) -> Slicing:
        return slicing(height, width, self._most[kind], self._scale, self._patch)

    def _slices(self, frame: NDArray[np.uint8], plan: Slicing) -> Iterator[NDArray[np.uint8]]:
        yield image.resize(frame, *plan.whole, Resampling.BICUBIC)
        if not plan.rows:
            return
        height, width = plan.slice
        refined = image.resize(frame, plan.rows * height, plan.columns * width, Resampling.BICUBIC)
        for top, left in itertools.product(range(0, refined.shape[0], height), range(0, refined.shape[1], width)):
            yield refined[top : top + height, left : left + width]

    def _patches(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[height, width, 3] -> [patches, 3 * patch * patch]"""
        patch = self._patch
        return image.patches([pixels], (1, pixels.shape[0] // patch, pixels.shape[1] // patch), patch, 1)
