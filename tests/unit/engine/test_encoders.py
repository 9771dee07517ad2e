"""Encoders through scheduler, batch builder and runner: no cache, whole prompts, unequal ones together as alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_harness import Bench, Result, bench
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.loading import load_engine
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, PoolingParams, PoolingTask, Prompt, SamplingParams

VOCAB = 120
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 300,
}
LENGTHS = [1, 17, 300, 40, 40, 3, 129, 64, 2, 250]


def _bert() -> Any:
    return BertModel(BertConfig(**SHAPE))


def _cross_encoder() -> Any:
    return BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1))


def _modernbert() -> Any:
    return ModernBertModel(ModernBertConfig(**SHAPE, local_attention=16, pad_token_id=0))


def _modern_classifier() -> Any:
    return ModernBertForSequenceClassification(
        ModernBertConfig(**SHAPE, local_attention=16, pad_token_id=0, num_labels=4, classifier_pooling="mean")
    )


def _mpnet() -> Any:
    return MPNetModel(MPNetConfig(**{**SHAPE, "max_position_embeddings": 302}))


ORACLES: dict[str, tuple[Callable[[], Any], PoolingTask]] = {
    "bert": (_bert, "embed"),
    "cross-encoder": (_cross_encoder, "score"),
    "modernbert": (_modernbert, "embed"),
    "mpnet": (_mpnet, "embed"),
    "modern-classifier": (_modern_classifier, "classify"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            oracle = ORACLES[name][0]()
            with torch.no_grad():
                for parameter in oracle.parameters():
                    parameter.normal_(std=0.2)
            made[name] = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(made[name])
        return made[name]

    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu")


_ids = iter(range(1, 10_000))


def pool(tokens: np.ndarray, task: PoolingTask, types: np.ndarray | None = None) -> EngineRequest:
    return EngineRequest(next(_ids), Prompt(tokens, token_types=types), None, PoolingParams(task))


def prompts(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, length).astype(np.int32) for length in LENGTHS]


def vectors(results: list[Result]) -> list[np.ndarray]:
    assert [(result.reason, result.error) for result in results] == [("stop", "")] * len(results)
    return [result.vector for result in results]


@pytest.mark.parametrize("name", list(ORACLES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_together_as_alone(folders: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    task, model = ORACLES[name][1], load(folders(name), dtype)
    one_by_one = bench(model, max_model_len=300)
    alone = [vectors(one_by_one.run(pool(tokens, task)))[0] for tokens in prompts()]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for budget in (300, 512, 4096):  # tokens of a step: one or two prompts, all of them
        together = bench(model, max_model_len=300, max_num_batched_tokens=budget, max_num_seqs=8)
        for one, other in zip(vectors(together.run(*(pool(t, task) for t in prompts()))), alone, strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


def test_a_prompt_longer_than_a_step_is_computed_whole(folders: Callable[[str], Path]) -> None:
    model = load(folders("bert"))
    small = bench(model, max_model_len=300, max_num_batched_tokens=32)
    chunks: list[list[int]] = []
    schedule = small.engine.scheduler.schedule

    def watched() -> Any:
        plan, ended = schedule()
        chunks.append([count for _, count in plan.prefills])
        return plan, ended

    small.engine.scheduler.schedule = watched  # type: ignore[method-assign]
    got = vectors(small.run(*(pool(tokens, "embed") for tokens in prompts())))
    assert [300] in chunks
    assert sorted(count for step in chunks for count in step) == sorted(LENGTHS)  # each once, in one piece
    assert all(len(step) == 1 or sum(step) <= 32 for step in chunks)
    expected = vectors(bench(model, max_model_len=300).run(*(pool(tokens, "embed") for tokens in prompts())))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_segments_of_pairs(folders: Callable[[str], Path]) -> None:
    """Beside prompts without segments, in one step."""
    model = load(folders("cross-encoder"))
    oracle = BertForSequenceClassification.from_pretrained(folders("cross-encoder")).eval()
    requests, expected = [], []
    for tokens in prompts():
        for types in (None, (np.arange(len(tokens)) >= len(tokens) // 2).astype(np.int32)):
            requests.append(pool(tokens, "score", types))
            with torch.inference_mode():
                logits = oracle(
                    torch.tensor(tokens).long()[None],
                    token_type_ids=None if types is None else torch.tensor(types).long()[None],
                ).logits
            expected.append(logits[0].sigmoid().numpy())
    got = vectors(bench(model, max_model_len=300).run(*requests))
    np.testing.assert_allclose(np.stack(got), np.stack(expected), atol=1e-5)


def test_tokens_embed_too(folders: Callable[[str], Path]) -> None:
    runner: Bench = bench(load(folders("bert")), max_model_len=300)
    found = vectors(runner.run(*(pool(tokens, "token_embed") for tokens in prompts())))
    for tokens, vector in zip(prompts(), found, strict=True):
        assert vector.shape == (len(tokens), SHAPE["hidden_size"])
        np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, atol=1e-5)


def test_what_the_engine_says_of_itself(folders: Callable[[str], Path]) -> None:
    for name, tasks, size in (
        ("bert", ("embed", "token_embed"), 32),
        ("cross-encoder", ("classify", "score"), 0),
        ("modern-classifier", ("classify",), 0),
    ):
        ready = load_engine(EngineConfig(model=str(folders(name)))).ready
        assert (ready.tasks, ready.embedding_size) == (tasks, size)
        assert (ready.dtype, ready.kv_tokens, ready.kv_bytes, ready.max_model_len) == ("float32", 0, 0, 300)


def test_what_an_encoder_cannot_do(folders: Callable[[str], Path]) -> None:
    runner = bench(load(folders("bert")), max_model_len=300)
    tokens = prompts()[1]
    requests = [
        EngineRequest(next(_ids), Prompt(tokens), SamplingParams(max_tokens=1)),
        pool(tokens, "score"),
        pool(np.ones(301, np.int32), "embed"),
        pool(tokens, "embed"),
    ]
    results = runner.run(*requests)
    assert [result.reason for result in results] == ["error", "error", "error", "stop"]
    assert "does not generate" in results[0].error
    assert "'score'" in results[1].error
    assert "301 tokens" in results[2].error


def test_an_id_outside_the_vocabulary_harms_nobody(folders: Callable[[str], Path]) -> None:
    model = load(folders("bert"))
    tokens = prompts()[1]
    wild = tokens.copy()
    wild[3] = VOCAB + 7
    alone = vectors(bench(model, max_model_len=300).run(pool(tokens, "embed")))[0]
    results = bench(model, max_model_len=300).run(pool(wild, "embed"), pool(tokens, "embed"))
    np.testing.assert_allclose(vectors(results)[1], alone, atol=1e-5)
