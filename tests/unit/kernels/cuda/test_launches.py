"""What a layer of each decoder launches in a decode step on a GPU, exactly, for each layout of its weights."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs need Triton")

from support import fake_cuda
from support.decoder_kernels import ROWS, layer_launches

from sensorium.kernels import FP8, Quantization

LAYOUTS = {"plain": None, "int8": Quantization(8), "int4": Quantization(4, 64), "fp8": FP8}
FEW, MANY = 16, 17  # sequences
Counts = dict[str, list[int | tuple[int, int]]]

DENSE: Counts = {"plain": [9], "int8": [9], "int4": [9], "fp8": [13]}
"""Of fp8 the activations before each product are made codes."""
TWO_KINDS: Counts = {layout: one * 2 for layout, one in DENSE.items()}
ROUTED: Counts = {"plain": [10], "int8": [10], "int4": [10], "fp8": [12]}
"""Of fp8 only attention's activations are made codes."""
DENSE_AND_ROUTED: Counts = {layout: DENSE[layout] + one for layout, one in ROUTED.items()}
TWO_ROUTED: Counts = {layout: one * 2 for layout, one in ROUTED.items()}
TABLE: dict[str, Counts] = {
    "gemma3_text": TWO_KINDS,
    "gemma4_text": {  # few sequences and many: plain weights gate within their products for few
        "plain": [(10, 13)] * 2, "int8": [13] * 2, "int4": [13] * 2, "fp8": [19] * 2,
    },
    "gemma4_text, large": TWO_KINDS,
    "gemma4_text, experts": TWO_ROUTED,
    "gpt_oss": TWO_ROUTED,
    "glm4_moe": DENSE_AND_ROUTED,
    "glm4v_moe_text": DENSE_AND_ROUTED,
    "mixtral": ROUTED,
    "olmoe": ROUTED,
    "qwen2_moe": ROUTED,
    "qwen3_moe": ROUTED,
    "qwen3_omni_moe_text": ROUTED,
    "qwen3_vl_moe_text": ROUTED,
    "qwen3_5_text": {"plain": [9, 9], "int8": [10, 9], "int4": [10, 9], "fp8": [14, 13]},  # the net's gates apart
    "qwen3_5_moe_text": {"plain": [10, 10], "int8": [11, 10], "int4": [11, 10], "fp8": [13, 12]},
}  # fmt: skip
"""Of every row that is not `DENSE`: of each kind of layer; of few sequences and of many where that differs."""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    fake_cuda.install(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize("row", ROWS)
def test_launches_of_a_layer(guard: None, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    expected = TABLE.get(row, DENSE)
    found = {layout: layer_launches(row, LAYOUTS[layout], (FEW, MANY), monkeypatch) for layout in expected}
    assert found == {
        layout: [one if isinstance(one, tuple) else (one, one) for one in counts] for layout, counts in expected.items()
    }
