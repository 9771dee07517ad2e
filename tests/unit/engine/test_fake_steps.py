"""Whole steps of every decoder on a GPU that is not there: nothing mixes devices, nothing waits for the device, and so
many kernels are launched, no more.

One copy brings a step's arrays, one takes back what was sampled: that is the only thing that a step waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import fake_cuda
from support.decoded_checkpoints import write_fp8
from support.engine_harness import Bench, random_prompt, request
from support.families import MAKERS, maker_of
from support.media_models import prompt_of, two_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, unset_fake_temporarily

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES, load_class
from sensorium.config import EngineConfig
from sensorium.engine import encoding, rehearsal
from sensorium.kernels import LowRank
from sensorium.kernels.context import LayerCache
from sensorium.kernels.gpu import gpu_kernels
from sensorium.kernels.reference import Fp8Linear
from sensorium.kernels.transfers import Fetch
from sensorium.models.adapters import Adapter, adaptable
from sensorium.models.loading import packed_weights
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Prompt, SpeechRules

LAUNCHES = {"reference": 70, "triton": 10}
"""Of a decode step, for each layer, of a decoder like Llama; AROUND more for what stands around the layers, the
sampler included. By Triton's kernels of any decoder."""
AROUND = 12
MORE_AROUND = {"gemma": 1, "gemma3": 4, "gemma3_text": 4, "phi3": 3, "phi3_v": 3, "gpt_oss": 2, "ministral3": 5,
               "gemma4": 17, "gemma4_text": 17}  # fmt: skip
"""Embeddings that are scaled, and a second table of rotations, or a scaled one, or scales of queries; and of Gemma 4
rows of the tokens for all layers, from a table and from the embeddings, and logits that are capped."""
OTHER_LAUNCHES = 130
"""By the reference, of those with states, more norms, rows for every layer, experts, gates or queries that grow."""
FEWER_LAUNCHES = 1
"""Of layers like Llama's."""
LIKE_LLAMA = {
    "mistral", "qwen2", "qwen3", "llava", "llava_next", "pixtral.mistral3", "pixtral.pixtral", "internvl.internvl",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_omni", "minicpmv", "ultravox",
}  # fmt: skip
MEDIA = {made for name, made in MAKERS.items() if FAMILIES[name].modalities}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    fake_cuda.install(tmp_path_factory.mktemp("guard"))


@pytest.fixture(autouse=True)
def zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched from a device without numbers."""

    def wait(fetch: Fetch) -> list[Any]:
        return [np.zeros(one.shape, str(one.dtype).removeprefix("torch.")) for one in fetch._tensors]

    def tensor(array: NDArray[Any], device: torch.device) -> Tensor:
        if array.dtype.kind != "i":
            return torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), device=rehearsal.GPU)
        with unset_fake_temporarily():
            return to_tensor(array, device)

    def tolist(numbers: Tensor) -> Any:
        if isinstance(numbers, FakeTensor):
            raise AssertionError("numbers of a device are waited for")
        with unset_fake_temporarily():
            return to_list(numbers)

    to_tensor, to_list = encoding._tensor, Tensor.tolist
    monkeypatch.setattr(Fetch, "wait", wait)
    monkeypatch.setattr(encoding, "_tensor", tensor)  # of media: what stays on the host has numbers
    monkeypatch.setattr(Tensor, "tolist", tolist)


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


def made(family: str, path: Path, **options: Any) -> Bench:
    """In a mode of tensors without numbers."""
    config = EngineConfig(
        model=str(path),
        text_model=str(path / "language") if family == "ultravox" else "",
        **{"kv_cache_memory": 2**22, "max_num_seqs": 4, "max_model_len": 128, **options},
    )
    engine = rehearsal.imagined(config, torch.bfloat16)
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
            assert traffic.to_host == ["copy_"]
        assert engine.core._scheduler.num_running == 3
        most = LAUNCHES[kernels]
        if kernels == "reference":
            most = OTHER_LAUNCHES if family not in LIKE_LLAMA else most + 20 * text.qk_norm
        else:
            most -= FEWER_LAUNCHES * (family in LIKE_LLAMA)
        around = AROUND + MORE_AROUND.get(family, 0)
        assert 0 < traffic.launches <= most * len(engine.engine.runner._cache) + around, traffic.launched
        assert rehearsal.rehearse(engine.engine) is (kernels == "triton")


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("family", sorted(MEDIA))
def test_towers_wait_for_nothing(tmp_path: Path, kernels: str, family: str) -> None:
    """Of each kind two media of different sizes in one batch, whose runs one call of torch's attends in: only the few
    queries of MiniCPM-V's resampler are no runs of tokens, and Gemma 4 hears with products of its own."""
    maker_of(family)(tmp_path)
    asked = [replace(request([], 1), prompt=prompt) for prompt in prompts_of(family, tmp_path)]
    with rehearsal.absent_gpu():
        engine = made(family, tmp_path, max_model_len=4096)
        for one in asked:
            engine.add(one)
            with fake_cuda.Traffic() as traffic:
                for _ in range(40):
                    engine.step()
            assert (engine.results[one.id].reason, engine.results[one.id].error) == ("length", "")
            assert traffic.to_host == ["copy_"]  # the token
            is_heard = family == "gemma4" and one.prompt.media[0].kind == "audio"
            assert traffic.launched["_varlen_attn"] or is_heard
            assert traffic.launched["scaled_dot_product_attention"] <= 2 * (family == "minicpmv"), traffic.launched


def prompts_of(family: str, folder: Path) -> list[Prompt]:
    """One for each kind of media that the family takes."""
    checkpoint = open_checkpoint(folder, folder / "language" if family == "ultravox" else None)
    make = load_class(checkpoint.family.processor)
    processor = make(checkpoint, Tokenizer.from_folder(folder).with_literals(make.literals))
    return [prompt_of(processor, two_of(kind), "{}?") for kind in sorted(processor.modalities)]


