"""One model of the catalogue: its names, where it comes from, what state it is in and who uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Literal, Protocol

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import ModelNotFoundError, UnavailableError
from sensorium.serving.adapters import AdapterTable, ServedAdapter
from sensorium.serving.model import ServedModel
from sensorium.serving.tasks import TASK_FLAGS

if TYPE_CHECKING:
    from sensorium.ipc.client import EngineClient

ModelState = Literal["unloaded", "loading", "ready", "unloading", "restarting", "draining", "failed"]
Progress = Callable[[str, float], None]

LATEST = ":latest"
USED_LATELY_S = 0.3  # between requests of one client, one after the other
MOST_STAY_S = 30.0
RETRY_S = 10.0
"""After a load that failed, until it is tried again."""
_UNAVAILABLE: dict[ModelState, tuple[str, float]] = {
    "unloaded": ("The model is not loaded.", 2.0),
    "loading": ("The model is still loading.", 2.0),
    "unloading": ("The model is being unloaded.", 2.0),
    "restarting": ("The engine is being restarted.", 5.0),
    "draining": ("The server is shutting down.", 10.0),
    "failed": ("The engine was lost and could not be started again.", 5.0),
}
"""What a client is told, and after how many seconds to come again."""


def spellings(name: str) -> tuple[str, str, str]:
    """With or without Ollama's `:latest`."""
    return name, name.removesuffix(LATEST), f"{name}{LATEST}"


@dataclass(frozen=True, slots=True)
class Keeping:
    """When a model is loaded, and when its memory is given back."""

    lazy: bool = False  # at its first request, not when the server starts
    pinned: bool = False  # never unloaded
    idle_unload_s: float | None = None  # unloaded after so many seconds without a request

    @property
    def comes_and_goes(self) -> bool:
        """Whether clients may say how long it stays (Ollama's `keep_alive`)."""
        return not self.pinned and (self.lazy or self.idle_unload_s is not None)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a model that is not loaded. `engine_bytes` is what its engine may take."""

    checkpoint: Checkpoint
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]  # beside text
    max_model_len: int
    weight_bytes: int = 0
    engine_bytes: int = 0
    cache_bytes: int = 0  # of that the KV cache

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, task: str, *, weight_bytes: int, engine_bytes: int, cache_bytes: int = 0
    ) -> Outline:
        """`task` is --task. What a family can, its models can; one may turn out to do more or less."""
        family = checkpoint.family
        can = {"token_classify" if one == "reward" else one for one in family.tasks}
        return cls(
            checkpoint,
            tuple(one for one in TASK_FLAGS[task].tasks if one in can),
            tuple(sorted(family.modalities)),
            checkpoint.max_model_len,
            weight_bytes,
            engine_bytes,
            cache_bytes,
        )


class Source(Protocol):
    """Where a model comes from, as often as it is loaded."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def outline(self) -> Outline | None:
        """What its files say, if they are on this machine."""

    async def find(self, on_progress: Progress) -> Outline:
        """The same, after fetching what is missing. StartupError if there is no such model."""

    def open(self, on_progress: Progress) -> AbstractAsyncContextManager[ServedModel]:
        """The model, whose engine may still be loading; its memory is given back at the end of the block."""


