"""Content keys (safety catalogue S72 to S74)."""

from __future__ import annotations

import hashlib

import numpy as np

from sensorium.media.key import content_key


def test_shape_kind_type_times_and_rate_are_in_the_key() -> None:
    flat = np.zeros(9000, np.uint8)
    keys = [
        content_key("image", flat.reshape(30, 100, 3)),
        content_key("image", flat.reshape(100, 30, 3)),
        content_key("video", flat.reshape(1, 30, 100, 3)),
        content_key("video", flat.reshape(1, 30, 100, 3), timestamps_s=(0.0,)),
        content_key("video", flat.reshape(1, 30, 100, 3), timestamps_s=(0.5,)),
        content_key("video", flat.reshape(2, 15, 100, 3), timestamps_s=(0.0, 1.0)),
        content_key("video", flat.reshape(2, 15, 100, 3), timestamps_s=(0.0, 2.0)),
        content_key("audio", flat.view(np.float32), sample_rate=16000),
        content_key("audio", flat.view(np.float32), sample_rate=8000),
        content_key("image", flat.view(np.int8).reshape(30, 100, 3)),
        content_key("image", np.ones((30, 100, 3), np.uint8)),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == hashlib.sha256().digest_size for key in keys)


def test_key_is_of_the_values_not_of_the_layout() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    assert content_key("image", pixels) == content_key("image", np.asfortranarray(pixels))
    assert content_key("image", pixels) == content_key("image", np.repeat(pixels, 2, axis=0)[::2])


def test_keys_of_many_pictures_differ() -> None:
    """S74, with pictures that differ in one value."""
    picture = np.zeros((8, 8, 3), np.uint8)
    keys = set()
    for number in range(100_000):
        picture.reshape(-1)[:3] = number & 255, number >> 8 & 255, number >> 16
        keys.add(content_key("image", picture))
    assert len(keys) == 100_000
