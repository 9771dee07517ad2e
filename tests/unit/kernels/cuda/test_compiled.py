"""Kernels compiled for GPUs that are not there: registers, shared memory, spills, tensor cores and wide loads.

What the decoders of every family start, in their own sizes, on one compute capability each, in turn, and a variant
that a process has seen on one of them is not compiled again. With SENSORIUM_TEST_ALL_CARDS=1 every variant on all of
them, which takes some minutes. `python -m sensorium.kernels.cuda.build` compiles every known shape.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not there")

from support import fake_cuda
from support.decoder_kernels import ROWS, launches_of

from sensorium.kernels.cuda import build, compiling
from sensorium.kernels.cuda.build import SHAPES, Shape
from sensorium.kernels.cuda.compiling import Usage, compiling_for
from sensorium.kernels.cuda.launch import launch

SHARED = 99 * 1024  # bytes that a block may have on the smallest of them, sm_89
CARDS = (80, 89, 90)
WITH_PRODUCTS = {
    "narrow_product",
    "add_wide_product",
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
    "narrow_product": 168,
    "add_wide_product": 255,
    "sample": 128,
    "rms_norm": 96,
    "branching_norms": 96,
    "arrange": 168,
    "rotate_and_write": 128,
    "delta_step": 192,
    "token_gates": 128,
}
WIDE_ROW = 256  # numbers that a warp reads 16 bytes a thread of
TOO_NARROW = {"int8"}  # caches whose rows are not of a multiple of 16 bytes
OF_ANY_RANK = "add_wide_product"  # whose rows are as long as the rank of an adapter, which is not compiled for


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def check(one: Usage, shape: Shape | None = None) -> None:
    """`shape`: where anything is kept as codes."""
    assert one.stack_bytes == 0, one
    assert one.shared_bytes <= SHARED, one
    is_coded = one.constants.get("LAYOUT", "plain") != "plain"
    assert one.registers <= (255 if is_coded else REGISTERS.get(one.kernel, 64)), one
    assert bool(one.products) == (one.kernel in WITH_PRODUCTS), one
    cache_dtype = None if shape is None else shape.cache_dtype
    if one.kernel in WITH_PRODUCTS and one.kernel != OF_ANY_RANK and cache_dtype not in TOO_NARROW:
        is_fp8 = cache_dtype == "float8_e4m3fn" or (shape is not None and shape.form is not None and shape.form.is_fp8)
        is_narrow = is_fp8 or one.constants.get("LAYOUT") == "int4"  # rows of x have as many numbers as codes bytes
        octets = one.half_wide_loads if is_narrow else 0  # of eight numbers, like wide ones of bfloat16
        part = 3 if is_coded else 2  # scales of codes are few bytes
        assert one.wide_loads and one.wide_loads + octets >= one.loads // part, one
    if one.kernel == "sample":
        assert one.wide_loads, one
    if one.kernel in ("rms_norm", "gated") and int(str(one.constants["BLOCK"])) >= WIDE_ROW:
        single = sum(bool(one.constants.get(name)) for name in ("HAS_GATE", "HAS_FACTOR"))  # numbers by themselves
        assert one.wide_loads + single == one.loads, one


EVERY = os.environ.get("SENSORIUM_TEST_ALL_CARDS") == "1"


def on_cards(chosen: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    return [(name, arch) for name, cards in chosen.items() for arch in (CARDS if EVERY else cards)]


EXPERTS: dict[str, tuple[int, ...]] = {
    "qwen3-30b-a3b-w4": (90,),
    "qwen3-30b-a3b-w8": (80,),
    "qwen3-30b-a3b-fp8": (89,),
    "gemma4-26b-w4": (80,),
}
KNOWN = {"qwen2-7b": (90,), "gpt-oss": (90,), "qwen2-7b-int8": (80, 90), "qwen2-7b-kv-fp8": CARDS}
WITH_CODES = {
    "qwen2-7b-w4": ({"int4_product"}, (80, 90)),
    "qwen2-7b-w8": ({"int8_product"}, (89,)),
    "qwen2-7b-fp8": ({"quantize_rows"}, (80, 90)),
    "qwen3-8b-fp8": ({"quantize_rows", "fp8_product"}, (89, 90)),
}


@pytest.mark.parametrize(("name", "arch"), on_cards(KNOWN))
def test_what_kernels_use(name: str, arch: int) -> None:
    forget(arch)
    build.compile_shape(SHAPES[name], arch)
    found = build.usages(arch)
    assert {one.kernel for one in found} >= {"decode_split", "prefill", "rms_norm", "gated"}
    for one in found:
        check(one, SHAPES[name])


SEEN: dict[tuple[object, ...], str] = {}
"""Forms of variants that this process has checked, and which decoder's."""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    fake_cuda.install(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize(("row", "arch"), on_cards({name: (CARDS[place % 3],) for place, name in enumerate(ROWS)}))
def test_what_decoders_use(guard: None, monkeypatch: pytest.MonkeyPatch, row: str, arch: int) -> None:
    """Of every row that says what configs leave out, so that a new one is here by itself."""
    launches = launches_of(row, arch, monkeypatch)
    assert {one.kernel.__name__ for one in launches} >= {"decode_split", "prefill", "rms_norm"}
    forget(arch)
    place = {"arch": arch} if EVERY else {}
    for one in launches:
        if SEEN.setdefault((one.form, *place.values()), row) is row:
            with compiling_for(arch):
                launch(one.kernel, one.grid, *one.args, **one.constants)
    for used in build.usages(arch):
        check(used)


