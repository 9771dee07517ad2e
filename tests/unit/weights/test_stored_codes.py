"""Checkpoints that come quantised: every layout is read as the codes that it holds, and gives the model they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.checkpoints import (
    make_llama,
    make_llava,
    make_mixtral,
    make_phi3,
    make_qwen2,
    make_qwen2_vl,
    make_qwen3_moe,
    make_ultravox,
    read_weights,
    write_weights,
)
from support.decoded_checkpoints import write_bnb4, write_bnb8, write_fp4, write_fp8, write_hqq, write_mlx
from support.model_driver import Driver, Sequence
from support.quantized_checkpoints import (
    DAMAGES,
    Change,
    compressed_config,
    write_awq,
    write_awq_gemv,
    write_gptq,
    write_int8,
    write_packed,
)
from torch import Tensor
from transformers import PreTrainedModel

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.hub import resolve
from sensorium.cli.main import main
from sensorium.config import EngineConfig
from sensorium.engine.loading import choose_quantization
from sensorium.errors import CheckpointError, StartupError
from sensorium.kernels import FP8, Quantization
from sensorium.kernels.cpu import blocks, library, linear
from sensorium.kernels.reference import BlockLinear
from sensorium.kernels.reference.fp8 import Fp8Linear
from sensorium.kernels.reference.quantized import QuantizedLinear
from sensorium.models import loading
from sensorium.models.base import Model
from sensorium.models.layers import Linear
from sensorium.models.loading import load_model, weight_bytes
from sensorium.weights.checkpoint_files import stored_tensors
from sensorium.weights.decoded_codes import Fp8Codes
from sensorium.weights.joining import join
from sensorium.weights.stored_codes import StoredCodes

PROMPT = [5, 300, 7, 42, 11, 17, 230, 8, 77, 19, 3]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 288}
BF16 = torch.bfloat16
CPU = torch.device("cpu")

Writer = Callable[[Path], dict[str, Tensor]]


def misnamed(*, second_format: bool = True, **options: Any) -> Writer:
    """GPTQ whose zeros are of the other format than checkpoint_format says."""
    named = {"checkpoint_format": "gptq" if second_format else "gptq_v2"}
    return lambda folder: write_gptq(
        folder, second_format=second_format, **{**options, "config": {**named, **options.get("config", {})}}
    )


ROWS = Quantization(4, 128)  # what rows with one scale become if they are longer than any kernel's group
# Every layout that is published, and what a layer of it becomes: its own codes, or int8 where no kernel takes them.
LAYOUTS: dict[str, tuple[Writer, Quantization, bool]] = {
    "awq": (write_awq, Quantization(4, 32), True),
    "awq-16": (lambda folder: write_awq(folder, size=16), Quantization(4, 16), True),
    "awq-w_bit": (
        lambda folder: write_awq(folder, config={"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        Quantization(4, 32),
        True,
    ),
    "awq-rows": (lambda folder: write_awq(folder, size=1 << 20, config={"group_size": -1}), ROWS, True),
    "gptq": (write_gptq, Quantization(4, 32), True),
    "gptq-asymmetric": (lambda folder: write_gptq(folder, symmetric=False), Quantization(4, 32), True),
    "gptq-v2": (
        lambda folder: write_gptq(folder, symmetric=False, config={"checkpoint_format": "gptq_v2"}),
        Quantization(4, 32),
        True,
    ),
    "auto-round": (
        lambda folder: write_gptq(
            folder,
            config={
                "quant_method": "auto-round",
                "packing_format": "auto_round:auto_gptq",
                "data_type": "int",
                "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
            },
        ),
        Quantization(4, 32),
        True,
    ),
    "auto-round-asymmetric": (
        lambda folder: write_gptq(
            folder, symmetric=False, config={"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}
        ),
        Quantization(4, 32),
        True,
    ),
    "auto-round-awq": (
        lambda folder: write_awq(folder, config={"quant_method": "auto-round", "packing_format": "auto_awq"}),
        Quantization(4, 32),
        True,
    ),
    "gptq-rows": (lambda folder: write_gptq(folder, size=None), ROWS, True),
    "gptq-own-file": (lambda folder: write_gptq(folder, config_file="quantize_config.json"), Quantization(4, 32), True),
    "gptq-desc_act-in-order": (lambda folder: write_gptq(folder, config={"desc_act": True}), Quantization(4, 32), True),
    "gptq-act-order": (lambda folder: write_gptq(folder, act_order=True), Quantization(8), False),
    "gptq-8": (lambda folder: write_gptq(folder, bits=8, size=None), Quantization(8), True),
    "gptq-8-groups": (lambda folder: write_gptq(folder, bits=8), Quantization(8), False),
    "gptq-8-asymmetric": (
        lambda folder: write_gptq(folder, bits=8, size=None, symmetric=False),
        Quantization(8),
        False,
    ),
    "gptq-misnamed": (misnamed(), Quantization(4, 32), True),
    "gptq-misnamed-gptqmodel": (
        misnamed(config={"meta": {"quantizer": ["gptqmodel:5.4.0"]}}),
        Quantization(4, 32),
        True,
    ),
    "gptq-misnamed-v2": (misnamed(second_format=False), Quantization(4, 32), True),
    "gptq-misnamed-own-file": (misnamed(config_file="quantize_config.json"), Quantization(4, 32), True),
    "gptq-misnamed-asymmetric": (misnamed(symmetric=False), Quantization(4, 32), True),
    "gptq-misnamed-asymmetric-v2": (misnamed(symmetric=False, second_format=False), Quantization(4, 32), True),
    "gptq-misnamed-asymmetric-act-order": (misnamed(symmetric=False, act_order=True), Quantization(8), False),
    "gptq-misnamed-sym-unsaid": (misnamed(config={"sym": None}), Quantization(4, 32), True),
    "gptq-misnamed-dynamic-sym": (
        misnamed(config={"sym": False, "dynamic": {"+:.*": {"sym": True}}}),
        Quantization(4, 32),
        True,
    ),
    "gptq-misnamed-rows": (misnamed(size=None), ROWS, True),
    "gptq-misnamed-128": (misnamed(size=128), Quantization(4, 128), True),
    "gptq-misnamed-act-order": (misnamed(act_order=True), Quantization(8), False),
    "gptq-misnamed-8": (misnamed(bits=8, size=None), Quantization(8), True),
    "gptq-misnamed-8-groups": (misnamed(bits=8), Quantization(8), False),
    "gptq-asymmetric-sym-unsaid": (
        lambda folder: write_gptq(folder, symmetric=False, config={"sym": None}),
        Quantization(4, 32),
        True,
    ),
    "packed": (write_packed, Quantization(4, 32), True),
    "packed-asymmetric": (lambda folder: write_packed(folder, symmetric=False), Quantization(4, 32), True),
    "packed-rows": (lambda folder: write_packed(folder, size=None), ROWS, True),
    "packed-act-order": (lambda folder: write_packed(folder, act_order=True), Quantization(8), False),
    "packed-8": (lambda folder: write_packed(folder, bits=8, size=None), Quantization(8), True),
    "packed-compression_config": (
        lambda folder: write_packed(folder, config_key="compression_config"),
        Quantization(4, 32),
        True,
    ),
    "packed-3": (lambda folder: write_packed(folder, bits=3), Quantization(4, 32), True),
    "packed-6-asymmetric": (lambda folder: write_packed(folder, bits=6, symmetric=False), Quantization(8), False),
    "int8": (write_int8, Quantization(8), True),
    "awq-gemv": (write_awq_gemv, Quantization(4, 32), True),
    "gptq-3-asymmetric": (lambda folder: write_gptq(folder, bits=3, symmetric=False), Quantization(4, 32), True),
    "fp8": (write_fp8, Quantization(8), False),
    "nvfp4": (write_fp4, Quantization(8), False),
    "nf4": (write_bnb4, Quantization(8, blocks=((0, "NF4"),)), False),
    "bnb-fp4": (
        lambda folder: write_bnb4(folder, kind="fp4", nested=True),
        Quantization(8, blocks=((0, "FP4"),)),
        False,
    ),
    "bnb-int8": (write_bnb8, Quantization(8), True),
    "mlx": (write_mlx, Quantization(4, 32), False),
    "mlx-6": (lambda folder: write_mlx(folder, bits=6), Quantization(8), False),
    "hqq": (write_hqq, Quantization(4, 32), False),  # whose formula rounds to float16
    "hqq-across": (lambda folder: write_hqq(folder, axis=0), Quantization(8), False),
    "int8-one-scale": (lambda folder: write_int8(folder, strategy="tensor"), Quantization(8), True),
}


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu", **options)


def logits(model: Model, dtype: torch.dtype = torch.float32) -> Tensor:
    return Driver(model, dtype=dtype).prefill(Sequence(list(PROMPT))).float()


def expected_logits(oracle: PreTrainedModel, floats: dict[str, Tensor]) -> Tensor:
    """transformers' model with the weights that the codes stand for."""
    oracle.load_state_dict(floats, strict=False)
    with torch.no_grad():
        return oracle(torch.tensor([PROMPT])).logits[0]


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.float(), expected.float()
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = make_llama(folder, **SIZES)
    write, quantization, exact = LAYOUTS[request.param]
    floats = write(folder)
    return folder, expected_logits(oracle, floats), floats, (quantization, exact)


