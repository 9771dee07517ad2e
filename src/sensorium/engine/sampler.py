"""Logits -> token ids, for all rows of a step at once, on an accelerator without waiting.

Bias and forbidden tokens, penalties, a transcript's rules, grammars, then what `drawing` does. What a seeded request
gets depends on its seed, its own logits and the token's index only, so neither batch mates nor preemption change it.
Logprobs are those of the raw logits, of transcripts of what the rules leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium import kernels
from sensorium.engine import speech_rules
from sensorium.engine.choosing import argmax, choose, choose_held, take
from sensorium.engine.constraint import Constraint
from sensorium.engine.drawing import TRIES, draw_together, draws_of, stream_seed, uniforms_of
from sensorium.engine.masks import Held, Masks, MaskTable
from sensorium.engine.sampler_state import SamplerState, edits_of
from sensorium.engine.sequence import Sequence
from sensorium.kernels.transfers import Fetch, to_device
from sensorium.types import SamplingParams, TokenLogprob

_is_plain = attrgetter("plain")

CPU = torch.device("cpu")

Finish = Callable[[], "Sampled"]
"""Waits for what was launched."""


@dataclass(slots=True)
class Sampled:
    """Result of a step, by row. A row in `failed` had logits that are not numbers; its token means nothing."""

    token_ids: list[int]
    failed: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


class Sampler:
    def __init__(self, seed: int = 0, masks: Masks | None = None, device: torch.device = CPU) -> None:
        """`masks` are of sequences that have a grammar. On a CPU rows are sampled by numpy, one by one; for any other
        `device` by kernels, all at once."""
        self._seed = seed
        self._masks = masks
        self._on_cpu = device.type == "cpu"

    def sample(self, logits: Tensor, sequences: Seq[Sequence], ahead: Seq[list[int]] = ()) -> Sampled:
        """logits [rows, vocab], one row for each sequence; `ahead`: tokens that each has gained and not yet has.

        Rows of sequences with a grammar may be written to.
        """
        return self.start(logits, sequences, ahead)()

    def start(self, logits: Tensor, sequences: Seq[Sequence], ahead: Seq[list[int]] = ()) -> Finish:
        """The same in two halves. This one waits only for the masks of sequences with a grammar; the logits may change
        as soon as it is through."""
        states = [seq.sampler_state or self._remember(seq, logits.shape[1]) for seq in sequences]
        logits = logits.float()
        if self._on_cpu and all(map(_is_plain, states)):
            sampled = _checked(*argmax(logits.numpy()), logits.shape[1])
            return lambda: sampled
        held = _held(sequences, ahead)
        ids, highest, edited = self._chosen(logits, states, sequences, ahead, held)
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        scores = _scores(edited, logits, states, wanted, ids) if wanted else None
        fetch = Fetch([ids, *(scores.tensors if scores else ()), highest])

        def finish() -> Sampled:
            token_ids, *found, values = fetch.wait()
            sampled = _checked(token_ids, values, logits.shape[1])
            if held:
                sampled.failed += take(held, sampled.token_ids, sampled.failed)
            if scores is not None:
                told = scores.finish([sampled.token_ids[row] for row in wanted], found)
                sampled.logprobs = {
                    row: one for row, one in zip(wanted, told, strict=True) if row not in sampled.failed
                }
            return sampled

        return finish

    def _chosen(
        self,
        logits: Tensor,
        states: Seq[SamplerState],
        sequences: Seq[Sequence],
        ahead: Seq[list[int]],
        held: list[Held],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(token ids int64, highest logits, logits with all that is asked of single ones). The input stays as it is,
        but for rows with a grammar."""
        table, masks = MaskTable(*logits.shape), self._masks if held else None
        if masks is not None and not self._on_cpu:
            masks.tell(table, held)
        wishes = _Wishes(logits, states, sequences, ahead, table)
        tells = any(states[row].params.logprobs is not None for row, *_ in held)
        indices = [seq.num_outputs + (len(ahead[i]) if ahead else 0) for i, seq in enumerate(sequences)]
        twice = [] if self._on_cpu else [row for row, one, _, at in held if _draws_twice(states[row], one, at)]
        tried = _tried(logits, wishes, states, indices, twice) if twice else None
        found = wishes.granted(logits.clone() if wishes.are_any or tells else logits)
        if self._on_cpu:
            array, raw = found.numpy(), logits.numpy()
            chosen = (
                choose(array, states, indices)
                if masks is None
                else choose_held(array, raw, states, indices, held, masks, is_edited=wishes.are_any)
            )
            return torch.from_numpy(chosen[0]), torch.from_numpy(chosen[1]), found
        last = set(twice)
        ids, highest = _drawn(found, states, indices, [TRIES if row in last else 0 for row in range(len(states))])
        return ids if tried is None else _with_allowed(ids, *tried, found), highest, found

    def _remember(self, seq: Sequence, vocab_size: int) -> SamplerState:
        if seq.sampling is None:
            raise ValueError("a pooling request is not sampled")
        state = SamplerState(seq, seq.sampling, self._seed, vocab_size)
        seq.sampler_state = state
        return state


