"""Runs a model over a paged cache without the engine: shuffled block tables, in steps that a test chooses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sensorium.engine.cache_layout import CacheLayout, by_place, make_states
from sensorium.kernels.context import AttentionContext, LayerRows, Segments
from sensorium.models.base import Model
from sensorium.models.cache import paged, states
from sensorium.models.decoder import Decoder
from sensorium.types import MediaSpan


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # tokens computed
    rows: Tensor | None = None  # embeddings of the prompt, for models with media
    layer_rows: Tensor | None = None  # [tokens, layers, hidden] of the prompt, added behind the first layers
    positions: Tensor | None = None  # [axes, tokens] of the prompt
    position_delta: int | float = 0
    prompt: int = 0  # tokens that it began with
    spans: tuple[MediaSpan, ...] = ()  # of media, for models whose media see all of themselves
    memory: Tensor | None = None  # what an encoder-decoder's tokens attend to besides
    state: int = 0  # slot of its layers' states


def with_and_without_stack(model: Model, prompt: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    """Hidden states of a prompt in two parts, of another one beside it, and of a decode of both, by one native call for
    all layers and layer by layer. `options` are the driver's."""
    decoder = model.get_submodule("model")
    assert isinstance(decoder, Decoder)
    stack = decoder.stack
    assert stack is not None
    found = []
    for one in (stack, None):
        decoder.__dict__["stack"] = one
        driver, first, second = Driver(model, **options), Sequence(list(prompt)), Sequence(prompt[::-1])
        steps = [[(first, 20)], [(first, 1), (second, 37)], [(first, 1), (second, 1)]]
        found.append(torch.cat([driver.step(work) for work in steps]))
    decoder.__dict__["stack"] = stack
    return found[0], found[1]


