"""Models that ranks share: every family and stored format gives what it gives as a whole, and no rank has all of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.families import maker_of
from support.model_driver import Driver, Sequence
from support.quantized_checkpoints import write_awq, write_gptq, write_int8, write_mxfp4, write_packed
from support.ranks import in_turns
from torch import Tensor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.ranks import check_ranks, sizes
from sensorium.errors import StartupError
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model, weight_bytes
from sensorium.parallel.ranks import Ranks

BF16 = torch.bfloat16
WIDE = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}  # groups of 32 and more


def computed(folder: Path, ranks: Ranks | None = None, **options: Any) -> tuple[Tensor, int]:
    """(logits of a prompt in two chunks and of a token after it, bytes of weights)"""
    options = {"dtype": torch.float32, **options}
    model = load_model(open_checkpoint(folder), device="cpu", ranks=ranks, **options)
    driver = Driver(model, dtype=options["dtype"])
    sequence = Sequence(random.Random(1).sample(range(10, 390), 23))
    prefilled = driver.prefill(sequence, 9)
    sequence.tokens.append(77)
    decoded = driver.logits(driver.step([(sequence, 1)]))
    return torch.cat([prefilled, decoded]), weight_bytes(model)


def check_split(folder: Path, size: int = 2, tolerance: float = 1e-4, most: float = 0.8, **options: Any) -> None:
    expected, whole = computed(folder, **options)
    found = in_turns(size, lambda ranks: computed(folder, ranks, **options))
    error = (found[0][0] - expected).float().norm() / expected.float().norm()
    assert error <= tolerance
    assert max(part for _, part in found[1:]) <= most * whole


FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma4_text"]
ROUTED = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe"]
WITH_STATES = ["lfm2", "qwen3_5_text"]


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED, *WITH_STATES, "qwen2_vl", "minicpmv"])
def test_every_family(tmp_path: Path, family: str) -> None:
    maker_of(family)(tmp_path)
    check_split(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_more_ranks_than_heads_of_keys(tmp_path: Path, family: str) -> None:
    """The two heads of keys have a copy each."""
    maker_of(family)(tmp_path)
    check_split(tmp_path, 4, most=0.5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4, 32), None], ids=["int8", "int4", "bf16"])
def test_quantised_while_loading(tmp_path: Path, family: str, quantization: Quantization | None) -> None:
    """Codes are those of the whole model, and products the same to the last bit; sums of experts and of bfloat16 are
    taken in another order."""
    maker_of(family)(tmp_path)
    is_same = family == "llama" and quantization is not None
    check_split(tmp_path, dtype=BF16, quantization=quantization, tolerance=0 if is_same else 0.01)


@pytest.mark.parametrize("write", [write_awq, write_gptq, write_packed, write_int8])
def test_stored_codes(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """Rows are cut inside the words that hold eight of them."""
    shape: dict[str, Any] = {**WIDE, "num_attention_heads": 16, "head_dim": 4, "num_key_value_heads": 4}
    checkpoints.make_llama(tmp_path, **shape)
    write(tmp_path)
    check_split(tmp_path, 4, tolerance=0, dtype=BF16)


def test_stored_experts(tmp_path: Path) -> None:
    checkpoints.make_gpt_oss(tmp_path)
    write_mxfp4(tmp_path)
    check_split(tmp_path, dtype=BF16, tolerance=0.01)


def test_sizes_that_cannot_work_are_refused_with_those_that_can(tmp_path: Path) -> None:
    checkpoints.make_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    found = open_checkpoint(tmp_path)
    assert sizes(found) == [1, 2, 4, 8]
    check_ranks(found, 4)
    with pytest.raises(StartupError) as caught:
        check_ranks(found, 3)
    assert caught.value.message == (
        "--tensor-parallel-size 3: 8 query heads cannot be shared out (sizes that work: 1, 2, 4, 8)"
    )


def test_families_that_are_not_split_are_refused_by_name(tmp_path: Path) -> None:
    from support import whisper

    whisper.make_whisper(tmp_path)
    with pytest.raises(StartupError, match=r"--tensor-parallel-size 2: Whisper .* is not split over devices"):
        check_ranks(open_checkpoint(tmp_path), 2)