def forget(arch: int) -> None:
    """What this process has compiled; what equals it is found in the folder."""
    for function in build.functions():
        function.device_caches.pop(arch, None)


@pytest.mark.parametrize(("name", "arch"), on_cards({name: cards for name, (_, cards) in WITH_CODES.items()}))
def test_what_products_with_codes_use(name: str, arch: int) -> None:
    """Torch's scaled product is what multiplies fp8 with a scale per output, where there is one."""
    shape, (kernels, _) = SHAPES[name], WITH_CODES[name]
    forget(arch)
    assert shape.form is not None
    build.compile_products(shape, shape.form, arch)
    found = build.usages(arch)
    is_without_fp8 = shape.floats and arch < 89  # the bytes are multiplied as numbers then
    assert {one.kernel for one in found} == ({"fp8_product"} if is_without_fp8 else kernels)
    for one in found:
        check(one, shape)


@pytest.mark.parametrize(("name", "arch"), on_cards(EXPERTS))
def test_what_experts_in_codes_use(name: str, arch: int) -> None:
    shape = SHAPES[name]
    forget(arch)
    build.compile_experts(shape, arch)
    found = [one for one in build.usages(arch) if one.kernel in ("gate_and_up", "down_product")]
    assert len(found) == 4  # of few rows and of many
    for one in found:
        assert one.constants["LAYOUT"] != "plain"
        check(one, shape)


@pytest.mark.parametrize(("name", "arch"), on_cards({"qwen2-7b": (90,)}))
def test_what_adapters_use(name: str, arch: int) -> None:
    shape = SHAPES[name]
    forget(arch)
    build.compile_adapters(shape, arch)
    found = build.usages(arch)
    assert len(found) == 8  # two kernels of small and large tiles and ranks
    for one in found:
        check(one, shape)


def test_the_assembly_says_what_the_binary_does(tmp_path: Path) -> None:
    """Wide loads and products of a kernel, counted in both; taking all of them apart would take as long as compiling
    them."""
    forget(90)
    build.compile_adapters(SHAPES["qwen2-7b"], 90)
    name, constants, kernel = next(compiling.compiled(build.functions(), 90))
    binary = tmp_path / "one.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    code = compiling.tool_output("cuobjdump", "-sass", str(binary))
    used = compiling.usage(name, 90, constants, kernel)
    assert used.wide_loads and re.search(r"\bLDG\S*\.128\b", code)
    assert used.products and re.search(r"\bHG?MMA\b", code)
    assert used.stack_bytes == len(re.findall(r"\b(?:LDL|STL)\b", code)) == 0


@pytest.mark.parametrize(
    ("line", "width"),
    [("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16), ("ld.global.b32 { %r1 }, [ %rd1 + 0 ];", 4),
     ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16), ("ld.shared.v4.b32 {%r1}, [%r2];", 0),
     ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;", 8), ("cp.async.commit_group;", 0),
     ("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 8), ("ld.param.b64 %rd1, [prefill_param_0];", 0)],
)  # fmt: skip
def test_widths_of_loads(line: str, width: int) -> None:
    assert compiling.loaded_bytes(line) == width


def test_the_command_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(own))
    forget(90)
    shapes = tmp_path / "shapes.json"
    shapes.write_text(
        json.dumps({"tiny": {"heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 32, "intermediate": 48}})
    )
    assert list(build.main(["--arch", "90", "--shapes", str(shapes)])) == ["compiled tiny for sm_90"]
    kept = {file.name.removesuffix(".cubin") for file in own.rglob("*.cubin")}
    assert kept >= {"decode_split", "prefill", "rms_norm", "gated", "rotate_and_write", "narrow_product"}


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text('{"odd": {"heads": 2}}')
    with pytest.raises(SystemExit):
        list(build.main(["--shapes", str(shapes)]))
    with pytest.raises(SystemExit):
        list(build.main(["--arch", "hopper"]))
