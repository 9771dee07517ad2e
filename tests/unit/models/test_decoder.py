"""Every text family against transformers' own class: logits, greedy tokens, chunked prefill, mixed batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import checkpoints
from support.model_driver import Driver, Sequence, peak_bytes
from torch import Tensor
from transformers import PreTrainedModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.models.rope import RotaryEmbedding, query_scales

Make = Callable[..., tuple[PreTrainedModel, Model]]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [1.1, 2.5, 9.0, 20.0],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic-rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "dynamic-rope-beyond": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn-mscale": (
        "qwen3",
        {
            "rope_parameters": {
                **YARN,
                "factor": 40.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
                "beta_fast": 3.0,
                "beta_slow": 0.2,
            }
        },
    ),
    "yarn-attention-factor": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.4, "beta_fast": 2, "original_max_position_embeddings": 300}},
    ),
    "yarn-original-outside": ("qwen2", {"rope_parameters": YARN, "original_max_position_embeddings": 40}),
    "yarn-windowed": (
        "mistral",
        {
            "max_position_embeddings": 16,
            "sliding_window": 16,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 16},
        },
    ),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu-new": ("mistral", {"hidden_act": "gelu_new"}),
    "gelu-tanh": ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
    "gelu-fast": ("phi3", {"hidden_act": "gelu_fast"}),
    "quick-gelu": ("llama", {"hidden_act": "quick_gelu"}),
    "relu": ("qwen3", {"hidden_act": "relu"}),
    "yi": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "num_key_value_heads": 1}),
    "mistral-windowed": ("mistral", {}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-half-windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "gemma": ("gemma", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "seed": 2}),
    "qwen3-moe": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),  # in every layer
    "qwen2-moe": (
        "qwen2_moe",
        {
            **{"qkv_bias": False, "decoder_sparse_step": 2, "num_hidden_layers": 4},
            **{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},  # in the first alone
        },
    ),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {"sliding_window": 7}),
    "gpt-oss": ("gpt_oss", {"seed": 3}),  # no two experts so near that rounding to bfloat16 chooses
    "gpt-oss-plain": (
        "gpt_oss",
        {
            "intermediate_size": 40,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "olmoe": ("olmoe", {}),
    "glm4-moe": ("glm4_moe", {"seed": 1}),
    "glm4-moe-plain": (
        "glm4_moe",
        {
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 1, "seed": 1},
            **{"use_qk_norm": False, "attention_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        },
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-plain": (
        "gemma3_text",
        {
            "rope_parameters": None,
            "attention_bias": True,
            "hidden_activation": "gelu",
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4": ("gemma4_text", {}),
    "gemma4-plain": (
        "gemma4_text",
        {
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4-moe": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "qwen3.5": ("qwen3_5_text", {}),
    "qwen3.5-plain": (
        "qwen3_5_text",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_conv_kernel_dim": 2,
            "linear_num_key_heads": 4,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "lfm2": ("lfm2", {}),
    "lfm2-plain": (
        "lfm2",
        {
            "conv_L_cache": 5,
            "conv_bias": True,
            "tie_word_embeddings": False,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention", "conv", "full_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-plain": ("phi3", {"rope_parameters": None, "sliding_window": 7, "original_max_position_embeddings": 512}),
    "phi3-attention-factor": ("phi3", {"rope_parameters": {**LONGROPE, "attention_factor": 1.5}}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}
PROMPT = 21


@pytest.fixture(
    scope="module", params=[(v, layout) for v in VARIANTS for layout in ("hub", "transformers")], ids="-".join
)
def pair(request: pytest.FixtureRequest, made: Make) -> tuple[PreTrainedModel, Model]:
    variant, layout = request.param
    family, options = VARIANTS[variant]
    return made(family, layout, **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 400, (length,), generator=generator).tolist()


def forget_lengths(oracle: PreTrainedModel) -> None:
    """Dynamic rope in transformers keeps the frequencies of the longest sequence so far: each call is the first."""
    for module in oracle.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq, module.original_max_seq_len


@torch.no_grad()
def oracle_logits(oracle: PreTrainedModel, tokens: list[int]) -> Tensor:
    forget_lengths(oracle)
    return oracle(torch.tensor([tokens])).logits[0]


@torch.no_grad()
def oracle_greedy(oracle: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    forget_lengths(oracle)
    out = oracle.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(tokens) :].tolist()


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-4)


def test_prefill(pair: tuple[PreTrainedModel, Model]) -> None:
    oracle, model = pair
    tokens = prompt_of(PROMPT)
    expected = oracle_logits(oracle, tokens)
    assert expected.std() > 0.5  # or 1e-4 would mean nothing
    assert close(Driver(model).prefill(Sequence(tokens)), expected)


def test_prefill_cut_at_every_place(pair: tuple[PreTrainedModel, Model]) -> None:
    oracle, model = pair
    tokens = prompt_of(PROMPT)
    expected = oracle_logits(oracle, tokens)
    driver = Driver(model)
    for cut in range(1, PROMPT):
        assert close(driver.prefill(Sequence(tokens), cut), expected), cut
    assert close(driver.prefill(Sequence(tokens), *[1] * PROMPT), expected)


def test_greedy_in_a_mixed_batch(pair: tuple[PreTrainedModel, Model]) -> None:
    oracle, model = pair
    prompts = [prompt_of(length, seed=length) for length in (PROMPT, 1, 4, 13)]
    expected = [oracle_greedy(oracle, tokens, 32 if i == 0 else 8) for i, tokens in enumerate(prompts)]
    got = Driver(model).greedy([Sequence(list(tokens)) for tokens in prompts], 32)
    assert got[0] == expected[0]
    assert [tokens[:8] for tokens in got[1:]] == expected[1:]
    assert len(set(got[0])) > 4  # not a loop that any model would repeat


def test_decodes_and_chunks_in_one_step(pair: tuple[PreTrainedModel, Model]) -> None:
    oracle, model = pair
    driver = Driver(model)
    first, second, third = (Sequence(prompt_of(length, seed=length)) for length in (9, 12, 7))
    driver.step([(first, 8), (second, 5)])
    hidden = driver.step([(second, 7), (first, 1), (third, 7)])
    logits = driver.logits(hidden).split([7, 1, 7])
    assert close(logits[0], oracle_logits(oracle, second.tokens)[5:])
    assert close(logits[1], oracle_logits(oracle, first.tokens)[8:])
    assert close(logits[2], oracle_logits(oracle, third.tokens))


def test_longrope_takes_long_factors_per_sequence(made: Make) -> None:
    oracle, model = made("phi3")
    assert model.long_context_from == 64
    long, short = Sequence(prompt_of(80)), Sequence(prompt_of(20))
    expected = [oracle_logits(oracle, s.tokens) for s in (long, short)]
    driver = Driver(model)
    driver.step([(long, 30)])
    hidden = driver.step([(long, 50), (short, 20)])
    logits = driver.logits(hidden).split([50, 20])
    assert close(logits[0], expected[0][30:])
    assert close(logits[1], expected[1])
    short_only = made(
        "phi3",
        original_max_position_embeddings=512,
        rope_parameters={**LONGROPE, "original_max_position_embeddings": 512},
    )[1]
    assert not close(Driver(short_only).prefill(Sequence(list(long.tokens))), expected[0])


def test_longrope_needs_to_be_told(made: Make) -> None:
    _, model = made("phi3")
    driver = Driver(model)
    context = driver._context([(Sequence(prompt_of(80), blocks=list(range(20))), 80)])
    context.long_context = None
    with pytest.raises(ValueError, match="long rope"), torch.inference_mode():
        model(model.embed(torch.tensor(prompt_of(80))), torch.arange(80), driver.cache, context)


def test_goldens_of_growing_queries(tmp_path: Path) -> None:
    """Class defaults; the last numbers of a long and of a short batch."""
    config = {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    text = open_checkpoint(tmp_path).decoder
    rope = RotaryEmbedding(text.rope, 16)
    wanted = torch.tensor([1, 0.177828, 0.0316228, 0.0038661, 0.000375, 1.11142e-5, 1.97642e-6, 3.51463e-7])
    torch.testing.assert_close(rope.inv_freq, wanted, atol=0, rtol=1e-4)
    assert (rope.scale, text.max_len, text.layers[0].window) == (1.0, 262144, None)
    scales = query_scales(text.rope, torch.tensor([0, 16383, 16384, 100_000]), 100_001)
    torch.testing.assert_close(scales, torch.tensor([1, 1, 1.069315, 1.194591]))
    assert query_scales(text.rope, torch.tensor([16383]), 16384) is None


def test_mrope_positions(made: Make) -> None:
    """Text decoder of Qwen2-VL with positions that differ by axis."""
    oracle, model = made("qwen2_vl")
    tokens = prompt_of(PROMPT)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 30, (3, PROMPT), generator=generator)
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens]), position_ids=positions.unsqueeze(1)).logits[0]
    assert close(Driver(model).prefill(Sequence(tokens, positions=positions), 8), expected)
    flat = oracle_logits(oracle, tokens)
    assert close(Driver(model).prefill(Sequence(tokens)), flat)
    assert not close(flat, expected)


def test_embedding_of_ids_outside_the_table(made: Make) -> None:
    for options in ({}, {"tie_word_embeddings": True}):
        _, model = made("llama", **options)
        rows = model.embed(torch.tensor([-3, 5, 10**6]))
        assert torch.equal(rows, model.embed(torch.tensor([0, 5, cast(Any, model.text).vocab_size - 1])))


@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_5_text"])
def test_activation_bytes_bounds_what_a_step_allocates(made: Make, family: str) -> None:
    wide = {"linear_num_value_heads": 16, "linear_key_head_dim": 32} if family == "qwen3_5_text" else {}
    _, model = made(family, hidden_size=256, intermediate_size=1024, num_attention_heads=8, **wide)
    tokens = prompt_of(400)
    driver = Driver(model, num_blocks=128)
    peak = peak_bytes(lambda: driver.prefill(Sequence(tokens)))
    assert 2**20 < peak < model.activation_bytes(len(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_close(variant: str, tmp_path: Path) -> None:
    """The kernels that serve: prefill in chunks, then decodes, with the oracle's weights rounded alike."""
    family, options = VARIANTS[variant]
    oracle = getattr(checkpoints, f"make_{family}")(tmp_path, dtype="bfloat16", **options)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu")
    tokens = prompt_of(PROMPT)
    expected = oracle_logits(oracle, tokens)
    for chunks in ((), (1,), (8,), (17, 1, 1, 1)):
        got = Driver(model, dtype=torch.bfloat16).prefill(Sequence(tokens), *chunks).float()
        least = 0.99 if family.startswith("qwen3_5") else 0.998  # the delta rule enlarges what is rounded
        assert torch.nn.functional.cosine_similarity(got, expected).min() > least
        assert (got - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_angles_of_several_axes_lie_row_by_row(is_interleaved: bool) -> None:
    """As a GPU's kernels read them: those of images were refused, in steps that have any."""
    rope = RopeConfig(mrope_section=(2, 1, 1), mrope_interleaved=is_interleaved)
    positions = torch.arange(15).view(3, 5)
    for turn in RotaryEmbedding(rope, 8)(positions):
        assert (turn.shape, turn.stride()) == ((5, 4), (4, 1))
