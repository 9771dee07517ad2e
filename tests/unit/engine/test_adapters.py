"""LoRA adapters in one engine: each sequence's tokens are those of its merged model, whoever shares the step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import ALL, make_adapter, merge
from support.checkpoints import make_llama, make_phi3, make_qwen3_moe
from support.engine_harness import Bench, bench, image_request, random_prompt, request, tokens_of
from transformers import AutoModelForCausalLM

from sensorium.checkpoint.adapters import read_adapter_config
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.loop import NO_ADAPTER
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization
from sensorium.models.adapters import StepAdapters, adaptable, load_adapter
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest

CPU = torch.device("cpu")
NEW = 8  # tokens of an answer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def llama(base: Path) -> Model:
    return load_model(open_checkpoint(base), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def four(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, float]]]:
    """Adapters of all kinds that are served, each with its scales."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        (make_adapter(root / "all", base, seed=1), {"": 2.0}),
        (make_adapter(root / "two", base, seed=2, rank=2, targets=("q_proj", "v_proj"), lora_alpha=8), {"": 4.0}),
        (
            make_adapter(
                root / "patterns",
                base,
                seed=3,
                ranks={"q_proj": 3, "layers.0.mlp.up_proj": 6},
                alpha_pattern={"o_proj": 2, r"layers\.[01]\.mlp\.gate_proj": 6},
                target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            ),
            {"q_proj": 8 / 3, "layers.0.mlp.up_proj": 8 / 6, "o_proj": 0.5, "gate_proj": 1.5, "": 2.0},
        ),
        (
            make_adapter(root / "rslora", base, seed=4, use_rslora=True, dtype=torch.bfloat16, target_modules=None),
            {"": 4.0},
        ),
    ]


def adapted(model: Model, folders: list[Path], **options: Any) -> Bench:
    """The adapters have the numbers 1, 2, …"""
    made = bench(model, **{"max_num_seqs": 16, **options})
    for number, folder in enumerate(folders, 1):
        assert made.engine.adapters.load(number, str(folder)) == ""
    return made


def asked(max_tokens: int = NEW, *, kinds: int = 5) -> list[EngineRequest]:
    """Sixteen: with every adapter, and with none, some prompts the same."""
    return [replace(request(random_prompt(i % 7, 5 + 4 * (i % 7)), max_tokens), adapter=i % kinds) for i in range(16)]


@torch.no_grad()
def spoken(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers says after each prompt."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            ids = torch.cat([ids, oracle(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def test_four_adapters_in_one_batch_say_what_their_merged_models_say(
    llama: Model, base: Path, four: list[tuple[Path, dict[str, float]]], tmp_path: Path
) -> None:
    requests = asked()
    merged = [base, *(merge(base, one, tmp_path / one.name, scales) for one, scales in four)]
    expected: dict[int, list[int]] = {}
    for adapter, folder in enumerate(merged):
        own = [one for one in requests if one.adapter == adapter]
        answers = spoken(folder, [one.prompt.token_ids.tolist() for one in own])
        expected.update(zip((one.id for one in own), answers, strict=True))
    assert len({tuple(expected[one.id]) for one in requests[:5]}) == 5  # they do differ
    folders = [one for one, _ in four]
    for options in ({}, {"max_num_batched_tokens": 13}, {"speculative_tokens": 16}):
        engine = adapted(llama, folders, **options)
        scheduler = engine.engine.scheduler

        def preempt(step: int, scheduler: Any = scheduler) -> None:
            if step % 5 == 4 and scheduler.num_running > 1:
                scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

        for turn in range(2):  # the second finds its beginnings in the cache
            again = [replace(one, id=one.id + 1000 * turn) for one in requests]
            got = engine.run(*again, before_step=preempt if options else None)
            assert tokens_of(got) == [expected[one.id] for one in requests]


