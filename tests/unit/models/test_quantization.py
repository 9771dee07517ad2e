"""Quantising while loading: which layers, how well, in how little memory, and the same with and without native code."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from support import checkpoints
from support.checkpoints import make_llama, make_llava, make_qwen2_omni, make_qwen2_vl, read_weights
from support.encoder_support import VOCAB, pooled, prompts_of, run, save
from support.model_driver import Driver, Sequence, clear_answers, peak_bytes
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GteConfig,
    GteModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.engine.loading import activation_bytes
from sensorium.kernels import Quantization
from sensorium.kernels.cpu import library, linear, native, onednn
from sensorium.models.base import Model
from sensorium.models.layers import Embedding, Linear
from sensorium.models.loading import declared_bytes, load_model, weight_bytes
from sensorium.models.towers.blocks import PatchLinear

BF16 = torch.bfloat16
INT8, INT4 = Quantization(8), Quantization(4, 32)
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

needs_native = pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")


def load(folder: Path, dtype: torch.dtype = BF16, quantization: Quantization | None = None, **options: Any) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu", quantization=quantization, **options)


@contextmanager
def without_native() -> Iterator[None]:
    """Everything through plain torch, as where the package was installed without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_native", lambda: None)
        patch.setattr(onednn, "usable", lambda: False)
        yield


def bits_of(model: Model) -> dict[str, int]:
    """Bits of every linear layer and embedding table, 16 for plain numbers."""
    return {
        name: getattr(module.packed, "bits", 16)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and (isinstance(module, Linear) or not module._tied)
    }


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("wanted", [INT8, INT4])
def test_what_is_quantised(tmp_path: Path, wanted: Quantization) -> None:
    make_llama(tmp_path)
    found = bits_of(load(tmp_path, quantization=wanted))
    assert found == {f"model.layers.{i}.{name}": wanted.bits for i in range(2) for name in LAYERS} | {
        "lm_head": 8,
        "model.embed_tokens": 8,
    }


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_tied_head_is_one_copy_of_eight_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    make_llama(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path, dtype, INT4)
    head = read_weights(tmp_path)["model.embed_tokens.weight"]
    assert bits_of(model)["lm_head"] == 8
    assert "model.embed_tokens" not in bits_of(model)
    rows = model.embed(torch.arange(len(head)))
    assert torch.equal(rows, cast(Any, model.lm_head).packed.rows(torch.arange(len(head))))
    assert 0 < error(rows, head) < 0.01
    assert torch.equal(model.embed(torch.tensor([-1, 10**6])), rows[[0, -1]])


TOWERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "qwen2_vl": (make_qwen2_vl, ("visual.",)),
    "llava": (make_llava, ("vision_tower.", "multi_modal_projector.")),
    "qwen2_omni": (make_qwen2_omni, ("visual.", "audio_tower.")),
}


@pytest.mark.parametrize("family", TOWERS)
def test_towers_only_when_asked(tmp_path: Path, family: str) -> None:
    make, prefixes = TOWERS[family]
    make(tmp_path)
    found = bits_of(load(tmp_path, quantization=INT4))
    towers = {name for name in found if name.startswith(prefixes)}
    assert towers
    assert {found[name] for name in towers} == {16}
    assert {found[name] for name in found.keys() - towers} <= {4, 8}
    model = load(tmp_path, quantization=INT4, quantize_towers=True)
    for name, bits in bits_of(model).items():
        assert bits == (
            16
            if isinstance(model.get_submodule(name), PatchLinear)
            else found[name]
            if found[name] < 16
            else 8
            if isinstance(model.get_submodule(name), Embedding)
            else 4
        ), name


