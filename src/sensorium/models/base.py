"""The contract of a model file: what the runner calls, and what a family declares.

A model is an `nn.Module` built on the meta device from a `Checkpoint`; `weights.load_model` streams tensors into it
through `weight_map`. Model code sees one flattened batch: `[tokens, hidden]` and an `AttentionContext`.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeAlias, TypeVar

from torch import Tensor, nn

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, NeededStates
from sensorium.models.cache import CacheGroup
from sensorium.parallel.ranks import Ranks
from sensorium.pooling.pooler import Pooler
from sensorium.types import Modality, PoolingTask

T = TypeVar("T")
Steps: TypeAlias = Generator[int, None, T]
"""A long computation that stops before each of its pieces and says how many multiply-adds the piece has, about; what it
returns is the result."""


@dataclass(frozen=True, slots=True)
class Rename:
    """One row of a weight map: checkpoint key pattern -> module parameter.

    `{n}`-style fields match one path component (a number) and may be repeated in `target`. `shard` places the tensor in
    a slice of a merged parameter ("q", "k", "v", "gate", "up" of `layers`); "up+gate" cuts it into equal parts for two,
    and of "gate|up" the rows take turns.
    With "[*]" in `target` the tensor holds such a parameter for each number there, along one more dimension in front,
    whose matrices have their inputs first or not, or are as they fit (None).
    """

    source: str
    target: str
    shard: str | None = None
    inputs_first: bool | None = False


def finished(steps: Steps[T]) -> T:
    """The result of a computation that nobody interrupts."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Model(nn.Module):
    """Base of all served models."""

    modalities: ClassVar[frozenset[Modality]] = frozenset()
    weight_prefixes: ClassVar[Mapping[str, str]] = {}  # literal prefix renames, first match wins
    weight_map: ClassVar[tuple[Rename, ...]] = ()  # after the prefixes, first match wins; other keys keep their names
    quantizable: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes of the parameters that `--quantization` covers; towers and projectors need `--quantize-towers` too."""
    ignored: tuple[str, ...] = ()  # suffixes or prefixes of keys (stored or renamed) that may be there and are not used

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.tied: dict[str, str] = {}  # parameter that has no memory of its own -> the one that it shares
        self.elsewhere: list[nn.Module] = []  # whose weights other ranks have, and this one has not

    long_context_from: int | None = None
    """LongRoPE: sequences longer than this use other frequencies *for all their tokens*. The engine decides once per
    sequence, marks its tokens in `AttentionContext.long_context`, never shares cache blocks between the two kinds, and
    recomputes a sequence from its start if it grows past the border."""

    stretched_from: int | None = None
    """Dynamic rope: beyond so many tokens, frequencies depend on the length of the sequence. `rope_lengths` says it of
    every token: a prompt's tokens take the prompt's length, each later token the length up to itself, whatever the
    chunks. Cache blocks are never shared between prompts of different lengths beyond the border."""

    media_both_ways: bool = False
    """Tokens of an image or frame see all of it: the engine computes an item's span whole, in one step, and says in
    `AttentionContext.visible` how far each token sees."""

    deepstack: int = 0
    """Slices of the hidden size that a row of the tower has behind the token's embedding: the k-th is added to the
    token's state behind layer k, by way of `AttentionContext.layer_rows`."""

    row_size: int = 0
    """Numbers in a row of a tower, where the checkpoint has no decoder whose hidden states they become."""

    partial_states: ClassVar[NeededStates] = "all"
    """What `AttentionContext.needed_states` may say beside "all": `forward` then computes the hidden states of these
    tokens only, and the others are undefined."""

    generates: bool = False  # whether it has a language head
    task: ClassVar[str] = "generate"  # what generating is called: "transcribe" of models that do not chat
    poolers: Mapping[PoolingTask, Pooler] = MappingProxyType({})  # what it can do besides, set by the constructor

    def forget_kernels(self) -> None:
        """Others compute from now on: make anew what was made of the ones before."""
        for module in self.modules():
            for name in list(vars(module)):
                if isinstance(getattr(type(module), name, None), functools.cached_property):
                    delattr(module, name)

    def split(self, ranks: Ranks) -> None:
        """Have one rank's part of the model, before its weights are there. Sizes are those that `check_ranks` takes."""
        raise CheckpointError(f"{self.checkpoint.architecture} is not split over ranks")

    def cache_groups(self) -> list[CacheGroup]:
        """What the engine is to keep of the tokens of a sequence; nothing where a prompt is computed whole."""
        return []

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Token ids int64 [tokens] -> [tokens, hidden]. Placeholder ids outside the table are looked up as 0.

        `token_types` int64 [tokens] are the segments of BERT's pairs; None where no prompt of the step has any."""
        raise NotImplementedError

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """Tower: the arrays of each item's MediaFeatures -> rows [num_rows, hidden] per item, in one batch and piece
        by piece, so that other work can be done between them. With `deepstack` rows are wider."""
        raise NotImplementedError

    def encode(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The same without a break."""
        return finished(self.encoding(kind, items))

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        """Embeddings [tokens, hidden], positions int64 [tokens] or [axes, tokens] -> hidden states [tokens, hidden]
        after the last norm. `hidden` may be written over."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> float32 or model dtype [n, vocab]."""
        raise NotImplementedError

    def activation_bytes(self, tokens: int) -> int:
        """Upper bound of the memory that a step of `tokens` tokens takes beside weights and cache."""
        raise NotImplementedError
