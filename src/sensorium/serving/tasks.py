"""What a model can do: the one table of tasks, and what --task leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sensorium.types import PoolingTask

Task = PoolingTask | Literal["generate", "transcribe"]
TASKS: Mapping[str, str] = {
    "generate": "generate text (/v1/chat/completions, /v1/completions)",
    "transcribe": "transcribe recordings (/v1/audio/transcriptions, /v1/audio/translations)",
    "embed": "embed (/v1/embeddings, /score, /rerank)",
    "token_embed": "embed tokens (/pooling)",
    "sparse": "embed sparsely (/pooling, /embed_sparse)",
    "classify": "classify (/classify)",
    "token_classify": "classify tokens (/pooling)",
    "score": "score (/score, /rerank)",
}
"""Each task in the words that clients are told."""


def task_text(task: str, *, compares: bool) -> str:
    """The same; `compares`: whether vectors were made to be compared. Without that nothing is scored by them."""
    return "embed (/v1/embeddings)" if task == "embed" and not compares else TASKS[task]


@dataclass(frozen=True, slots=True)
class TaskFlag:
    """A value of --task: what it leaves of what the model can do, and the families (a `Family.tasks`) that may have it.

    Whether one model of a family can, is known when it is loaded. The first of `tasks` that pools is what /pooling does
    if it is not told.
    """

    tasks: tuple[Task, ...]
    families: tuple[str, ...]


TASK_FLAGS: Mapping[str, TaskFlag] = {
    "generate": TaskFlag(("generate", "transcribe"), ("generate", "transcribe")),
    "embed": TaskFlag(("embed", "token_embed", "sparse", "token_classify"), ("embed", "token_embed")),
    "classify": TaskFlag(("classify", "token_classify"), ("classify", "token_classify")),
    "reward": TaskFlag(("token_classify", "classify"), ("reward", "classify", "token_classify")),
    "score": TaskFlag(("score",), ("score", "classify", "embed", "token_embed")),
    "pooling": TaskFlag(
        ("classify", "score", "embed", "token_embed", "sparse", "token_classify"),
        ("embed", "token_embed", "classify", "token_classify", "reward", "score"),
    ),
    "auto": TaskFlag(
        ("generate", "transcribe", "classify", "score", "embed", "token_embed", "sparse", "token_classify"),
        ("generate", "transcribe", "embed", "token_embed", "classify", "token_classify", "reward", "score"),
    ),
}