@pytest.mark.parametrize("quantization", [INT8, INT4])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_quantised_towers_see_much_the_same(tmp_path: Path, quantization: Quantization, dtype: torch.dtype) -> None:
    make_qwen2_vl(tmp_path, vision={"embed_dim": 64, "num_heads": 2})
    grid = torch.tensor([1, 8, 8])
    pixels = torch.randn(64, 588, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain, less = (
            load(tmp_path, dtype, quantization, quantize_towers=towers).encode(
                "image", [{"pixels": pixels, "grid": grid}]
            )[0]
            for towers in (False, True)
        )
    assert 0 < error(less, plain) < (0.03 if quantization is INT8 else 0.25)


@pytest.mark.parametrize("quantization", [INT8, INT4])
def test_quantised_decoders_think_much_the_same(tmp_path: Path, quantization: Quantization) -> None:
    make_llama(tmp_path, hidden_size=128, intermediate_size=256)
    tokens = [5, 300, 7, 42, 11, 17, 230, 8]
    plain = Driver(load(tmp_path, torch.float32)).prefill(Sequence(list(tokens)))
    for dtype in (torch.float32, BF16):
        got = Driver(load(tmp_path, dtype, quantization), dtype=dtype).prefill(Sequence(list(tokens)))
        assert 0 < error(got, plain) < (0.04 if quantization is INT8 else 0.3)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, BertConfig(max_position_embeddings=64, **SIZES)),
    "deberta": (
        DebertaV2Model,
        DebertaV2Config(max_position_embeddings=64, relative_attention=True, pos_att_type="c2p|p2c", **SIZES),
    ),
    "gte": (GteModel, GteConfig(max_position_embeddings=64, **SIZES)),
    "mpnet": (MPNetModel, MPNetConfig(max_position_embeddings=64, **SIZES)),
    "modernbert": (ModernBertModel, ModernBertConfig(max_position_embeddings=64, pad_token_id=0, **SIZES)),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("quantization", [INT8, INT4])
def test_encoders(tmp_path: Path, encoder: str, quantization: Quantization) -> None:
    """Every linear layer and every table; an embedding points much the same way."""
    kind, config = ENCODERS[encoder]
    save(kind(config), tmp_path)
    prompts = prompts_of([9, 3, 17])
    plain = run(load(tmp_path, torch.float32), prompts)
    model = load(tmp_path, BF16, quantization)
    found = bits_of(model)
    assert set(found.values()) <= {quantization.bits, 8}
    assert sum(bits == quantization.bits for bits in found.values()) >= 8
    for got, expected, ids in zip(run(model, prompts), plain, prompts, strict=True):
        assert error(got, expected) < (0.06 if quantization is INT8 else 0.35)
        vectors = [pooled(model, "embed", states.float(), ids) for states in (got, expected)]
        assert torch.cosine_similarity(vectors[0], vectors[1], dim=0) > (0.995 if quantization is INT8 else 0.93)


