"""Loading: every file layout gives the same weights; whatever does not fit is one clear line."""

from __future__ import annotations

import gc
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    make_llama,
    make_llava,
    make_phi3,
    make_qwen2,
    make_qwen3,
    make_qwen3_moe,
    read_weights,
    write_weights,
)
from support.engine_harness import Outbox
from support.model_driver import Driver, Sequence
from torch import Tensor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.faults import Faults
from sensorium.engine.loading import load_engine, mapped_weights
from sensorium.engine.loop import Core
from sensorium.errors import CheckpointError
from sensorium.kernels.cpu.native import fastest as _fastest
from sensorium.models import loading as weights
from sensorium.models.base import Model
from sensorium.models.layers import Linear, declare
from sensorium.models.loading import load_model, weight_bytes

PROMPT = [5, 300, 7, 42, 11]


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu", **options)


def logits(model: Model) -> Tensor:
    dtype = model.embed(torch.tensor([0])).dtype
    return Driver(model, dtype=dtype).prefill(Sequence(list(PROMPT)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama(tmp_path)
    return tmp_path


def fails(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers 2147483647 is more than 4096"),
        ({"num_hidden_layers": 4000}, "states 4000 layers"),
        ({"head_dim": 2**31 - 1}, "head_dim 2147483647 is more than 65536"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast"),
        ({"partial_rotary_factor": 1e6}, "rotated dimensions"),
        ({"vision_config": {"depth": 10**6}}, "depth 1000000 is more than 4096"),
    ],
)
def test_no_number_asks_for_more_than_memory_has(folder: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    fails(folder, said)


def test_experts_are_no_more_than_the_weights(tmp_path: Path) -> None:
    make_qwen3_moe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_experts": 2**31 - 1, "num_local_experts": 2**31 - 1})
    )
    fails(tmp_path, "experts, more than the weights")


def test_what_a_model_cannot_be_made_of_is_told(tmp_path: Path) -> None:
    make_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = [2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(tmp_path, "config.json describes no LlavaForConditionalGeneration")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pickled", [False, True])
def test_files(folder: Path, shards: int, pickled: bool) -> None:
    expected = logits(load(folder))
    write_weights(folder, read_weights(folder), shards=shards, pickled=pickled)
    files = open_checkpoint(folder).weight_files
    assert len(files) == shards
    assert all((file.suffix == ".bin") is pickled for file in files)
    assert torch.equal(logits(load(folder)), expected)


def test_pickles_of_before_zip_files_load(folder: Path) -> None:
    expected = logits(load(folder))
    tensors = read_weights(folder)
    write_weights(folder, tensors, pickled=True)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load(folder)), expected)


def test_safetensors_win_over_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"nothing that loads")
    load(folder)


