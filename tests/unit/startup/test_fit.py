"""What the HTTP process may take of a machine or control group: arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sensorium.config import EngineConfig, Limits, LoadConfig, ServeOptions, ServerConfig
from sensorium.startup.fit import BASE_BYTES, fitted, fitted_limits
from sensorium.units import GiB, MiB


def options(limits: Limits | None = None) -> ServeOptions:
    return ServeOptions(None, LoadConfig(), EngineConfig("m"), ServerConfig(), limits or Limits())


def model(folder: Path, size_bytes: int) -> Path:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size_bytes)
    return folder


def test_a_machine_with_much_memory_has_the_flags_limits(tmp_path: Path) -> None:
    given = options()
    assert fitted(given, [model(tmp_path, GiB)], 64 * GiB) == given


def test_a_control_group_of_700_mib(tmp_path: Path) -> None:
    found = fitted(options(), [model(tmp_path, 14 * MiB)], 680 * MiB)
    spare = 680 * MiB - BASE_BYTES - 14 * MiB
    assert found.limits.media_memory == int(0.3 * spare) == 108_842_188
    assert found.limits.max_pending_bytes == found.limits.max_body_bytes == int(0.08 * spare) == 29_024_583
    assert found.limits.max_upload_bytes == found.limits.max_pending_bytes
    assert found.limits.max_image_bytes == 20 * MiB
    assert found.limits.max_audio_bytes == 25 * MiB
    assert found.limits.max_video_bytes == found.limits.media_memory // 8
    assert 9_000_000 < found.limits.max_image_pixels < 9_200_000
    assert found.server.media_workers == 1


@pytest.mark.parametrize("free", [0, 100 * MiB, 350 * MiB, 700 * MiB, GiB, 2 * GiB, 4 * GiB, 16 * GiB, 100 * GiB])
def test_all_that_is_promised_fits(tmp_path: Path, free: int) -> None:
    """Media, prompts, three times the bodies and what the engine's caches take (3/8 of what they find): together no
    more than there is, but for what the smallest server needs to do anything."""
    found = fitted(options(), [model(tmp_path, 14 * MiB)], free)
    spare = free - BASE_BYTES - 14 * MiB
    limits = found.limits
    taken = limits.media_memory + limits.prompt_memory + 3 * limits.max_pending_bytes + 3 / 8 * spare
    assert taken <= max(spare, 0) or free <= 350 * MiB
    assert found.limits.max_pending_bytes >= 8 * MiB and found.limits.media_memory >= 48 * MiB
    assert found.limits.max_body_bytes <= found.limits.max_pending_bytes


def test_weights_that_may_lie_elsewhere_leave_a_part(tmp_path: Path) -> None:
    """On a GPU, or mapped, or made smaller: an eighth of what is free is there in any case."""
    found = fitted(options(), [model(tmp_path, 100 * GiB)], 16 * GiB)
    assert found.limits == fitted_limits(Limits(), 2 * GiB)
    assert found.limits.max_image_pixels == 40_000_000


def test_flags_say_the_most(tmp_path: Path) -> None:
    small = replace(Limits(), media_memory=60 * MiB, max_pending_bytes=10 * MiB, max_image_pixels=1000)
    found = fitted(options(small), [model(tmp_path, MiB)], 64 * GiB).limits
    assert (found.media_memory, found.max_pending_bytes, found.max_image_pixels) == (60 * MiB, 10 * MiB, 1000)
    assert found.max_body_bytes == 10 * MiB and found.max_image_bytes == 15 * MiB


def test_a_folder_without_weights_is_the_engines_matter(tmp_path: Path) -> None:
    assert fitted(options(), [tmp_path], 64 * GiB) == options()
