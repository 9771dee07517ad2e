"""Sampling in Triton: tokens of all rows in one launch, with the meaning and the streams of `engine.sampler`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensorium.kernels.backend import Draws
from sensorium.kernels.cuda.device import sampling as device
from sensorium.kernels.cuda.launch import launch, power_of_two
from sensorium.kernels.transfers import to_device

ROOM = 4096  # likely logits of a row that are looked at alone
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Choices:
    """How each row is drawn, all [rows] on the logits' device."""

    seeds: Tensor  # int64, the bits of a request's 64-bit seed
    indices: Tensor  # int64, of the token in its output
    temperature: Tensor  # float32; 0 or less: the highest logit
    top_k: Tensor  # int32; 0: all
    top_p: Tensor  # float64; 1: all
    least: Tensor  # float32, the logarithm of min_p; minus infinity: all


def on_device(draws: Draws, device: torch.device) -> Choices:
    """In one copy."""
    columns = (draws.seeds, draws.indices, draws.temperature, draws.top_k, draws.top_p, draws.least)
    return Choices(*to_device(columns, device))


def sample(logits: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
    """float32 logits [rows, vocab] -> (token ids int64 [rows], highest logits float32 [rows]).

    A row whose highest logit is NaN or infinite has nothing to choose by; its token means nothing. Nothing is read from
    the device.
    """
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    highest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kept = torch.empty((rows, ROOM), dtype=torch.float32, device=logits.device)
    launch(
        device.sample, (rows,), logits, kept, choices.seeds, choices.indices, choices.temperature, choices.top_k,
        choices.top_p, choices.least, tokens, highest, logits.stride(0), size,
        BLOCKS=power_of_two(-(-size // BLOCK)), BLOCK=BLOCK, ROOM=ROOM, num_warps=8,
    )  # fmt: skip
    return tokens, highest
