"""Decoders whose configuration says that attention goes both ways (embedders), against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_llama, make_mistral, make_phi3, make_qwen2, make_qwen2_vl, make_qwen3
from torch import Tensor
from transformers import AutoModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.loading import Engine, build_engine
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, PoolingParams, Prompt, SamplingParams

MAKERS = {"llama": make_llama, "mistral": make_mistral, "qwen2": make_qwen2, "qwen3": make_qwen3, "phi3": make_phi3}
CPU = torch.device("cpu")
PROMPTS = [list(range(3, 60)), [7], [11, 2, 6, 4, 9], list(range(20, 41))]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def engine_of(folder: Path, **options: Any) -> Engine:
    checkpoint = open_checkpoint(folder)
    dtype = torch.float32
    config = EngineConfig(str(folder), kv_cache_memory=1 << 20, **options)
    return build_engine(load_model(checkpoint, dtype=dtype, device=CPU), checkpoint, config, CPU, dtype)


def vectors_of(engine: Engine, prompts: list[list[int]], task: Any = "embed") -> list[Tensor]:
    """What the engine's own steps make of prompts that come together."""
    for number, ids in enumerate(prompts):
        asked = EngineRequest(number, Prompt(np.array(ids, np.int32)), pooling=PoolingParams(task))
        assert engine.scheduler.add(asked) is None
    found: dict[int, Tensor] = {}
    while engine.scheduler.has_work():
        plan, ended = engine.scheduler.schedule()
        assert plan and not ended
        with engine.runner.computing():
            result = engine.runner.launch(plan).result()
        found |= {number: torch.from_numpy(vector) for number, [vector] in result.vectors.items()}
        for seq, count in plan.prefills:
            if engine.scheduler.advance(seq, count):
                engine.scheduler.finish(seq)
    return [found[number] for number in range(len(prompts))]


@torch.inference_mode()
def states_of(folder: Path, ids: list[int]) -> Tensor:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("family", MAKERS)
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    MAKERS[family](tmp_path, "transformers")
    causal = vectors_of(engine_of(tmp_path), PROMPTS)
    change_config(tmp_path, is_causal=False)
    engine = engine_of(tmp_path)
    tokens, last = vectors_of(engine, PROMPTS, "token_embed"), vectors_of(engine, PROMPTS)
    for ids, states, vector, before in zip(PROMPTS, tokens, last, causal, strict=True):
        expected = torch.nn.functional.normalize(states_of(tmp_path, ids), dim=-1)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vector, expected[-1], atol=1e-5, rtol=1e-5)
        assert len(ids) == 1 or float((vector - before).norm()) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 3},
        {"sliding_window": None},
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ],
)
def test_windows_reach_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    (make_qwen2 if "layer_types" in changes else make_mistral)(tmp_path)
    change_config(tmp_path, is_causal=False, **changes)
    for ids, states in zip(PROMPTS, vectors_of(engine_of(tmp_path), PROMPTS, "token_embed"), strict=True):
        expected = torch.nn.functional.normalize(states_of(tmp_path, ids), dim=-1)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_another_name_of_it(tmp_path: Path) -> None:
    make_qwen2(tmp_path)
    change_config(tmp_path, is_causal=False)
    expected = vectors_of(engine_of(tmp_path), PROMPTS)
    change_config(tmp_path, is_causal=True, use_bidirectional_attention=True)
    for found, vector in zip(vectors_of(engine_of(tmp_path), PROMPTS), expected, strict=True):
        torch.testing.assert_close(found, vector, atol=0, rtol=0)


def test_prompts_are_computed_whole_and_nothing_of_them_is_kept(tmp_path: Path) -> None:
    make_qwen2(tmp_path)
    change_config(tmp_path, is_causal=False)
    engine = engine_of(tmp_path)
    expected = vectors_of(engine, PROMPTS)
    assert engine.ready.kv_bytes == 0 and not engine.prefixes.queries
    narrow = engine_of(tmp_path, max_num_batched_tokens=8)
    for _ in range(2):  # the second time a cache would have all of it
        for found, vector in zip(vectors_of(narrow, PROMPTS), expected, strict=True):
            torch.testing.assert_close(found, vector, atol=1e-6, rtol=1e-6)


def test_nothing_is_generated(tmp_path: Path) -> None:
    make_qwen3(tmp_path)
    change_config(tmp_path, is_causal=False)
    engine = engine_of(tmp_path)
    assert engine.ready.tasks == ("embed", "token_embed")
    refused = engine.scheduler.add(EngineRequest(1, Prompt(np.array([3], np.int32)), sampling=SamplingParams(4)))
    assert refused is not None and "does not generate" in str(refused.error)


def test_models_with_towers_say_it_of_their_language_model(tmp_path: Path) -> None:
    make_qwen2_vl(tmp_path, "transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config={**config["text_config"], "is_causal": False})
    assert engine_of(tmp_path).ready.tasks == ("embed", "token_embed")
