"""An engine on a card: the tokens of a CPU, with graphs or without, no waiting, and kernels compiled before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_harness import Bench, random_prompt, request, tokens_of
from support.families import maker_of

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.graphs import CudaCapture
from sensorium.engine.loading import build_engine
from sensorium.kernels import FP8, Quantization
from sensorium.kernels.gpu import gpu_kernels
from sensorium.models.loading import load_model

pytestmark = pytest.mark.device

FAMILIES = [
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "lfm2",
    "qwen3_5_text",
    "qwen2_moe",
    "gpt_oss",
    "qwen2_vl",
]


@pytest.fixture(params=["reference", "triton", "graphs"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "reference":
        gpu_kernels().switch()
    yield request.param
    gpu_kernels().switch_back()


def engine_on(
    device: torch.device,
    path: Path,
    *,
    captures: bool = False,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    **options: Any,
) -> Bench:
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, dtype=dtype, device=device, quantization=quantization)
    options = {"kv_cache_memory": 2**24, "max_num_seqs": 8, "max_model_len": 256, "speculative_tokens": 0, **options}
    config = EngineConfig(model=str(path), **options)
    capture = CudaCapture() if captures else None
    engine = build_engine(model, checkpoint, config, device, dtype, capture=capture)
    while captures and engine.runner.can_capture:
        engine.runner.capture_one()
    return Bench(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_cpu(card: torch.device, tmp_path: Path, kernels: str, family: str) -> None:
    """Greedy and with seeds, of sequences that come and end at different times."""
    torch.backends.cuda.matmul.allow_tf32 = False
    maker_of(family)(tmp_path)
    sampling: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "top_k": 5},
    ]
    asked = [request(random_prompt(i, 5 + 9 * i), 12 + i, **sampling[i % 3]) for i in range(7)]
    expected = tokens_of(engine_on(torch.device("cpu"), tmp_path).run(*asked))
    engine = engine_on(card, tmp_path, captures=kernels == "graphs" and family not in ("qwen2_moe", "gpt_oss"))
    assert tokens_of(engine.run(*asked)) == expected


@pytest.mark.parametrize("is_cached", [False, True], ids=["weights", "weights and cache"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_fp8(card: torch.device, tmp_path: Path, family: str, is_cached: bool) -> None:
    """What the likeliest first tokens are to the kernels, as to torch on the same card: as near as eight bits are."""
    maker_of(family)(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization": FP8}
    options |= {"kv_cache_dtype": "fp8"} if is_cached else {}
    asked = [request(random_prompt(i, 20 + i), 1, logprobs=5) for i in range(4)]
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            gpu_kernels().switch()
        try:
            results = engine_on(card, tmp_path, **options).run(*asked)
        finally:
            gpu_kernels().switch_back()
        found.append([dict(one.logprobs[0].top) for one in results])
    for expected, got in zip(*found, strict=True):
        both = expected.keys() & got.keys()
        assert len(both) >= 3
        assert all(abs(expected[one] - got[one]) < 0.2 for one in both)


def test_a_launched_step_waits_for_nothing(card: torch.device, tmp_path: Path) -> None:
    """Torch raises at whatever waits, until the tokens are asked for."""
    maker_of("qwen2")(tmp_path)
    gpu_kernels().switch()
    try:
        engine = engine_on(card, tmp_path, captures=True)
        engine.run(request(random_prompt(1, 20), 4))
        engine.add(request(random_prompt(2, 20), 8))
        engine.step()
        runner, scheduler = engine.engine.runner, engine.engine.scheduler
        plan, _ = scheduler.schedule()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with runner.computing():
                pending = runner.launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with runner.computing():
            assert len(pending.result().tokens.token_ids) == 1
    finally:
        gpu_kernels().switch_back()


def test_what_was_compiled_without_a_card_is_found(card: torch.device, tmp_path: Path) -> None:
    """A rehearsal fills a cache; an engine of the same checkpoint then compiles nothing."""
    model, cache = tmp_path / "model", tmp_path / "cache"
    maker_of("qwen2")(model)
    major, minor = torch.cuda.get_device_capability(card)
    program = (
        "import torch; from sensorium.config import EngineConfig; from sensorium.engine.rehearsal import compile_for\n"
        f"config = EngineConfig({str(model)!r}, kv_cache_memory=2**24, max_num_seqs=8, max_model_len=256)\n"
        f"assert compile_for({major}{minor}, config, torch.float32)"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    hidden = {**environment, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=hidden)
    before = {file.parent.name for file in cache.rglob("*.cubin")}
    assert before
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "device"]
    chosen = "test_tokens_are_those_of_a_cpu and qwen2 and triton and not qwen2_"
    subprocess.run([*tests, "-k", chosen], check=True, timeout=300, env=environment)
    after = {file.parent.name for file in cache.rglob("*.cubin")}
    assert after == before
