"""Which frames of a clip are taken: each family's own rule as data, and the arithmetic that both processes share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Placement = Literal["ends", "starts", "centers", "stride", "floors", "ceilings", "paced"]
PLACEMENTS: tuple[Placement, ...] = ("ends", "starts", "centers", "stride", "floors", "ceilings", "paced")
PACES = ((30, 3.0), (300, 1.0), (2400, 0.5))  # of clips up to so many seconds, pairs of frames in one


@dataclass(frozen=True, slots=True)
class VideoSampling:
    """How many frames (`num_frames`, or `fps` times the duration, within the bounds) and where they lie.

    ends: evenly from the first to the last frame; starts: at the beginning of equal parts; centers: in their middle;
    stride: every n-th frame, n the clip's rate over `fps`, thinned to `max_frames` at the centers of equal parts;
    floors: as ends, but rounded down, and the number of frames to the nearest; ceilings: the first frame at or after
    each time, `max_frames` of them in what is too long for `fps`; paced: so, at a rate that depends on the duration.
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
        if self.placement in ("ceilings", "paced") and self.num_frames is None:
            paced = self.placement == "paced"
            found = _paced(total, duration_s, self.max_frames or total) if paced else self._ceilings(total, duration_s)
            return self._pairs(found if len(found) <= most else _evenly(0, total - 1, most))
        count = self._count(total, duration_s, most)
        if self.placement in ("ends", "ceilings", "paced"):
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
        return self._pairs(_evenly(first, last, count))

    def _ceilings(self, total: int, duration_s: float) -> list[int]:
        """Source: transformers' Glm4vVideoProcessor."""
        fps, rate = self.fps or 2.0, total / max(duration_s, 1e-6)
        most = self.max_frames or total
        if duration_s <= most / fps:
            places = [i * rate / fps for i in range(max(math.floor(duration_s * fps), 1))]
        elif most >= total:
            return list(range(total))
        else:
            places = [time * rate for time in np.linspace(0, duration_s, most).tolist()]
        return sorted({min(total - 1, math.ceil(place - 1e-6)) for place in places})

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


def _evenly(first: int, last: int, count: int) -> list[int]:
    return sorted({*np.linspace(first, last, count, dtype=int).tolist()})


def _paced(total: int, duration_s: float, most: int) -> list[int]:
    """Source: transformers' Glm46VVideoProcessor."""
    frame_s = 1 / round(total / max(duration_s, 1e-6), 9)  # with the errors that there are of the clip's own rate
    longest = min(duration_s, PACES[-1][0])
    pairs_a_second = next(pace for seconds, pace in PACES if longest <= seconds)
    wanted = min(int(longest * pairs_a_second * 2), most)
    if total < wanted:
        return _evenly(0, total - 1, wanted)
    found, time = list[int](), 0.0
    for index in range(total):
        if index * frame_s >= time:
            time += 1 / (2 * pairs_a_second)
            found.append(index)
            if time >= int(duration_s):
                break
    if len(found) < wanted:
        return _evenly(found[0], found[-1], wanted)
    return found if len(found) == wanted else _evenly(0, total - 1, max(wanted, 1))


def _centers(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of 0..total-1."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def fitted_size(height: int, width: int, frames: int, max_pixels: int) -> tuple[int, int]:
    """The size at which so many frames have at most `max_pixels` together; unchanged where they do already."""
    if height * width * frames <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width * frames))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