@pytest.mark.parametrize("native_built", [pytest.param(True, marks=needs_native), False])
def test_bytes_of_a_quantised_model(tmp_path: Path, native_built: bool) -> None:
    make_llama(tmp_path, dtype="bfloat16", hidden_size=128, intermediate_size=256, num_attention_heads=8)
    tensors = read_weights(tmp_path)
    linear = sum(t.numel() for key, t in tensors.items() if "_proj" in key)
    rows = sum(len(t) for key, t in tensors.items() if "_proj" in key)
    tables = 2 * tensors["lm_head.weight"].numel() + 2 * 4 * len(tensors["lm_head.weight"])
    norms = sum(t.nbytes for key, t in tensors.items() if "norm" in key)
    for quantization, expected in ((INT8, linear + 4 * rows), (INT4, linear // 2 + 2 * linear // 32)):
        if native_built:
            model = load(tmp_path, quantization=quantization)
        else:
            with without_native():
                model = load(tmp_path, quantization=quantization)
        padding = weight_bytes(model) - (expected + tables + norms)
        assert 0 <= padding < (2 * 32 * 4 if native_built else 1)  # scales of the tables, up to whole panels


@pytest.mark.parametrize("family", TOWERS)
def test_bytes_are_known_before_the_weights_are_there(tmp_path: Path, family: str) -> None:
    TOWERS[family][0](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        declared: Model = load_class(checkpoint.family.model)(checkpoint)
    for quantization in (None, INT8, INT4, Quantization(4, 64)):
        with without_native():
            model = load(tmp_path, quantization=quantization)
        assert declared_bytes(declared, BF16, quantization) == weight_bytes(model)


PEAK = """
import sys
from pathlib import Path
import torch
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model, weight_bytes

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

small, large, bits = sys.argv[1:]
load = lambda folder: load_model(open_checkpoint(Path(folder)), dtype=torch.bfloat16, device="cpu",
                                 quantization=Quantization(int(bits)) if int(bits) else None)
torch.set_num_threads(1)
load(small)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = status("VmRSS")
model = load(large)
print(status("VmHWM") - before, weight_bytes(model))
"""


def test_peak_memory_is_the_quantised_model_and_one_tensor(tmp_path: Path) -> None:
    """252 MB of bfloat16 become 71 MB of int4; what a process ever holds beside them are some 20 MB of scratch."""
    make_llama(tmp_path / "small", hidden_size=64)
    large = tmp_path / "large"
    make_llama(large, hidden_size=64)
    hidden, inner, layers = 1024, 2560, 10
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    noise = {shape: torch.randn(shape).to(BF16) for shape in set(shapes.values())}
    config = json.loads((large / "config.json").read_text())
    table = torch.randn(config["vocab_size"], hidden).to(BF16)
    tensors = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table.clone(),
        "model.norm.weight": table[0].clone(),
    }
    for index in range(layers):
        tensors |= {f"model.layers.{index}.{name}.weight": noise[shape].clone() for name, shape in shapes.items()}
    save_file(tensors, large / "model.safetensors")
    (large / "config.json").write_text(
        json.dumps(
            {
                **config,
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "head_dim": 128,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "torch_dtype": "bfloat16",
            }
        )
    )
    stored, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    for bits in (4, 8):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(large), str(bits)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak, held = map(int, done.stdout.split())
        assert held < stored * (0.29 if bits == 4 else 0.52)
        assert held < peak < held + largest + 48 * 2**20 < stored


def test_activation_bytes_bounds_what_the_twin_takes(tmp_path: Path) -> None:
    """As on a GPU, where the twin computes."""
    make_llama(tmp_path, hidden_size=256, intermediate_size=1024, num_attention_heads=8)
    tokens = torch.randint(0, 400, (400,)).tolist()
    with without_native():
        model = load(tmp_path, torch.float32, INT4)
        driver = Driver(model, num_blocks=128, int8_cache=True)
        peak = peak_bytes(lambda: driver.prefill(Sequence(tokens)))
    assert 2**22 < peak < activation_bytes(model, len(tokens), torch.int8)


# Native code and plain torch


MODES: dict[str, tuple[torch.dtype, Quantization | None, bool]] = {
    "fp32": (torch.float32, None, False),
    "bf16": (BF16, None, False),
    "bf16-kv8": (BF16, None, True),
    "int8": (BF16, INT8, False),
    "int8-kv8": (BF16, INT8, True),
    "int4": (BF16, INT4, False),
    "int4-kv8": (BF16, INT4, True),
}

# Relative errors of all logits. Sums are rounded to bfloat16 in other places, and a rounding that turns over there may
# move a code by one.
BOUNDS = {"fp32": 1e-5, "bf16": 0.03, "bf16-kv8": 0.04, "int8": 0.08, "int8-kv8": 0.08, "int4": 0.08, "int4-kv8": 0.08}


def random_shape(seed: int) -> tuple[str, dict[str, Any]]:
    pick = random.Random(seed)
    kv_heads = pick.choice([1, 1, 2, 3])
    heads = kv_heads * pick.choice([1, 2, 3, 7])
    head_dim = 2 * pick.randint(2, 33)
    family = pick.choice(["llama", "mistral", "qwen2", "qwen3"])
    return family, {
        "hidden_size": heads * pick.randint(3, 29),
        "intermediate_size": pick.randint(5, 300),
        "head_dim": head_dim,
        "num_hidden_layers": pick.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": pick.random() < 0.5,
        **({"sliding_window": pick.randint(1, 30)} if family == "mistral" else {}),
    }


def states_and_logits(model: Model, dtype: torch.dtype, int8_cache: bool, seed: int) -> Tensor:
    """Three sequences in chunks and in one batch, then some decodes: every row's logits."""
    pick = random.Random(seed)
    driver = Driver(model, dtype=dtype, int8_cache=int8_cache, block_size=pick.randint(1, 19), num_blocks=400)
    sequences = [Sequence([pick.randrange(400) for _ in range(pick.randint(9, 70))]) for _ in range(3)]
    rows = []
    while work := [
        (s, min(pick.randint(1, 40), len(s.tokens) - 3 - s.cached)) for s in sequences if s.cached < len(s.tokens) - 3
    ]:
        rows.append(driver.step(work))
    rows += [driver.step([(s, 1) for s in sequences]) for _ in range(3)]
    return driver.logits(torch.cat(rows)).float()


@needs_native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(10))
def test_whole_models_of_random_shapes(tmp_path: Path, seed: int, mode: str) -> None:
    dtype, quantization, int8_cache = MODES[mode]
    if quantization is not None and quantization.bits == 4:
        quantization = Quantization(4, random.Random(seed).choice([32, 40, 64, 128]))
    family, shape = random_shape(seed)
    getattr(checkpoints, f"make_{family}")(tmp_path, **shape)
    got = states_and_logits(load(tmp_path, dtype, quantization), dtype, int8_cache, seed)
    with without_native():
        expected = states_and_logits(load(tmp_path, dtype, quantization), dtype, int8_cache, seed)
    assert not got.isnan().any()
    assert error(got, expected) < BOUNDS[mode]


@needs_native
@pytest.mark.parametrize("mode", [*(mode for mode in MODES if mode != "fp32"), "towers"])
def test_no_result_depends_on_the_number_of_threads(tmp_path: Path, mode: str) -> None:
    """Layers wide enough that several threads take part in each."""
    dtype, quantization, int8_cache = MODES.get(mode, (BF16, INT8, False))
    make_qwen2_vl(
        tmp_path,
        text={
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_attention_heads": 4,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        },
        vision={"embed_dim": 128, "num_heads": 4},
    )
    grid, generator = torch.tensor([1, 16, 16]), torch.Generator().manual_seed(0)
    pixels = torch.randn(256, 588, generator=generator)
    library = native.load()
    before, results = (torch.get_num_threads(), library.threads), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            library.set_threads(threads)
            model = load(tmp_path, dtype, quantization, quantize_towers=mode == "towers")
            with torch.inference_mode():
                seen = model.encode("image", [{"pixels": pixels, "grid": grid}])[0]
            results.append((states_and_logits(model, dtype, int8_cache, 1), seen))
    finally:
        torch.set_num_threads(before[0])
        library.set_threads(before[1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4", "int4-kv8"])
def test_the_same_greedy_tokens_without_native_code(tmp_path: Path, mode: str) -> None:
    dtype, quantization, int8_cache = MODES[mode]
    make_llama(tmp_path, hidden_size=64, dtype="bfloat16")
    with without_native():
        plain = load(tmp_path, dtype, quantization)
        answers = clear_answers(plain, 5, 8, dtype=dtype, int8_cache=int8_cache)
    model = load(tmp_path, dtype, quantization)
    assert isinstance(cast(Any, model.lm_head).packed, linear.NativeLinear)
    for prompt, tokens in answers:
        driver = Driver(model, dtype=dtype, int8_cache=int8_cache)
        assert driver.greedy([Sequence(list(prompt))], 8) == [tokens]
