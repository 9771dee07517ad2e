"""Gemma 4's own: sizes of images, caches of two shapes that layers share, published configs, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_gemma4, make_gemma4_text
from support.engine_harness import bench
from support.image_families import noise, record, word_tokenizer
from support.media_models import load
from support.model_driver import Driver

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.text_config import TextConfig
from sensorium.errors import CheckpointError, RequestError
from sensorium.models.cache import PagedGroup
from sensorium.models.rope import RotaryEmbedding
from sensorium.processors.gemma4 import Gemma4Processor
from sensorium.types import EngineRequest, SamplingParams

IDS = {"<s>": 2, "<|image>": 255999, "<|image|>": 258880, "<image|>": 258882}
E2B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "global_head_dim": 512,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
}


@pytest.mark.parametrize(
    ("width", "height", "most", "size", "rows", "total"),
    [
        (16, 16, 280, (768, 768), 256, 866254.452),
        (640, 480, 280, (912, 672), 266, 918632.716),
        (2000, 50, 280, (5040, 96), 210, 724018.715),
        (333, 777, 70, (240, 576), 60, None),
        (1280, 720, 1120, (2112, 1200), 1100, None),
    ],
)
def test_goldens(width: int, height: int, most: int, size: tuple[int, int], rows: int, total: float | None) -> None:
    processor = Gemma4Processor(record({}, {"max_soft_tokens": most}), word_tokenizer(IDS))
    assert processor.num_tokens("image", height, width) == rows + 2
    if total is not None:
        media = processor.process(noise(height, width))
        assert media.arrays["grid"].tolist() == [1, size[1] // 16, size[0] // 16]
        assert media.num_rows == rows
        assert media.arrays["pixels"].astype(np.float64).sum() == pytest.approx(total, abs=0.5)
        prompt = processor.build("a<|image|>b", [media])
        assert prompt.token_ids.tolist() == [97, 255999, *[258880] * rows, 258882, 98]


def test_layers_share_caches_of_two_shapes(tmp_path: Path) -> None:
    """Computed by the engine in small steps, from a prefix and after preemption."""
    served = load(tmp_path, make_gemma4(tmp_path))
    assert served.model.cache_groups() == [
        PagedGroup((0,), 2, 16, 30, ((2, 0),)),
        PagedGroup((1,), 1, 32, None, ((3, 1),)),
    ]
    prompts = [served.prompt([noise(50, 70)], "look: {}?"), served.prompt([], "nothing to see, nothing at all to see")]
    expected = [Driver(served.model).greedy([served.run(prompt)], 6)[0] for prompt in prompts]
    engine = bench(served.model, max_num_batched_tokens=11, block_size=4)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if step % 7 == 6 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for turn in range(2):
        asked = [EngineRequest(10 * turn + i, one, SamplingParams(6, temperature=0.0)) for i, one in enumerate(prompts)]
        results = engine.run(*asked, before_step=preempt)
        assert [result.tokens for result in results] == expected
    assert results[0].cached > 0 and scheduler.preemptions > 0


def read(folder: Path, text: dict[str, Any]) -> TextConfig:
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    found = open_checkpoint(folder).text
    assert found is not None
    return found


def test_published_shapes(tmp_path: Path) -> None:
    text = read(tmp_path, E2B)
    assert (text.layer_embedding_size, text.logit_cap, text.tie_word_embeddings) == (256, 30.0, True)
    assert [layer.source for layer in text.layers[13:21]] == [None, None, 13, 13, 13, 13, 14, 13]
    local, full = text.layers[0], text.layers[34]
    assert (local.head_dim, local.num_kv_heads, local.window, local.intermediate_size) == (256, 1, 512, 6144)
    assert (full.head_dim, full.num_kv_heads, full.window, full.intermediate_size) == (512, 1, None, 12288)
    assert (local.scale, local.media_both_ways, full.keys_are_values) == (1.0, False, False)
    wide = {**E2B, "attention_k_eq_v": True, "num_global_key_value_heads": 4, "num_key_value_heads": 8}
    text = read(tmp_path, {**wide, "use_bidirectional_attention": "vision"})
    assert (text.layers[4].num_kv_heads, text.layers[4].keys_are_values, text.layers[4].media_both_ways) == (
        4,
        True,
        False,
    )
    assert (text.layers[3].num_kv_heads, text.layers[3].keys_are_values, text.layers[3].media_both_ways) == (
        8,
        False,
        True,
    )
    frequencies = RotaryEmbedding(full.rope, 32).inv_freq
    torch.testing.assert_close(frequencies[:4], torch.tensor([1, 0.421697, 0.177828, 0.0749894]))
    assert len(frequencies) == 16 and not frequencies[4:].any()


def test_what_is_not_served_is_named(tmp_path: Path) -> None:
    for change, said in (
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5}, "top_k_experts 5"),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers"),
        ({"per_layer_config": {"0": {"hidden_size": 3}}}, "per_layer_config of layer 0"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path, {**E2B, **change})
    processor = Gemma4Processor(record({}, {}), word_tokenizer(IDS))
    with pytest.raises(RequestError, match="max_soft_tokens"):
        processor.with_overrides({"max_soft_tokens": 100})
    make_gemma4_text(tmp_path / "both", use_bidirectional_attention="all")
    with pytest.raises(CheckpointError, match="both ways"):
        load(tmp_path / "both", make_gemma4_text(tmp_path / "both", use_bidirectional_attention="all"))
