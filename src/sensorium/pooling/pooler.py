"""What turns a sequence's hidden states into the answer of a pooling task. One object per task, held by the model.

The engine collects the states of a sequence over its prefill chunks (only the last token's where `all_tokens` is
false) and calls the pooler once. Results are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sensorium.checkpoint.pooling import PoolingKind
from sensorium.pooling.pool import ACTIVATIONS, finish, pool
from sensorium.types import PoolingParams

Head = Callable[[Tensor], Tensor]


class Pooler(Protocol):
    @property
    def all_tokens(self) -> bool:
        """Whether it needs every token's state, which also rules out reading the sequence from the prefix cache."""
        ...

    @property
    def first_only(self) -> bool:
        """Whether it reads the first token's state and no other."""
        ...

    @property
    def size(self) -> int:
        """Numbers per vector."""
        ...

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        """[tokens, hidden], or [1, hidden] of the last token -> float32 [size] or, per token, [tokens, size]"""
        ...


class EmbedPooler:
    """Pooled, through the dense layers that the checkpoint brings, cut to `dimensions`, normalised."""

    def __init__(self, kinds: tuple[PoolingKind, ...], size: int, *, normalize: bool, head: Head | None = None) -> None:
        self.kinds = kinds
        self.size = size
        self.normalize = normalize
        self.head = head
        self.all_tokens = kinds != ("last",)
        self.first_only = kinds == ("cls",)

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        vector = pool(hidden, self.kinds, params.prompt_tokens)
        if self.head is not None:
            vector = self.head(vector.unsqueeze(0)).squeeze(0).float()
        normalize = self.normalize if params.normalize is None else params.normalize
        return finish(vector, params.dimensions, normalize)


class TokenPooler:
    """Every token's classes, or whatever else a head makes of its state. The first `skip` and the last `skip_last`
    tokens have none."""

    all_tokens = True
    first_only = False

    def __init__(
        self, size: int, *, head: Head, activation: str = "identity", skip: int = 0, skip_last: int = 0
    ) -> None:
        self.size = size
        self.head = head
        self.activation = ACTIVATIONS[activation]
        self.skip, self.skip_last = skip, skip_last

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        logits = self.head(hidden[self.skip : len(hidden) - self.skip_last]).float()
        return logits if params.activation is False else self.activation(logits)


class VectorsPooler:
    """Every token's vector: its state, or what a head makes of it, normalised. The first `skip` tokens have none."""

    all_tokens = True
    first_only = False

    def __init__(self, size: int, *, normalize: bool, head: Head | None = None, skip: int = 0) -> None:
        self.size = size
        self.normalize = normalize
        self.head = head
        self.skip = skip

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        vectors = hidden[self.skip :] if self.head is None else self.head(hidden[self.skip :])
        normalize = self.normalize if params.normalize is None else params.normalize
        return functional.normalize(vectors.float(), dim=-1) if normalize else vectors.float()


class SparsePooler:
    """The words of a text with a weight each (BGE-M3): the head's largest number at any of a word's tokens, of those
    above 0. `dropped` are ids that are no words."""

    all_tokens = True
    first_only = False
    size = 2

    def __init__(self, head: Head, dropped: Sequence[int]) -> None:
        self.head = head
        self.dropped = np.array(dropped, np.int32)

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        """[tokens, hidden] -> [words, 2]: (token id, weight), by id"""
        words, places = np.unique(token_ids, return_inverse=True)
        largest = hidden.new_zeros(len(words), dtype=torch.float32)
        index = torch.from_numpy(places).to(hidden.device)
        largest = largest.scatter_reduce(0, index, self.head(hidden).float().squeeze(-1), "amax")
        kept = (largest > 0) & ~torch.from_numpy(np.isin(words, self.dropped)).to(hidden.device)
        return torch.stack([torch.from_numpy(words).to(largest), largest], 1)[kept]


class ClassifyPooler:
    """One token's state through a head: logits, and probabilities if asked for."""

    def __init__(self, kind: PoolingKind, head: Head, size: int, activation: str) -> None:
        self.kind = kind
        self.head = head
        self.size = size
        self.activation = ACTIVATIONS[activation]
        self.all_tokens = kind != "last"
        self.first_only = kind == "cls"

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        state = pool(hidden, (self.kind,)).to(hidden.dtype)
        logits = self.head(state.unsqueeze(0)).squeeze(0).float()
        return logits if params.activation is False else self.activation(logits)


class StepPooler:
    """Probabilities at every token that ends a step of reasoning (process reward models)."""

    all_tokens = True
    first_only = False

    def __init__(self, head: Head, size: int, step_token_id: int) -> None:
        self.head = head
        self.size = size
        self.step_token_id = step_token_id

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        """[tokens, hidden] -> [steps, size]"""
        logits = self.head(hidden[torch.from_numpy(token_ids == self.step_token_id)]).float()
        return logits if params.activation is False else logits.softmax(-1)
