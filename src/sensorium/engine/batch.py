"""A plan as arrays: every token of the step in one row, decodes first, then prompt chunks; no padding.

What steps of the same decoding sequences have in common is made once. Vectorised: Python touches each sequence a few
times, never each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.drafts import DraftRows, is_certain
from sensorium.engine.scheduler import Plan, spans_within
from sensorium.engine.sequence import ItemKey, Positions, Sequence
from sensorium.engine.staging import Staging
from sensorium.engine.state_slots import segments_of
from sensorium.engine.table_rows import TableRows
from sensorium.kernels.context import AttentionContext, Segments

Ints: TypeAlias = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
NO_TOKENS = torch.empty(0, dtype=torch.int64, device="cpu")
NO_TABLES = torch.empty((0, 0), dtype=torch.int32, device="cpu")
MAX_DECODES = 256  # sequences that padding may make of a step of fewer


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
    table_rows: Tensor | None = None  # int64 [seqs]: their rows of the device's block tables, see `gather_tables`


@dataclass(slots=True)
class Batch:
    """A step and whose it is. `starts[i]` is where the tokens of `sequences[i]` begin."""

    inputs: StepInput
    sequences: list[Sequence]
    starts: list[int]
    sampled: list[Sequence]  # those that gain tokens here, in order
    drafts: list[DraftRows] = field(default_factory=list)
    ahead: list[list[int]] = field(default_factory=list)  # certain drafts of each of `sampled`; none: nobody has any
    padded: int | None = None  # sequences that it was made of: more than there are, where a graph computes them


class Unknown(list[int]):
    """Numbers that differ from replay to replay of what is captured."""

    def __init__(self, count: int) -> None:
        super().__init__([0] * count)

    def __iter__(self) -> NoReturn:
        raise ValueError("what a graph holds does not depend on the lengths that its sequences have")

    def __getitem__(self, index: object) -> NoReturn:
        self.__iter__()


class Spare(NamedTuple):
    """What no sequence has: a block of the cache and a slot of states."""

    block: int
    state: int


@dataclass(slots=True)
class _Decoding:
    """What stays the same as long as the same sequences decode, in step after step."""

    sequences: list[Sequence]
    slots: Ints
    deltas: Positions
    starts: list[int]
    ones: list[int]
    query_start: Tensor = NO_TOKENS
    tables: list[Tensor] = field(default_factory=list)  # int32 [seqs, most blocks], until one has a new block

    @classmethod
    def of(cls, decodes: list[Sequence]) -> _Decoding:
        count = len(decodes)
        return cls(
            decodes,
            np.array([seq.slot for seq in decodes], np.int64),
            _whole_or_single(np.array([seq.delta for seq in decodes] or [0])[:count]),
            list(range(count)),
            [1] * count,
        )

    def starts_of(self, every: Tensor, size: int) -> Tensor:
        """`query_start` of so many sequences, of all numbers in a row."""
        if len(self.query_start) != size + 1:
            self.query_start = every[: size + 1]
        return self.query_start


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
        has_states: bool = False,
        staging: Staging | None = None,
        spare: Spare | None = None,
    ) -> None:
        """`axes` is the number of position axes of the model (1, or 3 for M-RoPE); `marks_long`: it has long rope;
        `stretched_from`, `media_both_ways`: see `Model`; `num_tables`: block tables of a sequence; `has_states`: layers
        keep some. With `staging` arrays go to the device together: `send`. `spare`: where padding writes."""
        self._staging = staging
        self._spare = spare or Spare(0, 0)
        self.pads_to: Callable[[list[Sequence]], int | None] = lambda decodes: None  # how many rows they get
        self._has_states = has_states
        self._marks_long = marks_long
        self._media_both_ways = media_both_ways
        self._stretched_from = stretched_from
        self._block_size = block_size
        self._axes = axes
        self._tables = TableRows(num_tables, max_num_seqs, max_blocks, staging)
        self._longest = max_blocks * block_size
        self._has_cache = max_blocks > 0
        self._every = torch.arange(max(max_num_seqs, MAX_DECODES) + 1, dtype=torch.int32, device=device)
        self._decoding: _Decoding | None = None  # of the last step, if it had only decodes

    def build(self, plan: Plan) -> Batch:
        if plan.chunks:
            self._begin()
            self._decoding = None
            return self._mixed(plan)
        batch = self._decodes_only(plan.decodes, 0)
        self.add_tokens(batch)
        return batch

    def prepare(self, decodes: list[Sequence]) -> Batch:
        """The step after one that gives each of the sequences a token, without these tokens: `add_tokens` adds them.
        They must have their blocks."""
        return self._decodes_only(decodes, 1)

    def add_tokens(self, batch: Batch) -> None:
        """The last token of each sequence to a batch of decodes, and its state."""
        size = batch.padded or len(batch.sequences)
        token_ids = np.array([seq.last_token for seq in batch.sequences], np.int64)
        batch.inputs.token_ids = self._tensor(_padded(token_ids, size, 0))
        batch.inputs.context.segments = self._segments(batch.sequences, len(batch.sequences), size)

    def blank(self, size: int) -> StepInput:
        """A step of `size` decodes of nobody: the places that steps padded to it have, and lists that do for all of
        them. It is on the device."""
        batch = self._decodes_only([], 0, size)
        self.add_tokens(batch)
        self.send()
        inputs = batch.inputs
        lengths = [self._longest] * size if self._every.device.type == "cpu" else Unknown(size)
        for context in (inputs.context, *inputs.context.others):
            context.query_lens, context.context_lens, context.num_decodes = [1] * size, lengths, size
        return inputs

    def send(self) -> None:
        """What a step needs to the device, where it is another one, in one copy."""
        if self._staging is not None:
            self._tables.put_news()
            self._staging.send()
            self._tables.take_news()

    def gather_tables(self, inputs: StepInput) -> None:
        """The block tables of a step's sequences, from those that the device has."""
        if inputs.table_rows is not None:
            context = inputs.context
            tables = self._tables.gathered(inputs.table_rows)
            for one, table in zip((context, *context.others), tables, strict=True):
                one.block_tables = table

    def _begin(self) -> None:
        if self._staging is not None:
            self._staging.begin()

    def _decodes_only(self, decodes: list[Sequence], more: int, padded: int | None = None) -> Batch:
        """A step that computes the last token of each sequence, once it has so many `more` than now."""
        self._begin()
        padded = padded or self.pads_to(decodes)
        size = padded or len(decodes)
        same = self._decoding
        is_new = same is None or same.sequences != decodes
        if same is None or is_new:
            same = self._decoding = _Decoding.of(decodes)
        lens = [seq.num_tokens + more for seq in decodes]
        lengths = np.array(lens, np.int64)
        computed = lengths - 1
        blocks, offsets = np.divmod(computed, self._block_size)
        if is_new or not offsets.all():
            self._update_tables(same, [0] * len(decodes) if is_new else offsets.tolist(), max(lens, default=1))
        places = np.multiply(self._tables.host[:, same.slots, blocks], self._block_size, dtype=np.int64)
        places += offsets
        places = _padded(places, size, self._spare.block * self._block_size)
        context = AttentionContext(
            same.ones,
            lens,
            len(decodes),
            self._block_size,
            same.starts_of(self._every, size),
            self._tensor(_padded(lengths.astype(np.int32), size, 0)),
            same.tables[0],
            self._tensor(places[0]),
            self._long_context(decodes, same.ones, size),
            self._rope_lengths(decodes, lengths, np.ones_like(lengths), size),
        )
        self._add_tables(context, same.tables, places)
        positions = self._tensor(_whole_or_single(_padded(computed + same.deltas, size, 0)))
        inputs = StepInput(NO_TOKENS, positions, context, table_rows=self._table_rows(_padded(same.slots, size, 0)))
        return Batch(inputs, decodes, same.starts, decodes, padded=padded)

    def _update_tables(self, same: _Decoding, offsets: list[int], longest: int) -> None:
        """Those of sequences whose next token is the first one of a block."""
        for seq, offset in zip(same.sequences, offsets, strict=True):
            if not offset:
                self._tables.follow(seq)
        same.tables = self._block_tables(same.slots, longest)

    def _table_rows(self, slots: Ints) -> Tensor | None:
        return None if self._staging is None or not self._has_cache else self._tensor(slots)

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
            self._table_rows(np.array([seq.slot for seq in sequences], np.int64)),
        )
        return Batch(inputs, sequences, starts, sampled, drafts, ahead)

    def _context(self, sequences: list[Sequence], num_decodes: int, lengths: Ints, counts: Ints) -> AttentionContext:
        slots = np.array([seq.slot for seq in sequences], np.int64)
        for seq in sequences if self._has_cache else ():
            self._tables.follow(seq)
        tables = self._block_tables(slots, int(lengths.max()))
        query_lens = counts.tolist()
        places = self._cache_places(slots, lengths, counts)
        context = AttentionContext(
            query_lens,
            lengths.tolist(),
            num_decodes,
            self._block_size,
            self._tensor(np.concatenate(([0], counts.cumsum())).astype(np.int32)),
            self._tensor(lengths.astype(np.int32)),
            tables[0],
            self._tensor(places[0]),
            self._long_context(sequences, query_lens),
            self._rope_lengths(sequences, lengths, counts),
            visible=self._visible(sequences, lengths, counts),
            segments=self._segments(sequences, num_decodes, 0),
        )
        self._add_tables(context, tables, places)
        return context

    def _segments(self, sequences: list[Sequence], num_decodes: int, size: int) -> Segments | None:
        """Of at least `size` runs: those added change a state that nobody has."""
        if not self._has_states:
            return None
        lengths, slots = segments_of(sequences)
        missing = max(size - len(lengths), 0)
        if missing:
            lengths += [1] * missing
            slots = np.concatenate([slots, np.array([[0], [self._spare.state]]).repeat(missing, 1)], 1)
        sources, targets = self._tensor(slots)
        return Segments(lengths, num_decodes + missing, sources, targets)

    def _add_tables(self, context: AttentionContext, tables: list[Tensor], places: Ints) -> None:
        """Of a sequence's tables those beside the first, with the places of its tokens in their blocks."""
        for blocks, places_there in zip(tables[1:], places[1:], strict=True):
            slots = self._tensor(places_there)
            context.others.append(replace(context, block_tables=blocks, slots=slots, others=[]))

    def _cache_places(self, slots: Ints, lengths: Ints, counts: Ints) -> Ints:
        """Where each token's keys and values go: block * block_size + offset. [tables, tokens]"""
        ends = counts.cumsum()
        if not self._has_cache:
            return np.zeros((1, ends[-1]), np.int64)
        places = _places(lengths, counts)
        blocks = self._tables.host[:, np.repeat(slots, counts), places // self._block_size].astype(np.int64)
        return np.ascontiguousarray(blocks * self._block_size + places % self._block_size)

    def _block_tables(self, slots: Ints, longest: int) -> list[Tensor]:
        """int32 [seqs, most blocks] of each table; none yet where the device gathers them."""
        if not self._has_cache:
            return [self._tensor(np.zeros((len(slots), 1), np.int32))]
        if self._staging is not None:
            return [NO_TABLES] * len(self._tables.host)
        return [self._tensor(table) for table in self._tables.of(slots, -(-longest // self._block_size))]

    def _long_context(self, sequences: list[Sequence], query_lens: list[int], size: int = 0) -> Tensor | None:
        if not self._marks_long:
            return None
        marks = np.repeat(np.array([seq.is_long for seq in sequences], np.bool_), query_lens)
        return self._tensor(_padded(marks, max(size, len(marks)), False))

    def _rope_lengths(self, sequences: list[Sequence], lengths: Ints, counts: Ints, size: int = 0) -> Tensor | None:
        """Of each token, the length that its frequencies are made for: the prompt's, or what ends with the token."""
        if self._stretched_from is None:
            return None
        prompts = np.array([seq.num_prompt for seq in sequences], np.int64)
        if np.maximum(prompts, lengths).max(initial=0) <= self._stretched_from:
            return None
        found = np.maximum(np.repeat(prompts, counts), _places(lengths, counts) + 1)
        return self._tensor(_padded(found, max(size, len(found)), 1))

    def _visible(self, sequences: list[Sequence], lengths: Ints, counts: Ints) -> Tensor | None:
        """Of each token how many keys it sees: all of its media span, up to itself elsewhere and in audio. None without
        media. int32 [tokens]"""
        if not self._media_both_ways or not any(seq.item_keys for seq in sequences):
            return None
        seen = _places(lengths, counts) + 1
        ends = counts.cumsum()
        for seq, start, count in zip(sequences, (ends - counts).tolist(), counts.tolist(), strict=True):
            shift, media = start - seq.num_computed, seq.request.prompt.media
            for span in spans_within(seq, seq.num_computed, seq.num_computed + count):
                if media[span.item].kind == "audio":
                    continue
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

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array) if self._staging is None else self._staging.put(array)


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


def _padded(array: NDArray[Number], size: int, value: int) -> NDArray[Number]:
    """[.., n] -> [.., size]"""
    missing = size - array.shape[-1]
    if not missing:
        return array
    return np.concatenate([array, np.full((*array.shape[:-1], missing), value, array.dtype)], -1)


def _joined(pieces: list[Positions], axes: int) -> Positions:
    """Positions of all sequences: one axis if that says everything, else all."""
    if all(piece.ndim == 1 for piece in pieces):
        return _whole_or_single(np.concatenate(pieces))
    wide = [np.broadcast_to(piece, (axes, piece.shape[-1])) for piece in pieces]
    return _whole_or_single(np.concatenate(wide, axis=1))


def _whole_or_single(positions: Positions) -> Positions:
    """int64, or float32 where any of them may be no whole number: it holds all that a context has."""
    return positions.astype(np.float32 if positions.dtype.kind == "f" else np.int64, copy=False)


def _media_slices(seq: Sequence, first: int, last: int, shift: int) -> list[MediaSlice]:
    """Tower outputs for tokens [first, last) of a sequence, which stand in the batch at token + shift."""
    out = []
    for span in spans_within(seq, first, last):
        start, end = max(first, span.offset), min(last, span.offset + span.length)
        out.append(MediaSlice(start + shift, end + shift, seq.item_keys[span.item], span.row + start - span.offset))
    return out
