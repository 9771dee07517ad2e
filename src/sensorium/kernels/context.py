"""How a step's tokens belong to sequences and to cache blocks: what attention kernels are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class LayerCache(NamedTuple):
    """What one layer keeps: each [num_blocks, kv_heads, block_size, head_dim], with the heads of the layer's group."""

    keys: Tensor
    values: Tensor
    table: int = 0  # of a sequence's block tables, the one that says which blocks are the layer's


class StateCache(NamedTuple):
    """What one layer keeps in place of keys and values: a state of fixed size, each part [slots, ...], the state of a
    sequence after one of its tokens in one slot. Slot 0 holds zeros: the state before any token."""

    parts: tuple[Tensor, ...]


KVCache = list[LayerCache | StateCache]


NeededStates = Literal["all", "first", "last"]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """What is added to the states of some tokens behind a decoder's first layers: `values[:, k]` behind layer k."""

    tokens: Tensor  # int64 [n], places in the step
    values: Tensor  # [n, layers, hidden]


class Additions(Protocol):
    """What adapters of some of a step's tokens add to linear layers (`models.adapters`)."""

    def add(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        """To `out` = module(x) of all tokens of the step, in place."""

    def rows(self) -> Mapping[int, Tensor | None]:
        """int64 [n], the tokens of each adapter by its number; None: all of them."""

    def moved(self, device: torch.device) -> Additions:
        """The same on a device."""


@dataclass(frozen=True, slots=True)
class Segments:
    """A step as layers with states see it: runs of consecutive tokens, each of one sequence. The state in slot
    `sources[i]` goes before run i, and what it then is goes to slot `targets[i]`, which no run of the step reads but
    later ones of the same sequence. So a step that failed can be repeated."""

    lengths: list[int]  # tokens of each run; they are the step's tokens in their order
    num_singles: int  # leading runs of one token each, of as many sequences
    sources: Tensor  # int64 [runs]
    targets: Tensor  # int64 [runs]


@dataclass(slots=True)
class AttentionContext:
    """How the tokens of a step belong to sequences and to cache blocks. Built by `engine.batch`, one per step.

    Sequences with exactly one query token that are decoding come first (`num_decodes` of them), then prefill chunks.
    The lists are the same numbers as the tensors, for host code.
    """

    query_lens: list[int]  # tokens of each sequence in this step
    context_lens: list[int]  # tokens of each sequence in the cache once this step is done (its own included)
    num_decodes: int
    block_size: int
    query_start: Tensor  # int32 [seqs + 1], cumulative query_lens
    seq_lens: Tensor  # int32 [seqs], context_lens
    block_tables: Tensor  # int32 [seqs, max_blocks], padded with 0
    slots: Tensor  # int64 [tokens], block * block_size + offset of each token's K and V
    long_context: Tensor | None = None  # bool [tokens], only for models with `long_context_from`; see there
    rope_lengths: Tensor | None = None  # int64 [tokens], only for models with `stretched_from`; see there
    memories: Sequence[Tensor] = ()  # of encoder-decoders: what each sequence's tokens attend to besides, by the model
    aligned: dict[int, list[Tensor]] = field(default_factory=dict)
    """Sequences whose attention to their memories is wanted -> per layer, float32 [heads, tokens, rows of memory]."""
    query_scales: Tensor | None = None  # [tokens, 1, 1], of queries whose positions say how large they are
    token_ids: Tensor | None = None  # int64 [tokens], for models whose inner layers look tokens up
    token_rows: Sequence[Tensor] | None = None  # of each layer [tokens, size], embeddings of its own
    visible: Tensor | None = None  # int32 [tokens], keys that each token may see; None: up to its own
    layer_rows: LayerRows | None = None  # only for models with `deepstack`; see there
    others: list[AttentionContext] = field(default_factory=list)  # the same step by the other block tables: 1, 2, …
    unseen: list[int] | None = None  # tokens at the end of each sequence that nobody attends to; encoders only
    adapters: Additions | None = None  # where any sequence has one
    segments: Segments | None = None  # only for models with states
    needed_states: NeededStates = "all"  # tokens whose states `forward` must compute: all, or one per sequence

    @property
    def runs(self) -> Segments:
        """`segments`, of layers that cannot do without."""
        if self.segments is None:
            raise ValueError("the batch does not say which states its tokens go on from")
        return self.segments

    def by_table(self, table: int) -> AttentionContext:
        """The step as the layers of a block table see it."""
        return self.others[table - 1] if table else self
