"""One request inside the engine: its tokens so far, how many of them are in the KV cache, and in which blocks.

Mutable, owned by the scheduler. Invariant: 0 <= num_computed < num_tokens while it lives, and its blocks hold at least
num_computed tokens.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sensorium.engine.constraint import Constraint
from sensorium.models.adapters import Adapter
from sensorium.types import EngineRequest, MediaFeatures, Prompt, SamplingParams, TokenLogprob

ItemKey = tuple[bytes, bytes]
"""(tenant salt, MediaFeatures.key): tower outputs are shared inside a tenant only, as their timing can be observed."""


Positions: TypeAlias = NDArray[Any]  # whole numbers, but for the times of some videos


class Wanted(NamedTuple):
    """A media item that a tower is to compute, and whose turn that is."""

    turn: bytes
    features: MediaFeatures


class Status(IntEnum):
    WAITING = 0
    PREFILLING = 1
    DECODING = 2
    DONE = 3


class Sequence:
    __slots__ = (
        "adapter",
        "arrival",
        "arrived_s",
        "block_keys",
        "blocks",
        "branch",
        "cached_tokens",
        "constraint",
        "delta",
        "drafts",
        "guesses",
        "hidden",
        "id",
        "is_long",
        "item_ends",
        "item_keys",
        "last_token",
        "max_tokens",
        "memories",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "num_released",
        "num_tokens",
        "order",
        "passed_tokens",
        "pinned",
        "plain_until",
        "prompt_logprobs",
        "request",
        "reuse",
        "sampler_state",
        "sampling",
        "segments",
        "slot",
        "snapshot",
        "span_offsets",
        "started_s",
        "state",
        "status",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: EngineRequest, arrival: int, constraint: Constraint | None = None) -> None:
        prompt, sampling = request.prompt, request.sampling
        self.request, self.id = request, request.id
        self.arrival, self.arrived_s = arrival, monotonic()
        self.started_s = 0.0  # when its first step was planned
        self.num_preemptions = 0
        self.passed_tokens = 0  # of other tenants' sequences that started before it because it did not fit
        self.order = (request.priority, arrival)  # smaller runs first
        self.status = Status.WAITING
        self.sampling: SamplingParams | None = sampling
        self.max_tokens = sampling.max_tokens if sampling else 0
        self.stop_ids = frozenset(sampling.stop_token_ids) if sampling else frozenset()
        self.constraint = constraint  # what holds its output to a grammar
        self.adapter: Adapter | None = None  # its own for as long as it lives
        self.num_prompt = self.num_tokens = len(prompt.token_ids)
        self.num_computed = 0
        self.tokens: NDArray[np.int32] = np.empty(self.num_prompt + self.max_tokens, np.int32)
        self.tokens[: self.num_prompt] = prompt.token_ids
        self.last_token = int(prompt.token_ids[-1])
        self.delta = prompt.position_delta
        self.drafts: list[int] = []  # guessed next tokens, of which the step that computes them keeps what is right
        self.guesses: Any = None  # what prompt look-up knows of them
        self.plain_until = _plain_positions(prompt.positions, self.num_prompt)
        self.span_offsets = [span.offset for span in prompt.spans]
        self.item_keys: list[ItemKey] = [(request.salt, item.key) for item in prompt.media]
        self.item_ends = _item_ends(prompt)
        self.memories = [item for item, end in enumerate(self.item_ends) if end == sys.maxsize]
        self.pinned: dict[int, None] = {}  # items whose tower outputs are held for this sequence
        self._hold_nothing()
        # May it start from a cached prefix? Prompt logprobs (and some poolings) need every prompt token computed.
        self.reuse = sampling is None or sampling.prompt_logprobs is None
        self.cached_tokens = -1  # unknown until it is scheduled for the first time
        self.is_long = False  # see `Budget.long_context_from`
        self.slot = -1  # of the batch tables while it runs
        self.sampler_state: Any = None  # a SamplerState, once a token of it was sampled
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.hidden: list[Any] = []  # hidden states of the chunks so far, for pooling

    def _hold_nothing(self) -> None:
        """Of the caches."""
        self.blocks: list[list[int]] = []  # while it runs: of each of its tables
        self.num_released: list[int] = []  # leading blocks of each table that no layer sees any more: not its own now
        self.block_keys: list[bytes] = []  # of its full blocks, as far as they were needed
        self.state = 0  # slot of its state after `num_computed` tokens; see `StateSlots`
        self.segments: list[tuple[int, int]] = []  # (tokens, slot of the state after them) of the step that is planned
        self.snapshot = b""  # key of the latest state after tokens of its own that the prefix cache knows
        self.branch = 0  # leading tokens that the prefix cache knew keys and values of
        self.num_published = 0  # leading blocks that the prefix cache knows

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.num_prompt

    def append(self, token_id: int) -> None:
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.last_token = token_id

    def positions(self, start: int, end: int) -> Positions:
        """Positions of tokens [start, end): [end - start], or [axes, end - start] where the prompt brings its own."""
        explicit = self.request.prompt.positions
        cut = min(end, self.num_prompt)
        if explicit is None or start >= cut:
            out: Positions = np.arange(start, end)
            if self.delta and end > self.num_prompt:
                out = out + self.delta * (out >= self.num_prompt)
            return out
        if end == cut:
            return explicit[:, start:end]
        tail: Positions = np.broadcast_to(np.arange(cut, end) + self.delta, (len(explicit), end - cut))
        return np.concatenate((explicit[:, start:cut], tail), axis=1)


def _item_ends(prompt: Prompt) -> list[int]:
    """Where the last span of each media item ends. One without spans is seen by all tokens, to the end."""
    ends = [0] * len(prompt.media)
    for span in prompt.spans:
        ends[span.item] = max(ends[span.item], span.offset + span.length)
    return [end or sys.maxsize for end in ends]


def _plain_positions(positions: Positions | None, num_prompt: int) -> int:
    """How many leading prompt tokens stand at 0, 1, 2, … on every axis."""
    if positions is None:
        return num_prompt
    differs = (positions != np.arange(num_prompt)).any(axis=0)
    first = int(differs.argmax())
    return first if differs[first] else num_prompt
