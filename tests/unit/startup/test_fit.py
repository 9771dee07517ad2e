"""What the HTTP process may take of a machine or control group: arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import maker_of
from support.gguf_writer import tokenizer_metadata, write_gguf

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.gguf import gguf_folder
from sensorium.checkpoint.ranks import sizes
from sensorium.config import EngineConfig, Limits, LoadConfig, ServeOptions, ServerConfig
from sensorium.models.loading import load_model, weight_bytes
from sensorium.parallel.ranks import Ranks
from sensorium.startup.copies import Copies, copies_of
from sensorium.startup.fit import BASE_BYTES, engine_plan, fitted, fitted_limits
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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "olmoe", "gpt_oss", "lfm2", "qwen3_5_text", "gemma4", "qwen2_vl", "llava",
                                    "phi3_v", "gemma3", "qwen2_omni", "minicpmv", "smolvlm.smolvlm"])  # fmt: skip
def test_copies_of_ranks_are_counted(tmp_path: Path, family: str, ranks: int) -> None:
    """As the ranks themselves have them: of towers, norms and routers each has one, of few heads of keys some."""
    maker_of(family)(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    if ranks not in sizes(checkpoint):
        pytest.skip("heads cannot be shared out so")
    engine = EngineConfig(str(tmp_path), dtype="float32")
    parts = [
        weight_bytes(load_model(checkpoint, dtype=torch.float32, device="cpu", ranks=one))
        for one in (None, *(Ranks(rank, ranks) for rank in range(ranks)))
    ]
    alone, shared = (
        engine_plan(replace(engine, tensor_parallel_size=size), checkpoint, None).weight_bytes for size in (1, ranks)
    )
    assert shared - alone == pytest.approx(sum(parts[1:]) - parts[0], rel=0.02)


def test_copies_are_told_by_the_names_of_gguf_files_too(tmp_path: Path) -> None:
    maker_of("qwen3")(tmp_path / "hub")
    vocabulary = tokenizer_metadata(tmp_path / "hub", "gpt-2")
    write_gguf(tmp_path / "hub", tmp_path / "m.gguf", "F32", vocabulary, "qwen3")
    found = copies_of(open_checkpoint(gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")))
    assert found == copies_of(open_checkpoint(tmp_path / "hub"))
    assert found.towers == 0 and found.decoder and found.keys


def test_files_without_headers_are_the_engines_matter(tmp_path: Path) -> None:
    maker_of("llama")(tmp_path)
    for content in (b"", b"\xff" * 16, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a": {}}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert copies_of(open_checkpoint(tmp_path)) == Copies()