class Driver:
    """`step` computes some tokens of some sequences and returns the last hidden state of each, as the runner does."""

    def __init__(
        self,
        model: Model,
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        int8_cache: bool = False,
    ) -> None:
        self.model = model
        self.block_size = block_size
        cache_dtype = torch.int8 if int8_cache else dtype
        # NaN shows every read of a slot that nobody wrote; as scales, four bytes of -1 are one.
        unwritten = -1 if int8_cache else torch.nan
        groups = [replace(group, sliding_window=None) for group in paged(model.cache_groups())]  # one table: no holes
        layout = CacheLayout.of(groups, block_size, cache_dtype)
        attending = layout.make(num_blocks, torch.device(device))
        for keys, values, _ in attending.values():
            keys.fill_(unwritten), values.fill_(unwritten)
        keeping = make_states(states(model.cache_groups()), num_blocks, dtype, torch.device(device))
        for layer in keeping.values():
            for part in layer.parts:
                part[1:] = torch.nan
        self.cache = by_place(attending, keeping)
        self.free, self.free_states = list(range(num_blocks)), list(range(1, num_blocks))
        random.Random(0).shuffle(self.free)
        self.device = device

    def step(self, work: Series[tuple[Sequence, int]]) -> Tensor:
        """(sequence, number of tokens) of this step, in any order -> hidden states [tokens, hidden], in that order."""
        order = sorted(range(len(work)), key=lambda i: not self._is_decode(*work[i]))
        hidden = self._forward([work[i] for i in order])
        pieces = hidden.split([work[i][1] for i in order])
        back = sorted(range(len(work)), key=lambda i: order[i])
        return torch.cat([pieces[i] for i in back])

    @staticmethod
    def _is_decode(sequence: Sequence, count: int) -> bool:
        return count == 1 and sequence.cached > 0

    def _forward(self, work: list[tuple[Sequence, int]]) -> Tensor:
        for sequence, count in work:
            sequence.prompt = sequence.prompt or len(sequence.tokens)
            while len(sequence.blocks) * self.block_size < sequence.cached + count:
                sequence.blocks.append(self.free.pop())
        context = self._context(work)
        targets = [self.free_states.pop() for _ in work]
        context.segments = self._segments(work, targets)
        context.layer_rows = self._layer_rows(work)
        with torch.inference_mode():
            rows = torch.cat([self._rows(s, n) for s, n in work])
            positions = torch.cat([self._positions(s, n) for s, n in work], dim=-1)
            hidden: Tensor = self.model(rows.clone(), positions, self.cache, context)
            if self.model.partial_states == "last":
                self._check_last_rows(rows, positions, context, hidden)
        for (sequence, count), target in zip(work, targets, strict=True):
            sequence.cached += count
            if sequence.state:
                self.free_states.append(sequence.state)
            sequence.state = target
        return hidden

    def _segments(self, work: list[tuple[Sequence, int]], targets: list[int]) -> Segments:
        return Segments(
            [count for _, count in work],
            sum(self._is_decode(sequence, count) for sequence, count in work),
            torch.tensor([sequence.state for sequence, _ in work], device=self.device),
            torch.tensor(targets, device=self.device),
        )

    def _check_last_rows(self, rows: Tensor, positions: Tensor, context: AttentionContext, expected: Tensor) -> None:
        """A step that computes nothing else in its last layer gives the same for each sequence's last token."""
        last = context.query_start[1:].long() - 1
        context.needed_states = "last"
        error = (self.model(rows, positions, self.cache, context)[last] - expected[last]).float()
        assert error.norm() <= (1e-4 if expected.dtype == torch.float32 else 0.03) * expected[last].float().norm()

    def _rows(self, sequence: Sequence, count: int) -> Tensor:
        first, last = sequence.cached, sequence.cached + count
        if sequence.rows is not None and last <= len(sequence.rows):
            return sequence.rows[first:last]
        return self.model.embed(torch.tensor(sequence.tokens[first:last], device=self.device))

    def _layer_rows(self, work: list[tuple[Sequence, int]]) -> LayerRows | None:
        """Also zeros, of tokens that are text."""
        values, tokens, start = [], [], 0
        for sequence, count in work:
            if sequence.layer_rows is not None:
                part = sequence.layer_rows[sequence.cached : sequence.cached + count]
                values.append(part)
                tokens.append(torch.arange(start, start + len(part), device=self.device))
            start += count
        return LayerRows(torch.cat(tokens), torch.cat(values)) if values else None

    def _positions(self, sequence: Sequence, count: int) -> Tensor:
        first, last = sequence.cached, sequence.cached + count
        if sequence.positions is None:
            return torch.arange(first, last, device=self.device)
        prompt = sequence.positions.shape[1]
        if last <= prompt:
            return sequence.positions[:, first:last]
        late = torch.arange(first, last, device=self.device) + sequence.position_delta
        return late.expand(sequence.positions.shape[0], -1)

    def _context(self, work: list[tuple[Sequence, int]]) -> AttentionContext:
        query_lens = [n for _, n in work]
        context_lens = [s.cached + n for s, n in work]
        width = max(len(s.blocks) for s, _ in work)
        slots = [
            s.blocks[p // self.block_size] * self.block_size + p % self.block_size
            for s, n in work
            for p in range(s.cached, s.cached + n)
        ]
        border = self.model.long_context_from
        is_long = [len(s.tokens) > border for s, n in work for _ in range(n)] if border is not None else None
        return AttentionContext(
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=sum(self._is_decode(s, n) for s, n in work),
            block_size=self.block_size,
            query_start=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            block_tables=torch.tensor(
                [s.blocks + [0] * (width - len(s.blocks)) for s, _ in work], dtype=torch.int32, device=self.device
            ),
            slots=torch.tensor(slots, device=self.device),
            token_ids=torch.tensor([t for s, n in work for t in s.tokens[s.cached : s.cached + n]], device=self.device),
            visible=self._visible(work) if self.model.media_both_ways else None,
            long_context=None if is_long is None else torch.tensor(is_long, device=self.device),
            memories=[s.memory for s, _ in work if s.memory is not None],
            rope_lengths=None
            if self.model.stretched_from is None
            else torch.tensor([max(s.prompt, s.cached + i + 1) for s, n in work for i in range(n)], device=self.device),
        )

    def _visible(self, work: list[tuple[Sequence, int]]) -> Tensor:
        seen = [
            next((s.offset + s.length for s in sequence.spans if s.offset <= at < s.offset + s.length), at + 1)
            for sequence, count in work
            for at in range(sequence.cached, sequence.cached + count)
        ]
        return torch.tensor(seen, dtype=torch.int32, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.logits(hidden)

    def prefill(self, sequence: Sequence, *chunks: int) -> Tensor:
        """Compute the whole prompt in chunks of these sizes (the rest in one) -> logits [tokens, vocab]. Media that see
        all of themselves are never cut: such a chunk ends before them, or behind them where they are next."""
        pieces = []
        ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
        for wanted in (*ends, len(sequence.tokens)):
            end = self._at_border(sequence, wanted)
            if end > sequence.cached:
                pieces.append(self.step([(sequence, end - sequence.cached)]))
        return self.logits(torch.cat(pieces))

    def _at_border(self, sequence: Sequence, end: int) -> int:
        for span in sequence.spans if self.model.media_both_ways else ():
            if span.offset < end < span.offset + span.length:
                return span.offset if span.offset > sequence.cached else span.offset + span.length
        return end

    def greedy(self, sequences: Series[Sequence], count: int) -> list[list[int]]:
        """Prefill all sequences in one step, then decode them together: `count` greedy tokens of each."""
        new: list[list[int]] = [[] for _ in sequences]
        lengths = [len(s.tokens) - s.cached for s in sequences]
        for _ in range(count):
            hidden = self.step(list(zip(sequences, lengths, strict=True)))
            last = torch.tensor(lengths).cumsum(0) - 1
            chosen = self.logits(hidden[last]).argmax(-1).tolist()
            for sequence, out, token in zip(sequences, new, chosen, strict=True):
                sequence.tokens.append(token)
                out.append(token)
            lengths = [1] * len(sequences)
        return new


def clear_answers(model: Model, count: int, length: int, **options: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, greedy tokens) that are no close call: every token wins by a tenth of its logits' standard deviation.

    For models that compute alike but for rounding, which could turn closer ones.
    """
    found = []
    for seed in range(300):
        prompt = [random.Random(seed).randrange(400) for _ in range(12)]
        driver, sequence, margins = Driver(model, **options), Sequence(list(prompt)), []
        for _ in range(length):
            logits = driver.logits(driver.step([(sequence, len(sequence.tokens) - sequence.cached)]))[-1].float()
            best = logits.topk(2).values
            margins.append(float((best[0] - best[1]) / logits.std()))
            sequence.tokens.append(int(logits.argmax()))
        if min(margins) > 0.1:
            found.append((prompt, sequence.tokens[len(prompt) :]))
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} prompts have a clear answer")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory beyond what was there that `work` holds at once, as the profiler saw it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = itertools.accumulate(
        event.self_cpu_memory_usage for event in sorted(profile.events(), key=lambda e: e.time_range.start)
    )
    return max(held, default=0)