class _Wishes:
    """What requests ask of single logits [rows, vocab], and grammars whose masks are in a table."""

    def __init__(
        self,
        logits: Tensor,
        states: Seq[SamplerState],
        sequences: Seq[Sequence],
        ahead: Seq[list[int]],
        table: MaskTable,
    ) -> None:
        num_grammars = len(table.bits)
        self._raw, self._edits = logits, edits_of(states, sequences, ahead, table)
        self._ruled = [
            (row, state.params, sequences[row], ahead[row] if ahead else [])
            for row, state in enumerate(states)
            if state.params.rules is not None
        ]
        has_lists = self._edits is not None and (self._edits.has_lists or len(table.bits) > num_grammars)
        self.are_any = bool(self._ruled) or has_lists

    def granted(self, rows: Tensor, *, grammars: bool = True) -> Tensor:
        """In `rows`, which are as the logits are."""
        if self._edits is not None:
            kernels.edit(rows, self._raw, self._edits if grammars else self._edits.without_grammars())
        for row, params, seq, gained in self._ruled:
            _hold_to_rules(rows[row], params, seq, gained)
        return rows


def _held(sequences: Seq[Sequence], ahead: Seq[list[int]]) -> list[Held]:
    """The rows of sequences with a grammar."""
    return [
        (row, seq.constraint, seq.slot, seq.num_outputs + (len(ahead[row]) if ahead else 0))
        for row, seq in enumerate(sequences)
        if seq.constraint is not None
    ]


def _hold_to_rules(row: Tensor, params: SamplingParams, seq: Sequence, gained: list[int]) -> None:
    if params.rules is not None:
        said = seq.tokens[seq.num_prompt : seq.num_tokens].tolist()
        speech_rules.hold(row, params.rules, [*said, *gained])


# Choosing on an accelerator; `choosing` does it on a CPU


def _draws_twice(state: SamplerState, constraint: Constraint, index: int) -> bool:
    """Whether a row draws as if there were no grammar, and again where that comes to nothing."""
    return state.open and not state.greedy and not constraint.error and constraint.needs_mask(index)


def _tried(
    logits: Tensor, wishes: _Wishes, states: Seq[SamplerState], indices: list[int], rows: list[int]
) -> tuple[Tensor, Tensor]:
    """(the rows [n], tokens [tries, n] that they draw among all tokens)"""
    each = rows * TRIES
    [where] = to_device([np.array(each, np.int64)], logits.device)
    free = wishes.granted(logits.clone(), grammars=False)[where]
    streams = [number for number in range(TRIES) for _ in rows]
    tokens, _ = _drawn(free, [states[row] for row in each], [indices[row] for row in each], streams)
    return where[: len(rows)], tokens.view(TRIES, -1)


def _with_allowed(ids: Tensor, rows: Tensor, tries: Tensor, held: Tensor) -> Tensor:
    """`ids` with the first of each row's tries that is allowed by the logits `held`, where one is."""
    is_allowed = (held[rows].gather(1, tries.T) > -torch.inf).T
    best = is_allowed.to(torch.uint8).argmax(dim=0, keepdim=True)
    return ids.index_copy(0, rows, torch.where(is_allowed.any(0), tries.gather(0, best)[0], ids[rows]))