def test_adapters_of_a_decoder_behind_a_tower(model: Model, folder: Path, tmp_path: Path) -> None:
    """Qwen2-VL: pictures with adapters and without in one batch; names as transformers 4.52 and later has them."""
    adapter = make_adapter(tmp_path / "adapter", folder, within="model.layers.")
    renamed = {
        key.replace("base_model.model.model.layers.", "base_model.model.model.language_model.layers."): value
        for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    tower = "base_model.model.model.visual.blocks.0.attn.qkv"
    renamed[f"{tower}.lora_A.weight"], renamed[f"{tower}.lora_B.weight"] = torch.ones(4, 32), torch.zeros(96, 4)
    newer = tmp_path / "newer"
    newer.mkdir()
    said = json.loads((adapter / "adapter_config.json").read_text())
    (newer / "adapter_config.json").write_text(json.dumps({**said, "target_modules": "model.*"}))
    save_file(renamed, newer / "adapter_model.safetensors")
    whole = load_model(
        open_checkpoint(merge(folder, adapter, tmp_path / "merged", {"": 2.0})), dtype=torch.float32, device="cpu"
    )
    pictures = [image_request(i, NEW) for i in range(4)]
    expected = [tokens_of(bench(one).run(*pictures)) for one in (model, whole)]
    assert expected[0] != expected[1]
    engine = adapted(model, [adapter, newer])
    mixed = [replace(one, id=one.id + 500 * kind, adapter=kind) for kind in range(3) for one in pictures]
    got = tokens_of(engine.run(*mixed))
    assert [got[:4], got[4:8], got[8:]] == [expected[0], expected[1], expected[1]]
    assert engine.engine.encoder.hits >= 8  # what a tower saw is everybody's


def test_adapters_of_fused_layers(tmp_path: Path) -> None:
    """Phi-3 stores queries, keys and values as one matrix, and gates with the rest."""
    make_phi3(tmp_path / "phi3")
    targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "phi3", targets=targets)
    folders = [tmp_path / "phi3", merge(tmp_path / "phi3", adapter, tmp_path / "merged", {"": 2.0})]
    plain, whole = (load_model(open_checkpoint(one), dtype=torch.float32, device="cpu") for one in folders)
    prompts = [random_prompt(i, 9) for i in range(4)]
    expected = tokens_of(bench(whole).run(*(request(prompt, NEW) for prompt in prompts)))
    got = tokens_of(adapted(plain, [adapter]).run(*(replace(request(one, NEW), adapter=1) for one in prompts)))
    assert got == expected


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_does_not_depend_on_how_the_base_is_stored(
    base: Path, four: list[tuple[Path, dict[str, float]]], quantization: Quantization, dtype: torch.dtype
) -> None:
    model = load_model(open_checkpoint(base), dtype=dtype, device="cpu", quantization=quantization)
    adapter = load_adapter(model, four[0][0], dtype=dtype, device=CPU)
    stored = load_file(four[0][0] / "adapter_model.safetensors")
    layer = adaptable(model)["model.layers.1.self_attn.qkv_proj"]
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor([1, 4])
    added = (layer.adapted(x, StepAdapters([(adapter, rows)])) - layer.packed(x)).float()
    name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight"
    expected = torch.cat(
        [x.float() @ stored[name.format(i, "A")].t() @ stored[name.format(i, "B")].t() * 2.0 for i in "qkv"], dim=1
    )
    assert not added[[0, 2, 3, 5]].any()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(added[rows], expected[rows], atol=tolerance, rtol=tolerance)


