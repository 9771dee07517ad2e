"""Decoders between whose layers that attend are layers with a state: published configs, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_lfm2, make_qwen3_5_moe, make_qwen3_5_text
from support.model_driver import with_and_without_stack

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.state_layers import DeltaNetSpec, ShortConvSpec
from sensorium.checkpoint.text_config import TextConfig
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization
from sensorium.kernels.context import Segments
from sensorium.kernels.cpu import library
from sensorium.models.cache import PagedGroup, StateGroup, StatePart
from sensorium.models.loading import load_model

BF16 = torch.bfloat16

LFM2: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "block_ff_dim": 12288,
    "block_multiple_of": 256,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "conv_L_cache": 3,
    "vocab_size": 65536,
}


def read(folder: Path, config: dict[str, Any]) -> TextConfig:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    found = open_checkpoint(folder).text
    assert found is not None
    return found


def test_published_lfm2(tmp_path: Path) -> None:
    stated = {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", **LFM2}
    text = read(tmp_path, stated)
    attending = [index for index, layer in enumerate(text.layers) if layer.state is None]
    assert (attending, text.intermediate_size, text.head_dim) == (LFM2["full_attn_idxs"], 8192, 64)
    assert text.layers[0].state == ShortConvSpec(3, bias=False)
    assert (text.rms_norm_eps, text.rope.theta, text.tie_word_embeddings, text.qk_norm) == (1e-5, 1e6, True, True)
    assert read(tmp_path, {**stated, "block_ff_dim": 6656}).intermediate_size == 4608
    assert read(tmp_path, {**stated, "block_auto_adjust_ff_dim": False}).intermediate_size == 12288
    assert not read(tmp_path, {**stated, "tie_embedding": False}).tie_word_embeddings
    for change, said in (
        ({"full_attn_idxs": []}, "without a layer that attends"),
        ({"layer_types": ["conv"] * 3}, "must name 16 layers"),
        ({"layer_types": ["mamba"] * 16}, "layer type 'mamba'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path, {**stated, **change})


QWEN36: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 40,
    "full_attention_interval": 4,
    "linear_num_value_heads": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
    "vocab_size": 248320,
}


def test_published_qwen36(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": QWEN36}
    text = read(tmp_path, config)
    assert [index for index, layer in enumerate(text.layers) if layer.state is None] == list(range(3, 40, 4))
    assert text.layers[0].state == DeltaNetSpec(4, 16, 32, 128, 128)
    assert (text.head_dim, text.rope.partial, text.rope.mrope_section) == (256, 0.25, (11, 11, 10))
    assert (text.norm_offset, text.gates_attention, text.tie_word_embeddings) == (1.0, True, False)
    routing = text.routing
    assert routing is not None
    assert (routing.num_experts, routing.per_token, routing.expert_size, routing.shared_size) == (256, 8, 512, 512)
    assert routing.renormalizes
    with pytest.raises(CheckpointError, match="linear_num_value_heads 33"):
        read(tmp_path, {**config, "text_config": {**QWEN36, "linear_num_value_heads": 33}})


def test_golden_of_the_delta_rule() -> None:
    """Five tokens, two value heads to one key head; by itself, one at a time, and cut."""
    q = torch.arange(20.0).view(5, 1, 4) / 10
    k, v = q.flip(0) + 0.3, torch.arange(40.0).view(5, 2, 4) / 20 - 0.5
    decay, learned = -torch.linspace(0.1, 0.9, 10).view(5, 2), torch.linspace(0.2, 0.8, 10).view(5, 2)
    for lengths in ([5], [1] * 5, [2, 3]):
        states = torch.zeros(6, 2, 4, 4)
        slots = torch.arange(len(lengths) + 1)
        out = kernels.delta_rule(q, k, v, decay, learned, states, Segments(lengths, 0, slots[:-1], slots[1:]))
        close = torch.tensor([0.42457, 0.44491, 0.46526, 0.48560]), torch.tensor([0.29548, 0.31043, 0.32539, 0.34034])
        torch.testing.assert_close((out[-1, 0], states[len(lengths), 0, 0]), close, atol=1e-5, rtol=0)


def test_long_runs_of_the_delta_rule() -> None:
    """Chunks of a run beside one token at a time, with heads that forget at once and such that forget nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 150, 2, 8, generator=generator)
    v = torch.randn(150, 4, 6, generator=generator)
    decay = -torch.tensor([0.0, 0.01, 1.0, 50.0]) * torch.rand(150, 4, generator=generator)
    learned = torch.rand(150, 4, generator=generator)
    before = torch.randn(4, 8, 6, generator=generator)
    states = torch.stack([torch.zeros_like(before), before, before, before])
    once = kernels.delta_rule(q, k, v, decay, learned, states, Segments([150], 0, torch.tensor([1]), torch.tensor([3])))
    for token in range(150):
        step = Segments([1], 1, torch.tensor([1 + token % 2]), torch.tensor([2 - token % 2]))
        inputs: Any = (*(x[token : token + 1] for x in (q, k, v, decay, learned)), states, step)
        torch.testing.assert_close(kernels.delta_rule(*inputs)[0], once[token], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states[1], states[3], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")
@pytest.mark.parametrize("quantization", [None, Quantization(4, 32)])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_lfm2, {"conv_bias": True}),
        (make_qwen3_5_text, {}),
        (make_qwen3_5_text, {"linear_value_heads_take_turns": True}),
        (make_qwen3_5_moe, {}),
    ],
)
def test_one_native_call_is_layer_by_layer(
    tmp_path: Path, make: Callable[..., object], options: dict[str, Any], quantization: Quantization | None
) -> None:
    """To the last bit, with keys and values of both kinds."""
    make(tmp_path, dtype="bfloat16", **options)
    model = load_model(open_checkpoint(tmp_path), dtype=BF16, device="cpu", quantization=quantization)
    for int8_cache in (False, True):
        pair = with_and_without_stack(model, [7 * i % 391 for i in range(60)], dtype=BF16, int8_cache=int8_cache)
        assert pair[0].isfinite().all()
        assert torch.equal(*pair)


def test_what_a_sequence_keeps(tmp_path: Path) -> None:
    make_lfm2(tmp_path)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    paged, states = model.cache_groups()
    assert paged == PagedGroup((1,), 2, 8)
    assert states == StateGroup((0, 2), (StatePart((2, 32)),))
    assert isinstance(states, StateGroup)
    assert states.slot_bytes(torch.bfloat16) == 2 * 2 * 32 * 2