def _drawn(logits: Tensor, states: Seq[SamplerState], indices: list[int], streams: Seq[int]) -> tuple[Tensor, Tensor]:
    """(token ids int64, highest logits float32) of float32 logits [rows, vocab], by the numbers of each row's stream.
    Nothing is read from the device."""
    random = [row for row, state in enumerate(states) if not state.greedy]
    if not random:
        highest, token_ids = logits.max(dim=-1)
        return token_ids, highest
    params = [state.params for state in states]
    seeds = [stream_seed(state.seed, stream) for state, stream in zip(states, streams, strict=True)]
    draws = draws_of(seeds, indices, params)
    draws.temperature[[row for row, state in enumerate(states) if state.greedy]] = 0
    found = kernels.draw(logits, draws)
    if found is not None:
        return found
    highest, token_ids = logits.max(dim=-1)
    [where] = to_device([np.array(random, np.int64)], logits.device)
    uniforms = uniforms_of([seeds[row] for row in random], [indices[row] for row in random])
    drawn = draw_together(logits[where], [params[row] for row in random], uniforms)
    return token_ids.index_copy_(0, where, drawn), highest


def _checked(token_ids: NDArray[np.int64], highest: NDArray[np.float32], vocab_size: int) -> Sampled:
    ids, values = token_ids.tolist(), highest.tolist()
    if math.isfinite(sum(values)) and min(ids) >= 0 and max(ids) < vocab_size:  # float64: no float32 numbers overflow
        return Sampled(ids)
    bad = [not math.isfinite(value) or not 0 <= token < vocab_size for token, value in zip(ids, values, strict=True)]
    return Sampled(ids, [row for row, is_bad in enumerate(bad) if is_bad])


# Logprobs


class Scores:
    """Log-probabilities of chosen tokens and the likeliest ones, launched and not yet read."""

    __slots__ = ("_also", "_num_top", "tensors")

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: list[int], also: Seq[tuple[int, ...]] = ()) -> None:
        """float32 logits [rows, vocab], of each of which one token int64 [rows] was chosen; the `num_top[i]` likeliest
        of row i are told, followed by the tokens `also[i]` that are not among them."""
        self._num_top, self._also = num_top, also
        scores = torch.log_softmax(logits, dim=-1)
        values, ids = scores.topk(min(max(num_top), scores.shape[1]), dim=-1)
        longest = max(map(len, also), default=0)
        named = np.array([[*tokens, *[0] * (longest - len(tokens))] for tokens in also], np.int64)
        [places] = to_device([named.reshape(len(logits), longest)], logits.device) if longest else [token_ids[:, None]]
        self.tensors = [ids, scores.gather(1, token_ids.unsqueeze(1)), values, scores.gather(1, places)]

    def finish(self, token_ids: list[int], found: list[NDArray[np.generic]]) -> list[TokenLogprob]:
        """`found` is what the tensors held."""
        ids, chosen, values, others = (array.tolist() for array in found)
        made = []
        for row, (token, count) in enumerate(zip(token_ids, self._num_top, strict=True)):
            top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
            if self._also:
                have = {known for known, _ in top}
                wanted = zip(self._also[row], others[row], strict=False)
                top += tuple((one, value) for one, value in wanted if one not in have)
            made.append(TokenLogprob(token, chosen[row][0], top))
        return made


def _scores(edited: Tensor, raw: Tensor, states: Seq[SamplerState], wanted: list[int], ids: Tensor) -> Scores:
    params = [states[row].params for row in wanted]
    rows = torch.stack([edited[row] if states[row].params.rules else raw[row] for row in wanted])
    chosen = torch.stack([ids[row] for row in wanted])
    return Scores(rows, chosen, [one.logprobs or 0 for one in params], [one.logprob_token_ids for one in params])


def logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprob]:
    """Log-probabilities of `token_ids` under float32 logits [rows, vocab], and the `num_top[i]` likeliest of row i."""
    [ids] = to_device([np.array(token_ids, np.int64)], logits.device)
    scores = Scores(logits, ids, num_top)
    return scores.finish(token_ids, Fetch(scores.tensors).wait())