def test_steps_without_adapters_are_as_they_were(
    llama: Model, four: list[tuple[Path, dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of layers; a step with one says so to all of them."""
    seen: list[bool] = []
    forward = llama.forward

    def spy(hidden: Any, positions: Any, cache: Any, context: Any) -> Any:
        seen.append(context.adapters is not None)
        return forward(hidden, positions, cache, context)

    monkeypatch.setattr(llama, "forward", spy)
    engine = adapted(llama, [four[0][0]])
    engine.run(*asked(2, kinds=1))
    assert not any(seen)
    engine.run(replace(request(random_prompt(1, 5), 2), adapter=1))
    assert seen[-1]


# Caches, and adapters that come and go


def test_cached_beginnings_are_of_one_adapter(llama: Model, four: list[tuple[Path, dict[str, float]]]) -> None:
    """By its content: the same files under another number are the same."""
    folders = [one for one, _ in four[:2]]
    engine = adapted(llama, [*folders, folders[0]])
    prompt = random_prompt(3, 50)
    results: dict[int, Any] = {}
    for adapter in (0, 1, 2, 0, 1, 3):
        [result] = engine.run(replace(request(prompt, NEW), adapter=adapter))
        assert (result.cached > 0) == (adapter in results or adapter == 3)
        assert results.setdefault(adapter, result.tokens) == result.tokens
    assert len({tuple(results[one]) for one in (0, 1, 2)}) == 3
    assert results[3] == results[1]


def test_an_adapter_replaced_under_load(llama: Model, four: list[tuple[Path, dict[str, float]]]) -> None:
    """Sequences in flight, also those that wait and those that are preempted, end with what they began with."""
    one, other = (folder for folder, _ in four[:2])
    prompt = random_prompt(3, 40)
    expected = [
        tokens_of(adapted(llama, [folder]).run(replace(request(prompt, 20), adapter=1)))[0] for folder in (one, other)
    ]
    engine = adapted(llama, [one], max_num_seqs=2)
    old = [replace(request(prompt, 20), adapter=1) for _ in range(4)]
    new = [replace(request(prompt, 20), adapter=2) for _ in range(2)]
    engine.add(*old)
    for _ in range(5):
        engine.step()
    engine.engine.adapters.unload(1)
    assert engine.engine.adapters.load(2, str(other)) == ""
    scheduler = engine.engine.scheduler
    scheduler._preempt(scheduler.decoding[0])
    engine.run(*new)
    assert [engine.results[one.id].tokens for one in old] == [expected[0]] * 4
    assert [engine.results[one.id].tokens for one in new] == [expected[1]] * 2
    [refused] = engine.run(replace(request(prompt, 3), adapter=1))
    assert (refused.reason, refused.error) == ("error", NO_ADAPTER)


# What is not served


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"r": 0}, "r must be"),
        ({"r": "4"}, "r must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [*ALL, "wq"]}, "no tensors of wq"),
        ({"target_modules": ["q_proj"]}, "does not name"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "has shape"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "too complex"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"r": 8}, "has shape"),
    ],
)
def test_configurations_that_are_refused(
    llama: Model, base: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    folder = make_adapter(tmp_path, base, **config)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(llama, folder, dtype=torch.float32, device=CPU)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def _without(key: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if key not in name}


def _with(key: str, value: torch.Tensor) -> Any:
    return lambda tensors: {**tensors, key: value}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("layers.1.mlp.down_proj"), "layers.1.mlp.down_proj"),
        (_without("layers.1.self_attn.k_proj"), "qkv_proj (k)"),
        (_without("layers.0.self_attn.q_proj.lora_B"), "q_proj.lora_B.weight"),
        (_with(f"{FIRST}.lora_A.weight", torch.ones(5, 32)), "has shape [5, 32]"),
        (_with(f"{FIRST}.lora_B.weight", torch.full((32, 4), torch.inf)), "not finite"),
        (_with(f"{FIRST}.lora_A.weight", torch.ones(4, 32, dtype=torch.int32)), "no matrix of floats"),
        (_with("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 4)), "embeddings"),
        (_with(f"{FIRST}.lora_magnitude_vector", torch.ones(4)), "DoRA"),
        (_with("base_model.model.lm_head.modules_to_save.weight", torch.ones(4, 4)), "modules_to_save"),
        (_with("base_model.model.lm_head.lora_A.weight", torch.ones(4, 4)), "lm_head"),
        (_with("something", torch.ones(4, 4)), "no matrix of LoRA"),
        (lambda tensors: {}, "no tensors"),
    ],
)
def test_tensors_that_are_refused(llama: Model, base: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = make_adapter(tmp_path, base)
    file = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(llama, folder, dtype=torch.float32, device=CPU)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_adapters_beside_experts(tmp_path: Path) -> None:
    """Of attention they are served, of experts refused by name, as layers and as stacked matrices."""
    make_qwen3_moe(tmp_path / "base")
    model = load_model(open_checkpoint(tmp_path / "base"), dtype=torch.float32, device=CPU)
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    folder = make_adapter(tmp_path / "attention", tmp_path / "base", targets=attention)
    attending = {one for name, one in adaptable(model).items() if ".self_attn." in name}
    assert load_adapter(model, folder, dtype=torch.float32, device=CPU).additions.keys() == attending
    file = folder / "adapter_model.safetensors"
    kept, pair = load_file(file), {"A": torch.ones(4, 32), "B": torch.ones(8, 4)}
    for module in ("experts.0.gate_proj", "experts.base_layer", "experts"):
        own = {f"base_model.model.model.layers.0.mlp.{module}.lora_{part}.weight": one for part, one in pair.items()}
        save_file(kept | own, file)
        with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.{module} is of experts"):
            load_adapter(model, folder, dtype=torch.float32, device=CPU)


def test_folders_that_are_none(llama: Model, base: Path, tmp_path: Path) -> None:
    engine = bench(llama).engine
    assert "adapter_config.json" in engine.adapters.load(1, str(base))
    assert "adapter_config.json" in engine.adapters.load(1, str(tmp_path / "nowhere"))
    broken = make_adapter(tmp_path / "broken", base)
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert "safetensors" in engine.adapters.load(1, str(broken))
    (broken / "adapter_model.safetensors").unlink()
    (broken / "adapter_model.bin").touch()
    assert "as safetensors" in engine.adapters.load(1, str(broken))
    (broken / "adapter_config.json").write_text("[" * 100_000)
    assert "cannot be read" in engine.adapters.load(1, str(broken))
    assert engine.adapters.find(1) is None


def test_scales_are_peft_s(tmp_path: Path, base: Path) -> None:
    config = read_adapter_config(make_adapter(tmp_path, base, rank=16, lora_alpha=8, ranks={"q_proj": 4}))
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 2.0
    assert config.scale_of("model.layers.0.mlp.xq_proj") == 0.5  # a name's end begins at a dot
    assert np.isclose(replace(config, is_rank_stabilised=True).scale_of("model.o_proj"), 2.0)
