"""The engine without a process around it: messages go to a list, steps are taken by hand."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.faults import Faults
from sensorium.engine.loading import Engine, LoadedPart, build_engine
from sensorium.engine.loop import Core
from sensorium.engine.memory import SNAPSHOT_TOKENS
from sensorium.ipc import messages
from sensorium.ipc.channel import Channel
from sensorium.ipc.liveness import Pulse
from sensorium.ipc.messages import Kind
from sensorium.models.base import Model
from sensorium.models.cache import paged, states
from sensorium.types import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    MediaFeatures,
    MediaSpan,
    Prompt,
    SamplingParams,
    TokenLogprob,
)

VOCAB = 400  # token ids that tests use
OVERLAP = "SENSORIUM_TEST_OVERLAP"  # 1: steps are prepared as they are for an accelerator, in all engines of the tests
GRAPHS = (
    "SENSORIUM_TEST_GRAPHS"  # 1: decodes are replayed as graphs, as an accelerator does, in all engines of the tests
)
IMAGE_TOKEN = 5  # any id: the rows of the tower replace it

_ids = itertools.count(1)


class Outbox(Channel):
    """Takes what the core sends."""

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []

    def poll(self, *, wait: bool, patience_s: float | None = None) -> list[tuple[int, memoryview]]:
        return []

    def wake(self) -> None:
        pass

    def send(self, frame: bytes) -> None:
        for kind, payload in messages.FrameReader().feed(frame):
            if kind == Kind.OUTPUTS:
                outputs = messages.decode_outputs(payload)
                self.outputs += [EngineOutput(i, (t,)) for i, t in zip(outputs.ids, outputs.token_ids, strict=True)]
                self.outputs += outputs.full


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str = ""
    cached: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    vector: Any = None
    others: tuple[Any, ...] = ()
    times: list[tuple[float, float]] = field(default_factory=list)  # (queue_s, prefill_s) of outputs that bring them
    preemptions: int = 0

    def take(self, output: EngineOutput) -> None:
        assert self.reason is None, "an output after the end"
        self.tokens += output.token_ids
        self.reason = output.finish_reason
        self.error = output.error
        self.cached = max(self.cached, output.cached_tokens)
        self.logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.vector, self.others = output.vector, output.others
        if output.queue_s or output.prefill_s:
            self.times.append((output.queue_s, output.prefill_s))
        self.preemptions += output.preemptions


class Bench:
    """One engine and the results of its requests."""

    def __init__(self, engine: Engine, faults: Faults | None = None) -> None:
        self.engine = engine
        self.outbox = Outbox()
        self.core = Core(engine, self.outbox, faults or Faults(), Pulse(self.outbox.beat, 10.0))
        self.results: dict[int, Result] = {}

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.results[request.id] = Result()
            self.core._add(request)

    def step(self) -> None:
        self.core.turn()
        for output in self.outbox.outputs:
            self.results[output.id].take(output)
        self.outbox.outputs.clear()

    def run(self, *requests: EngineRequest, before_step: Callable[[int], None] | None = None) -> list[Result]:
        """Until all are done. Everything must be given back afterwards."""
        self.add(*requests)
        for number in range(10_000):
            if before_step is not None:
                before_step(number)
            while self.core._grammars.num_waiting and not self.engine.scheduler.has_work():
                time.sleep(0.001)  # so that steps are counted, not waits for a grammar
                self.step()
            if not self.core.has_work() and not self.core._refused:
                break
            self.step()
        else:
            raise AssertionError("requests do not end")
        self.check_clean()
        return [self.results[request.id] for request in requests]

    def check_clean(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.check_integrity()
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        if scheduler.prefixes.states is not None:
            assert scheduler.prefixes.states.pool.num_free == scheduler.prefixes.states.pool.num_blocks - 1
        assert self.engine.encoder.pinned_bytes == 0
        assert self.engine.drafting is None or self.engine.drafting.is_idle
        assert not scheduler.num_running and not scheduler.waiting


class Replayed:
    """The twin of an accelerator's graphs: what a function launches is the function, called again over the same
    memory. `captured` and `replays` count."""

    def __init__(self) -> None:
        self.captured = self.replays = 0

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replays += 1
            compute()

        return replay


def bench(
    model: Model,
    *,
    faults: Faults | None = None,
    kv_tokens: int = 4096,
    capture: Replayed | None = None,
    draft: Model | None = None,
    **options: Any,
) -> Bench:
    """A fresh engine around a model that is loaded already. With `capture` its decodes are graphs; `draft` guesses."""
    if os.environ.get(GRAPHS) == "1":
        capture = capture or Replayed()
    options = {
        "max_num_seqs": 8,
        "block_size": 16,
        "max_model_len": min(kv_tokens, 1024),
        "speculative_tokens": 0,  # so that steps can be counted
        **options,
    }
    checkpoint: Checkpoint = model.checkpoint
    token_bytes = sum(group.token_bytes(torch.float32) for group in paged(model.cache_groups()))
    slot_bytes = sum(group.slot_bytes(torch.float32) for group in states(model.cache_groups()))
    slots = 1 + 2 * options["max_num_seqs"] + kv_tokens // SNAPSHOT_TOKENS
    kv_bytes = kv_tokens // options["block_size"] * options["block_size"] * token_bytes + slots * slot_bytes
    cpu = torch.device("cpu")
    part = None if draft is None else LoadedPart(draft, draft.checkpoint, cpu, torch.float32, None)
    if draft is not None:
        kv_bytes += kv_tokens * sum(group.token_bytes(torch.float32) for group in paged(draft.cache_groups()))
    config = EngineConfig(model=str(checkpoint.folder), kv_cache_memory=kv_bytes, **options)
    engine = build_engine(model, checkpoint, config, cpu, torch.float32, faults=faults, capture=capture, draft=part)
    while engine.runner.can_capture:
        engine.runner.capture_one()
    engine.runner.overlaps = os.environ.get(OVERLAP) == "1"
    return Bench(engine, faults)


def request(
    tokens: Sequence[int] | np.ndarray, max_tokens: int = 8, *, salt: bytes = b"", priority: int = 0, **sampling: Any
) -> EngineRequest:
    sampling.setdefault("temperature", 0.0)
    return EngineRequest(
        next(_ids),
        Prompt(np.array(tokens, np.int32)),
        SamplingParams(max_tokens=max_tokens, **sampling),
        salt=salt,
        priority=priority,
    )


def image_request(
    seed: int,
    max_tokens: int = 8,
    *,
    before: int = 20,
    after: int = 13,
    grid: tuple[int, int] = (12, 12),
    pixels_seed: int | None = None,
    images: int = 1,
    **sampling: Any,
) -> EngineRequest:
    """Text, pictures (Qwen2-VL's patches, 2 x 2 of them to a token) and text, with three-axis positions."""
    rng = np.random.default_rng(seed)
    height, width = grid
    rows = height * width // 4
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    spans, media = [], []
    at = 0

    def text(count: int) -> None:
        nonlocal at
        tokens.extend(rng.integers(10, VOCAB, count).tolist())
        positions.append(np.arange(at, at + count)[None].repeat(3, axis=0))
        at += count

    for index in range(images):
        text(before)
        spans.append(MediaSpan(index, len(tokens), rows))
        tokens.extend([IMAGE_TOKEN] * rows)
        y, x = np.divmod(np.arange(rows), width // 2)
        positions.append(np.stack([np.full(rows, at), y + at, x + at]))
        at += max(height, width) // 2
        media.append(picture((seed if pixels_seed is None else pixels_seed) * 100 + index, grid))
    text(after)
    prompt = Prompt(
        np.array(tokens, np.int32),
        tuple(media),
        tuple(spans),
        np.concatenate(positions, axis=1).astype(np.int32),
        at - len(tokens),
    )
    sampling.setdefault("temperature", 0.0)
    return EngineRequest(next(_ids), prompt, SamplingParams(max_tokens=max_tokens, **sampling))


def picture(seed: int, grid: tuple[int, int]) -> MediaFeatures:
    height, width = grid
    pixels = np.random.default_rng(seed).standard_normal((height * width, 588), np.float32)
    arrays: dict[str, NDArray[np.generic]] = {"pixels": pixels, "grid": np.array([1, height, width], np.int64)}
    return MediaFeatures("image", b"picture %d" % seed, height * width // 4, arrays)


def tokens_of(results: Iterable[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


def random_prompt(seed: int, length: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(10, VOCAB, length).tolist()
    return found