def test_codes_are_the_checkpoints(written: tuple[Path, Tensor, Any, Any]) -> None:
    folder, _, floats, (quantization, exact) = written
    model = load(folder)
    for index in range(2):
        layer = f"model.layers.{index}."
        for name, keys in (
            ("self_attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("self_attn.o_proj", ["self_attn.o_proj"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
            ("mlp.down_proj", ["mlp.down_proj"]),
        ):
            module = model.get_submodule(layer + name)
            assert isinstance(module, Linear)
            whole = quantization.bits == 8 or (quantization is ROWS and module.in_features <= 256)
            packed: Any = module.packed
            assert packed.bits == quantization.bits
            assert isinstance(packed, BlockLinear) == bool(quantization.blocks)
            if not quantization.blocks:
                assert packed._group == (module.in_features if whole else quantization.group)
            rows = module.packed.rows(torch.arange(module.out_features))
            meant = torch.cat([floats[f"{layer}{key}.weight"] for key in keys])
            if exact:
                torch.testing.assert_close(rows, meant, rtol=1e-6, atol=1e-9)
            else:
                assert error(rows, meant) < 0.01
    head: Any = model.lm_head
    assert torch.equal(head.packed.rows(torch.arange(head.out_features)), floats["lm_head.weight"])


@pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")
def test_native_codes_are_the_checkpoints(written: tuple[Path, Tensor, Any, Any]) -> None:
    folder, _, floats, (quantization, exact) = written
    down: Any = load(folder, BF16).get_submodule("model.layers.1.mlp.down_proj")
    made: type[Any] = blocks.BlockLinear if quantization.blocks else linear.QuantizedLinear
    assert type(down.packed) is made
    rows, meant = down.packed.rows(torch.arange(64)), floats["model.layers.1.mlp.down_proj.weight"].to(BF16)
    assert torch.equal(rows, meant) if exact else error(rows, meant) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_model_is_the_one_that_the_codes_mean(written: tuple[Path, Tensor, Any, Any], dtype: torch.dtype) -> None:
    folder, expected, _, _ = written
    assert error(logits(load(folder, dtype), dtype), expected) < 0.045  # activations in eight bits, layer by layer


UNPLANNED = re.compile(
    "in-order|misnamed|gemv|unsaid|rows|bnb-fp4"
)  # what config.json does not tell, or tiny layers fill up


@pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")
def test_the_memory_that_is_planned_is_what_codes_take(written: tuple[Path, Tensor, Any, Any]) -> None:
    folder = written[0]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization is not None
    if UNPLANNED.search(folder.name):
        return
    joined = join(stored_tensors(checkpoint.weight_files), checkpoint.quantization)
    stored = sum(one.nbytes for one in joined if isinstance(one, StoredCodes))
    layers = load(folder, BF16).get_submodule("model.layers")
    found = sum(one.packed.nbytes for one in layers.modules() if isinstance(one, Linear))
    assert found == pytest.approx(checkpoint.quantization.memory_part * stored, rel=0.12)


def test_info_tells_the_bits_of_a_weight_with_its_scales(
    written: tuple[Path, Tensor, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a file's tensors, and whatever belongs to codes, on as many weights as the model has."""
    folder, _, floats, _ = written
    assert main(["info", str(folder)]) == 0
    row = r"^weights +([\d.]+) million, ([\d.]+) bits each; quantised ones ([\d.]+)"
    told = re.search(row, capsys.readouterr().out, re.MULTILINE)
    assert told is not None
    count = sum(one.numel() for one in floats.values())
    octets = sum(one.nbytes for one in read_weights(folder).values())
    assert float(told[1]) == pytest.approx(count / 1e6, abs=0.06)
    assert float(told[2]) == pytest.approx(8 * octets / count, rel=0.005)
    assert float(told[3]) < float(told[2])


def test_layers_with_bits_and_groups_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config`: the shapes of a layer's tensors tell them."""
    oracle = make_llama(tmp_path, **SIZES)
    original = read_weights(tmp_path)
    others: dict[str, dict[str, Any]] = {
        "down_proj": {"bits": 8, "size": None},
        "o_proj": {"bits": 2, "size": 32},
        "q_proj": {"size": 64},
    }
    stored: dict[str, Tensor] = {}
    floats = dict(original)
    for name, options in {"": {}, **others}.items():
        write_weights(tmp_path, original)
        own = write_gptq(tmp_path, symmetric=False, **options)
        keep = [key for key in own if name in key]
        floats |= {key: own[key] for key in keep}
        bases = tuple(key.removesuffix("weight") for key in keep)
        stored = {key: one for key, one in stored.items() if not key.startswith(bases)}
        stored |= {key: one for key, one in read_weights(tmp_path).items() if key.startswith(bases)}
    write_weights(tmp_path, stored)
    config = json.loads((tmp_path / "config.json").read_text())
    dynamic = {rf"+:.*\.{name}": {"bits": one.get("bits", 4)} for name, one in others.items()}
    config["quantization_config"] |= {"bits": 4, "group_size": 32, "dynamic": {**dynamic, r"-:.*lm_head": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for module, bits in (("mlp.down_proj", 8), ("self_attn.o_proj", 4), ("mlp.gate_up_proj", 4)):
        assert cast(Any, load(tmp_path).get_submodule(f"model.layers.1.{module}")).packed.bits == bits
    assert error(logits(load(tmp_path)), expected_logits(oracle, floats)) < 0.04


@pytest.mark.parametrize("make", [make_qwen3_moe, make_mixtral])
def test_experts_that_mlx_stacks(tmp_path: Path, make: Callable[..., PreTrainedModel]) -> None:
    """With bits that the stacks of one product have of their own."""
    make(
        tmp_path,
        hidden_size=64,
        intermediate_size=96,
        **({} if make is make_mixtral else {"moe_intermediate_size": 32}),
    )
    down = {"gate": "w1", "up": "w3", "down": "w2"} if make is make_mixtral else {}
    tensors = {
        re.sub(r"\.(w\d)\.weight", r".\1_proj.weight", key): one for key, one in read_weights(tmp_path).items()
    }  # which the writer takes for layers
    write_weights(tmp_path, tensors)
    write_mlx(tmp_path)
    stored = {re.sub(r"\.(w\d)_proj\.", r".\1.", key): one for key, one in read_weights(tmp_path).items()}
    write_weights(tmp_path, stored)
    expected = logits(load(tmp_path))
    stacks: dict[str, list[Tensor]] = {}
    names = {own: name for name, own in down.items()} or {f"{name}_proj": name for name in ("gate", "up", "down")}
    for key in sorted(stored):
        match = re.fullmatch(r"(.+)\.experts\.(\d)\.(\w+)\.(weight|scales|biases)", key)
        if match is not None:
            place = f"{match[1]}.switch_mlp.{names[match[3]]}_proj.{match[4]}"
            stacks.setdefault(place, []).append(stored.pop(key))
    assert len(stacks) >= 9
    write_weights(tmp_path, {**stored, **{key: torch.stack(parts) for key, parts in stacks.items()}})
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_scheme_of_the_cache_alone_quantises_nothing(tmp_path: Path) -> None:
    make_llama(tmp_path, **SIZES)
    expected = logits(load(tmp_path))
    tensors = {**read_weights(tmp_path), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    write_weights(tmp_path, tensors)
    stated = compressed_config("dense", {}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    config = json.loads((tmp_path / "config.json").read_text())
    for groups in ({}, stated["config_groups"], {"group_0": {"targets": ["LlamaAttention"], "weights": None}}):
        config["quantization_config"] = {**stated, "config_groups": groups}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(load(tmp_path)), expected)


def test_info_tells_method_bits_memory_and_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path, **SIZES)
    write_gptq(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["files"].endswith("gptq of 4 bits in groups of 32")
    assert said["kernels"] == kernels.describe()
    assert "of weights" in said["as"]


def test_codes_take_little_memory(tmp_path: Path) -> None:
    make_llama(tmp_path, **SIZES)
    plain = weight_bytes(load(tmp_path, BF16))
    linear = sum(t.numel() for key, t in read_weights(tmp_path).items() if "_proj" in key)
    write_gptq(tmp_path)
    saved = plain - weight_bytes(load(tmp_path, BF16))
    assert saved == linear * 2 - linear // 2 - linear // 32 * 2  # half a byte each and a float16 for every group


@pytest.mark.parametrize("write", [write_awq, write_int8])
@pytest.mark.parametrize("make", [make_phi3, make_qwen2, make_qwen2_vl])
def test_other_families(tmp_path: Path, make: Callable[..., PreTrainedModel], write: Writer) -> None:
    """Merged tensors, biases, a tied head, a tower that stays as it is."""
    options = {"text": SIZES} if make is make_qwen2_vl else {**SIZES, "num_attention_heads": 8}
    oracle = make(tmp_path, **options)
    floats = write(tmp_path)
    if make is make_qwen2_vl:
        floats = {
            key.replace("model.", "model.language_model.", 1)
            if not key.startswith("visual.")
            else f"model.{key}": value
            for key, value in floats.items()
        }
    assert error(logits(load(tmp_path)), expected_logits(oracle, floats)) < 0.04


def test_layers_that_are_not_quantised_stay_as_they_are(tmp_path: Path) -> None:
    """A merged product one of whose parts is plain is computed in plain numbers."""
    oracle = make_llama(tmp_path, **SIZES)
    original = read_weights(tmp_path)
    floats = write_packed(tmp_path)
    stored = read_weights(tmp_path)
    for key in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(key)}
        stored[f"{key}.weight"] = floats[f"{key}.weight"] = original[f"{key}.weight"]
    write_weights(tmp_path, stored)
    model = load(tmp_path)
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not isinstance(module.packed, QuantizedLinear)
    }
    assert plain == {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    qkv: Any = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    rows = qkv.packed.rows(torch.arange(128))
    assert torch.equal(rows, torch.cat([floats[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]))
    assert error(logits(model), expected_logits(oracle, floats)) < 0.04


def test_a_quantised_head(tmp_path: Path) -> None:
    oracle = make_llama(tmp_path, **SIZES)
    head = read_weights(tmp_path)["lm_head.weight"]
    floats = write_gptq(tmp_path)
    stored = read_weights(tmp_path)
    other = tmp_path / "head"
    make_llama(other, **SIZES)
    write_weights(other, {"model.layers.0.x_proj.weight": head})
    floats["lm_head.weight"] = write_gptq(other)["model.layers.0.x_proj.weight"]
    del stored["lm_head.weight"]
    stored |= {key.replace("model.layers.0.x_proj", "lm_head"): part for key, part in read_weights(other).items()}
    write_weights(tmp_path, stored)
    model = load(tmp_path)
    assert cast(Any, model.lm_head).packed.bits == 4
    assert error(logits(model), expected_logits(oracle, floats)) < 0.04


@pytest.mark.parametrize("wanted", [Quantization(8), Quantization(4, 32)])
def test_codes_can_be_quantised_anew(tmp_path: Path, wanted: Quantization) -> None:
    oracle = make_llama(tmp_path, **SIZES)
    expected = expected_logits(oracle, write_gptq(tmp_path, act_order=True))
    model = load(tmp_path, quantization=wanted)
    assert cast(Any, model.get_submodule("model.layers.0.mlp.down_proj")).packed.bits == wanted.bits
    assert error(logits(model), expected) < (0.05 if wanted.bits == 8 else 0.5)


def test_forms_without_a_kernel_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_llama(tmp_path, **SIZES)
    write_gptq(tmp_path, act_order=True)
    load(tmp_path)
    assert next(r.message for r in caplog.records if "act-order" in r.message).startswith("8 layers")
    caplog.clear()
    load(tmp_path, quantization=Quantization(8))  # asked for
    assert not any("act-order" in r.message for r in caplog.records)


def test_layers_with_zeros_of_either_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some layers of a symmetric checkpoint in one format, some in the other: each is known by its own zeros."""
    oracle = make_llama(tmp_path, **SIZES)
    original = read_weights(tmp_path)
    first = {key: tensor for key, tensor in read_after(write_gptq, tmp_path).items() if "qzeros" in key}
    write_weights(tmp_path, original)
    floats = write_gptq(tmp_path, second_format=True)
    mixed = {
        key: first[key] if key in first and ("layers.1" in key or "q_proj" in key) else tensor
        for key, tensor in read_weights(tmp_path).items()
    }
    assert len({tuple(mixed[key].unique().tolist()) for key in first}) == 2
    write_weights(tmp_path, mixed)
    assert error(logits(load(tmp_path)), expected_logits(oracle, floats)) < 0.04
    assert not any("zeros" in record.message for record in caplog.records)


def read_after(write: Writer, folder: Path) -> dict[str, Tensor]:
    write(folder)
    return read_weights(folder)


@pytest.mark.parametrize(
    ("symmetric", "named", "stored", "zero", "said"),
    [
        (False, "gptq", 8, 8, "checkpoint_format is wrong: the zeros are of GPTQ's second format"),
        (False, "gptq_v2", 7, 8, "checkpoint_format is wrong: the zeros are of GPTQ's first format"),
        (True, "gptq", 5, 6, "are not the middle code though sym is true. They are read as GPTQ's first format"),
        (False, "gptq", 7, 8, None),
        (False, "gptq", 5, 6, None),
    ],
)
def test_zeros_that_are_all_alike_are_what_the_codes_bear_out_or_the_name_says(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    symmetric: bool,
    named: str,
    stored: int,
    zero: int,
    said: str | None,
) -> None:
    make_llama(tmp_path, **SIZES)
    floats = write_gptq(tmp_path, config={"sym": symmetric, "checkpoint_format": named})
    tensors = read_weights(tmp_path)
    fill = sum(stored << 4 * place for place in range(8))
    write_weights(
        tmp_path,
        {
            key: torch.full_like(tensor, fill - 2**32 if fill >= 2**31 else fill) if key.endswith("qzeros") else tensor
            for key, tensor in tensors.items()
        },
    )
    down = "model.layers.0.mlp.down_proj"
    rows = cast(Any, load(tmp_path).get_submodule(down)).packed.rows(torch.arange(64))
    scales = tensors[f"{down}.scales"].T.float().repeat_interleave(32, 1)
    torch.testing.assert_close(rows, floats[f"{down}.weight"] + (8 - zero) * scales, rtol=1e-4, atol=1e-6)
    lines = [record.message for record in caplog.records if "zeros" in record.message]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_biases_that_only_the_quantiser_wrote(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer one: ignored where it is zero and the model has none."""
    make_llama(tmp_path, **SIZES)
    write_gptq(tmp_path)
    expected = logits(load(tmp_path))
    names = [key.removesuffix("qweight") + "bias" for key in read_weights(tmp_path) if key.endswith("qweight")]
    tensors = {**read_weights(tmp_path), **{name: torch.zeros(64, dtype=torch.float16) for name in names}}
    write_weights(tmp_path, tensors)
    assert torch.equal(logits(load(tmp_path)), expected)
    write_weights(tmp_path, {**tensors, names[3]: torch.tensor([0.0, 1.0])})
    with pytest.raises(CheckpointError, match=f"unexpected {names[3]}$"):
        load(tmp_path)


def test_where_it_may_be_stated(tmp_path: Path) -> None:
    """In the decoder's part of the configuration; in the file that AutoAWQ wrote before there was a place for it."""
    make_llava(tmp_path / "llava", text=SIZES)
    write_awq(tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    expected = logits(load(tmp_path / "llava"))
    stated = config.pop("quantization_config")
    config["text_config"]["quantization_config"] = stated
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path / "llava")), expected)
    del config["text_config"]["quantization_config"]
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="qweight"):
        load(tmp_path / "llava")
    (tmp_path / "llava" / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    )
    assert torch.equal(logits(load(tmp_path / "llava")), expected)


def test_a_quantised_language_model_from_another_repository(tmp_path: Path) -> None:
    make_ultravox(tmp_path, text=SIZES)
    write_gptq(tmp_path / "language")
    model = load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
    assert cast(Any, model.get_submodule("model.layers.0.mlp.down_proj")).packed.bits == 4
    alone = logits(load(tmp_path / "language"))
    assert torch.equal(logits(model), alone)


def test_pickled_codes(tmp_path: Path) -> None:
    make_llama(tmp_path, **SIZES)
    write_awq(tmp_path)
    expected = logits(load(tmp_path))
    write_weights(tmp_path, read_weights(tmp_path), pickled=True)
    assert torch.equal(logits(load(tmp_path)), expected)


# What cannot be served


def group_of(**weights: Any) -> dict[str, Any]:
    return compressed_config("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", **weights})


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "torchao", "quant_type": "int4wo"}, "quantisation by torchao"),
        ({"quant_method": "gguf"}, "gguf without its file"),
        ({"quant_method": ["awq"]}, "quantisation by ['awq']"),
        ({"bits": 4}, "quantisation by None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt with quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "quant_type 'af4'"),
        ({"bits": 7, "group_size": 64}, "mlx with bits 7"),
        ({"bits": 4, "group_size": 64, "mode": "other"}, "mlx with mode 'other'"),
        ({"bits": 4, "group_size": 64, "lm_head": {"mode": "mxfp4"}}, "mode of a single layer 'mxfp4'"),
        ("awq", "quantization_config 'awq'"),
        ({"quant_method": "awq", "bits": 8}, "awq with bits 8"),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "awq with version 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "gptq with bits 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size 'all'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm_compressor"}, "llm_compressor'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round"}, "packing_format 'auto_round'"),
        ({"quant_method": "auto-round", "bits": 5, "packing_format": "auto_round:auto_gptq"}, "gptq with bits 5"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"quant_method": "auto-round", "bits": 4, "extra_config": {"lm_head": {"bits": 7}}}, "bits of 'lm_head' 7"),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_awq", "extra_config": {"a": {"bits": 8}}},
            "packed as awq with other settings",
        ),
        ({"quant_method": "auto-round", "bits": 4, "extra_config": [4]}, "extra_config '[4]'"),
        ({"quant_method": "auto-round", "bits": 4, "extra_config": {"a": 4}}, "extra_config 'a' '4'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {r"+:.*\.18\..*gate.*": {"bits": 5}}}, "gate.*' 5"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": 1}, "gptq with dynamic '1'"),
        (compressed_config("float-quantized", {"num_bits": 8, "type": "int"}), "format 'float-quantized'"),
        (compressed_config("mxfp6-quantized", {"num_bits": 6, "type": "float"}), "format 'mxfp6-quantized'"),
        (compressed_config("marlin-24", {"num_bits": 4, "type": "int"}), "format 'marlin-24'"),
        (group_of(num_bits=9), "weights.num_bits 9"),
        ({**group_of(), "sparsity_config": 1}, "sparsity_config '1'"),
        ({**group_of(), "config_groups": {"a": {"weights": 4}}}, "weights '4'"),
        (
            {**group_of(), "config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": 1}}},
            "activations '1'",
        ),
        (group_of(type="complex"), "weights.type 'complex'"),
        (group_of(strategy="all"), "weights.strategy 'all'"),
        ({**group_of(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({**group_of(), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({**group_of(), "config_groups": {}}, "without config_groups"),
        (
            compressed_config("int-quantized", {"num_bits": 8}, {"num_bits": 4, "type": "int"}),
            "input_activations.num_bits",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, stated: Any, said: str) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert said in message
    assert "supported are awq (gemm and gemv, 4 bits), gptq (2, 3, 4 or 8 bits), compressed-tensors" in message
    assert "--quantization int8" in message


def test_other_files(tmp_path: Path) -> None:
    """AutoGPTQ's old name of the only file; and what is no checkpoint at all."""
    make_llama(tmp_path, **SIZES)
    write_gptq(tmp_path)
    expected = logits(load(tmp_path))
    renamed = (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(load(tmp_path)), expected)
    renamed.rename(tmp_path / "model-Q4_0.gguf")
    with pytest.raises(CheckpointError, match=r"model-Q4_0.gguf is not a GGUF file"):
        resolve(str(tmp_path / "model-Q4_0.gguf"))
    with pytest.raises(StartupError, match="no such file"):
        resolve(str(tmp_path / "other.gguf"))


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("write", "change", "said"),
    [
        (write_gptq, drop(f"{Q}.scales"), f"{Q}.qweight is there without its scales"),
        (write_gptq, drop(f"{Q}.qweight"), f"{Q}.g_idx"),
        (write_gptq, put(f"{Q}.g_idx", lambda t: t + 1), f"{Q}.g_idx names groups that are not there"),
        (write_gptq, put(f"{Q}.g_idx", lambda t: t - 1), f"{Q}.g_idx names groups that are not there"),
        (write_gptq, put(f"{Q}.qweight", lambda t: t.float()), f"{Q}.qweight in model.safetensors is torch.float32"),
        (write_gptq, put(f"{Q}.qweight", lambda t: t[:-1]), f"{Q}.weight in model.safetensors has shape [64, 56]"),
        (write_gptq, put(f"{Q}.qweight", lambda t: t[0]), f"{Q}.qweight in model.safetensors has shape [64]"),
        (write_gptq, put(f"{Q}.scales", lambda t: t[:-1]), f"{Q}.scales in model.safetensors has shape [1, 64]"),
        (write_awq, put(f"{Q}.qzeros", lambda t: t[:, 1:]), f"{Q}.qzeros in model.safetensors has shape [2, 7]"),
        (write_awq, drop(f"{Q}.qzeros"), "without its qzeros"),
        (write_packed, put(f"{Q}.weight_shape", lambda t: t * 2), "which is no weight of [128, 128]"),
        (
            write_packed,
            put(f"{Q}.weight_scale", lambda t: t[:, :0]),
            f"{Q}.weight_scale in model.safetensors has shape",
        ),
        (
            write_packed,
            put(f"{Q}.weight_scale", lambda t: t[:5]),
            f"{Q}.weight_scale in model.safetensors has shape [5",
        ),
        (write_packed, drop(f"{Q}.weight_shape"), "without its weight_shape"),
        (
            write_int8,
            put(f"{Q}.weight_scale", lambda t: t[:7]),
            f"{Q}.weight_scale in model.safetensors has shape [7, 1]",
        ),
        (write_int8, drop(f"{Q}.weight_scale"), f"{Q}.weight in model.safetensors is torch.int8"),
    ],
)
def test_damaged_layers_are_named(
    tmp_path: Path, write: Writer, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    make_llama(tmp_path, **SIZES)
    write(tmp_path)
    tensors = read_weights(tmp_path)
    change(tensors)
    write_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert said in str(caught.value)


CHANGES: list[Change] = [
    *DAMAGES,
    lambda t: t.flatten()[:1],
    lambda t: t.to(torch.int64) * -7,
    lambda t: t.to(torch.int32) * 1000,
]


UNDAMAGED = re.compile("-8|misnamed|fp8|nvfp4|nf4|bnb|mlx|hqq")  # like others, or damaged in test_decoded_codes


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not UNDAMAGED.search(name)])
def test_no_damage_goes_further_than_an_error(tmp_path: Path, layout: str) -> None:
    """Any part of a layer cut, turned or retyped: refused in one line, or loaded where it still means something."""
    make_llama(tmp_path, **SIZES)
    LAYOUTS[layout][0](tmp_path)
    tensors, refused = read_weights(tmp_path), 0
    parts = [key for key, one in tensors.items() if key.startswith("model.layers.0.mlp.down_proj.") and one.dim()]
    assert parts
    for part in parts:
        for change in CHANGES:
            write_weights(tmp_path, {**tensors, part: change(tensors[part]).contiguous()})
            try:
                logits(load(tmp_path))
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 3 * len(parts)


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_fp8_stays_where_a_device_multiplies_it(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the checkpoint, whose scales every output and group of inputs has."""
    oracle = make_llama(tmp_path, **SIZES)
    floats = write_fp8(tmp_path, scheme=scheme)
    monkeypatch.setattr(loading, "_computed_as", lambda weight, device: loading._stored_quantization(weight))
    model = load(tmp_path)
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(down, Linear)
    assert isinstance(down.packed, Fp8Linear)
    rows = down.packed.rows(torch.arange(down.out_features))
    torch.testing.assert_close(rows, floats["model.layers.1.mlp.down_proj.weight"], rtol=1e-6, atol=0)
    assert error(logits(model), expected_logits(oracle, floats)) < 0.1  # activations of three bits behind the first


def test_an_fp8_checkpoint_on_each_device(tmp_path: Path) -> None:
    make_llama(tmp_path, **SIZES)
    write_fp8(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization is not None
    joined = join(stored_tensors(checkpoint.weight_files), checkpoint.quantization)
    source = next(one for one in joined if isinstance(one, Fp8Codes))
    weight = loading._Slot("w", Linear(1, 1), "weight", source.shape, {"": source})
    assert loading._computed_as(weight, CPU) == (Quantization(8), False)
    assert loading._computed_as(weight, torch.device("cuda", 0)) == (source.quantization(), True)


def test_methods_by_name(tmp_path: Path) -> None:
    """vLLM's users name the method that the checkpoint has."""
    make_llama(tmp_path, **SIZES)
    with pytest.raises(StartupError, match="--quantization fp8: a CPU has no kernels for it; int8"):
        choose_quantization(EngineConfig("m", quantization="fp8"), None, CPU)
    assert choose_quantization(EngineConfig("m", quantization="fp8"), None, torch.device("cuda", 0)) == FP8
    with pytest.raises(StartupError, match="stored as plain numbers"):
        choose_quantization(EngineConfig("m", quantization="awq"), open_checkpoint(tmp_path).quantization, CPU)
    write_awq(tmp_path)
    stored = open_checkpoint(tmp_path).quantization
    assert choose_quantization(EngineConfig("m", quantization="awq"), stored, CPU) is None
    assert choose_quantization(EngineConfig("m"), stored, CPU) is None
    with pytest.raises(StartupError, match="stored as awq"):
        choose_quantization(EngineConfig("m", quantization="gptq"), stored, CPU)
    with pytest.raises(StartupError, match="--quantize-towers goes with"):
        choose_quantization(EngineConfig("m", quantize_towers=True), stored, CPU)
    assert choose_quantization(
        EngineConfig("m", quantization="int4", quantization_group_size=32), stored, CPU
    ) == Quantization(4, 32)
