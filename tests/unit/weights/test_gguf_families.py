"""A tiny model of each family, as llama.cpp's converter writes it, has the logits of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.gguf_families import FAMILIES, write_family
from support.gguf_writer import container, tokenizer_metadata
from support.model_driver import Driver, Sequence

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.gguf import describe, gguf_folder
from sensorium.checkpoint.gguf_file import Strings, read_gguf
from sensorium.errors import CheckpointError
from sensorium.kernels.reference.block_linear import BlockLinear
from sensorium.kernels.reference.quantized import QuantizedLinear
from sensorium.models.loading import load_model
from sensorium.weights.gguf import BlockCodes, read_gguf_tensors

PLAIN = [name for name, stated in FAMILIES.items() if "tower" not in stated and "is_pooled" not in stated]
PROMPT = [5, 300, 7, 42, 11, 17, 230, 8, 77, 19, 3]
OPTIONS: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma": {"tie_word_embeddings": True},  # the converter leaves a head out
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}


def make(family: str, folder: Path) -> None:
    getattr(checkpoints, f"make_{family}")(folder, **OPTIONS.get(family, {}))


def written(family: str, folder: Path, kind: str = "F32") -> Path:
    make(family, folder / "hub")
    file = folder / f"{family}.gguf"
    write_family(folder / "hub", file, family, tokenizer_metadata(folder / "hub", "gpt-2"), kind)
    return file


def logits(folder: Path) -> torch.Tensor:
    model = load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    return Driver(model).prefill(Sequence(PROMPT))


@pytest.mark.parametrize("family", PLAIN)
def test_a_family_in_plain_numbers(tmp_path: Path, family: str) -> None:
    file = written(family, tmp_path)
    folder = gguf_folder(file, tmp_path / "cache")
    expected, found = logits(tmp_path / "hub"), logits(folder)
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=1e-4, atol=1e-4)
    assert gguf_folder(file, tmp_path / "cache") == folder


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_experts_in_blocks(tmp_path: Path, kind: str) -> None:
    """Each expert's weight is the rows that the file has for it."""
    file = written("gpt_oss", tmp_path, kind)
    model = load_model(open_checkpoint(gguf_folder(file, tmp_path / "cache")), dtype=torch.float32, device="cpu")
    stored = {tensor.key: tensor for tensor in read_gguf_tensors([file])}
    for expert in (0, 4):
        own = stored[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert isinstance(own, BlockCodes)
        meant = torch.cat([rows for _, rows in own.pieces()])
        packed = model.get_submodule(f"model.layers.1.mlp.experts.{expert}.down_proj").packed
        assert isinstance(packed, QuantizedLinear)
        assert isinstance(packed, BlockLinear) == (kind != "Q4_0")  # which int4 holds code for code
        assert (packed.rows(torch.arange(32)) - meant).norm() <= 0.01 * meant.norm()


def test_old_files_have_a_tensor_for_each_expert(tmp_path: Path) -> None:
    from sensorium.checkpoint.gguf_names import checkpoint_name, gguf_architecture

    mixtral = gguf_architecture({"general.architecture": "llama", "llama.expert_count": 8})
    assert mixtral.architecture == "MixtralForCausalLM"
    name = checkpoint_name("blk.3.ffn_up.7.weight", mixtral)
    assert name == "model.layers.3.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func 2"),
        ("qwen3_moe", {"expert_used_count": 7}, "more than the 6 experts"),
        ("qwen3_moe", {"expert_used_count": "a"}, "must be a number"),
        ("gemma4_text", {"attention.sliding_window_pattern": [True]}, "has 1 values for 4 layers"),
        ("gemma4_text", {"attention.sliding_window_pattern": 4}, "must say which layers"),
        ("lfm2", {"attention.head_count_kv": [0, 2]}, "has 2 numbers for 3 layers"),
        ("glm4_moe", {"nextn_predict_layers": 9}, "layers, but has"),
    ],
)
def test_mislabelled_experts_and_layers(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    """In one line, before any weight is read."""
    stated = FAMILIES[family]["metadata"]
    name = stated["general.architecture"]
    metadata = {**stated, **{f"{name}.{key}": value for key, value in changes.items()}}
    tensors: dict[str, Any] = {f"blk.{i}.a": ("F32", (1,), bytes(4)) for i in range(8)}
    tensors |= {f"blk.{i}.ffn_gate_inp.weight": ("F32", (2, 2), bytes(16)) for i in range(4)}
    tensors["token_embd.weight"] = ("F32", (2, 2), bytes(16))
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b"]}
    file = tmp_path / "m.gguf"
    file.write_bytes(container({**metadata, **vocabulary, "tokenizer.ggml.merges": ["a b"]}, tensors))
    with pytest.raises(CheckpointError, match=said) as error:
        open_checkpoint(gguf_folder(file, tmp_path / "cache"))
    assert "\n" not in error.value.message


ODD: tuple[Any, ...] = (0, 2**32 - 1, -1, 0.5, float("nan"), "a\nb", "a" * 3000, True, [2**31 - 1] * 3, ["a"], [0.5])


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "lfm2"])
def test_no_metadata_goes_further_than_an_error(tmp_path: Path, family: str) -> None:
    """Any value missing, of another type, or an array: one short line, or a model; a bounded time and memory."""
    file = written(family, tmp_path)
    stored = read_gguf(file)
    arrays = (np.ndarray, Strings)
    metadata = {
        key: [x.item() if isinstance(x, np.generic) else x for x in one] if isinstance(one, arrays) else one
        for key, one in stored.metadata.items()
    }
    octets, refused = file.read_bytes(), 0
    tensors = {
        one.name: (one.kind.name, one.shape, octets[one.offset : one.offset + one.nbytes]) for one in stored.tensors
    }
    own = [key for key in metadata if not key.endswith((".tokens", ".merges", ".token_type", "architecture"))]
    more = ["general.type", "general.sampling.temp", f"{stored.metadata['general.architecture']}.rope.scaling.type"]
    for key in dict.fromkeys([*own, *more]):
        for odd in ODD[len(key) % 3 :: 3]:  # a third of them each
            file.write_bytes(container({**metadata, key: odd}, tensors))
            try:
                load_model(open_checkpoint(gguf_folder(file, tmp_path / "cache")), dtype=torch.float32, device="cpu")
            except CheckpointError as error:
                assert "\n" not in error.message and len(error.message) < 1500
                refused += 1
    assert refused > len(own)


def test_info_tells_of_a_file_with_experts(tmp_path: Path) -> None:
    file = written("qwen2_moe", tmp_path)
    found = describe(file)
    assert found.architecture == "Qwen2MoeForCausalLM"
    config = json.loads((gguf_folder(file, tmp_path / "cache") / "config.json").read_text())
    assert (config["num_experts"], config["shared_expert_intermediate_size"]) == (5, 28)