def test_sampling_waits_once(tmp_path: Path, kernels: str) -> None:
    """Draws, edits of logits and logprobs: each has a copy to the device, nobody waits but for the tokens."""
    maker_of("qwen2")(tmp_path)
    rules = SpeechRules(end=100, never=(7,), never_first=(3,), timestamps=200, max_initial=5)
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"logit_bias": ((4, 2.0),), "repetition_penalty": 1.2, "allowed_token_ids": (0, 4, 9)},
        {"logprobs": 3, "logprob_token_ids": (2, 5), "bad_words": ((9,),)},
        {"rules": rules},
    ]
    with rehearsal.absent_gpu():
        engine = made("qwen2", tmp_path)
        for seed, wish in enumerate(wishes):
            engine.core._add(request(random_prompt(seed, 20 + seed), 5, **wish))
        for _ in range(3):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            assert traffic.to_host == ["copy_"]
            assert len(traffic.to_device) == 4 if kernels == "triton" else 5  # the reference draws some rows alone
    assert [engine.core._scheduler.num_running, engine.core._scheduler.preemptions] == [4, 0]
    assert (traffic.launched["edit"], traffic.launched["sample"]) == ((1, 1) if kernels == "triton" else (0, 0))


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_adapters_wait_for_nothing(tmp_path: Path, kernels: str, quantization: str) -> None:
    """Two of different ranks and a sequence without: two launches a layer for all, in steps that are no graphs. Where
    products take codes, adapters take the numbers that these are made of."""
    maker_of("qwen2")(tmp_path)
    with rehearsal.absent_gpu():
        engine = made("qwen2", tmp_path, quantization=quantization)
        layers = adaptable(engine.engine.runner._model)
        for number, rank in ((1, 8), (2, 33)):
            additions: dict[nn.Module, LowRank] = {
                one: LowRank(absent(rank, one.in_features), [(0, absent(one.out_features, rank))])
                for one in layers.values()
            }
            engine.engine.adapters._loaded[number] = Adapter(number, b"", additions)
        engine.engine.runner.capture_one()
        for seed, adapter in enumerate((0, 1, 2)):
            engine.core._add(replace(request(random_prompt(seed, 20 + seed), 5), adapter=adapter))
        for _ in range(3):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            assert traffic.to_host == ["copy_"]
    expected = len(layers) if kernels == "triton" else 0
    assert (traffic.launched["narrow_product"], traffic.launched["add_wide_product"]) == (expected, expected)
    assert traffic.launched["index_add_"] == (0 if kernels == "triton" else 2 * len(layers))


def absent(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device=rehearsal.GPU)


def test_steps_with_an_fp8_cache(tmp_path: Path, kernels: str) -> None:
    maker_of("qwen2")(tmp_path)
    with rehearsal.absent_gpu():
        engine = made("qwen2", tmp_path, kv_cache_dtype="fp8")
        engine.core._add(request(random_prompt(1, 20), 4))
        for _ in range(2):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            assert (traffic.to_device, traffic.to_host) == (["copy_"], ["copy_"])
        cache = engine.engine.runner._cache
        assert {layer.keys.dtype for layer in cache if isinstance(layer, LayerCache)} == {torch.float8_e4m3fn}
        if kernels == "triton":
            assert traffic.launches <= LAUNCHES[kernels] * len(cache) + AROUND


@pytest.mark.parametrize("is_stored", [False, True], ids=["quantised", "stored"])
def test_steps_with_fp8_weights(tmp_path: Path, kernels: str, is_stored: bool) -> None:
    """Of a checkpoint in bfloat16, and of one that has such weights, in blocks."""
    maker_of("qwen3")(tmp_path)
    if is_stored:
        write_fp8(tmp_path)
    with rehearsal.absent_gpu():
        engine = made("qwen3", tmp_path, **({} if is_stored else {"quantization": "fp8"}))
        packed = list(packed_weights(engine.engine.runner._model))
        assert sum(isinstance(one, Fp8Linear) for one in packed) == 4 * len(engine.engine.runner._cache)
        engine.core._add(request(random_prompt(1, 20), 4))
        for _ in range(2):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            assert (traffic.to_device, traffic.to_host) == (["copy_"], ["copy_"])
        if kernels == "triton":
            codes = 4 * len(engine.engine.runner._cache)  # of activations
            assert traffic.launched["quantize_rows"] == codes
            around = AROUND if is_stored else AROUND + 5  # the tokens' rows come from a table of int8
            assert traffic.launches - codes <= LAUNCHES[kernels] * len(engine.engine.runner._cache) + around


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("family", "quantization"),
    [("qwen3_moe", "fp8"), ("qwen2_moe", "int8"), ("qwen3_5_moe", "int4"), ("gpt_oss", "int4")],
)
def test_steps_with_experts_in_codes(tmp_path: Path, kernels: str, family: str, quantization: str) -> None:
    """Nothing is read from the device, and each layer's experts are two launches."""
    maker_of(family)(tmp_path)
    with rehearsal.absent_gpu():
        engine = made(family, tmp_path, quantization=quantization)
        routing = engine.engine.runner._model.checkpoint.decoder.routing
        assert routing is not None
        engine.core._add(request(random_prompt(1, 20), 4))
        for _ in range(2):
            with fake_cuda.Traffic() as traffic:
                engine.core._step()
            assert traffic.to_host == ["copy_"]
        assert traffic.to_device == ["copy_"]
        count = len(routing.layers)
        assert (traffic.launched["gate_and_up"], traffic.launched["down_product"]) == (count, count)
        assert traffic.launched["index_add_"] == 0


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