class CatalogEntry:
    """`names` are all that clients may use; the first is shown. `users` have acquired it, `waiting` want to."""

    def __init__(
        self,
        names: tuple[str, ...],
        source: Source | None = None,
        keeping: Keeping | None = None,
        *,
        served: ServedModel | None = None,
        adapters: AdapterTable | None = None,
    ) -> None:
        """Either from a source, or `served` for as long as the server runs."""
        self.adapters = adapters or AdapterTable()
        self.names = names
        self.source = source
        self.keeping = keeping or Keeping(pinned=source is None)
        self.served = served
        self.created = int(time.time())
        self.users = self.waiting = 0
        self.used_s = self.loaded_s = self.failed_s = 0.0  # monotonic
        self.load_s = 0.0  # how long it took
        self.idle_s = self.keeping.idle_unload_s
        self.progress: tuple[str, float] = ("", 0.0)
        self.failure = ""
        self.reserved_bytes = 0  # for its engine, without adapters
        self.stage: Literal["loading", "unloading"] | None = None
        self.is_draining = False
        self.is_leaving = False  # takes nobody in, so that it can be unloaded
        self.stack = AsyncExitStack()
        self.outline = source.outline if source is not None else _outline_of(served)
        """What is known of it, loaded or not; None before a repository's files are there."""

    @property
    def taken_bytes(self) -> int:
        """Of the memory that all models share."""
        return self.reserved_bytes + self.adapters.nbytes if self.reserved_bytes else 0

    @property
    def name(self) -> str:
        return self.names[0]

    def adapter_of(self, name: str | None) -> ServedAdapter | None:
        """The adapter of that name, which `Catalog.find` has found here, or None if it is the model's own.
        ModelNotFoundError if it is gone meanwhile."""
        found = None
        if name and not any(one in self.names for one in spellings(name)):
            found = next(filter(None, map(self.adapters.find, spellings(name))), None)
            if found is None:
                raise ModelNotFoundError(f"The adapter {name!r} is not there any more.", param="model")
        return found

    @property
    def state(self) -> ModelState:
        if self.is_draining:
            return "draining"
        if self.stage is not None:
            return self.stage
        if self.served is None:
            return "failed" if self.failure else "unloaded"
        state = self.served.client.state
        return "failed" if state == "closed" else state

    @property
    def is_usable(self) -> bool:
        return self.state == "ready" and not self.is_leaving

    @property
    def model(self) -> ServedModel:
        """UnavailableError while there is none."""
        if self.served is None:
            self.check_ready()
            raise UnavailableError(_UNAVAILABLE["unloaded"][0])
        return self.served

    @property
    def client(self) -> EngineClient | None:
        """Of its engine, while it has one."""
        return None if self.served is None else self.served.client

    @property
    def checkpoint(self) -> Checkpoint | None:
        if self.served is not None:
            return self.served.checkpoint
        return None if self.outline is None else self.outline.checkpoint

    @property
    def tasks(self) -> tuple[str, ...]:
        served = () if self.served is None else self.served.tasks
        return served or (() if self.outline is None else self.outline.tasks)

    @property
    def modalities(self) -> tuple[str, ...]:
        if self.served is not None:
            return tuple(sorted(self.served.processor.modalities))
        return () if self.outline is None else self.outline.modalities

    @property
    def max_model_len(self) -> int | None:
        if self.served is not None:
            return self.served.max_model_len
        return None if self.outline is None else self.outline.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self.model.client.config.max_num_seqs if self.source is None else self.source.max_num_seqs

    @property
    def reason(self) -> str:
        """Why it does not answer, for clients. Empty if it does."""
        state = self.state
        if state == "ready":
            return ""
        if state == "failed" and self.failure:
            return f"The model {self.name!r} cannot be loaded: {self.failure}"
        phase, fraction = self.progress
        if state == "loading" and phase:
            return f"The model is still loading ({phase}, {fraction:.0%})."
        return _UNAVAILABLE[state][0]

    def check_ready(self) -> None:
        """UnavailableError unless the model answers."""
        if self.state != "ready":
            raise UnavailableError(self.reason, retry_after_s=_UNAVAILABLE[self.state][1])

    def check_hopeful(self) -> None:
        """UnavailableError if waiting is of no use: a load has just failed, or the server stops."""
        if self.is_draining or (self.state == "failed" and not self.may_try):
            raise UnavailableError(self.reason, retry_after_s=RETRY_S)

    @property
    def may_try(self) -> bool:
        return monotonic() - self.failed_s >= RETRY_S

    def stays_s(self) -> float:
        """How long it stays at least, whoever wants its memory: as long as loading it took, while it is used."""
        now = monotonic()
        if not self.users and now - max(self.used_s, self.loaded_s) > USED_LATELY_S:
            return 0.0
        return max(self.loaded_s + min(self.load_s, MOST_STAY_S) - now, 0.0)

    def learn(self) -> None:
        """Keep what is known now that it is loaded, for when it is not."""
        served, outline = self.served, self.outline
        if served is not None and outline is not None and served.tasks:
            self.outline = replace(outline, tasks=tuple(served.tasks), modalities=self.modalities)

    async def close(self) -> None:
        """Give back what it takes."""
        self.learn()
        stack, self.stack = self.stack, AsyncExitStack()
        self.served = None
        try:
            await stack.aclose()
        finally:
            self.reserved_bytes = 0


def _outline_of(served: ServedModel | None) -> Outline | None:
    return None if served is None else Outline.of(served.checkpoint, served.task, weight_bytes=0, engine_bytes=0)
