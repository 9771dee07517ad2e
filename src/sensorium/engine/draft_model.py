"""A second, smaller model that guesses how sequences go on. Its guesses are drafts (see `drafts`).

Each sequence that it is asked about has one of its own here: the same tokens without the rows of media, which it does
not see, in a cache of its own. It draws with the numbers and the parameters of the sequence's request, so that a model
with the same logits guesses the same tokens at any temperature. What it computed of wrong guesses is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from torch import Tensor

from sensorium.engine.batch import Batch, BatchBuilder
from sensorium.engine.faults import Faults
from sensorium.engine.prefix_cache import PrefixCache
from sensorium.engine.sampler import Sampler
from sensorium.engine.scheduler import Budget, Plan
from sensorium.engine.sequence import Sequence
from sensorium.kernels.context import KVCache
from sensorium.models.base import Model
from sensorium.types import EngineRequest, Prompt


class DraftModel:
    """Use it in the mode that `Runner.computing` gives, between two steps."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        builder: BatchBuilder,
        prefixes: PrefixCache,
        sampler: Sampler,
        budget: Budget,
        vocab_size: int,
        faults: Faults | None = None,
    ) -> None:
        """`budget` is this model's; `vocab_size`: width of the logits of the model that it guesses for."""
        self._model = model
        self._cache = cache
        self._builder = builder
        self._prefixes = prefixes
        self._sampler = sampler
        self._max_len = budget.max_model_len
        self._block_size = budget.block_size
        self._tables = budget.tables()
        self._vocab_size = vocab_size
        self._faults = faults or Faults()
        self._own: dict[int, Sequence | None] = {}  # by request; None of those that it cannot follow

    @property
    def pool_is_idle(self) -> bool:
        """Whether all blocks are free."""
        pool = self._prefixes.pool
        pool.check_integrity()
        return pool.num_free == pool.num_blocks and not self._own

    def behind(self, seq: Sequence) -> int | None:
        """How many tokens of a decoding sequence are to be computed before its last one; None where this model cannot
        follow it: there is no room, or no text in the prompt, or it is too long."""
        if seq.id not in self._own:
            self._own[seq.id] = self._begun(seq)
        own = self._own[seq.id]
        if own is None:
            return None
        if own.num_prompt + seq.num_outputs >= self._max_len:
            self._drop(seq.id)
            return None
        _follow(own, seq)
        return own.num_tokens - 1 - own.num_computed

    def forget(self, seq: Sequence) -> None:
        """A sequence ends, or gives its cache back."""
        self._drop(seq.id)
        self._own.pop(seq.id, None)

    def forget_all(self) -> None:
        for request_id in list(self._own):
            self._drop(request_id)
        self._own.clear()

    def catch_up(self, sequences: Seq[Sequence], most: int) -> int:
        """Compute at most so many of the tokens that these are `behind`. Returns how many."""
        work: list[tuple[Sequence, int]] = []
        for seq in sequences:
            own = self._own[seq.id]
            count = 0 if own is None else min(own.num_tokens - 1 - own.num_computed, most)
            if own is not None and count > 0 and self._secure(own, own.num_computed + count):
                work.append((own, count))
                most -= count
        if work:
            self._forward(self._builder.build(Plan(prefills=work)))
        for own, count in work:
            own.num_computed += count
            self._prefixes.publish(own)
        return sum(count for _, count in work)

    def guess(self, asked: Seq[tuple[Sequence, int]]) -> dict[int, list[int]]:
        """At most so many next tokens of each sequence, by request. None that would end it: nothing follows them."""
        self._faults.hit("draft")
        limits: dict[int, int] = {}
        running = []
        for seq, most in asked:
            own = self._own[seq.id]
            limit = 0 if own is None else min(most, self._max_len - own.num_tokens)
            if own is not None and limit > 0 and self._secure(own, own.num_tokens + limit - 1):
                limits[seq.id] = limit
                running.append(own)
        lengths = [(own, own.num_tokens) for own in running]
        guesses: dict[int, list[int]] = {own.id: [] for own in running}
        while running:
            running = self._guess_one(running, limits, guesses)
        for own, length in lengths:
            _take_back(own, length)
        return guesses

    def _guess_one(
        self, running: list[Sequence], limits: dict[int, int], guesses: dict[int, list[int]]
    ) -> list[Sequence]:
        """One more token of each sequence; returns those that are to go on."""
        work = [(own, own.num_tokens - own.num_computed) for own in running]
        plan = Plan(
            decodes=[own for own, count in work if count == 1],
            prefills=[(own, count) for own, count in work if count > 1],
        )
        batch = self._builder.build(plan)
        hidden, rows = self._forward(batch), batch.inputs.sampled_rows
        for own, count in work:
            own.num_computed += count
            if not guesses[own.id]:
                self._prefixes.publish(own)
        logits = self._model.logits(hidden if rows is None else hidden[rows])[:, : self._vocab_size]
        sampled = self._sampler.sample(logits, batch.sampled)
        going_on = []
        for row, (own, token) in enumerate(zip(batch.sampled, sampled.token_ids, strict=True)):
            if row in sampled.failed or token in own.stop_ids:
                continue
            guesses[own.id].append(token)
            own.append(token)
            if len(guesses[own.id]) < limits[own.id]:
                going_on.append(own)
        return going_on

    def _forward(self, batch: Batch) -> Tensor:
        """Hidden states of all tokens: [tokens, hidden]."""
        inputs = batch.inputs
        inputs.context.token_ids = inputs.token_ids
        hidden = self._model.embed(inputs.token_ids)
        return self._model.forward(hidden, inputs.positions, self._cache, inputs.context)

    # Its own sequences

    def _begun(self, seq: Sequence) -> Sequence | None:
        """With what the cache has of it."""
        sampling, prompt = seq.sampling, seq.request.prompt
        text = np.ones(seq.num_prompt, np.bool_)
        for span in prompt.spans:
            text[span.offset : span.offset + span.length] = False
        if sampling is None or not text.any():
            return None
        own = Sequence(
            EngineRequest(
                seq.id,
                Prompt(prompt.token_ids[text]),
                replace(sampling, logprobs=None, prompt_logprobs=None, grammar=None, rules=None),
                salt=seq.request.salt,
            ),
            seq.arrival,
        )
        own.slot = seq.slot
        found = self._prefixes.find(own)
        own.num_published = len(found[0])
        own.num_computed = own.num_published * self._block_size
        own.num_released = [self._tables.first(window, own.num_computed) for window in self._tables.windows]
        for blocks, first in zip(found, own.num_released, strict=True):
            for block in blocks[first:]:
                self._prefixes.pool.retain(block)
        own.blocks = found
        return own

    def _secure(self, own: Sequence, num_tokens: int) -> bool:
        """Blocks for so many tokens. Where there are none left the sequence is followed no more."""
        pool = self._prefixes.pool
        wanted = self._tables.blocks(num_tokens)
        if sum(max(wanted - len(blocks), 0) for blocks in own.blocks) > pool.num_free:
            self._drop(own.id)
            return False
        for blocks in own.blocks:
            while len(blocks) < wanted:
                blocks.append(pool.allocate())
        return True

    def _drop(self, request_id: int) -> None:
        """Follow a sequence no more."""
        own = self._own.get(request_id)
        self._own[request_id] = None
        if own is not None:
            for blocks, first in zip(own.blocks, own.num_released, strict=True):
                for block in reversed(blocks[first:]):
                    self._prefixes.pool.release(block)


def _follow(own: Sequence, seq: Sequence) -> None:
    """Take the tokens that a sequence has gained; what was computed of others counts no more."""
    start, end = own.num_tokens, own.num_prompt + seq.num_outputs
    said = seq.tokens[seq.num_tokens - (end - start) : seq.num_tokens]
    wrong = np.flatnonzero(own.tokens[start:end] != said)
    right = start + int(wrong[0]) if len(wrong) else end
    own.num_computed = min(own.num_computed, right, end - 1)
    own.tokens[start:end] = said
    own.num_tokens, own.last_token = end, seq.last_token


def _take_back(own: Sequence, length: int) -> None:
    """Its guesses are not said. They stay behind its tokens, for `_follow` to compare."""
    own.num_tokens, own.last_token = length, int(own.tokens[length - 1])
    if own.sampler_state is not None and own.sampler_state.counts is not None:
        own.sampler_state.counts.take_back(own.num_outputs)
