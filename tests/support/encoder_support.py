"""Encoders without an engine: random checkpoints, batches of unequal prompts, and what a pooler makes of the states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.kernels.context import AttentionContext, NeededStates
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.types import PoolingParams, PoolingTask

VOCAB = 120


def save(oracle: PreTrainedModel, folder: Path) -> Any:
    """Random weights, large enough that every part of the model shows in its output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(std=0.3)
    oracle.eval().save_pretrained(folder)
    return oracle


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(open_checkpoint(folder), dtype=dtype, device="cpu")


def run(
    model: Model, prompts: list[Tensor], types: list[Tensor] | None = None, *, needed_states: NeededStates = "all"
) -> list[Tensor]:
    """The states of each prompt, all computed in one step."""
    lengths = [len(ids) for ids in prompts]
    positions = torch.cat([torch.arange(n) for n in lengths])
    empty = torch.zeros(0, dtype=torch.int32)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    context = AttentionContext(lengths, lengths, 0, 16, starts, empty, empty, empty, needed_states=needed_states)
    with torch.inference_mode():
        hidden = model.embed(torch.cat(prompts), None if types is None else torch.cat(types))
        return list(torch.split(model.forward(hidden, positions, [], context), lengths))


def prompts_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCAB, (n,), generator=generator) for n in lengths]


def pooled(model: Model, task: PoolingTask, states: Tensor, ids: Tensor, **params: Any) -> Tensor:
    return model.poolers[task](states, PoolingParams(task, **params), ids.numpy().astype(np.int32))
