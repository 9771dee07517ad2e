"""GLM-4.1V's, 4.5V's and OCR's videos against transformers: logits and greedy tokens, also of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import engine_harness
from support.glm4v import make_glm4v, make_glm4v_moe, make_glm_ocr
from support.image_families import noise, normalised
from support.media_models import again, load
from support.model_driver import Driver, with_and_without_stack

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, SamplingParams


@pytest.mark.parametrize(
    ("make", "layout"), [(make_glm4v, "hub"), (make_glm4v_moe, "transformers"), (make_glm_ocr, "hub")]
)
def test_videos_equal_transformers(make: Callable[..., Any], layout: str, tmp_path: Path) -> None:
    """Frames are told from images by the marks around them: its types say so to transformers."""
    here = load(tmp_path, make(tmp_path, layout, seed=1))
    times = (0.0, 0.5, 1.0, 2.0, 11.5)
    prompt = here.prompt([replace(noise(40, 60, frames=5), timestamps_s=times)], "USER: {} what is shown?")
    (video,) = prompt.media
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.from_numpy(normalised(video.arrays)),
        "video_grid_thw": torch.from_numpy(video.arrays["grid"]).long()[None],
        "mm_token_type_ids": 2 * (ids == here.oracle.config.image_token_id).int(),
    }
    assert inputs["mm_token_type_ids"].sum() == 2 * video.num_rows and video.arrays["grid"][0] == 3
    with torch.inference_mode():
        theirs = here.oracle(**inputs).logits[0]
    driver, run = Driver(here.model), here.run(prompt)
    torch.testing.assert_close(driver.prefill(again(run)), theirs, atol=1e-4, rtol=0)
    made = here.oracle.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)
    expected = made[0, ids.shape[1] :].tolist()
    bench = engine_harness.bench(here.model, max_num_batched_tokens=13, block_size=4)
    result = bench.run(EngineRequest(1, prompt, SamplingParams(32, temperature=0.0)))[0]
    assert result.tokens == expected and len(set(expected)) > 4


@pytest.mark.parametrize("make", [make_glm4v, make_glm_ocr])
def test_one_native_call_is_layer_by_layer(make: Callable[..., Any], tmp_path: Path) -> None:
    """To the last bit, though neighbours are rotated together."""
    make(tmp_path, dtype="bfloat16")
    model = load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu")
    for int8_cache in (False, True):
        pair = with_and_without_stack(
            model, [7 * i % 300 for i in range(60)], dtype=torch.bfloat16, int8_cache=int8_cache
        )
        assert pair[0].isfinite().all()
        assert torch.equal(*pair)
