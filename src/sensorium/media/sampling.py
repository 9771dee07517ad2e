"""Which frames of a clip are taken: each family's own rule as data, and the arithmetic that both processes share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Placement = Literal["ends", "starts", "centers", "stride", "floors"]
PLACEMENTS: tuple[Placement, ...] = ("ends", "starts", "centers", "stride", "floors")


@dataclass(frozen=True, slots=True)
class VideoSampling:
    """How many frames (`num_frames`, or `fps` times the duration, within the bounds) and where they lie.

    ends: evenly from the first to the last frame; starts: at the beginning of equal parts; centers: in their middle;
    stride: every n-th frame, n the clip's rate over `fps`, thinned to `max_frames` at the centers of equal parts;
    floors: as ends, but rounded down, and the number of frames to the nearest.
    """

    fps: float | None = 2.0
    num_frames: int | None = None  # wins over fps
    min_frames: int = 1
    max_frames: int | None = None
    even: bool = False  # an even number of frames, for towers that take them in pairs
    placement: Placement = "ends"
    skip_s: float = 0.0  # floors: left out at both ends of clips that have more seconds besides than frames

    def indices(self, total: int, duration_s: float, limit: int) -> list[int]:
        """Ascending, distinct numbers of the frames to take out of `total`; at most `limit`, at least one."""
        most = max(1, min(total, limit, self.max_frames or total))
        if self.placement == "stride" and self.fps and self.num_frames is None:
            step = max(1, round(total / max(duration_s, 1e-6) / self.fps))
            every = range(0, total, step)
            return self._pairs([every[i] for i in _centers(len(every), min(len(every), most))])
        if self.placement == "floors":
            return self._floors(total, duration_s, most)
        count = self._count(total, duration_s, most)
        if self.placement == "ends":
            return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
        if self.placement == "starts":
            return [i * total // count for i in range(count)]
        return _centers(total, count)

    def _floors(self, total: int, duration_s: float, most: int) -> list[int]:
        """Source: SmolVLM's processor."""
        fps, first, last = self.fps or 1.0, 0, total - 1
        count = max(1, min(self.num_frames or round(fps * duration_s), most))
        if self.skip_s and duration_s - 2 * self.skip_s > (self.max_frames or most) * fps:
            skipped = self.skip_s * total / duration_s
            first, last = int(skipped), min(int(total - skipped), last)
        return self._pairs(sorted({*np.linspace(first, last, count, dtype=int).tolist()}))

    def _count(self, total: int, duration_s: float, most: int) -> int:
        wanted: float = total
        if self.num_frames is not None:
            wanted = self.num_frames
        elif self.fps is not None:
            wanted = duration_s * self.fps
        count = max(1, math.floor(min(max(wanted + 1e-6, self.min_frames), most)))
        return count // 2 * 2 if self.even and count > 1 else count

    def _pairs(self, indices: list[int]) -> list[int]:
        return indices[: len(indices) // 2 * 2] if self.even and len(indices) > 1 else indices

    def as_record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def _centers(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of 0..total-1."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def fitted_size(height: int, width: int, frames: int, max_pixels: int) -> tuple[int, int]:
    """The size at which so many frames have at most `max_pixels` together; unchanged where they do already."""
    if height * width * frames <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width * frames))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
