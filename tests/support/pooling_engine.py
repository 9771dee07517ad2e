"""A fake engine that pools: what a model would make of a prompt, as far as a test can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from sensorium.types import EngineOutput, EngineRequest
from support.api_support import READY, FakeEngine

SIZE = 8


ALL = ("generate", "embed", "token_embed")


def vector_of(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Different for every prompt, and not of unit length."""
    return np.array([len(ids), *(int(ids[i % len(ids)]) + 1 for i in range(SIZE - 1))], np.float32)


async def pool(asked: EngineRequest) -> AsyncIterator[EngineOutput]:
    """What a model would make of a prompt, as far as a test can tell."""
    params, ids = asked.pooling, asked.prompt.token_ids
    assert params is not None and asked.sampling is None
    if params.task in ("token_embed", "token_classify"):
        vector = np.stack([np.array([i, token], np.float32) for i, token in enumerate(ids)])
    elif params.task == "sparse":
        vector = sparse_of(ids)
    elif params.task == "classify":
        vector = np.array([0.25, 0.75] if len(ids) % 2 else [0.75, 0.25], np.float32)
    elif params.task == "score":
        vector = np.array([1 / len(ids)], np.float32)
    else:
        vector = vector_of(ids)[: params.dimensions]
    others = tuple(_other(task, ids) for task in params.also)
    yield EngineOutput(asked.id, finish_reason="stop", vector=vector, cached_tokens=1, others=others)


def _other(task: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return sparse_of(ids) if task == "sparse" else vector_of(ids)


def sparse_of(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Every token with how often it is there."""
    return np.stack(np.unique(ids, return_counts=True), 1).astype(np.float32)


def engine_of(*tasks: str, script: Any = pool) -> FakeEngine:
    return FakeEngine(script=script, ready=dataclasses.replace(READY, tasks=tasks, embedding_size=SIZE))
