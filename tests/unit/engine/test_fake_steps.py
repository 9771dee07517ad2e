"""Whole steps of every decoder on a GPU that is not there: nothing mixes devices, nothing waits for the device, and so
many kernels are launched, no more.

One copy brings a step's arrays. What the sampler brings back is not here: there are no numbers to sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support import fake_cuda
from support.engine_harness import Bench, random_prompt, request
from support.families import MAKERS, maker_of
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from sensorium.config import EngineConfig
from sensorium.engine import rehearsal
from sensorium.engine.sampler import Sampled, Sampler
from sensorium.kernels.gpu import gpu_kernels

LAUNCHES = {"reference": 70, "triton": 10}
"""Of a decode step, for each layer, of a decoder like Llama; AROUND more for what stands around the layers."""
AROUND = 10
OTHER_LAUNCHES = {"reference": 130, "triton": 75}
"""Of those with states, more norms, rows for every layer, experts, gates or queries that grow."""
LIKE_LLAMA = {
    "mistral", "qwen2", "qwen3", "llava", "llava_next", "pixtral.mistral3", "pixtral.pixtral", "internvl.internvl",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_omni", "minicpmv", "ultravox",
}  # fmt: skip
UNCAPTURED = {"ministral3"}  # asks for the longest sequence


class NoNumbers(Sampler):
    """Samples without reading logits."""

    def sample(self, logits: Tensor, sequences: Sequence[object], ahead: Sequence[list[int]] = ()) -> Sampled:
        return Sampled([7] * len(sequences))


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    fake_cuda.install(tmp_path_factory.mktemp("guard"))


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes. Triton's kernels are counted, not compiled: that is the matter of tests/unit/kernels/cuda."""
    if request.param == "reference":
        yield request.param
        return
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs need Triton")
    from sensorium.kernels.cuda.compiling import compiling_for

    fake_cuda.count_launches(monkeypatch)
    gpu_kernels().switch()
    with compiling_for(90):
        yield request.param
    gpu_kernels().switch_back()


def made(family: str, path: Path) -> Bench:
    """In a mode of tensors without numbers."""
    config = EngineConfig(
        model=str(path),
        text_model=str(path / "language") if family == "ultravox" else "",
        kv_cache_memory=2**22,
        max_num_seqs=4,
        max_model_len=128,
    )
    engine = rehearsal.imagined(config, torch.bfloat16)
    engine.runner._sampler = NoNumbers()
    made = Bench(engine)
    made.core._raise_if_lost = _raise  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("family", sorted(MAKERS.values()))
def test_steps_wait_for_nothing(tmp_path: Path, kernels: str, family: str) -> None:
    maker_of(family)(tmp_path)
    with rehearsal.absent_gpu():
        engine = made(family, tmp_path)
        text = engine.engine.runner._model.checkpoint.decoder
        if text.routing is not None and kernels == "reference":
            pytest.skip("the reference reads which experts were chosen")
        for seed in range(3):
            engine.core._add(request(random_prompt(seed, 20 + seed), 4))
        for number in range(3):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            if number or text.routing is None:  # the first time experts' addresses go there too
                assert traffic.to_device == ["copy_"]
            assert not traffic.to_host
        assert engine.core._scheduler.num_running == 3
        most = (LAUNCHES if family in LIKE_LLAMA else OTHER_LAUNCHES)[kernels]
        most += 20 if kernels == "reference" and text.qk_norm else 0
        assert 0 < traffic.launches <= most * len(engine.engine.runner._cache) + AROUND, traffic.launched
        if kernels == "triton" and family in LIKE_LLAMA:
            assert rehearsal.rehearse(engine.engine)
        elif kernels == "reference" or family in UNCAPTURED:
            assert not rehearsal.rehearse(engine.engine)


def test_what_waits_is_told(tmp_path: Path, guard: None) -> None:
    maker_of("qwen2_moe")(tmp_path)
    with rehearsal.absent_gpu():
        engine = made("qwen2_moe", tmp_path)
        engine.core._add(request(random_prompt(1, 20), 4))
        with pytest.raises(DynamicOutputShapeException):
            engine.core._step()
        assert not rehearsal.rehearse(made("qwen2_moe", tmp_path).engine)


def _raise(error: Exception) -> None:
    raise error
