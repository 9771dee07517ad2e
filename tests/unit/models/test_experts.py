"""Layers that route: which experts, both ways of storing them, what is quantised and what it takes to load them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    make_glm4_moe,
    make_gpt_oss,
    make_mixtral,
    make_olmoe,
    make_qwen2_moe,
    make_qwen3_moe,
    make_qwen3_vl_moe,
    read_weights,
    write_weights,
)
from support.model_driver import Driver, Sequence, peak_bytes, with_and_without_stack
from torch import Tensor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization
from sensorium.kernels.cpu import library
from sensorium.models.base import Model
from sensorium.models.layers import Linear
from sensorium.models.loading import load_model

BF16 = torch.bfloat16
PROMPT = [7 * i % 391 for i in range(60)]

needs_native = pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu", **options)


def logits(model: Model, *chunks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Driver(model, dtype=dtype).prefill(Sequence(list(PROMPT)), *chunks).float()


@pytest.mark.parametrize("per_token", [1, 6])
def test_tokens_to_one_and_to_all(tmp_path: Path, per_token: int) -> None:
    oracle = make_qwen3_moe(tmp_path, num_experts_per_tok=per_token)
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    model = load(tmp_path)
    assert (logits(model) - expected).abs().max() < 1e-4
    assert (logits(model, *[1] * len(PROMPT)) - expected).abs().max() < 1e-4


@needs_native
@pytest.mark.parametrize("quantization", [None, Quantization(8), Quantization(4, 32)])
def test_one_token_at_a_time_is_the_whole_prompt(tmp_path: Path, quantization: Quantization | None) -> None:
    """To the last bit, since a token's experts compute the same for it in any company."""
    make_qwen3_moe(tmp_path, dtype="bfloat16")
    model = load(tmp_path, BF16, quantization=quantization)
    whole = logits(model, dtype=BF16)
    assert torch.equal(logits(model, *[1] * len(PROMPT), dtype=BF16), whole)
    assert torch.equal(logits(model, 13, 27, dtype=BF16), whole)


@needs_native
@pytest.mark.parametrize("make", [make_qwen3_moe, make_qwen2_moe, make_mixtral, make_olmoe, make_gpt_oss])
@pytest.mark.parametrize("quantization", [None, Quantization(8), Quantization(4, 32)])
def test_one_native_call_is_layer_by_layer(
    tmp_path: Path, make: Callable[..., object], quantization: Quantization | None
) -> None:
    """To the last bit: prompts, mixed steps, and where the last layer computes some rows alone."""
    make(tmp_path, dtype="bfloat16")
    model = load(tmp_path, BF16, quantization=quantization)
    assert torch.equal(*with_and_without_stack(model, PROMPT, dtype=BF16))


def fused(tensors: dict[str, Tensor], *, inputs_first: bool) -> dict[str, Tensor]:
    """Experts of each layer as two tensors."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key in [key for key in tensors if ".experts." in key]:
        base, _, rest = key.partition(".experts.")
        number, part, _ = rest.split(".")
        found.setdefault(base, {}).setdefault(int(number), {})[part] = tensors.pop(key)
    for base, experts in found.items():
        own = [experts[i] for i in range(len(experts))]
        made = {
            "gate_up_proj": torch.stack([torch.cat([one["gate_proj"], one["up_proj"]]) for one in own]),
            "down_proj": torch.stack([one["down_proj"] for one in own]),
        }
        for name, tensor in made.items():
            tensors[f"{base}.experts.{name}"] = tensor.transpose(1, 2).contiguous() if inputs_first else tensor
    return tensors


@pytest.mark.parametrize("pickled", [False, True])
def test_experts_in_one_tensor(tmp_path: Path, pickled: bool) -> None:
    make_qwen3_moe(tmp_path)
    expected = logits(load(tmp_path))
    write_weights(tmp_path, fused(read_weights(tmp_path), inputs_first=False), pickled=pickled)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_square_experts_are_refused_where_nothing_tells(tmp_path: Path) -> None:
    make_qwen3_vl_moe(tmp_path, text={"moe_intermediate_size": 32})
    with pytest.raises(CheckpointError, match=r"gate_up_proj.* is square"):
        load(tmp_path)


def test_missing_and_spare_experts_are_named(tmp_path: Path) -> None:
    make_qwen3_moe(tmp_path)
    tensors = fused(read_weights(tmp_path), inputs_first=False)
    key = "model.layers.2.mlp.experts.down_proj"
    for changed, said in ((tensors[key][:5], "missing.*experts.5.down_proj"), (tensors[key].repeat(2, 1, 1), r"\[6\]")):
        write_weights(tmp_path, {**tensors, key: changed})
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path)


@pytest.mark.parametrize("wanted", [Quantization(8), Quantization(4, 32)])
def test_routers_are_not_quantised(tmp_path: Path, wanted: Quantization) -> None:
    make_qwen3_moe(tmp_path)
    model = load(tmp_path, BF16, quantization=wanted)
    bits = {
        name: getattr(module.packed, "bits", 16)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and ".mlp." in name
    }
    assert {bits[name] for name in bits if name.endswith("mlp.gate")} == {16}
    assert {bits[name] for name in bits if ".experts." in name} == {wanted.bits}


def test_activation_bytes_bounds_what_a_step_allocates(tmp_path: Path) -> None:
    """Also where one expert has all of a step's tokens."""
    make_qwen3_moe(tmp_path, hidden_size=128, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=8)
    model, tokens = load(tmp_path), PROMPT * 6
    driver = Driver(model, num_blocks=128)
    peak = peak_bytes(lambda: driver.prefill(Sequence(tokens)))
    assert 2**20 < peak < model.activation_bytes(len(tokens))


