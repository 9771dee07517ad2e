"""Language heads: tied, stored, both or neither, as transformers loads the same folder; and bases that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    make_llama,
    make_llava,
    make_llava_next,
    make_mistral,
    make_phi3,
    make_qwen2,
    make_qwen2_vl,
    make_qwen3,
    read_weights,
    write_weights,
)
from support.model_driver import Driver, Sequence
from support.quantized_checkpoints import write_gptq
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Model
from sensorium.models.loading import load_model, weight_bytes

PROMPT = [5, 300, 7, 42, 11, 17, 230, 8]
TEXT_FAMILIES = [make_llama, make_mistral, make_qwen2, make_qwen3, make_phi3]
Make = Callable[..., PreTrainedModel]


def load(folder: Path) -> Model:
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")


def logits(model: Model) -> Tensor:
    return Driver(model).prefill(Sequence(list(PROMPT)), 3)


@torch.no_grad()
def reference_logits(folder: Path) -> Tensor:
    """What transformers makes of the folder's own files."""
    is_text = "vision_config" not in json.loads((folder / "config.json").read_text())
    oracle = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_pretrained(
        folder, dtype=torch.float32
    )
    return oracle.eval()(torch.tensor([PROMPT])).logits[0]


def head_of(tensors: dict[str, Tensor]) -> tuple[str, Tensor]:
    """(name of the head, embeddings) in the same dialect."""
    name = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    prefix = "language_model." if name.startswith("language_model.") else ""
    return f"{prefix}lm_head.weight", tensors[name]


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("make", [*TEXT_FAMILIES, make_llava, make_qwen2_vl])
def test_a_stored_head_that_differs_is_kept(
    make: Make, pickled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # transformers no longer knows the hub's name of LongRoPE.
    oracle = make(tmp_path, "transformers" if make is make_phi3 else "hub", tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    name, embeddings = head_of(tensors)
    tensors[name] = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3)) * 0.2
    write_weights(tmp_path, tensors, pickled=pickled)
    model = load(tmp_path)
    assert "the stored head is used" in caplog.text
    expected = reference_logits(tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (oracle(torch.tensor([PROMPT])).logits[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_an_equal_stored_head_takes_no_memory(pickled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle = make_llama(tmp_path, tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    alone = sum(tensor.nbytes for tensor in tensors.values())
    name, embeddings = head_of(tensors)
    tensors[name] = embeddings if pickled else embeddings.clone()  # a torch file keeps both names of one tensor
    write_weights(tmp_path, tensors, pickled=pickled)
    model = load(tmp_path)
    assert weight_bytes(model) == alone
    assert "lm_head" not in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(logits(model), oracle(torch.tensor([PROMPT])).logits[0], atol=1e-4, rtol=0)


def test_one_number_makes_another_head(tmp_path: Path) -> None:
    make_qwen2(tmp_path, tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    name, embeddings = head_of(tensors)
    tensors[name] = embeddings.clone()
    tensors[name][-1, -1] += 0.5
    write_weights(tmp_path, tensors)
    torch.testing.assert_close(logits(load(tmp_path)), reference_logits(tmp_path), atol=1e-4, rtol=0)


def test_heads_are_compared_in_the_dtype_that_is_served(tmp_path: Path) -> None:
    make_qwen2(tmp_path, tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    name, embeddings = head_of(tensors)
    write_weights(tmp_path, {**tensors, name: embeddings.bfloat16()})
    checkpoint = open_checkpoint(tmp_path)
    assert load_model(checkpoint, dtype=torch.bfloat16, device="cpu").tied
    assert not load_model(checkpoint, dtype=torch.float32, device="cpu").tied


def test_a_quantised_head_beside_tied_embeddings(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    make_llama(tmp_path, tie_word_embeddings=True, **sizes)
    write_gptq(tmp_path)
    stored = read_weights(tmp_path)
    make_llama(tmp_path / "other", **sizes, seed=5)
    other = read_weights(tmp_path / "other")["lm_head.weight"]
    write_weights(tmp_path / "other", {"model.layers.0.x_proj.weight": other})
    expected = write_gptq(tmp_path / "other")["model.layers.0.x_proj.weight"]
    codes = read_weights(tmp_path / "other")
    write_weights(tmp_path, {**stored, **{k.replace("model.layers.0.x_proj", "lm_head"): v for k, v in codes.items()}})
    model = load(tmp_path)
    hidden = torch.randn(3, 64)
    got = model.logits(hidden)
    assert (got - hidden @ expected.T).norm() < 0.04 * got.norm()


@pytest.mark.parametrize(("outer", "inner"), [(False, True), (True, False), (None, True), (True, None)])
@pytest.mark.parametrize("make", [make_llava, make_qwen2_vl, make_llava_next])
def test_either_level_ties(make: Make, outer: bool | None, inner: bool | None, tmp_path: Path) -> None:
    """llava-onevision says it in `text_config` alone, beside a default `false`."""
    oracle = make(tmp_path, "transformers", tie_word_embeddings=True)
    said = {"tie_word_embeddings": outer} if outer is not None else {}
    config = json.loads((tmp_path / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "tie_word_embeddings"} | said
    config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "tie_word_embeddings"} | (
        {"tie_word_embeddings": inner} if inner is not None else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = read_weights(tmp_path)
    tensors.pop(head_of(tensors)[0], None)
    write_weights(tmp_path, tensors)
    model = load(tmp_path)
    assert model.generates
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    if make is not make_llava_next or outer:  # whose class in transformers does not look into text_config
        torch.testing.assert_close(reference_logits(tmp_path), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", TEXT_FAMILIES)
@pytest.mark.parametrize("bare", [False, True], ids=["model.", "bare"])
def test_a_checkpoint_without_a_head_embeds(
    make: Make, bare: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = make(tmp_path)
    strip = "model." if bare else ""
    tensors = {k.removeprefix(strip): v for k, v in read_weights(tmp_path).items() if k != "lm_head.weight"}
    write_weights(tmp_path, tensors)
    model = load(tmp_path)
    assert not model.generates
    assert "no language head" in caplog.text
    assert set(model.poolers) >= {"embed", "token_embed"}
    assert_states(model, oracle.model)


@pytest.mark.parametrize("make", TEXT_FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_base_models(make: Make, tied: bool, tmp_path: Path) -> None:
    """As AutoModel saves them: `MistralModel`, …, names without `model.`, no head."""
    oracle = make(tmp_path / "whole", tie_word_embeddings=tied).model
    oracle.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "whole" / "tokenizer.json").read_bytes())
    names = read_weights(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(oracle).__name__]
    assert "embed_tokens.weight" in names
    for head in ({}, {"lm_head.weight": torch.zeros(7, 3)}):  # what such a class has no use for
        write_weights(tmp_path, {**names, **head})
        model = load(tmp_path)
        assert not model.generates
        assert_states(model, AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval())
    write_weights(tmp_path, {f"model.{key}": tensor for key, tensor in names.items()})
    assert_states(load(tmp_path), oracle)


def assert_states(model: Model, oracle: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).last_hidden_state[0]
    sequence = Sequence(list(PROMPT))
    driver = Driver(model)
    got = torch.cat([driver.step([(sequence, 3)]), driver.step([(sequence, 5)])])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_generating_checkpoint_with_bare_names(tmp_path: Path) -> None:
    """Qwen3-Embedding: a causal model's class, tied, saved without `model.`."""
    oracle = make_qwen3(tmp_path, tie_word_embeddings=True)
    write_weights(tmp_path, {key.removeprefix("model."): tensor for key, tensor in read_weights(tmp_path).items()})
    model = load(tmp_path)
    assert model.generates
    with torch.no_grad():
        torch.testing.assert_close(logits(model), oracle(torch.tensor([PROMPT])).logits[0], atol=1e-4, rtol=0)


def test_a_bias_of_the_head(tmp_path: Path) -> None:
    oracle = make_llama(tmp_path)
    tensors = read_weights(tmp_path)
    size = len(tensors["lm_head.weight"])
    write_weights(tmp_path, {**tensors, "lm_head.bias": torch.zeros(size)})
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path)), oracle(torch.tensor([PROMPT])).logits[0], atol=1e-4, rtol=0)
    write_weights(tmp_path, {**tensors, "lm_head.bias": torch.ones(size)})
    with pytest.raises(CheckpointError, match=r"unexpected lm_head\.bias"):
        load(tmp_path)
