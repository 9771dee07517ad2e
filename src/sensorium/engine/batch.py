"""A plan as arrays: every token of the step in one row, decodes first, then prompt chunks; no padding.

The arrays of a step live in buffers that are used again by the next one. Vectorised: Python touches each sequence a few
times, never each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.drafts import DraftRows, is_certain
from sensorium.engine.scheduler import Plan, spans_within
from sensorium.engine.sequence import ItemKey, Positions, Sequence
from sensorium.kernels.context import AttentionContext

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MediaSlice:
    """Tokens [start, end) of the batch take rows [row, row + end - start) of an item's tower output."""

    start: int
    end: int
    key: ItemKey
    row: int


@dataclass(slots=True)
class StepInput:
    """What a model computes in one step: tensors, numbers and keys of media, no sequences."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens], or [axes, tokens] if any sequence needs it
    context: AttentionContext
    media: list[MediaSlice] = field(default_factory=list)
    sampled_rows: Tensor | None = None  # int64: rows of the tokens to be sampled, then those of drafts; None: all
    token_types: Tensor | None = None  # int64 [tokens], where any prompt has them


@dataclass(slots=True)
class Batch:
    """A step and whose it is. `starts[i]` is where the tokens of `sequences[i]` begin."""

    inputs: StepInput
    sequences: list[Sequence]
    starts: list[int]
    sampled: list[Sequence]  # those that gain tokens here, in order
    drafts: list[DraftRows] = field(default_factory=list)
    ahead: list[list[int]] = field(default_factory=list)  # certain drafts of each of `sampled`; none: nobody has any


class BatchBuilder:
    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        axes: int,
        device: torch.device,
        *,
        marks_long: bool = False,
        stretched_from: int | None = None,
        media_both_ways: bool = False,
        num_tables: int = 1,
    ) -> None:
        """`axes` is the number of position axes of the model (1, or 3 for M-RoPE); `marks_long`: it has long rope;
        `stretched_from`, `media_both_ways`: see `Model`; `num_tables`: block tables of a sequence."""
        self._marks_long = marks_long
        self._media_both_ways = media_both_ways
        self._stretched_from = stretched_from
        self._block_size = block_size
        self._axes = axes
        self._device = device
        self._tables = np.zeros((num_tables, max_num_seqs, max(max_blocks, 1)), np.int32)  # by Sequence.slot
        self._copied: list[list[list[int]]] = [[] for _ in range(max_num_seqs)]  # the block lists of a slot's tables
        self._num_copied = [[0] * num_tables for _ in range(max_num_seqs)]
        self._has_cache = max_blocks > 0

    def build(self, plan: Plan) -> Batch:
        if not plan.chunks:
            return self._decodes_only(plan.decodes)
        return self._mixed(plan)

    def _decodes_only(self, decodes: list[Sequence]) -> Batch:
        count = len(decodes)
        numbers = np.array([(seq.last_token, seq.num_computed, seq.delta, seq.slot) for seq in decodes], np.int64).T
        token_ids, computed, deltas, slots = numbers
        lengths = computed + 1
        positions = computed + deltas
        tables = self._block_tables(decodes, slots, lengths)
        blocks = self._tables[:, slots, computed // self._block_size].astype(np.int64)
        places = np.ascontiguousarray(blocks * self._block_size + computed % self._block_size)
        ones = [1] * count
        context = AttentionContext(
            ones,
            lengths.tolist(),
            count,
            self._block_size,
            self._tensor(np.arange(count + 1, dtype=np.int32)),
            self._tensor(lengths.astype(np.int32)),
            self._tensor(tables[0]),
            self._tensor(places[0]),
            self._long_context(decodes, ones),
            self._rope_lengths(decodes, lengths, np.ones(count, np.int64)),
        )
        self._add_tables(context, tables, places)
        inputs = StepInput(self._tensor(np.ascontiguousarray(token_ids)), self._tensor(positions), context)
        return Batch(inputs, decodes, list(range(count)), decodes)

    def _mixed(self, plan: Plan) -> Batch:
        sequences = plan.sequences()
        query_lens = [count for _, count in plan.work]
        counts = np.array(query_lens, np.int64)
        lengths = np.array([seq.num_computed for seq in sequences], np.int64) + counts
        ends = counts.cumsum()
        token_ids = np.empty(ends[-1], np.int64)
        pieces = []
        media: list[MediaSlice] = []
        starts: list[int] = (ends - counts).tolist()
        for (seq, count), start in zip(plan.work, starts, strict=True):
            first, last = seq.num_computed, seq.num_computed + count
            if seq.drafts:
                seq.tokens[seq.num_tokens : last] = seq.drafts
            token_ids[start : start + count] = seq.tokens[first:last]
            pieces.append(seq.positions(first, last))
            if seq.item_keys:
                media.extend(_media_slices(seq, first, last, start - first))
        sampled, rows, drafts, ahead = _sampled(plan, starts)
        inputs = StepInput(
            self._tensor(token_ids),
            self._tensor(_joined(pieces, self._axes)),
            self._context(sequences, len(plan.decodes), lengths, counts),
            media,
            self._tensor(rows),
            self._token_types(sequences, query_lens),
        )
        return Batch(inputs, sequences, starts, sampled, drafts, ahead)

    def _context(self, sequences: list[Sequence], num_decodes: int, lengths: Ints, counts: Ints) -> AttentionContext:
        slots = np.array([seq.slot for seq in sequences], np.int64)
        tables = self._block_tables(sequences, slots, lengths)
        query_lens = counts.tolist()
        places = self._cache_places(slots, lengths, counts)
        context = AttentionContext(
            query_lens,
            lengths.tolist(),
            num_decodes,
            self._block_size,
            self._tensor(np.concatenate(([0], counts.cumsum())).astype(np.int32)),
            self._tensor(lengths.astype(np.int32)),
            self._tensor(tables[0]),
            self._tensor(places[0]),
            self._long_context(sequences, query_lens),
            self._rope_lengths(sequences, lengths, counts),
            visible=self._visible(sequences, lengths, counts),
        )
        self._add_tables(context, tables, places)
        return context

    def _add_tables(self, context: AttentionContext, tables: NDArray[np.int32], places: Ints) -> None:
        """Of a sequence's tables those beside the first, with the places of its tokens in their blocks."""
        for table, places_there in zip(tables[1:], places[1:], strict=True):
            blocks, slots = self._tensor(table), self._tensor(places_there)
            context.others.append(replace(context, block_tables=blocks, slots=slots, others=[]))

    def _cache_places(self, slots: Ints, lengths: Ints, counts: Ints) -> Ints:
        """Where each token's keys and values go: block * block_size + offset. [tables, tokens]"""
        ends = counts.cumsum()
        if not self._has_cache:
            return np.zeros((1, ends[-1]), np.int64)
        places = _places(lengths, counts)
        blocks = self._tables[:, np.repeat(slots, counts), places // self._block_size].astype(np.int64)
        return np.ascontiguousarray(blocks * self._block_size + places % self._block_size)

    def _block_tables(self, sequences: list[Sequence], slots: Ints, lengths: Ints) -> NDArray[np.int32]:
        """int32 [tables, seqs, most blocks]; padding, and where a table has given its block back, holds any valid block
        number."""
        if not self._has_cache:
            return np.zeros((1, len(sequences), 1), np.int32)
        for seq in sequences:
            self._copy_new_blocks(seq)
        width = -(-int(lengths.max()) // self._block_size)
        return self._tables[:, slots, :width]

    def _long_context(self, sequences: list[Sequence], query_lens: list[int]) -> Tensor | None:
        if not self._marks_long:
            return None
        return self._tensor(np.repeat(np.array([seq.is_long for seq in sequences]), query_lens))

    def _rope_lengths(self, sequences: list[Sequence], lengths: Ints, counts: Ints) -> Tensor | None:
        """Of each token, the length that its frequencies are made for: the prompt's, or what ends with the token."""
        if self._stretched_from is None:
            return None
        prompts = np.array([seq.num_prompt for seq in sequences], np.int64)
        if np.maximum(prompts, lengths).max() <= self._stretched_from:
            return None
        return self._tensor(np.maximum(np.repeat(prompts, counts), _places(lengths, counts) + 1))

    def _visible(self, sequences: list[Sequence], lengths: Ints, counts: Ints) -> Tensor | None:
        """Of each token how many keys it sees: all of its media span, up to itself elsewhere. None without such spans.
        int32 [tokens]"""
        if not self._media_both_ways or not any(seq.item_keys for seq in sequences):
            return None
        seen = _places(lengths, counts) + 1
        ends = counts.cumsum()
        for seq, start, count in zip(sequences, (ends - counts).tolist(), counts.tolist(), strict=True):
            shift = start - seq.num_computed
            for span in spans_within(seq, seq.num_computed, seq.num_computed + count):
                first, last = max(span.offset + shift, start), span.offset + span.length
                seen[first : last + shift] = last
        return self._tensor(seen.astype(np.int32))

    def _token_types(self, sequences: list[Sequence], query_lens: list[int]) -> Tensor | None:
        types = [seq.request.prompt.token_types for seq in sequences]
        if all(one is None for one in types):
            return None
        pieces = [
            np.zeros(count, np.int64) if one is None else one[seq.num_computed : seq.num_computed + count]
            for seq, count, one in zip(sequences, query_lens, types, strict=True)
        ]
        return self._tensor(np.concatenate(pieces).astype(np.int64, copy=False))

    def _copy_new_blocks(self, seq: Sequence) -> None:
        """Bring the table rows of a sequence up to date; usually nothing is new."""
        slot, num_copied = seq.slot, self._num_copied[seq.slot]
        if self._copied[slot] is not seq.blocks:
            self._copied[slot] = seq.blocks
            num_copied[:] = [0] * len(num_copied)
        for table, blocks in enumerate(seq.blocks):
            known = num_copied[table]
            if len(blocks) != known:
                self._tables[table, slot, known : len(blocks)] = blocks[known:]
                num_copied[table] = len(blocks)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _sampled(plan: Plan, starts: list[int]) -> tuple[list[Sequence], Ints, list[DraftRows], list[list[int]]]:
    """(sequences that gain tokens, the rows that say them, which of the rows follow drafts, `Batch.ahead`)

    The first row of each sequence comes first, in their order; those behind drafts stand after all of them. Certain
    drafts have no rows but the one behind the last of them.
    """
    sequences: list[Sequence] = []
    rows: list[int] = []
    ahead: list[list[int]] = []
    guessed: list[tuple[int, int]] = []  # (index of the sequence, its first row of the batch)
    for (seq, count), start in zip(plan.work, starts, strict=True):
        if not seq.drafts and (seq.sampling is None or seq.num_computed + count < seq.num_tokens):
            continue
        certain = seq.drafts if is_certain(seq) else []
        if len(certain) < len(seq.drafts):
            guessed.append((len(sequences), start))
        rows.append(start + count - 1 if certain or not seq.drafts else start)
        sequences.append(seq)
        ahead.append(certain)
    drafts = []
    for index, start in guessed:
        drafts.append(DraftRows(index, len(rows)))
        rows.extend(range(start + 1, start + 1 + len(sequences[index].drafts)))
    return sequences, np.array(rows, np.int64), drafts, ahead if any(ahead) else []


def _places(lengths: Ints, counts: Ints) -> Ints:
    """Index of each token of the step in its sequence."""
    ends = counts.cumsum()
    return np.asarray(np.arange(ends[-1]) + np.repeat(lengths - ends, counts))


def _joined(pieces: list[Positions], axes: int) -> Ints:
    """Positions of all sequences: one axis if that says everything, else all."""
    if all(piece.ndim == 1 for piece in pieces):
        return np.concatenate(pieces).astype(np.int64, copy=False)
    wide = [np.broadcast_to(piece, (axes, piece.shape[-1])) for piece in pieces]
    return np.concatenate(wide, axis=1).astype(np.int64, copy=False)


def _media_slices(seq: Sequence, first: int, last: int, shift: int) -> list[MediaSlice]:
    """Tower outputs for tokens [first, last) of a sequence, which stand in the batch at token + shift."""
    out = []
    for span in spans_within(seq, first, last):
        start, end = max(first, span.offset), min(last, span.offset + span.length)
        out.append(MediaSlice(start + shift, end + shift, seq.item_keys[span.item], span.row + start - span.offset))
    return out
