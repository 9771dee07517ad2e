"""Kernels compiled for GPUs that are not there: registers, shared memory, spills, tensor cores and wide loads.

The commonest shape on three compute capabilities, others on one; `python -m sensorium.kernels.cuda.build` compiles all
for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not there")

from sensorium.kernels.cuda import build
from sensorium.kernels.cuda.build import SHAPES, Shape
from sensorium.kernels.cuda.compiling import Usage

SHARED = 99 * 1024  # bytes that a block may have on the smallest of them, sm_89
WITH_PRODUCTS = {
    "decode_split",
    "prefill",
    "int4_product",
    "int8_product",
    "fp8_product",
    "gate_and_up",
    "down_product",
}
REGISTERS = {
    "decode_split": 255,
    "prefill": 255,
    "int4_product": 192,
    "int8_product": 192,
    "fp8_product": 255,
    "quantize_rows": 96,
    "gate_and_up": 224,
    "down_product": 192,
    "decode_merge": 128,
    "sample": 128,
}
TOO_NARROW = {"int8"}  # caches whose rows are not of a multiple of 16 bytes


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def check(one: Usage, shape: Shape) -> None:
    assert one.spills == 0, one
    assert one.shared_bytes <= SHARED, one
    assert one.registers <= (255 if one.constants.get("FP4") else REGISTERS.get(one.kernel, 64)), one
    assert bool(one.products) == (one.kernel in WITH_PRODUCTS), one
    if one.kernel in WITH_PRODUCTS and shape.cache_dtype not in TOO_NARROW:
        is_fp8 = shape.floats or shape.cache_dtype == "float8_e4m3fn"
        octets = one.half_wide_loads if is_fp8 else 0  # of eight numbers, like wide ones of bfloat16
        part = 3 if one.constants.get("FP4") else 2  # scales of codes are few bytes
        assert one.wide_loads and one.wide_loads + octets >= one.loads // part, one
    if one.kernel == "sample":
        assert one.wide_loads, one
    if one.kernel in ("rms_norm", "gated"):
        assert one.wide_loads == one.loads, one


@pytest.mark.parametrize(
    ("name", "arch"),
    [("qwen2-7b", 80), ("qwen2-7b", 89), ("qwen2-7b", 90), ("phi-3", 90), ("gemma3-4b", 89), ("gpt-oss", 90),
     ("qwen2-7b-int8", 80), ("qwen2-7b-kv-fp8", 80), ("qwen2-7b-kv-fp8", 89), ("qwen2-7b-kv-fp8", 90)],
)  # fmt: skip
def test_what_kernels_use(name: str, arch: int) -> None:
    for function in build.functions():
        function.device_caches.pop(arch, None)
    build.compile_shape(SHAPES[name], arch)
    found = build.usages(arch)
    assert {one.kernel for one in found} >= {"decode_split", "decode_merge", "prefill", "rms_norm", "gated"}
    for one in found:
        check(one, SHAPES[name])


@pytest.mark.parametrize(
    ("name", "arch", "kernels"),
    [("qwen2-7b-w4", 90, {"int4_product"}), ("qwen2-7b-w4", 80, {"int4_product"}),
     ("qwen2-7b-w8", 89, {"int8_product"}), ("qwen2-7b-fp8", 80, {"fp8_product"}),
     ("qwen2-7b-fp8", 90, {"quantize_rows"}),
     ("qwen3-8b-fp8", 89, {"quantize_rows", "fp8_product"}), ("qwen3-8b-fp8", 90, {"quantize_rows", "fp8_product"})],
)  # fmt: skip
def test_what_products_with_codes_use(name: str, arch: int, kernels: set[str]) -> None:
    """Torch's scaled product is what multiplies fp8 with a scale per output, where there is one."""
    shape = SHAPES[name]
    for function in build.functions():
        function.device_caches.pop(arch, None)
    assert shape.bits is not None
    build.compile_products(shape, shape.bits, arch)
    found = build.usages(arch)
    assert {one.kernel for one in found} == kernels
    for one in found:
        check(one, shape)


def test_the_command_fills_the_cache(cache: Path, tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text(
        json.dumps({"tiny": {"heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 32, "intermediate": 48}})
    )
    command = [sys.executable, "-m", "sensorium.kernels.cuda.build", "--arch", "90", "--shapes", str(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "compiled tiny for sm_90\n"), done.stderr
    kept = {file.name.removesuffix(".cubin") for file in cache.rglob("*.cubin")}
    assert kept >= {"decode_split", "decode_merge", "prefill", "rms_norm", "gated", "rotate_and_write"}


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text('{"odd": {"heads": 2}}')
    with pytest.raises(SystemExit):
        list(build.main(["--shapes", str(shapes)]))
    with pytest.raises(SystemExit):
        list(build.main(["--arch", "hopper"]))
