"""What a model can do: the one table of tasks, and what --task leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sensorium.types import PoolingTask

Task = PoolingTask | Literal["generate"]
TASKS: Mapping[str, str] = {
    "generate": "generate text (/v1/chat/completions, /v1/completions)",
    "embed": "embed (/v1/embeddings, /score, /rerank)",
    "token_embed": "embed tokens (/pooling)",
    "classify": "classify (/classify)",
    "token_classify": "classify tokens (/pooling)",
    "score": "score (/score, /rerank)",
}
"""Each task in the words that clients are told."""

TASKS_OF_FLAG: Mapping[str, tuple[Task, ...]] = {
    "generate": ("generate",),
    "embed": ("embed", "token_embed"),
    "classify": ("classify", "token_classify"),
    "reward": ("token_classify", "classify"),
    "score": ("score",),
    "pooling": ("classify", "token_classify", "score", "embed", "token_embed"),
    "auto": ("generate", "classify", "token_classify", "score", "embed", "token_embed"),
}
"""What --task leaves of what the model can do; the first that pools is what /pooling does if it is not told."""