def test_clipped_projections_are_refused(tmp_path: Path) -> None:
    make_olmoe(tmp_path, clip_qkv=8.0)
    with pytest.raises(CheckpointError, match="clip_qkv"):
        open_checkpoint(tmp_path)


def test_more_experts_than_there_are(tmp_path: Path) -> None:
    make_qwen3_moe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 7}))
    with pytest.raises(CheckpointError, match="num_experts_per_tok 7"):
        open_checkpoint(tmp_path)


def test_layers_that_predict_more_tokens_are_passed_over(tmp_path: Path) -> None:
    """And the correction of choices stays float32."""
    oracle = make_glm4_moe(tmp_path)
    tensors = read_weights(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = correction = torch.rand(8) + 0.003
    write_weights(tmp_path, {**tensors, "model.layers.3.eh_proj.weight": torch.ones(2, 4)})
    oracle.load_state_dict({**oracle.state_dict(), name: correction})
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    assert (logits(load(tmp_path)) - expected).abs().max() < 1e-4
    gate = load(tmp_path, BF16).get_submodule("model.layers.1.mlp.gate")
    assert torch.equal(gate.get_parameter("e_score_correction_bias"), correction)


@pytest.mark.parametrize("change", [{"n_group": 3}, {"n_group": 8}, {"topk_group": 5}, {"num_experts_per_tok": 5}])
def test_groups_that_do_not_fit(tmp_path: Path, change: dict[str, int]) -> None:
    make_glm4_moe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match="n_group"):
        open_checkpoint(tmp_path)


PEAK = """
import sys, torch
from pathlib import Path
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model, weight_bytes

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def load(folder):
    return load_model(open_checkpoint(Path(folder)), dtype=torch.bfloat16, device="cpu", quantization=Quantization(4))

load(sys.argv[1])
before = status("VmRSS")
model = load(sys.argv[2])
print(status("VmHWM") - before, weight_bytes(model))
"""


def test_peak_memory_is_the_model_and_one_expert(tmp_path: Path) -> None:
    """75 MB of bfloat16 in fused tensors of 50 and 25 MB, which are never held whole."""
    experts, size, inner = 24, 1024, 512
    shape: dict[str, Any] = {"hidden_size": size, "num_experts": experts, "mlp_only_layers": [], "num_hidden_layers": 1}
    make_qwen3_moe(tmp_path / "small")
    make_qwen3_moe(tmp_path / "large", dtype="bfloat16", **{**shape, "moe_intermediate_size": inner})
    tensors = fused(read_weights(tmp_path / "large"), inputs_first=False)
    write_weights(tmp_path / "large", tensors)
    stored, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, held = map(int, done.stdout.split())
    assert held < stored * 0.3
    assert held < peak < held + 40 * 2**20 < held + largest
