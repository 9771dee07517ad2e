"""A JPEG's markers: its frame and orientation for the header, its scans for what decoding costs. Nothing is decoded.

Bytes between segments are skipped, as libjpeg does: drones and some phones leave them there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_SEGMENTS = 4096  # looked at before the frame; real files have some hundred
MAX_STRAY_BYTES = 1 << 20  # between all segments
MAX_SCANS = 64  # libjpeg writes 10 in colour and 18 for CMYK, mozjpeg about as many
START, END, SCAN, EXIF = 0xD8, 0xD9, 0xDA, 0xE1
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))  # frames that one scan can bring whole
BARE = frozenset((0x01, START, *range(0xD0, 0xD8)))  # markers without a body
MARKER = re.compile(rb"\xff([\x01-\xfe])")
AFTER_SCAN = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # restarts belong to the scan
COEFFICIENTS = 64
ALL_BITS = (1 << COEFFICIENTS) - 1


@dataclass(frozen=True, slots=True)
class Segment:
    """`end` is where the next one is looked for."""

    marker: int
    body: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Scans:
    """How often a decoder goes over the image (counted to one beyond `MAX_SCANS`), and whether the scans that are
    there bring every coefficient of every component to its full precision."""

    count: int
    is_whole: bool


def segments(data: bytes) -> Iterator[Segment]:
    """From the first one after the start on; ends where none is found or one is cut off."""
    offset, strays = 2, MAX_STRAY_BYTES
    while (found := MARKER.search(data, offset, offset + strays)) is not None:
        strays -= found.start() - offset
        marker, offset = found[1][0], found.end()
        if marker in BARE:
            yield Segment(marker, b"", offset)
            continue
        length = int.from_bytes(data[offset : offset + 2], "big")
        body = data[offset + 2 : offset + length]
        if marker == END or length < 2 or len(body) != length - 2:
            return
        offset += length
        yield Segment(marker, body, offset)
        if marker == SCAN:
            following = AFTER_SCAN.search(data, offset)
            if following is None:
                return
            offset = following.start()


def count_scans(data: bytes) -> Scans:
    """Runs in workers: it looks at the whole file."""
    count = 0
    missing: dict[int, int] = {}  # component -> a bit for each coefficient
    for segment in segments(data):
        if segment.marker in FRAMES:
            missing = dict.fromkeys(segment.body[6::3], ALL_BITS)
        elif segment.marker == SCAN:
            count += 1
            if count > MAX_SCANS:
                break
            _strike(missing, segment.body)
    return Scans(count, bool(missing) and not any(missing.values()))


def _strike(missing: dict[int, int], scan: bytes) -> None:
    """Take out of each component's bits of missing coefficients those that this scan completes."""
    if len(scan) < 4 or len(scan) != 4 + 2 * scan[0]:
        return
    first, last, precision = scan[-3], scan[-2], scan[-1] & 15
    if precision == 0 and first <= last < COEFFICIENTS:
        complete = (1 << last + 1) - (1 << first)
        for component in scan[1:-3:2]:
            missing[component] = missing.get(component, 0) & ~complete
