"""GPT-OSS as it is published, its experts in mxfp4: what the codes mean, and the model that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.checkpoints import make_gpt_oss, read_weights, write_weights
from support.model_driver import Driver, Sequence
from support.quantized_checkpoints import write_mxfp4
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization
from sensorium.kernels.cpu import library
from sensorium.kernels.cpu.linear import Fp4Linear
from sensorium.models.base import Model
from sensorium.models.decoder import Decoder
from sensorium.models.layers import Linear
from sensorium.models.loading import load_model

PROMPT = [7 * i % 391 for i in range(25)]
needs_native = pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu", **options)


def logits(model: Model, *chunks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Driver(model, dtype=dtype).prefill(Sequence(list(PROMPT)), *chunks).float()


def published(folder: Path, **options: Any) -> PreTrainedModel:
    """The oracle of a checkpoint in mxfp4, its weights decoded by transformers."""
    oracle = make_gpt_oss(folder, **{**SIZES, **options})
    write_mxfp4(folder)
    stored, decoded = read_weights(folder), {}
    for key in [key for key in stored if key.endswith("_blocks")]:
        scales = stored[key.replace("_blocks", "_scales")]
        decoded[key.removesuffix("_blocks")] = convert_moe_packed_tensors(stored[key], scales, dtype=torch.float32)
    assert len(decoded) == 2 * oracle.config.num_hidden_layers
    oracle.load_state_dict({**oracle.state_dict(), **decoded})
    return oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """(folder, logits of `PROMPT`)"""
    folder = tmp_path_factory.mktemp("gpt_oss")
    with torch.no_grad():
        return folder, published(folder)(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("pickled", [False, True])
def test_the_model_of_the_codes(tmp_path: Path, checkpoint: tuple[Path, Tensor], pickled: bool) -> None:
    folder, expected = checkpoint
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write_weights(tmp_path, read_weights(folder), pickled=pickled)
    model = load(tmp_path)
    assert (logits(model) - expected).abs().max() < 1e-4
    assert (logits(model, *[1] * len(PROMPT)) - expected).abs().max() < 1e-4


@needs_native
def test_native_code_keeps_four_bits(checkpoint: tuple[Path, Tensor]) -> None:
    """In the one call of the decoder, and near to what float32 makes of the same weights: in most rows, since bfloat16
    turns over the choice between two experts that are as good, and later rows attend to that one."""
    folder, expected = checkpoint
    model = load(folder, torch.bfloat16)
    experts = [
        module.packed for name, module in model.named_modules() if isinstance(module, Linear) and ".experts." in name
    ]
    assert all(isinstance(one, Fp4Linear) for one in experts)
    decoder = model.get_submodule("model")
    assert isinstance(decoder, Decoder)
    assert decoder.stack is not None
    found = logits(model, dtype=torch.bfloat16)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).median().item() < 0.04
    assert torch.equal(logits(model, *[1] * len(PROMPT), dtype=torch.bfloat16), found)


def test_published_codes(tmp_path: Path) -> None:
    """Numbers of the format's description: the first of two elements is in the low bits."""
    make_gpt_oss(tmp_path, **SIZES)
    write_mxfp4(tmp_path)
    tensors = read_weights(tmp_path)
    key = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{key}_blocks"][3, 5, 1, :2] = torch.tensor([0x21, 0xF9], dtype=torch.uint8)
    for scale, factor in ((127, 1.0), (0, 2.0**-127), (252, 2.0**125)):
        tensors[f"{key}_scales"][3, 5, 1] = scale
        write_weights(tmp_path, tensors)
        down: Any = load(tmp_path).get_submodule("model.layers.1.mlp.experts.3.down_proj").packed
        assert (down.rows(torch.tensor([5]))[0, 32:36] / factor).tolist() == [0.5, 1.0, -0.5, -6.0]


def test_broken_codes_are_named(tmp_path: Path) -> None:
    make_gpt_oss(tmp_path, **SIZES)
    write_mxfp4(tmp_path)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = read_weights(tmp_path)
    blocks, scales = tensors[f"{key}_blocks"], tensors[f"{key}_scales"]
    without = {name: tensor for name, tensor in tensors.items() if name != f"{key}_scales"}
    for changed, said in (
        (without, "gate_up_proj_blocks is there without its gate_up_proj_scales"),
        ({**tensors, f"{key}_scales": scales[:, :, :1]}, r"scales of \[5, 192, 1\]"),
        ({**tensors, f"{key}_blocks": blocks[..., :8]}, r"mxfp4 blocks are \[outputs, groups, 16\]"),
        ({**tensors, f"{key}_scales": torch.full_like(scales, 255)}, "a scale that is no number"),
        ({**tensors, f"{key}_scales": scales.int()}, r"gate_up_proj_scales.*torch\.int32"),
        ({**tensors, f"{key}_bias": tensors[f"{key}_bias"][:, 1:]}, "cannot be cut into gate and up"),
    ):
        write_weights(tmp_path, changed)
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path)


@pytest.mark.parametrize(("wanted", "bound"), [(Quantization(8), 0.02), (Quantization(4, 32), 0.1)])
def test_codes_can_be_quantised_anew(checkpoint: tuple[Path, Tensor], wanted: Quantization, bound: float) -> None:
    name = "model.layers.0.mlp.experts.4.gate_up_proj"
    exact, anew = (
        cast(Any, load(checkpoint[0], quantization=one).get_submodule(name)).packed.rows(torch.arange(192))
        for one in (None, wanted)
    )
    assert 0 < ((anew - exact).norm() / exact.norm()).item() < bound


@pytest.mark.parametrize(("key", "value"), [("swiglu_limit", 10.0), ("swiglu_alpha", 1.0)])
def test_another_clamped_product_is_refused(tmp_path: Path, key: str, value: float) -> None:
    make_gpt_oss(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(tmp_path)
