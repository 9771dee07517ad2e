"""Which kernels a GPU gets: the reference until those for NVIDIA are compiled, and for good where there can be none."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import sysconfig
from pathlib import Path
from threading import Event

import pytest
import torch
from support.engine_harness import Replayed, bench, random_prompt, request, tokens_of

from sensorium.config import EngineConfig
from sensorium.engine.graphs import graph_sizes
from sensorium.engine.warming import NOT_CAPTURED, Warming
from sensorium.kernels import Quantization, gpu, reference
from sensorium.models.base import Model

GPU = torch.device("cuda", 0)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An NVIDIA GPU, Triton and a compiler, as far as torch and the system say."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "find_spec", lambda name: importlib.util.find_spec("json"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return monkeypatch


def test_nvidia_gpus_get_their_kernels(usable: pytest.MonkeyPatch) -> None:
    assert gpu.refusal(GPU) is None


def test_what_leaves_the_reference_is_said_in_one_line(
    usable: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usable.setattr(torch.version, "hip", "7.0")
    assert not gpu.begin(GPU)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "ROCm" in record.getMessage() and "\n" not in record.getMessage()


def test_reasons(usable: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "xpu" in str(gpu.refusal(torch.device("xpu")))
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in str(gpu.refusal(GPU))
    usable.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in str(gpu.refusal(GPU))
    usable.setattr(gpu, "find_spec", lambda name: None)
    assert "sensorium[cuda]" in str(gpu.refusal(GPU))
    usable.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in str(gpu.refusal(GPU))
    usable.setattr(torch.version, "cuda", None)
    assert "knows no CUDA" in str(gpu.refusal(GPU))


# From the reference to compiled kernels


def test_an_engine_goes_on_with_compiled_kernels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(random_prompt(seed, 20), 20) for seed in range(3)]
    expected = tokens_of(bench(model).run(*requests))
    engine = bench(model, capture=(capture := Replayed()))
    loaded = engine.engine
    loaded.runner.forget_kernels()  # so that there are no graphs yet, as on a GPU
    loaded.warming = Warming(EngineConfig(""), 90, "float32", 0, 0)
    switches: list[int] = []
    monkeypatch.setattr(gpu.GpuKernels, "switch", lambda kernels: switches.append(engine.core._steps))
    before = capture.captured

    def compiled_at(step: int) -> None:
        if step == 5 and loaded.warming is not None:
            loaded.warming._code = 0

    assert tokens_of(engine.run(*requests, before_step=compiled_at)) == expected
    assert switches == [5]
    assert (loaded.warming, loaded.captures) == (None, True)
    assert capture.captured == before + 1  # of one sequence; the others are made while nothing is to be done
    while loaded.has_idle_work:
        loaded.idle_work()
    assert capture.captured == before + len(graph_sizes(8))


@pytest.mark.parametrize(("code", "is_switched", "captures"), [(NOT_CAPTURED, True, False), (1, False, False)])
def test_what_cannot_be_compiled_or_captured(
    model: Model, monkeypatch: pytest.MonkeyPatch, code: int, is_switched: bool, captures: bool
) -> None:
    engine = bench(model).engine
    switches: list[int] = []
    monkeypatch.setattr(gpu.GpuKernels, "switch", lambda kernels: switches.append(1))
    engine.warming = Warming(EngineConfig(""), 90, "float32", 0, 0)
    engine.take_kernels()
    assert engine.warming is not None  # it is not over
    engine.warming._code = code
    engine.take_kernels()
    assert (engine.warming, bool(switches), engine.captures) == (None, is_switched, captures)


@pytest.mark.parametrize("code", [0, 1])
def test_the_engine_hears_when_the_other_process_ends(code: int, caplog: pytest.LogCaptureFixture) -> None:
    warming = Warming(EngineConfig("nowhere"), 90, "bfloat16", 2**20, 128)
    assert warming._command[-4:] == ["--arch", "90", "--dtype", "bfloat16"]
    warming._command = [sys.executable, "-c", f"raise SystemExit({code})"]
    ended = Event()
    warming.start(ended.set)
    assert ended.wait(120)
    assert (warming.is_over, warming.has_succeeded, warming.can_capture) == (True, code == 0, code == 0)
    assert ("could not be compiled" in caplog.text) == (code == 1)


def test_what_was_made_of_kernels_is_forgotten(model: Model) -> None:
    decoder = model.model
    assert isinstance(decoder, torch.nn.Module)
    first = decoder.stack
    assert "stack" in vars(decoder)
    model.forget_kernels()
    assert "stack" not in vars(decoder)
    assert decoder.stack is first is None  # float32 on a CPU has none


def test_the_reference_is_where_it_begins() -> None:
    kernels = gpu.GpuKernels()
    assert kernels.current is kernels.weights is reference
    assert not kernels.is_switched and not kernels.is_compiling


def test_weights_are_made_for_kernels_that_are_still_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then torch alone multiplies them: nothing is compiled in a step."""
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs need Triton")
    from sensorium.kernels.cuda import linear

    kernels = gpu.GpuKernels()
    kernels.prepare()
    assert (kernels.current, kernels.is_compiling) == (reference, True)
    packed = kernels.weights.empty_quantized(64, 64, Quantization(4), dtype=torch.float32, device=torch.device("cpu"))
    weight = torch.randn(64, 64)
    packed.fill(0, weight)
    packed.set_bias(None)
    monkeypatch.setattr(linear, "gpu_kernels", lambda: kernels)
    monkeypatch.setattr(linear, "launch", None)
    x = torch.randn(3, 64)
    assert (packed(x) - x @ weight.t()).norm() < 0.2 * (x @ weight.t()).norm()
    kernels.switch()
    assert (kernels.weights, kernels.is_compiling) == (kernels.current, False)
    with pytest.raises(TypeError):  # it would be started now
        packed(x)