@pytest.mark.parametrize("family", [make_llama, make_qwen2, make_qwen3])
@pytest.mark.parametrize("stored", ["embedding", "both", "head"])
def test_tied_head(tmp_path: Path, family: Callable[..., Any], stored: str) -> None:
    oracle = family(tmp_path, tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    if stored != "embedding":
        tensors["lm_head.weight"] = embedding.clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    write_weights(tmp_path, tensors)
    model = load(tmp_path)
    with torch.no_grad():
        assert torch.allclose(logits(model), oracle(torch.tensor([PROMPT])).logits[0], atol=1e-4)
    assert weight_bytes(model) == sum(t.nbytes for k, t in tensors.items() if k != "lm_head.weight" or stored == "head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    make_phi3(tmp_path, dtype=stored)
    model = load(tmp_path, dtype)
    assert all(p.dtype is dtype for p in model.parameters())
    exact = logits(load(tmp_path))
    assert (logits(model).float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_loaded_weights_own_their_memory(folder: Path) -> None:
    """The memory map is gone: files may be replaced under a running server, and only one copy is resident."""
    model = load(folder)
    gc.collect()
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    expected = logits(model)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(model), expected)
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


def test_progress(folder: Path) -> None:
    heard: list[float] = []
    load(folder, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[0] > 0
    assert heard[-1] == 1.0
    assert len(heard) > 5


def test_merged_shards_keep_their_order(folder: Path) -> None:
    tensors = read_weights(folder)
    form: Any = load(folder).get_submodule("model.layers.1.self_attn.qkv_proj").packed
    parts = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(form.rows(torch.arange(64)), torch.cat(parts))


def test_old_leftovers_are_ignored(folder: Path) -> None:
    tensors = read_weights(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    write_weights(folder, tensors)
    load(folder)


def test_position_ids_of_towers_are_ignored(tmp_path: Path) -> None:
    make_llava(tmp_path)
    tensors = read_weights(tmp_path)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_weights(tmp_path, tensors)
    load(tmp_path)


def test_unexpected_and_missing_keys_are_named(folder: Path) -> None:
    tensors = read_weights(folder)
    tensors["model.layers.0.self_attn.rotary.scale"] = torch.zeros(4)
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_weights(folder, tensors)
    fails(
        folder,
        "unexpected model.layers.0.self_attn.rotary.scale",
        "missing model.layers.1.self_attn.qkv_proj.weight (k), model.norm.weight",
    )


def test_at_most_five_keys_are_named(folder: Path) -> None:
    tensors = read_weights(folder)
    for i in range(9):
        tensors[f"adapter.{i}.weight"] = torch.zeros(1)
    write_weights(folder, tensors)
    fails(folder, "adapter.4.weight and 4 more")


def test_missing_bias_and_unwanted_bias(tmp_path: Path) -> None:
    make_qwen2(tmp_path)
    tensors = read_weights(tmp_path)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)
    write_weights(tmp_path, tensors)
    fails(tmp_path, "unexpected model.layers.0.self_attn.o_proj.bias", "model.layers.0.self_attn.qkv_proj.bias (q)")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_wrong_shape(folder: Path, key: str) -> None:
    tensors = read_weights(folder)
    tensors[key] = torch.zeros(3, *tensors[key].shape[1:])
    write_weights(folder, tensors)
    fails(folder, key, "has shape [3", "model.safetensors", "needs [")


def test_quantised_tensors(folder: Path) -> None:
    tensors = read_weights(folder)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.int8)
    write_weights(folder, tensors)
    fails(folder, key, "int8", "quantised")


def test_duplicate_keys_across_files(folder: Path) -> None:
    tensors = read_weights(folder)
    write_weights(folder, tensors, shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({**load_file(second), "lm_head.weight": tensors["lm_head.weight"]}, second)
    fails(folder, "lm_head.weight is in model-00001-of-00002.safetensors and again in model-00002")


def test_two_names_of_one_parameter(folder: Path) -> None:
    tensors = read_weights(folder)
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = torch.zeros(96, 32)
    write_weights(folder, tensors)
    fails(folder, "model.layers.0.mlp.gate_up_proj.weight")


def test_truncated_at_every_part(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 5, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        fails(folder, "model.safetensors")


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]


def outside(header: dict[str, Any]) -> None:
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [begin + 10**9, end + 10**9]


def negative(header: dict[str, Any]) -> None:
    header["model.norm.weight"].update(shape=[-32], data_offsets=[0, -128])


def huge(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [2**62, 4]


def unknown_dtype(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["dtype"] = "F7"


def no_offsets(header: dict[str, Any]) -> None:
    del header["model.norm.weight"]["data_offsets"]


def twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ', "lm_head.weight": ' + json.dumps(header["lm_head.weight"]) + "}").encode()


def not_json(header: dict[str, Any]) -> bytes:
    return b"{" * 50


def deep(header: dict[str, Any]) -> bytes:
    return b"[" * 200_000


@pytest.mark.parametrize("change", [overlap, outside, negative, huge, unknown_dtype, no_offsets, twice, not_json, deep])
def test_broken_headers(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite_header(folder / "model.safetensors", change)
    fails(folder, "model.safetensors")


def test_header_length_is_not_believed(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])
    fails(folder, "model.safetensors")


def test_header_whose_data_is_not_aligned(folder: Path) -> None:
    expected = logits(load(folder))
    rewrite_header(folder / "model.safetensors", lambda header: json.dumps(header).encode() + b" " * 3)
    assert torch.equal(logits(load(folder)), expected)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [False, True])
def test_pickles_run_nothing(folder: Path, tmp_path: Path, plain: bool) -> None:
    canary = tmp_path / "canary"
    state = {**read_weights(folder), "model.extra": Canary(canary)}
    write_weights(folder, {"x": torch.zeros(1)}, pickled=True)
    if plain:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin", "not loaded")
    assert not canary.exists()


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"model.norm.weight": 3}, {1: torch.zeros(2)}])
def test_pickles_of_something_else(folder: Path, state: object) -> None:
    write_weights(folder, {"x": torch.zeros(1)}, pickled=True)
    torch.save(state, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin", "something else")


def test_truncated_pickle(folder: Path) -> None:
    write_weights(folder, read_weights(folder), pickled=True)
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2):
        file.write_bytes(whole[:size])
        fails(folder, "pytorch_model.bin")


def test_every_byte_of_a_form_comes_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing allocated while loading keeps what it was allocated with (another tenant's memory)."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    model = load(folder)
    for module in model.modules():
        if isinstance(module, Linear):
            assert not module.packed.rows(torch.arange(module.out_features)).isnan().any()
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("family", [make_llama, make_qwen2])
@pytest.mark.parametrize("tied", [False, True])
def test_mapped_weights_compute_the_same_before_and_after_they_are_packed(
    tmp_path: Path, family: Callable[..., Any], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, tie_word_embeddings=tied)
    write_weights(tmp_path, {key: tensor.to(torch.bfloat16) for key, tensor in read_weights(tmp_path).items()})
    expected = logits(load(tmp_path, torch.bfloat16))
    assert not mapped_weights(load(tmp_path, torch.bfloat16, memory_mapped=True))  # too small for that to pay
    monkeypatch.setattr(weights, "MAPPED_BYTES", 0)
    model = load(tmp_path, torch.bfloat16, memory_mapped=True)
    forms = mapped_weights(model)
    if (native := _fastest()) is not None and native.isa.startswith("avx512"):
        assert len(forms) == sum(isinstance(module, Linear) for module in model.modules())
    assert torch.equal(logits(model), expected)
    assert weight_bytes(model) >= weight_bytes(load(tmp_path, torch.bfloat16))
    for form in forms:
        form.pack()
    assert torch.equal(logits(model), expected)
    assert not mapped_weights(load(tmp_path, torch.float32, memory_mapped=True))


def test_an_idle_engine_packs_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_qwen2(tmp_path)
    write_weights(tmp_path, {key: tensor.to(torch.bfloat16) for key, tensor in read_weights(tmp_path).items()})
    monkeypatch.setattr(weights, "MAPPED_BYTES", 0)
    one = load_engine(EngineConfig(str(tmp_path), kv_cache_memory=1 << 20, map_weights=False))
    assert not one.mapped
    two = load_engine(EngineConfig(str(tmp_path), kv_cache_memory=1 << 20))
    core = Core(two, Outbox(), Faults())
    for _ in range(len(two.mapped)):
        core.turn()
    assert not two.mapped
    assert not two.pack_some()


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**70, 3), (-1, 3), (2**62,)])
def test_a_weight_that_no_memory_holds_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"a weight of {' x '.join(map(str, shape))}"):
        declare(*shape)
