"""Processed media that were seen lately, so that a conversation which repeats a picture does not decode it again.

Entries are found by the sha256 of the file as it came, the processor settings and the tenant's salt, and forgotten by
size in bytes, the least recently used first. Used on the event loop only.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from sensorium.types import MediaFeatures, Modality


def feature_key(
    kind: Modality, declared_type: str | None, payload: bytes, settings: Mapping[str, Any], salt: bytes
) -> bytes:
    """What a media item's features depend on, each field framed. The declared type decides whether the file is taken.
    `salt` separates tenants: how long an answer takes would tell one what another has sent."""
    fields = [kind, declared_type, settings, len(payload), salt.hex()]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(b"\0")
    digest.update(payload)
    return digest.digest()


class FeatureCache:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, MediaFeatures] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: bytes) -> MediaFeatures | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, features: MediaFeatures) -> None:
        size = _size(features)
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = features
        self.size_bytes += size
        while self.size_bytes > self._max_bytes:
            _, forgotten = self._entries.popitem(last=False)
            self.size_bytes -= _size(forgotten)


def _size(features: MediaFeatures) -> int:
    return sum(array.nbytes for array in features.arrays.values())
