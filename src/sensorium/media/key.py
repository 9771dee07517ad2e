"""Content keys: the full sha256 of everything that makes two media different, framed so that no two can be confused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sensorium.types import Modality

DOMAIN = b"sensorium media 1"


def content_key(
    kind: Modality, data: NDArray[np.generic], *, timestamps_s: Sequence[float] = (), sample_rate: int = 0
) -> bytes:
    """32 bytes. Every field goes in with its length before it, so 30x100 and 100x30 of one colour differ."""
    digest = hashlib.sha256()
    for field in (
        DOMAIN,
        kind.encode(),
        str(data.dtype).encode(),
        struct.pack(f"<{data.ndim}Q", *data.shape),
        struct.pack(f"<{len(timestamps_s)}d", *timestamps_s),
        struct.pack("<Q", sample_rate),
    ):
        digest.update(struct.pack("<Q", len(field)))
        digest.update(field)
    digest.update(struct.pack("<Q", data.nbytes))
    digest.update(np.ascontiguousarray(data).data)
    return digest.digest()
