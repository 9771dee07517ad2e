"""What turns a sequence's hidden states into the answer of a pooling task. One object per task, held by the model.

The engine collects the states of a sequence over its prefill chunks (only the last token's where `all_tokens` is
false) and calls the pooler once. Results are float32.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Every token's vector: the states themselves (normalised), or a head's classes of each."""

    all_tokens = True
    first_only = False

    def __init__(
        self, size: int, *, normalize: bool = False, head: Head | None = None, activation: str = "identity"
    ) -> None:
        self.size = size
        self.normalize = normalize
        self.head = head
        self.activation = ACTIVATIONS[activation]

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        if self.head is not None:
            logits = self.head(hidden).float()
            return logits if params.activation is False else self.activation(logits)
        vectors = hidden.float()
        normalize = self.normalize if params.normalize is None else params.normalize
        return functional.normalize(vectors, dim=-1) if normalize else vectors


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
